"""Exported folders load without this package and describe their contents."""

import json
import re

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from equality import assert_near
from fedmerge_peft import RunError, RunExistsError
from fedmerge_peft.serving.export import (
    export_all,
    export_client,
    export_soup,
    folder_name,
)
from fedmerge_peft.serving.model_card import plain
from fedmerge_peft.serving.vllm import VLLM_RANKS, vllm_support

from .conftest import TASKS

CLIENT = "client 1"


def example(card):
    """The Python lines of a card. They stand alone: nothing of this package is imported."""
    (lines,) = re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    assert "fedmerge_peft" not in lines
    return lines


def loaded(card):
    """The model that a card's lines load."""
    names = {}
    exec(compile(example(card), str(card), "exec"), names)
    return names["model"]


@pytest.mark.equality
@pytest.mark.parametrize("task", TASKS)
def test_the_cards_code_loads_the_clients_served_model(task, finished, tmp_path):
    made = finished(task)
    folder = export_client(made.run, CLIENT, tmp_path / "mine")
    model = loaded(folder / "README.md")
    assert_near(model(**made.inputs).logits.detach(), made.logits(CLIENT))
    with model.disable_adapter():
        assert float((model(**made.inputs).logits - made.logits(CLIENT)).abs().max()) > 1e-3


@pytest.mark.equality
@pytest.mark.parametrize("task", TASKS)
def test_the_soups_card_merges_the_clients_served_model_on_load(task, finished, tmp_path):
    made = finished(task)
    folder = export_soup(made.run, tmp_path / "soup")
    first = made.run.clients.index[0]
    assert_near(loaded(folder / "README.md")(**made.inputs).logits.detach(), made.logits(first))


def test_an_export_is_a_plain_peft_folder_of_the_runs_rank(finished, tmp_path):
    folder = export_client(finished("causal-lm").run, CLIENT, tmp_path / "mine")
    assert {path.name for path in folder.iterdir()} == {
        "generation_config.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "weights.json",
        "README.md",
        "SHA256SUMS",
    }
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2
    assert all(
        2 in value.shape
        for key, value in load_file(folder / "adapter_model.safetensors").items()
        if "lora_" in key
    )


@pytest.mark.equality
def test_all_clients_have_a_folder_each(finished, tmp_path):
    made = finished("sequence-classification")
    folder = export_all(made.run, tmp_path / "all")
    names = ["client 0", "client 1", "client 2"]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == names
    assert json.loads((folder / "clients.json").read_text()) == dict(zip(names, names, strict=True))
    for client in ("client 0", "client 2"):
        assert_near(
            loaded(folder / client / "README.md")(**made.inputs).logits.detach(),
            made.logits(client),
        )


def test_a_folder_of_all_clients_has_the_layout_of_vllms_filesystem_resolver(finished, tmp_path):
    """vLLM reads <cache directory>/<name in the request>/adapter_config.json.

    The configuration must be of type LORA and name the served model.
    """
    run = finished("causal-lm").run
    folder = export_all(run, tmp_path / "everyone", base_model_id="acme/base")
    for client in run.client_names:
        config = json.loads((folder / client / "adapter_config.json").read_text())
        assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", "acme/base")


def test_a_soups_weights_include_every_client(finished, tmp_path):
    run = finished("causal-lm").run
    folder = export_soup(run, tmp_path / "soup")
    document = json.loads((folder / "weights.json").read_text())
    assert document["round"] == 2
    assert list(document["clients"]) == list(run.clients.index)
    assert document["clients"][CLIENT] == pytest.approx(list(run.weights.loc[CLIENT]))
    assert sorted(path.name for path in folder.glob("adapter-*")) == [
        "adapter-0",
        "adapter-1",
        "adapter-2",
    ]


def test_a_card_describes_the_adapter(finished, tmp_path):
    run = finished("sequence-classification").run
    folder = export_client(run, CLIENT, tmp_path / "mine", base_model_id="acme/base")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "acme/base"
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-classification")
    (result,) = [each for each in card.data.eval_results if each.metric_type == "accuracy"]
    assert result.metric_value == run.clients.loc[CLIENT, "test_accuracy"]
    weights = ", ".join(
        f"adapter {number}: {weight:.3f}" for number, weight in enumerate(run.weights.loc[CLIENT])
    )
    assert all(
        text in card.text
        for text in ("| method | `fedmerge` |", "| round | 2 |", weights, "adapters: 3")
    )


def test_the_card_has_no_local_path_if_the_base_model_is_named(finished, tmp_path):
    made = finished("sequence-classification")
    folder = export_client(
        made.run, CLIENT, tmp_path / "mine", base_model_id="acme/base", repo="acme/mine"
    )
    for file in ("README.md", "adapter_config.json", "weights.json"):
        text = (folder / file).read_text()
        assert str(made.run.path.parent) not in text
        assert made.run.recipe.backbone.model not in text
    assert "PeftModel.from_pretrained(base, 'acme/mine')" in example(folder / "README.md")


def test_a_local_tokenizer_is_named_without_its_folder(finished, tmp_path, monkeypatch):
    run = finished("causal-lm").run
    backbone = run.recipe.backbone.model_copy(update={"tokenizer": str(tmp_path)})
    changed = run.recipe.model_copy(update={"backbone": backbone})
    monkeypatch.setattr(type(run), "recipe", property(lambda self: changed))
    folder = export_client(
        run, CLIENT, tmp_path / "mine", base_model_id="acme/base", repo="acme/mine"
    )
    assert f"AutoTokenizer.from_pretrained('{tmp_path.name}')" in example(folder / "README.md")
    assert str(tmp_path) not in (folder / "README.md").read_text()


def test_a_repository_of_many_clients_is_loaded_by_subfolder(finished, tmp_path):
    folder = export_all(
        finished("causal-lm").run, tmp_path / "all", base_model_id="acme/base", repo="acme/all"
    )
    assert "PeftModel.from_pretrained(base, 'acme/all', subfolder='client 0')" in example(
        folder / "client 0" / "README.md"
    )


def test_a_base_model_that_is_a_folder_is_not_claimed_to_be_on_the_hub(finished, tmp_path):
    folder = export_client(finished("causal-lm").run, CLIENT, tmp_path / "mine")
    assert ModelCard.load(folder / "README.md").data.base_model is None


def test_existing_files_are_not_overwritten(finished, tmp_path):
    run = finished("causal-lm").run
    export_client(run, CLIENT, tmp_path / "mine")
    for again in (
        lambda: export_client(run, CLIENT, tmp_path / "mine"),
        lambda: export_soup(run, tmp_path / "mine"),
    ):
        with pytest.raises(RunExistsError, match="existing files are never overwritten"):
            again()


def test_an_unknown_client_writes_no_files(finished, tmp_path):
    with pytest.raises(
        RunError, match="has no client 'nobody'; it has client 0, client 1, client 2"
    ):
        export_client(finished("causal-lm").run, "nobody", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("Fen Water", "Fen Water"),
        ("a/b", "a%2Fb"),
        ("..", "%2E%2E"),
        ("a%2Fb", "a%252Fb"),
        ("", "%"),
        ("ü\n", "ü%0A"),
    ],
)
def test_folder_names_are_safe_and_distinct(name, folder):
    assert folder_name(name) == folder


@pytest.mark.parametrize("letter", ["a", "ü", "漢", "/", "\n", "😀", "\ud800"])
def test_names_of_any_length_are_folder_names(letter, tmp_path):
    names = [letter * count for count in range(1, 700, 7)]
    folders = {folder_name(name) for name in names}
    assert len(folders) == len(names)
    for folder in folders:
        (tmp_path / folder).mkdir()
        assert "/" not in folder
    assert all("%" not in folder[-19:] for folder in map(folder_name, names[-5:]))


@pytest.mark.parametrize(
    ("rank", "flag"), [(1, 1), (2, 8), (8, 8), (9, 16), (257, 320), (512, 512)]
)
def test_vllm_gets_the_smallest_sufficient_rank_that_it_accepts(rank, flag, finished, monkeypatch):
    run = finished("causal-lm").run
    monkeypatch.setattr(type(run), "adapter_config", {**run.adapter_config, "r": rank})
    assert flag in VLLM_RANKS
    assert f"--max-lora-rank {flag} (rank {rank};" in vllm_support(run)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"r": 513}, "its rank 513 is above 512"),
        ({"use_dora": True}, "it uses DoRA"),
        ({"bias": "all"}, "it trains biases"),
        ({"alpha_pattern": {"c_attn": 4}}, "different scalings"),
    ],
)
def test_unsupported_adapters_are_named_with_vllms_reason(changed, why, finished, monkeypatch):
    run = finished("causal-lm").run
    monkeypatch.setattr(type(run), "adapter_config", {**run.adapter_config, **changed})
    assert vllm_support(run).startswith("vLLM cannot serve an adapter of this run: ")
    assert why in vllm_support(run)


def test_vllm_does_not_serve_classification_heads(finished):
    assert "modules_to_save" in vllm_support(finished("sequence-classification").run)


def test_names_of_clients_are_shown_unchanged():
    assert plain("a|b <i>\n") == r"a\|b \<i\>\\n"
