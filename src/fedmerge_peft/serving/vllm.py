"""vLLM's rules for LoRA adapters, and the command that serves all clients of a run.

The rules follow vllm/lora/peft_helper.py and vllm/config/lora.py. The names of adapted modules
cannot be checked here: vLLM compares them with the names in its own model when it loads an adapter
(``check_unexpected_modules`` in vllm/lora/lora_model.py), and reports any mismatch.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from fedmerge_peft.adapters.peft_folder import highest_rank
from fedmerge_peft.errors import RunError
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.serving.generation_files import carries_tokenizer
from fedmerge_peft.tasks.in_memory import is_passed

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Valid values of vLLM's ``--max-lora-rank`` (``MaxLoRARanks`` in vllm/config/lora.py)."""
_GPU_ADAPTERS = 16
"""Limit on adapters in one batch of the server; each adapter reserves GPU memory."""

_SCRIPT = """#!/bin/sh
# Serves the adapters of all clients. The `model` of a request is the name of a client.
# Arguments are passed on to vLLM: sh serve.sh --port 8001
cd "$(dirname "$0")" || exit
exec vllm serve {base} \\
    {options} "$@" \\
    --lora-modules \\
    {modules}
"""


def vllm_support(run: RunDirectory) -> str:
    """Return one line: the vLLM options for the run's adapters, or the reasons against vLLM."""
    if unsupported := _reasons(run):
        return f"vLLM cannot serve an adapter of this run: {'; '.join(unsupported)}"
    return (
        f"vLLM, if it supports LoRA for this model: --enable-lora --max-lora-rank {_slots(run)} "
        f"(rank {_rank(run)}; vLLM must serve the base model by the name in adapter_config.json)"
    )


def serve_script(
    run: RunDirectory, folders: Mapping[str, str], base_model_id: str | None = None
) -> str:
    """Return a shell script that serves all clients' adapters with vLLM.

    The script changes to its own folder, which is the folder of the export. It passes on the
    generation settings of the recipe, except stop strings and the maximum number of tokens, which
    each request must set. vLLM quantizes weights to 4 bits as bitsandbytes does, but not to 8 bits.
    Adapters of a run with ``quantization: 8bit`` are served on the weights as stored.

    Args:
        run: A run of a language model.
        folders: Folder of each client's adapter, relative to the script.
        base_model_id: Public name of the base model. Default: the recipe's ``backbone.model``.

    Raises:
        RunError: vLLM does not support the adapters, the task does not generate text, or the base
            model has no name that vLLM can load.
    """
    base, task = base_model_id or run.recipe.backbone.model, run.recipe.task.to_complete()
    unsupported = _reasons(run)
    if task is None:
        unsupported.append(f"the task {run.recipe.task.name} does not generate text")
    if is_passed(base) or base.startswith("tiny:"):
        unsupported.append(
            f"the base model {base} has no name that vLLM can load; name it with --base-model-id"
        )
    if unsupported or task is None:
        raise RunError(f"vLLM cannot serve an adapter of {run.path}: {'; '.join(unsupported)}")
    model = str(Path(base).expanduser().absolute()) if Path(base).exists() else base
    sampling = {
        "temperature": task.temperature if task.do_sample else 0.0,
        "top_p": task.top_p,
        "repetition_penalty": 1.0,
    }
    options = [
        "--enable-lora",
        f"--max-lora-rank {_slots(run)}",
        f"--max-loras {min(len(folders), _GPU_ADAPTERS)}",
        f"--max-cpu-loras {len(folders)}",
        "--generation-config vllm",
        f"--override-generation-config {shlex.quote(json.dumps(sampling))}",
    ]
    first = next(iter(folders.values()))
    if carries_tokenizer(run):
        options.append(f"--chat-template {shlex.quote(f'{first}/chat_template.jinja')}")
    if run.recipe.backbone.quantization == "4bit":
        options.append("--quantization bitsandbytes")
    if (revision := run.recipe.backbone.revision) is not None:
        options.append(f"--revision {shlex.quote(revision)}")
    if run.trusted_recipe.backbone.trust_remote_code:
        options.append("--trust-remote-code")
    modules = [
        shlex.quote(json.dumps({"name": name, "path": folder, "base_model_name": base}))
        for name, folder in folders.items()
    ]
    return _SCRIPT.format(
        base=shlex.quote(model),
        options=" \\\n    ".join(options),
        modules=" \\\n    ".join(modules),
    )


def _reasons(run: RunDirectory) -> list[str]:
    """Return the reasons why vLLM cannot load the run's adapters; empty if it can."""
    config = run.adapter_config
    reasons = {
        "it trains whole modules (modules_to_save), such as a classification head": config.get(
            "modules_to_save"
        ),
        "it uses DoRA": config.get("use_dora"),
        "it trains biases": config.get("bias", "none") != "none",
        "it trains token embeddings (trainable_token_indices)": config.get(
            "trainable_token_indices"
        ),
        "it adapts expert parameters (target_parameters)": config.get("target_parameters"),
        "its layers have different scalings (rank_pattern, alpha_pattern)": (
            config.get("rank_pattern") or config.get("alpha_pattern")
        ),
        "the method updates the backbone, so ranks differ by layer": (
            run.recipe.strategy.adds_to_backbone
        ),
        f"its rank {_rank(run)} is above {VLLM_RANKS[-1]}": _slots(run) is None,
    }
    return [reason for reason, applies in reasons.items() if applies]


def _rank(run: RunDirectory) -> int:
    return highest_rank(run.adapter_config)


def _slots(run: RunDirectory) -> int | None:
    """Return the smallest valid ``--max-lora-rank``; None if the rank exceeds all of them."""
    return next((rank for rank in VLLM_RANKS if rank >= _rank(run)), None)
