"""Chat templates of well-known models, without and with marks around what the assistant writes.

Templates that TRL ships are read from its package: the model's own (``plain``), and the one that
TRL trains with in its place (``marked``). The others are the published ones; their marks stand
where TRL's stand in templates of the same form.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

SYSTEM = {"role": "system", "content": "Be brief"}
CHAT = [
    {"role": "user", "content": "Name a colour"},
    {"role": "assistant", "content": "Red is one"},
    {"role": "user", "content": "Two and three?"},
    {"role": "assistant", "content": "Five"},
]
_TOKENS = re.compile(r"<\|[^|<>]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_turn>")
_WORDS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
"""Tokens that are no special tokens."""
POSITIONS = 4096
"""Tokens that the model and the tokenizer take."""


class Form(NamedTuple):
    """A chat template. A chat may have a system prompt or tools only if the form takes them."""

    plain: str
    marked: str
    system: bool = True
    tools: bool = False
    special: bool = True
    """True if the tokenizer of the model has tokens for the markers of the template."""
    trl: bool = False
    """True if TRL replaces the plain template by the marked one."""

    def tokenizer(self, folder: Path) -> Any:
        """Return the tokenizer of a folder with the tokens and the plain template of this form."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        if self.special:
            tokenizer.add_tokens(sorted(set(_TOKENS.findall(self.plain))), special_tokens=True)
        tokenizer.add_tokens([word for word in _WORDS if word in self.plain])
        tokenizer.model_max_length = POSITIONS
        tokenizer.chat_template = self.plain
        return tokenizer

    @property
    def chat(self) -> list[dict[str, str]]:
        return [SYSTEM, *CHAT] if self.system else CHAT


def shipped(name: str, **options: bool) -> Form:
    """Return a form of TRL's package."""
    folder = files("trl") / "chat_templates"
    texts = [(folder / f"{name}{kind}.jinja").read_text("utf-8") for kind in ("", "_training")]
    return Form(*texts, trl=True, **options)


def published(plain: str, turn: str, marked: str, **options: bool) -> Form:
    """Return a form of a template in which ``turn`` writes what ``marked`` writes with marks."""
    assert plain.count(turn) == 1
    marked = marked.replace("<<", "{% generation %}").replace(">>", "{% endgeneration %}")
    return Form(plain, plain.replace(turn, marked), **options)


CHATML = published(  # SmolLM2
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
    "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}"
    "<<{{message['content'] + '<|im_end|>' + '\n'}}>>{% else %}"
    "{{message['content'] + '<|im_end|>' + '\n'}}{% endif %}",
)
MISTRAL = published(  # Mistral-7B-Instruct-v0.2
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation"
    " roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}",
    "{{ message['content'] + eos_token}}",
    "<<{{ message['content'] + eos_token}}>>",
    system=False,
    special=False,
)
MISTRAL_LATE = published(  # as later versions: the system prompt moves to the last question
    "{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content + '\n\n' -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set system = '' -%}"
    "{%- set loop_messages = messages -%}{%- endif -%}"
    "{%- set last = namespace(user=-1) -%}{%- for m in loop_messages -%}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('roles must alternate') }}{%- endif -%}"
    "{%- if m.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{{ bos_token }}{%- for m in loop_messages -%}{%- if m.role == 'user' -%}"
    "{{ '[INST] ' + (system if loop.index0 == last.user else '') + m.content + '[/INST]' }}"
    "{%- else -%}{{ ' ' + m.content + eos_token }}{%- endif -%}{%- endfor -%}",
    "{{ ' ' + m.content + eos_token }}",
    "<<{{ ' ' + m.content + eos_token }}>>",
    special=False,
)
ZEPHYR = published(  # zephyr-7b-beta
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}",
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}",
    "{{ '<|assistant|>\n' }}<<{{ message['content'] + eos_token }}>>{{ '' }}",
    special=False,
)
QWEN25 = shipped("qwen2_5", tools=True)
QWEN3 = shipped("qwen3", tools=True)
FORMS = {
    "chatml": CHATML,
    "llama3": shipped("llama3"),
    "mistral": MISTRAL,
    "mistral-late": MISTRAL_LATE,
    "gemma": shipped("gemma", system=False),
    "qwen2.5": QWEN25,
    "qwen3": QWEN3,
    "phi3": shipped("phi3"),
    "zephyr": ZEPHYR,
    "deepseek": shipped("deepseekv3", tools=True),
    "cohere": shipped("cohere"),
}
