"""Files beside an exported adapter that make other programs generate text as the run does.

generation_config.json   generation settings, which GenerationConfig.from_pretrained loads
tokenizer files          only for chats, if the recipe sets a chat template or a system prompt
                         (``carries_tokenizer``): the run's tokenizer, with both in its chat
                         template; AutoTokenizer loads it
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fedmerge_peft.models.pretrained import model_folder
from fedmerge_peft.models.quiet import quiet_transformers
from fedmerge_peft.tasks.chat_template import set_chat_template
from fedmerge_peft.tasks.generation import generation_options
from fedmerge_peft.tasks.in_memory import is_passed
from fedmerge_peft.tasks.tokenization import load_tokenizer

if TYPE_CHECKING:
    from fedmerge_peft.recipe.tasks import CompletionRecipe
    from fedmerge_peft.runs.directory import RunDirectory


def carries_tokenizer(run: RunDirectory) -> bool:
    """Return True if exports of a run include a tokenizer.

    They do if the examples are chats and the recipe sets a chat template or a system prompt. If a
    Python program passed the model, the export has neither the model nor its tokenizer.
    """
    task = run.recipe.task.to_complete()
    return (
        task is not None
        and run.task.get("format") == "messages"
        and (task.chat_template is not None or task.system_prompt is not None)
        and not is_passed(run.recipe.backbone.model)
    )


def usage_code(run: RunDirectory) -> str:
    """Return Python code that generates text, for model cards; empty if the task generates none."""
    task = run.recipe.task.to_complete()
    if task is None:
        return ""
    given = generation_options(task)
    if not task.do_sample:
        given = {key: value for key, value in given.items() if key not in _OF_SAMPLING}
    options = ", ".join(f"{key}={value!r}" for key, value in given.items())
    if task.stop_strings:
        options += ", tokenizer=tokenizer"
    return (_CHAT if run.task.get("format") == "messages" else _PROMPT) + _GENERATE.format(
        options=options
    )


_OF_SAMPLING = ("temperature", "top_p", "top_k")
_CHAT = """
messages = [{"role": "user", "content": "Hello"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)"""
_PROMPT = """
prompt = "Hello"  # formatted as in training
inputs = tokenizer(prompt, return_tensors="pt")"""
_GENERATE = """
output = model.generate(
    **inputs, {options}
)
answer = output[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""


def generation_writer(run: RunDirectory) -> Callable[[Path], None]:
    """Return a function that writes the files that this module describes to an existing folder.

    The function writes nothing if the task does not generate text.

    Raises:
        BackboneError: The tokenizer cannot be loaded.
    """
    task = run.recipe.task.to_complete()
    if task is None:
        return lambda folder: None
    from transformers import GenerationConfig

    with quiet_transformers():
        settings = GenerationConfig(**generation_options(task))
    tokenizer = _tokenizer(run, task) if carries_tokenizer(run) else None

    def write(folder: Path) -> None:
        settings.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    return write


def _tokenizer(run: RunDirectory, task: CompletionRecipe) -> Any:
    backbone = run.trusted_recipe.backbone
    with TemporaryDirectory(prefix="fedmerge-") as scratch, quiet_transformers():
        tokenizer, _ = load_tokenizer(backbone, model_folder(backbone, Path(scratch)))
    set_chat_template(tokenizer, task)
    return tokenizer
