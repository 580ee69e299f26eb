"""Cards of saved adapters, mixtures and newcomers."""

import pytest
from huggingface_hub import ModelCard

from equality import assert_near
from fedmerge_peft import Recipe
from fedmerge_peft.models.pretrained import gguf_source
from fedmerge_peft.recipe.backbone import BackboneRecipe
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.serving.export import export_client, export_soup
from fedmerge_peft.serving.personalize import personalize

from .test_export import CLIENT, loaded

KIND = "sequence-classification"


@pytest.mark.equality
def test_a_saved_adapter_has_a_card_whose_code_loads_it(finished, tmp_path):
    made = finished(KIND)
    folder = made.run.save_adapter(CLIENT, tmp_path / "mine")
    assert_near(loaded(folder / "README.md")(**made.inputs).logits.detach(), made.logits(CLIENT))


def test_the_card_states_the_number_of_examples_behind_the_scores(finished, tmp_path):
    run = finished(KIND).run
    text = ModelCard.load(run.save_adapter(CLIENT, tmp_path / "mine") / "README.md").text
    assert f"**{CLIENT}**, one of 3 clients" in text
    assert f"| training examples | {run.clients.loc[CLIENT, 'train']} |" in text
    assert f"| test examples | {run.clients.loc[CLIENT, 'test']} |" in text


def test_the_card_advises_on_padding_if_outputs_depend_on_it(finished, tmp_path, monkeypatch):
    run = finished(KIND).run
    assert run.task["padding"] == "right"
    for padding, advice in [("right", None), ("left", "padding_side"), ("none", "one length")]:
        task = {**run.task, "padding": padding}
        monkeypatch.setattr(RunDirectory, "task", property(lambda _, task=task: task))
        text = ModelCard.load(run.save_adapter(CLIENT, tmp_path / padding) / "README.md").text
        assert ("| padding |" in text) == (advice is not None)
        assert advice is None or advice in text


def test_the_card_of_an_exact_merge_has_its_rank(finished, tmp_path):
    run = finished("causal-lm").run
    folder = run.save_adapter(CLIENT, tmp_path / "mine", exact=True)
    assert "PEFT adapter of rank 6." in ModelCard.load(folder / "README.md").text


def test_the_card_of_a_mixture_claims_no_client_and_no_scores(finished, tmp_path):
    folder = finished(KIND).run.merge({0: 1, 2: 1}).save(tmp_path / "half")
    card = ModelCard.load(folder / "README.md")
    assert "a mixture from a federated fine-tuning run of 3 clients" in card.text
    assert "adapter 0: 0.500, adapter 1: 0.000, adapter 2: 0.500" in card.text
    assert "one of 3 clients" not in card.text
    assert "examples |" not in card.text
    assert card.data.eval_results is None


@pytest.mark.equality
def test_a_newcomers_card_has_its_scores_and_loads_its_adapter(finished, tmp_path):
    made = finished(KIND)
    (tmp_path / "new.csv").write_text(
        "text,label\n" + "".join(f"it works {n},{['amber', 'blue'][n % 2]}\n" for n in range(8))
    )
    result = personalize(made.run, tmp_path / "new.csv", local=False, test_fraction=0.25)
    folder = result.save(tmp_path / "new")
    card = ModelCard.load(folder / "README.md")
    assert "**new**, a newcomer to a federated fine-tuning run of 3 clients" in card.text
    assert "| test examples | 2 |" in card.text
    scores = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert scores["accuracy"] == result.scores["test_accuracy"]
    made.engine.backbone.load_row(result.row)
    made.engine.backbone.eval()
    assert_near(
        loaded(folder / "README.md")(**made.inputs).logits.detach(),
        made.engine.backbone.model(**made.inputs).logits.detach(),
    )


def test_the_card_says_from_which_gguf_file_the_weights_are_dequantized(
    finished, tmp_path, monkeypatch
):
    run = finished("causal-lm").run
    plain = ModelCard.load(run.save_adapter(CLIENT, tmp_path / "plain") / "README.md").text
    assert "dequantized" not in plain
    backbone = run.recipe.backbone.model_copy(update={"gguf_file": "tiny.Q4_K_M.gguf"})
    changed = run.recipe.model_copy(update={"backbone": backbone})
    monkeypatch.setattr(type(run), "recipe", property(lambda self: changed))
    for folder in (
        export_client(run, CLIENT, tmp_path / "client"),
        export_soup(run, tmp_path / "soup"),
    ):
        text = ModelCard.load(folder / "README.md").text
        assert "| base weights | dequantized from `tiny.Q4_K_M.gguf` to float32 |" in text


def test_a_gguf_file_in_a_package_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "fedmerge_peft.models.pretrained._PACKAGED", {"acme/base": ("json", ".", "base.gguf")}
    )
    assert gguf_source(BackboneRecipe(model="acme/base")) == "base.gguf"
    assert gguf_source(Recipe.load("smoke").backbone) is None
