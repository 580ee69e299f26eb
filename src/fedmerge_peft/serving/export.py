"""Adapters to take away: plain PEFT folders with model cards, on the disk or on the Hugging Face hub.

client   adapter_config.json, adapter_model.safetensors, README.md (the card), weights.json (its row of π)
all      such a folder a client
soup     adapter-0, adapter-1, ... and weights.json with every client's row of π, for merging on load
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedmerge_peft.adapters.exact_merge import add_base_update
from fedmerge_peft.adapters.peft_folder import write_adapter
from fedmerge_peft.errors import RunError
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.serving.merged_adapter import MergedAdapter, client_adapter
from fedmerge_peft.serving.model_card import client_card, soup_card
from fedmerge_peft.util.files import write_json, write_text

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's ``--max-lora-rank`` takes (``MaxLoRARanks`` in its vllm/config/lora.py)."""


def export_client(
    run: RunDirectory,
    client: str,
    folder: Path | str,
    *,
    best: bool = False,
    base_model_id: str | None = None,
    repo: str | None = None,
) -> Path:
    """Write a client's merged adapter, at the rank of the run, with a model card.

    Args:
        run: A run of which at least a round is done.
        client: Whose.
        folder: New or empty.
        best: From the round with the lowest validation loss, instead of the last.
        base_model_id: The base model as others know it. Default: the recipe's ``backbone.model``.
        repo: The repository of the hub that the folder will be pushed to; the card's example then loads it from there.

    Returns:
        The folder.

    Raises:
        RunExistsError: The folder has something in it.
        RunError: No such client, no single adapter (``fedem``), no such round, or the folder cannot be written.
    """
    folder = Path(folder)
    merged = client_adapter(run, client, best=best)
    RunDirectory.check_free(folder)
    return _write_client(merged, folder, base_model_id, repr(repo or str(folder)))


def export_all(
    run: RunDirectory,
    folder: Path | str,
    *,
    best: bool = False,
    base_model_id: str | None = None,
    repo: str | None = None,
) -> Path:
    """Write the adapters of all clients, each into a folder of its own (``folder_name``) below this one; as ``export_client``."""
    folder = Path(folder)
    soup, weights = run.state(best=best)
    scores, after = run.scores(best=best), run.round(best=best)
    each_of = zip(run.client_names, weights, strict=True)
    merged = [
        MergedAdapter(run, client, soup, row, after, scores.get(client, {}))
        for client, row in each_of
    ]
    RunDirectory.check_free(folder)
    for each in merged:
        below = folder / folder_name(each.name)
        _write_client(
            each,
            below,
            base_model_id,
            repr(str(below)) if repo is None else f"{repo!r}, subfolder={below.name!r}",
        )
    return folder


def export_soup(
    run: RunDirectory,
    folder: Path | str,
    *,
    best: bool = False,
    base_model_id: str | None = None,
    repo: str | None = None,
) -> Path:
    """Write the soup: d adapters, and ``weights.json`` to merge them by on load; arguments and errors as for ``export_client``."""
    folder = Path(folder)
    soup, weights = run.state(best=best)
    RunDirectory.check_free(folder)
    config = _config(run.adapter_config, run, base_model_id)
    for number, row in enumerate(soup.rows):
        state = soup.state_dict(row)
        write_adapter(
            folder / f"adapter-{number}",
            *(add_base_update(state, config, soup.base) if soup.base else (state, config)),
        )
    rows = {client: row.tolist() for client, row in zip(run.client_names, weights, strict=True)}
    write_json(folder / "weights.json", {"round": run.round(best=best), "clients": rows})
    base, hub = base_model(run, base_model_id)
    card = soup_card(run, base, hub, str(folder), repo, adapters=len(soup), best=best)
    write_text(folder / "README.md", str(card))
    return folder


def push_to_hub(folder: Path, repo: str, *, private: bool = True) -> str:
    """Upload an exported folder to a model repository on the Hugging Face hub, made where it is missing.

    Args:
        folder: What ``export_client``, ``export_all`` or ``export_soup`` wrote.
        repo: Such as ``me/north-clinic``.
        private: Whether a new repository is private; one that is there stays as it is.

    Returns:
        The commit's address.

    Raises:
        RunError: No such repository name, no token, no network, or the hub refuses; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    check_repo(repo)
    try:
        api = HfApi(library_name="fedmerge-peft")
        api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Upload of fedmerge-peft"
        )
    except (HTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(
            f"{folder} is written, and was not uploaded: {reason}. Later: hf upload {repo} {folder}"
        ) from error
    return str(commit.commit_url)


def check_repo(repo: str) -> None:
    """Raise ``RunError`` unless this can be the name of a repository on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RunError(
            f"{repo!r} is no name of a repository: {str(error).splitlines()[0]}"
        ) from error


def base_model(run: RunDirectory, base_model_id: str | None = None) -> tuple[str, str | None]:
    """The base model's name for those who load the adapter, and the same where it may be on the hub, else None: a folder, or made up."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    name = base_model_id or run.recipe.backbone.model
    try:
        validate_repo_id(name)
    except HFValidationError:
        return name, None
    return name, None if base_model_id is None and Path(name).exists() else name


def vllm_says(run: RunDirectory) -> str:
    """A line: how vLLM serves the run's adapters, or why it does not (its vllm/lora/peft_helper.py and vllm/config/lora.py)."""
    config = run.adapter_config
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    enough = next((rank for rank in VLLM_RANKS if rank >= max(ranks)), None)
    reasons = {
        "it trains whole modules beside LoRA (modules_to_save), such as a classification head": config.get(
            "modules_to_save"
        ),
        "it is DoRA": config.get("use_dora"),
        "it trains biases": config.get("bias", "none") != "none",
        "it trains embeddings of tokens": config.get("trainable_token_indices"),
        "it adapts parameters of experts": config.get("target_parameters"),
        "its layers have scalings of their own (rank_pattern, alpha_pattern)": config.get(
            "rank_pattern"
        )
        or config.get("alpha_pattern"),
        "the method adds to the backbone, so that ranks differ by layer": run.recipe.strategy.name
        == "flora",
        f"its rank {max(ranks)} is above {VLLM_RANKS[-1]}": enough is None,
    }
    if why := [reason for reason, holds in reasons.items() if holds]:
        return f"vLLM does not serve this adapter: {'; '.join(why)}"
    return f"vLLM, where it has LoRA for this model: --enable-lora --max-lora-rank {enough} (rank {max(ranks)}; same name of the base model)"


def folder_name(client: str) -> str:
    """A client's name as that of a folder: characters that some file system refuses are written as %2F and the like."""
    kept = "".join(
        c
        if c.isprintable() and c not in '%/\\:*?"<>|'
        else quote(c, safe="", errors="surrogatepass")
        for c in client
    )
    return kept if kept.strip(".") else kept.replace(".", "%2E") or "%"


def _write_client(
    merged: MergedAdapter, folder: Path, base_model_id: str | None, place: str
) -> Path:
    state, config = merged.saved()
    weights = {"client": merged.name, "round": merged.round, "weights": merged.weights.tolist()}
    write_adapter(folder, state, _config(config, merged.run, base_model_id), weights=weights)
    write_text(
        folder / "README.md",
        str(client_card(merged, *base_model(merged.run, base_model_id), place)),
    )
    return folder


def _config(
    config: Mapping[str, Any], run: RunDirectory, base_model_id: str | None
) -> dict[str, Any]:
    """PEFT's configuration with the base model as others know it."""
    return {
        **config,
        "base_model_name_or_path": base_model_id or run.recipe.backbone.model,
        "revision": run.recipe.backbone.revision,
    }
