"""Export adapters as plain PEFT folders with model cards, to disk or to the Hugging Face hub.

client   adapter_config.json, adapter_model.safetensors, README.md (the model card), weights.json
         (the client's row of π) and, if the model generates text, the files of ``generation_files``
all      one such folder per client, clients.json (the folder of each client) and, if requested,
         serve.sh, which starts a vLLM server
soup     a folder for each adapter (adapter-0, adapter-1, ...), weights.json (each client's row of
         π), README.md with code that merges the adapters and, if the model generates text, the
         files of ``generation_files``

A folder is written whole or not at all, with the SHA-256 sums of its files in ``SHA256SUMS``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from fedmerge_peft.adapters.exact_merge import add_base_update
from fedmerge_peft.adapters.peft_folder import highest_rank, write_adapter
from fedmerge_peft.errors import RunError
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.serving.generation_files import generation_writer
from fedmerge_peft.serving.merged_adapter import MergedAdapter, client_adapter
from fedmerge_peft.serving.model_card import base_model, soup_card
from fedmerge_peft.serving.vllm import serve_script
from fedmerge_peft.util.files import write_json, write_text
from fedmerge_peft.util.folders import whole_folder, write_sums
from fedmerge_peft.util.library_errors import reason_of

_LONGEST = 200
"""Maximum length of a folder's name in bytes; file systems allow 255."""


def export_client(
    run: RunDirectory,
    client: str,
    folder: Path | str,
    *,
    best: bool = False,
    base_model_id: str | None = None,
    repo: str | None = None,
) -> Path:
    """Write a client's merged adapter with a model card.

    The adapter has the run's rank. If the run updated the backbone (flora, fedex_lora), the update
    is part of the adapter, whose rank is then higher.

    Args:
        run: A run with at least one finished round.
        client: The client's name.
        folder: A new or empty folder.
        best: Use the round with the lowest validation loss, even if the run serves its last round.
        base_model_id: Public name of the base model. Default: the recipe's ``backbone.model``.
        repo: Hub repository that the folder will be pushed to; the card's example loads from it.

    Returns:
        The folder.

    Raises:
        RunExistsError: The folder is not empty.
        RunError: The client or the round does not exist, the client has no single adapter
            (``fedem``), or the folder cannot be written.
        BackboneError: The tokenizer to export with the adapter cannot be loaded.
    """
    folder = Path(folder)
    merged = client_adapter(run, client, best=best)
    RunDirectory.check_free(folder)
    write_generation = generation_writer(run)
    with whole_folder(folder) as partial:
        _write_client(merged, partial, base_model_id, repr(repo or str(folder)))
        write_generation(partial)
    return folder


def export_all(
    run: RunDirectory,
    folder: Path | str,
    *,
    best: bool = False,
    base_model_id: str | None = None,
    repo: str | None = None,
    vllm: bool = False,
) -> Path:
    """Write the adapters of all clients, each to a subfolder that ``folder_name`` names.

    ``clients.json`` maps each client to its subfolder. With ``vllm``, the script ``serve.sh``
    starts a vLLM server with all adapters.

    Other arguments, result and errors are those of ``export_client``.

    Raises:
        RunError: As ``export_client``; or vLLM does not support the adapters.
    """
    folder = Path(folder)
    soup, weights = run.state(best=best)
    scores, after = run.scores(best=best), run.round(best=best)
    adapters = [
        MergedAdapter(run, client, soup, row, after, scores.get(client, {}), own)
        for client, row, own in zip(run.client_names, weights, torch.eye(len(weights)), strict=True)
    ]
    RunDirectory.check_free(folder)
    folders = {merged.name: folder_name(merged.name) for merged in adapters}
    script = serve_script(run, folders, base_model_id) if vllm else None
    write_generation = generation_writer(run)
    with whole_folder(folder) as partial:
        for merged in adapters:
            name = folders[merged.name]
            place = repr(str(folder / name)) if repo is None else f"{repo!r}, subfolder={name!r}"
            _write_client(merged, partial / name, base_model_id, place)
            write_generation(partial / name)
            write_sums(partial / name)
        write_json(partial / "clients.json", folders)
        if script is not None:
            write_text(partial / "serve.sh", script)
    return folder


def export_soup(
    run: RunDirectory,
    folder: Path | str,
    *,
    best: bool = False,
    base_model_id: str | None = None,
    repo: str | None = None,
) -> Path:
    """Write the soup: d adapters, and ``weights.json``, with which the user merges them.

    The arguments and the result are those of ``export_client``, except that there is no client. The
    clients' own parts of the adapters, such as label priors, are not exported.

    Raises:
        RunExistsError, BackboneError: As ``export_client``.
        RunError: The round does not exist, or the folder cannot be written; parts of the adapters
            are private to the clients, so that the soup has no whole adapters; or the merging
            weights differ between blocks.
    """
    folder = Path(folder)
    soup, weights = run.state(best=best)
    if soup.own is not None and soup.own.private:
        raise RunError(
            f"{run.path}: parts of its adapters are private to the clients "
            f"({run.recipe.strategy.name}), so that the soup has no whole adapters; export the "
            "clients' adapters with --all (export_all in Python)"
        )
    if soup.blocks is not None:
        raise RunError(
            f"{run.path}: the merging weights differ between blocks of the adapter, so that "
            "weights.json cannot hold them; export the clients' adapters with --all (export_all in "
            "Python)"
        )
    RunDirectory.check_free(folder)
    config = _config(run.adapter_config, run, base_model_id)
    base, hub = base_model(run, base_model_id)
    rows = {client: row.tolist() for client, row in zip(run.client_names, weights, strict=True)}
    card = soup_card(run, base, hub, str(folder), repo, soup=soup, best=best)
    write_generation = generation_writer(run)
    with whole_folder(folder) as partial:
        for number, row in enumerate(soup.rows):
            state = soup.state_dict(row)
            write_adapter(
                partial / f"adapter-{number}",
                *(add_base_update(state, config, soup.base) if soup.base else (state, config)),
            )
        write_json(partial / "weights.json", {"round": run.round(best=best), "clients": rows})
        write_text(partial / "README.md", str(card))
        write_generation(partial)
    return folder


def push_to_hub(folder: Path, repo: str, *, private: bool = True) -> str:
    """Upload an exported folder to a model repository on the Hugging Face hub.

    The repository is created if it does not exist.

    Args:
        folder: Output of ``export_client``, ``export_all`` or ``export_soup``.
        repo: Repository id, such as ``me/north-clinic``.
        private: Make a new repository private; an existing one keeps its visibility.

    Returns:
        The URL of the commit.

    Raises:
        RunError: The repository id is invalid, there is no token or no network, or the hub rejects
            the upload. The folder is kept.
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
        raise RunError(
            f"{folder} was written but not uploaded: {reason_of(error)}. "
            f"To upload it later: hf upload {repo} {shlex.quote(str(folder))}"
            f"{' --private' if private else ''}"
        ) from error
    return str(commit.commit_url)


def check_repo(repo: str) -> None:
    """Raise ``RunError`` unless ``repo`` has the form of a repository id on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        reason = str(error).splitlines()[0].removesuffix(" Use `repo_type` argument if needed.")
        raise RunError(
            f"{repo!r} is not a valid repository id: {reason.rstrip('.')}; write it as USER/NAME"
        ) from error


def folder_name(client: str) -> str:
    """Return a client's name as a folder name, percent-encoding unsafe characters.

    An encoded name of more than ``_LONGEST`` bytes is cut, and a digest of the client's name is
    appended.
    """
    encoded = "".join(
        character
        if character.isprintable() and character not in '%/\\:*?"<>|'
        else quote(character, safe="", errors="surrogatepass")
        for character in client
    )
    if len(encoded.encode()) > _LONGEST:
        digest = blake2b(client.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        begin = encoded.encode()[: _LONGEST - len(digest) - 1].decode(errors="ignore")
        return f"{re.sub('%.?$', '', begin)}-{digest}"
    return encoded if encoded.strip(".") else encoded.replace(".", "%2E") or "%"


def _write_client(
    merged: MergedAdapter, folder: Path, base_model_id: str | None, place: str
) -> None:
    state, config = merged.peft_state()
    weights = {"client": merged.name, "round": merged.round, "weights": merged.weights.tolist()}
    write_adapter(folder, state, _config(config, merged.run, base_model_id), weights=weights)
    card = merged.card(place, base_model_id, rank=highest_rank(config))
    write_text(folder / "README.md", str(card))


def _config(
    config: Mapping[str, Any], run: RunDirectory, base_model_id: str | None
) -> dict[str, Any]:
    """Return PEFT's configuration with the public name and the revision of the base model."""
    return {
        **config,
        "base_model_name_or_path": base_model_id or run.recipe.backbone.model,
        "revision": run.recipe.backbone.revision,
    }
