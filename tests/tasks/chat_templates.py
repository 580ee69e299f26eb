"""Chat templates in the forms of well-known models, with marks around what the assistant writes.

Each form has its special tokens, the template, and the text of ``CHAT`` as pairs: text without a
loss, and text with a loss. A system prompt is part of the chat only if the form takes one.
"""

from __future__ import annotations

import re
from typing import NamedTuple

SYSTEM = {"role": "system", "content": "Be brief"}
CHAT = [
    {"role": "user", "content": "Name a colour"},
    {"role": "assistant", "content": "Red is one"},
    {"role": "user", "content": "Two and three?"},
    {"role": "assistant", "content": "Five"},
]


class Form(NamedTuple):
    """A chat template and its rendering of ``CHAT``."""

    tokens: list[str]
    marked: str
    parts: list[tuple[str, str]]
    system: bool = True

    @property
    def plain(self) -> str:
        """The template without marks."""
        return re.sub(r"\{%-? (end)?generation -?%\}", "", self.marked)

    @property
    def chat(self) -> list[dict[str, str]]:
        return [SYSTEM, *CHAT] if self.system else CHAT


LOOP = "{%- for m in messages -%}"
CHATML = Form(
    ["<|im_start|>", "<|im_end|>"],
    LOOP + "{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' -%}{%- generation -%}{{ m.content + '<|im_end|>\n' }}"
    "{%- endgeneration -%}{%- else -%}{{ m.content + '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}",
    [
        (
            "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nName a colour<|im_end|>\n"
            "<|im_start|>assistant\n",
            "Red is one<|im_end|>\n",
        ),
        (
            "<|im_start|>user\nTwo and three?<|im_end|>\n<|im_start|>assistant\n",
            "Five<|im_end|>\n",
        ),
    ],
)
LLAMA3 = Form(
    ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "{{ bos_token }}" + LOOP + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{%- if m.role == 'assistant' -%}{%- generation -%}{{ m.content | trim + '<|eot_id|>' }}"
    "{%- endgeneration -%}{%- else -%}{{ m.content | trim + '<|eot_id|>' }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}",
    [
        (
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nName a colour<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "Red is one<|eot_id|>",
        ),
        (
            "<|start_header_id|>user<|end_header_id|>\n\nTwo and three?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "Five<|eot_id|>",
        ),
    ],
)
MISTRAL = Form(  # the system prompt moves to the last question, and nothing prompts generation
    ["[INST]", "[/INST]"],
    "{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content + '\n\n' -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set system = '' -%}"
    "{%- set loop_messages = messages -%}{%- endif -%}"
    "{%- set last = namespace(user=-1) -%}{%- for m in loop_messages -%}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('roles must alternate') }}{%- endif -%}"
    "{%- if m.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{{ bos_token }}{%- for m in loop_messages -%}{%- if m.role == 'user' -%}"
    "{{ '[INST] ' + (system if loop.index0 == last.user else '') + m.content + '[/INST]' }}"
    "{%- else -%}{%- generation -%}{{ ' ' + m.content + eos_token }}{%- endgeneration -%}"
    "{%- endif -%}{%- endfor -%}",
    [
        ("<s>[INST] Name a colour[/INST]", " Red is one</s>"),
        ("[INST] Be brief\n\nTwo and three?[/INST]", " Five</s>"),
    ],
)
GEMMA = Form(  # refuses system prompts, and has a role of another name
    ["<start_of_turn>", "<end_of_turn>"],
    "{{ bos_token }}{%- if messages[0].role == 'system' -%}"
    "{{ raise_exception('System role not supported') }}{%- endif -%}" + LOOP + ""
    "{%- if m.role == 'assistant' -%}{{ '<start_of_turn>model\n' }}{%- generation -%}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{%- endgeneration -%}{%- else -%}"
    "{{ '<start_of_turn>' + m.role + '\n' + m.content | trim + '<end_of_turn>\n' }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}",
    [
        (
            "<s><start_of_turn>user\nName a colour<end_of_turn>\n<start_of_turn>model\n",
            "Red is one<end_of_turn>\n",
        ),
        (
            "<start_of_turn>user\nTwo and three?<end_of_turn>\n<start_of_turn>model\n",
            "Five<end_of_turn>\n",
        ),
    ],
    system=False,
)
QWEN3 = Form(  # only turns after the last question keep their reasoning, empty if there is none
    ["<|im_start|>", "<|im_end|>"],
    "{%- set last = namespace(user=-1) -%}" + LOOP + "{%- if m.role == 'user' -%}"
    "{%- set last.user = loop.index0 -%}{%- endif -%}{%- endfor -%}" + LOOP + ""
    "{%- if m.role == 'assistant' -%}{{ '<|im_start|>assistant\n' }}{%- generation -%}"
    "{%- set content = m.content.split('</think>')[-1].lstrip('\n') -%}"
    "{%- set reasoning = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if '</think>' in m.content else '' -%}"
    "{%- if loop.index0 > last.user and (loop.last or reasoning) -%}"
    "{{ '<think>\n' + reasoning + '\n</think>\n\n' + content }}"
    "{%- else -%}{{ content }}{%- endif -%}{{ '<|im_end|>\n' }}{%- endgeneration -%}{%- else -%}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}",
    [
        (
            "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nName a colour<|im_end|>\n"
            "<|im_start|>assistant\n",
            "Red is one<|im_end|>\n",
        ),
        (
            "<|im_start|>user\nTwo and three?<|im_end|>\n<|im_start|>assistant\n",
            "<think>\n\n</think>\n\nFive<|im_end|>\n",
        ),
    ],
)
PHI3 = Form(  # the text ends with a token of its own if the assistant is not to continue
    ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    LOOP + "{{ '<|' + m.role + '|>\n' }}{%- if m.role == 'assistant' -%}{%- generation -%}"
    "{{ m.content + '<|end|>\n' }}{%- endgeneration -%}{%- else -%}{{ m.content + '<|end|>\n' }}"
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}"
    "{%- else -%}{%- generation -%}{{ eos_token }}{%- endgeneration -%}{%- endif -%}",
    [
        (
            "<|system|>\nBe brief<|end|>\n<|user|>\nName a colour<|end|>\n<|assistant|>\n",
            "Red is one<|end|>\n",
        ),
        ("<|user|>\nTwo and three?<|end|>\n<|assistant|>\n", "Five<|end|>\n</s>"),
    ],
)
ZEPHYR = Form(  # its headers are plain text
    [],
    LOOP + "{{ '<|' + m.role + '|>\n' }}{%- if m.role == 'assistant' -%}{%- generation -%}"
    "{{ m.content + eos_token }}{%- endgeneration -%}{{ '\n' }}{%- else -%}"
    "{{ m.content + eos_token + '\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}",
    [
        (
            "<|system|>\nBe brief</s>\n<|user|>\nName a colour</s>\n<|assistant|>\n",
            "Red is one</s>\n",
        ),
        ("<|user|>\nTwo and three?</s>\n<|assistant|>\n", "Five</s>\n"),
    ],
)
DEEPSEEK = Form(  # the generation prompt begins reasoning that chats do not have
    ["<｜User｜>", "<｜Assistant｜>"],
    "{{ bos_token }}" + LOOP + "{%- if m.role == 'system' -%}{{ m.content }}"
    "{%- elif m.role == 'user' -%}{{ '<｜User｜>' + m.content }}{%- else -%}"
    "{{ '<｜Assistant｜>' }}{%- generation -%}{{ m.content.split('</think>')[-1] + eos_token }}"
    "{%- endgeneration -%}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<｜Assistant｜><think>\n' }}{%- endif -%}",
    [
        ("<s>Be brief<｜User｜>Name a colour<｜Assistant｜>", "Red is one</s>"),
        ("<｜User｜>Two and three?<｜Assistant｜>", "Five</s>"),
    ],
)
TOOLS = Form(
    ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"],
    "{%- if tools -%}{{ '<|im_start|>system\n' }}{%- for tool in tools -%}{{ tool | tojson }}"
    "{%- endfor -%}{{ '<|im_end|>\n' }}{%- endif -%}" + LOOP + ""
    "{{ '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' -%}{%- generation -%}"
    "{{ m.content }}{%- for call in m.tool_calls -%}{{ '<tool_call>' }}"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
    "{{ '</tool_call>' }}{%- endfor -%}{{ '<|im_end|>\n' }}{%- endgeneration -%}{%- else -%}"
    "{{ m.content + '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}",
    [],
)
FORMS = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "qwen3": QWEN3,
    "phi3": PHI3,
    "zephyr": ZEPHYR,
    "deepseek": DEEPSEEK,
}
