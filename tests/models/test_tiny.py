from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

from fedmerge_peft.models import tiny


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_same_kind_gives_the_same_bytes(kind: str, tiny_models: Path, tmp_path: Path):
    again = tiny.write(kind, tmp_path / "again")
    names = sorted(path.name for path in again.iterdir())
    assert names == sorted(path.name for path in (tiny_models / kind).iterdir())
    assert all(
        (again / name).read_bytes() == (tiny_models / kind / name).read_bytes() for name in names
    )


def test_writing_does_not_change_torchs_generator(tmp_path: Path):
    before = torch.random.get_rng_state()
    tiny.write("bert", tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("kind", "auto", "fresh"),
    [
        ("bert", "AutoModelForSequenceClassification", {"classifier.weight", "classifier.bias"}),
        ("vit", "AutoModelForImageClassification", {"classifier.weight", "classifier.bias"}),
        ("llama", "AutoModelForSequenceClassification", {"score.weight"}),
        ("llama", "AutoModelForCausalLM", set()),
        ("gpt2", "AutoModelForCausalLM", set()),
    ],
)
def test_heads_of_classifiers_are_new_and_all_other_weights_are_loaded(
    kind: str, auto: str, fresh: set[str], tiny_models: Path
):
    _, report = getattr(hf, auto).from_pretrained(tiny_models / kind, output_loading_info=True)
    assert set(report["missing_keys"]) == fresh


def test_gpt2_alone_ties_its_output_matrix_and_has_no_pad_token(tiny_models: Path):
    gpt2, llama = (
        hf.AutoModelForCausalLM.from_pretrained(tiny_models / kind) for kind in ("gpt2", "llama")
    )
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    assert llama.lm_head.weight is not llama.model.embed_tokens.weight
    tokenizers = {
        kind: hf.AutoTokenizer.from_pretrained(tiny_models / kind) for kind in ("gpt2", "llama")
    }
    assert tokenizers["gpt2"].pad_token is None
    assert tokenizers["llama"].pad_token == "<pad>"
    assert tokenizers["llama"].chat_template


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_any_text_survives_the_tokenizer(kind: str, tiny_models: Path):
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_models / kind)
    text = "Grüße, 世界! \n\n  two  spaces"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_an_unknown_kind_is_refused_with_the_list(tmp_path: Path):
    with pytest.raises(ValueError, match="tiny:bert, tiny:llama, tiny:gpt2, tiny:vit"):
        tiny.write("opt", tmp_path)
