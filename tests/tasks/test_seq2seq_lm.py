"""Sequence-to-sequence language modeling: batches, losses, generation, edge cases."""

import logging

import numpy as np
import pytest
import torch
import transformers as hf
from datasets import Dataset

from equality import assert_near
from fedmerge_peft.errors import BackboneError, DataError, RunError
from fedmerge_peft.plugins import METRICS
from fedmerge_peft.report.page import write_report
from fedmerge_peft.training.prefix_cache import PrefixCache
from made_models import config_of, tokenizer_of, write
from task_bench import TaskBench, assert_same_step, run_of

NAME = "seq2seq-lm"
SOURCES = ["Name a color", "What is the sum of two and three?", "", "x"]
TARGETS = ["red", "five, not seven", "nothing is empty", "a longer one, which is cut"]
PAIRS = Dataset.from_dict({"source": SOURCES, "target": TARGETS})
KINDS = {"t5": ["q", "v"], "bart": ["q_proj", "v_proj"], "marian": ["q_proj"], "mbart": ["fc1"]}


@pytest.fixture(scope="module")
def folders(tiny_models, tmp_path_factory):
    """Folders of tiny models by kind."""
    folder = tmp_path_factory.mktemp("seq2seq")
    tokenizer = tokenizer_of(tiny_models, "t5")
    sizes = {**config_of("bart", tokenizer).to_dict()}
    shared = {name: sizes[name] for name in sizes if name.endswith(("layers", "heads", "dim"))} | {
        "d_model": 32,
        "max_position_embeddings": 64,
        "init_std": 0.2,
    }
    start = {"decoder_start_token_id": tokenizer.pad_token_id, "forced_eos_token_id": None}
    for kind in ("bart", "marian", "mbart"):
        config = hf.CONFIG_MAPPING[kind](
            **shared,
            **start,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
        write(folder / kind, hf.AutoModelForSeq2SeqLM, config, tokenizer)
    return {
        "t5": tiny_models / "t5",
        **{kind: folder / kind for kind in ("bart", "marian", "mbart")},
    }


def bench_of(folders, kind, table=PAIRS, **task):
    lora = {"target_modules": KINDS[kind]}
    return TaskBench(
        folders[kind],
        table,
        {"name": NAME, "max_target_length": 8, "max_new_tokens": 8, **task},
        lora,
    )


def features(folder, prefix=""):
    """The features of transformers' example script."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer([prefix + text for text in SOURCES], truncation=True)
    targets = tokenizer(text_target=TARGETS, max_length=8, truncation=True)["input_ids"]
    rows = zip(inputs["input_ids"], targets, strict=True)
    return tokenizer, [{"input_ids": ids, "labels": labels} for ids, labels in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_equals_that_of_the_trainer(folders, float64, kind, tmp_path):
    bench = bench_of(folders, kind, prefix="say: ")
    row = bench.row()
    tokenizer, rows = features(folders[kind], "say: ")
    model = bench.plain_peft(row, tmp_path / "adapter")
    collate = hf.DataCollatorForSeq2Seq(tokenizer, model=model)
    expected = bench.trained_by_transformers(model, rows, collate, tmp_path)
    assert_same_step(bench.trained(row), expected, bench.backbone.layout.state_dict(row))


@pytest.mark.equality
@pytest.mark.parametrize("kind", KINDS)
def test_clients_in_one_pass_have_the_gradients_of_each_alone(folders, kind):
    bench = bench_of(folders, kind)
    adapters = torch.stack([bench.row(1), bench.row(2), bench.row(3)])
    rows = [np.array([0, 3]), np.array([1]), np.array([2, 1])]
    for together, alone in zip(*bench.gradients(adapters, rows), strict=True):
        assert_near(together, alone)


def test_an_adapter_predicts_the_same_in_plain_peft(folders, tmp_path):
    bench = bench_of(folders, "t5", metrics=["exact_match"])
    row = bench.row()
    bench.backbone.load_row(row)
    logits, _ = bench.logits()
    model = bench.plain_peft(row, tmp_path).float().eval()
    tokenizer, rows = features(folders["t5"])
    batch = hf.DataCollatorForSeq2Seq(tokenizer, model=model)(rows)
    with torch.no_grad():
        assert_near(model(**batch).logits, logits)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        settings = hf.GenerationConfig(max_new_tokens=8, pad_token_id=tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(
            model.generate(**inputs, generation_config=settings), skip_special_tokens=True
        )
    examples, device = bench.runtime.examples, torch.device("cpu")
    found, references = bench.task.generate(bench.backbone.model, examples, bench.rows, device)
    assert found == [text.strip() for text in texts]
    assert references == TARGETS
    assert any(found)


def test_each_example_is_generated_as_it_is_alone(folders):
    bench = bench_of(folders, "bart", metrics=["rougeL"])
    bench.backbone.load_row(bench.row())
    assert (bench.task.padding, bench.task.prompt_padding) == ("right", "right")

    def texts(rows):
        model, examples = bench.backbone.model, bench.runtime.examples
        return bench.task.generate(model, examples, np.array(rows), torch.device("cpu"))[0]

    assert texts([0, 1, 2, 3]) == [texts([row])[0] for row in range(4)]


def test_metrics_equal_sacrebleu():
    import sacrebleu

    generated = ["the cat sat on the mat", "a dog", ""]
    references = ["the cat is on the mat", "a dog", "nothing here"]
    bleu, chrf = (METRICS[name].load()(generated, references) for name in ("bleu", "chrf"))
    assert bleu == pytest.approx(sacrebleu.corpus_bleu(generated, [references]).score / 100)
    assert chrf == pytest.approx(sacrebleu.corpus_chrf(generated, [references]).score / 100)
    assert 0 < bleu < chrf < 1
    assert METRICS["bleu"].load()(references, references) == pytest.approx(1)


def test_scores_are_those_of_the_whole_split(folders):
    bench = bench_of(folders, "t5", metrics=["perplexity", "accuracy", "chrf", "bleu"])
    row = bench.row()
    whole, parts = bench.scores(row, 4), bench.scores(row, 3)
    assert whole == pytest.approx(parts, rel=1e-5)
    assert whole["perplexity"] == pytest.approx(np.exp(whole["loss"]))


def test_a_run_predicts_exports_and_reports(tmp_path, caplog):
    rows = [
        {"client": client, "source": f"text number {row}", "target": f"{client} {row}"}
        for client in ("north", "south")
        for row in range(6)
    ]
    task = {"name": NAME, "metrics": ["chrf", "perplexity"], "max_new_tokens": 6}
    run = run_of(tmp_path / "run", rows, task, backbone={"model": "tiny:t5"}, lora={"r": 2})
    assert "one at a time" not in caplog.text
    texts = ["text number 2", "text"]
    found = run.predict({"north": texts, "south": texts[:1]}, device="cpu")
    assert [len(found[client]) for client in ("north", "south")] == [2, 1]
    assert found["north"][1] == run.predict({"north": texts[1:]}, device="cpu")["north"][0]
    with pytest.raises(RunError, match=r"transformers .* has no pipeline for seq2seq-lm"):
        run.client("north").pipeline()
    card = (run.client("north").save(tmp_path / "north") / "README.md").read_text()
    assert "AutoModelForSeq2SeqLM.from_pretrained('tiny:t5'" in card
    write_report([run.path], tmp_path / "report.html")
    assert "chrf" in (tmp_path / "report.html").read_text()


# --- edge cases -----------------------------------------------------------------------------------
def test_long_and_empty_texts_are_counted(folders, caplog):
    bench = bench_of(folders, "t5", max_source_length=6)
    cuts = {what: rows for what, rows in bench.runtime.examples.cuts.items() if rows}
    assert cuts == {
        "have a source of more than 6 tokens, truncated": [0, 1],
        "have a target of more than 8 tokens, truncated": [1, 2, 3],
        "have an empty source": [2],
    }
    columns = bench.runtime.examples.columns
    assert [len(ids) for ids in columns["labels"]] == [3, 8, 8, 8]
    end = bench.task.processor.eos_token_id
    assert all(ids[-1] == end for name in ("input_ids", "labels") for ids in columns[name])


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("source", ["a", None], r"row 1 .*column 'source' is empty \(null\)"),
        ("target", [1.5, 2.5], r"task.target: column 'target' has the type double"),
        ("other", ["a", "b"], "task.source: there is no column 'source'"),
    ],
)
def test_unsuitable_columns_are_refused(task_of, column, values, message):
    table = Dataset.from_dict({"source": ["a", "b"], "target": ["a", "b"], column: values})
    if column == "other":
        table = table.remove_columns("source")
    with pytest.raises(DataError, match=message):
        task_of("t5", table, name=NAME).encode(table)


def test_special_tokens_in_texts_are_characters(task_of):
    table = Dataset.from_dict({"source": ["a </s> b"], "target": ["</s>"]})
    task = task_of("t5", table, name=NAME)
    end = task.processor.eos_token_id
    columns = task.encode(table).columns
    assert all((columns[name][0] == end).sum() == 1 for name in ("input_ids", "labels"))


def test_a_length_beyond_the_models_limit_is_refused(folders, task_of):
    message = "task.max_target_length: 65 tokens exceed the model's limit of 64"
    with pytest.raises(DataError, match=message):
        task_of("bart", PAIRS, folder=folders["bart"], name=NAME, max_target_length=65)


def test_a_language_that_the_tokenizer_lacks_is_refused(task_of, monkeypatch):
    with pytest.raises(DataError, match=r"task\.target_language: .* tiny:t5 has no language codes"):
        task_of("t5", PAIRS, name=NAME, target_language="de_DE")
    monkeypatch.setattr(hf.PreTrainedTokenizerBase, "src_lang", "en_XX", raising=False)
    with pytest.raises(DataError, match=r"task\.source_language: .* has no language 'de_DE'"):
        task_of("t5", PAIRS, name=NAME, source_language="de_DE")


def test_a_model_without_a_start_token_is_refused(tiny_models, tmp_path):
    tokenizer = tokenizer_of(tiny_models, "t5")
    config = hf.T5Config(**hf.T5Config.from_pretrained(tiny_models / "t5").to_diff_dict())
    config.decoder_start_token_id = None
    folder = write(tmp_path, hf.AutoModelForSeq2SeqLM, config, tokenizer)
    with pytest.raises(BackboneError, match="has no decoder_start_token_id in"):
        bench_of({"t5": folder}, "t5")


def test_a_decoder_only_model_is_refused(tiny_models):
    with pytest.raises(BackboneError, match="cannot be loaded as AutoModelForSeq2SeqLM"):
        TaskBench(tiny_models / "gpt2", PAIRS, {"name": NAME}, {})


def test_the_prefix_cache_is_disabled_with_a_reason(folders, caplog):
    """The states of a decoder's layers are those of target tokens."""
    lora = {"target_modules": r".*decoder\.layers\.1\.self_attn\.q_proj"}
    bench = TaskBench(folders["bart"], PAIRS, {"name": NAME, "max_target_length": 8}, lora)
    assert bench.backbone.prefix is not None
    examples = bench.runtime.examples
    cache = PrefixCache(bench.backbone, bench.task, examples, [bench.rows], 1.0)
    with caplog.at_level(logging.INFO):
        cache.prepare(bench.rows)
    assert "the decoder and the encoder have different positions" in caplog.text


def test_the_output_matrix_of_tied_embeddings_is_not_adapted_twice(folders):
    """The embeddings of T5 are its output matrix, and frozen."""
    bench = bench_of(folders, "t5")
    model = bench.backbone.model.get_base_model()
    assert model.lm_head.weight is model.shared.weight
    assert not model.shared.weight.requires_grad
    assert all(entry.role == "lora" for entry in bench.backbone.layout.entries)
