"""Extractive question answering: windows, losses, answers, metrics, edge cases."""

import re
import string
from collections import Counter

import numpy as np
import pytest
import torch
import transformers as hf
from datasets import Dataset

from equality import assert_near, tolerance
from fedmerge_peft.errors import DataError, RunError
from fedmerge_peft.plugins import METRICS
from fedmerge_peft.report.page import write_report
from fedmerge_peft.training.batching import clients_per_batch
from fedmerge_peft.training.evaluation import evaluate, evaluate_parts
from task_bench import TaskBench, assert_same_step, run_of

NAME = "question-answering"
LORA = {"target_modules": ["query", "value"]}
LONG = "The badge reader at the east gate is offline, and " * 3 + "the guard calls Rollo twice."
QUESTIONS = ["Who sleeps?", "Who is called?", "What is late?", "What color is it?"]
CONTEXTS = ["The quick fox jumps, and the dog sleeps on.", LONG, "My parcel is late.", "It is red."]
TEXTS = ["the dog", "Rollo", "My parcel", "red"]


def rows_of(questions=QUESTIONS, contexts=CONTEXTS, texts=TEXTS):
    """Rows with one answer each; an empty text stands for none."""
    answers = [
        {"text": [text] * bool(text), "answer_start": [context.index(text)] * bool(text)}
        for context, text in zip(contexts, texts, strict=True)
    ]
    return Dataset.from_dict({"question": questions, "context": contexts, "answers": answers})


def bench_of(tiny_models, table=None, prefix_cache=False, lora=LORA, **task):
    table = rows_of() if table is None else table
    task = {"name": NAME, "max_length": 40, "stride": 8, **task}
    return TaskBench(tiny_models / "bert", table, task, lora, prefix_cache)


def features(tokenizer, table, length=40, stride=8):
    """The training features of transformers' example script (run_qa.py)."""
    tokenized = tokenizer(
        table["question"][:],
        table["context"][:],
        truncation="only_second",
        max_length=length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    mapping, offsets = tokenized.pop("overflow_to_sample_mapping"), tokenized.pop("offset_mapping")
    found = []
    for number, offset in enumerate(offsets):
        ids, kinds = tokenized["input_ids"][number], tokenized.sequence_ids(number)
        cls_index = ids.index(tokenizer.cls_token_id)
        answers = table[mapping[number]]["answers"]
        start = end = cls_index
        if answers["text"]:
            start_char = answers["answer_start"][0]
            end_char = start_char + len(answers["text"][0])
            token_start = kinds.index(1)
            token_end = len(kinds) - 1 - kinds[::-1].index(1)
            if offset[token_start][0] <= start_char and offset[token_end][1] >= end_char:
                while token_start < len(offset) and offset[token_start][0] <= start_char:
                    token_start += 1
                while offset[token_end][1] >= end_char:
                    token_end -= 1
                start, end = token_start - 1, token_end + 1
        own = {name: values[number] for name, values in tokenized.items()}
        found.append({**own, "start_positions": start, "end_positions": end})
    return found


def test_windows_and_labels_are_those_of_the_example_script(tiny_models):
    table = rows_of([*QUESTIONS, " Is it blue?"], [*CONTEXTS, LONG], [*TEXTS, ""])
    bench = bench_of(tiny_models, table, no_answer=True)
    columns = bench.runtime.examples.columns
    found = []
    for row in range(len(table)):
        windows = torch.split(columns["input_ids"][row], columns["sequences"][row].tolist())
        found += [
            (ids.tolist(), *label)
            for ids, label in zip(windows, columns["labels"][row].tolist(), strict=True)
        ]
    stripped = table.map(lambda row: {"question": row["question"].lstrip()})
    wanted = features(bench.task.processor, stripped)
    names = ("input_ids", "start_positions", "end_positions")
    assert found == [tuple(each[name] for name in names) for each in wanted]
    assert [len(own) for own in columns["sequences"]] == [1, 6, 1, 1, 5]


def test_one_step_equals_that_of_the_trainer(tiny_models, float64, tmp_path):
    """In a batch without padding, whose positions transformers gives a probability."""
    table = rows_of(QUESTIONS[:1] * 3, CONTEXTS[:1] * 3, ["the dog", "quick fox", ""])
    bench = bench_of(tiny_models, table, no_answer=True)
    row = bench.row()
    model = bench.plain_peft(row, tmp_path / "adapter")
    rows = features(bench.task.processor, table)
    expected = bench.trained_by_transformers(model, rows, hf.default_data_collator, tmp_path)
    start = bench.backbone.layout.state_dict(row)
    assert any("qa_outputs" in name for name in start)
    assert_same_step(bench.trained(row), expected, start)


def test_the_loss_of_an_example_depends_on_no_other(tiny_models):
    bench = bench_of(tiny_models)
    bench.backbone.load_row(bench.row())

    def losses(rows):
        logits, labels = bench.logits(np.array(rows))
        losses, counts = bench.task.losses(logits, labels)
        assert float(counts.sum()) == bench.task.count_terms(labels)
        return losses, counts

    together, counts = losses([0, 1, 2, 3])
    assert counts.tolist() == [1, 6, 1, 1]
    assert_near(together, torch.cat([losses([row])[0] for row in range(4)]))


@pytest.mark.equality
def test_parts_that_share_batches_have_the_scores_of_each_alone(tiny_models):
    bench = bench_of(tiny_models)
    parts = [np.array([2, 1]), np.array([0, 3])]  # example 1 has six windows
    found = evaluate_parts(bench.runtime, bench.row(), parts, 4)
    for part, scores in zip(parts, found, strict=True):
        alone = evaluate(bench.runtime, bench.row(), part, 4)
        assert scores == pytest.approx(alone, rel=tolerance(torch.float32))


@pytest.mark.equality
def test_clients_in_one_pass_have_the_gradients_of_each_alone(tiny_models):
    bench = bench_of(tiny_models)
    adapters = torch.stack([bench.row(1), bench.row(2), bench.row(3)])
    rows = [np.array([0, 3]), np.array([1]), np.array([2, 1])]
    for together, alone in zip(*bench.gradients(adapters, rows), strict=True):
        assert_near(together, alone)
    training = bench.recipe.training.model_copy(update={"clients_per_batch": 4, "batch_size": 2})
    assert clients_per_batch(bench.runtime, training, bench.rows) == 4


@pytest.mark.equality
@pytest.mark.parametrize("step", [1, 2])
def test_the_prefix_cache_is_exact_for_one_window_and_for_several(tiny_models, step):
    lora = {**LORA, "layers_to_transform": [1]}
    table = rows_of(*(values[::step] for values in (QUESTIONS, CONTEXTS, TEXTS)))
    cached, plain = (bench_of(tiny_models, table, kept, lora) for kept in (True, False))
    windows = max(map(len, plain.runtime.examples.sequences))
    assert (windows == 1) == (step == 2)
    row = plain.row()
    assert cached.runtime.cache is not None
    before = plain.backbone.layout.state_dict(row)
    for _ in range(2):  # recorded, then replayed
        # as a whole, because the gradient of the output's bias is zero but for rounding
        found, wanted, start = (
            torch.cat([own[name].flatten() for name in before])
            for own in (cached.trained(row), plain.trained(row), before)
        )
        assert_near(found, wanted, start)
    assert cached.runtime.cache.used


def test_the_best_span_has_the_largest_sum_of_logits(tiny_models):
    bench = bench_of(tiny_models, max_answer_length=3)
    bench.backbone.load_row(bench.row())
    examples = bench.runtime.examples
    logits, labels = bench.logits()
    answers = bench.task.answers(logits, examples, bench.rows)
    rows = logits.view(*labels.shape, -1)
    for row, answer in enumerate(answers):
        lengths = examples.columns["sequences"][row].tolist()
        places = torch.split(examples.columns["places"][row], lengths)
        sums = {
            (own[0, i] + own[1, j]).item(): (spots[i, 0].item(), spots[j, 1].item())
            for own, spots in zip(rows[row], places, strict=False)
            for i in range(len(spots))
            for j in range(i, min(i + 3, len(spots)))
            if spots[i, 0] >= 0 and spots[j, 0] >= 0
        }
        begin, end = sums[max(sums)]
        assert answer["answer"] == CONTEXTS[row][begin:end].strip()
        assert answer["answer"] == CONTEXTS[row][answer["start"] : answer["end"]]
        assert 0 < answer["score"] < 1
    again = bench.task.outputs(logits, labels, examples, bench.rows)["answers"]
    assert again == ([each["answer"] for each in answers], [[text] for text in TEXTS])


def test_perfect_logits_find_every_answer(tiny_models):
    bench = bench_of(tiny_models, rows_of(texts=[*TEXTS[:3], ""]), no_answer=True)
    logits, labels = bench.logits()
    perfect = torch.zeros_like(logits)
    for window, label in enumerate(labels.flatten(0, 1).tolist()):
        if label[0] >= 0:
            perfect[window, 0, label[0]] = perfect[window, 1, label[1]] = 10.0
    found, wanted = bench.task.outputs(perfect, labels, bench.runtime.examples, bench.rows)[
        "answers"
    ]
    assert found == [*TEXTS[:3], ""]
    assert METRICS["squad_exact_match"].load()(found, wanted) == 1


def test_metrics_equal_those_of_squad():
    """The functions of SQuAD's own evaluation script (evaluate-v2.0.py)."""

    def normalize_answer(text):
        text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
        return " ".join(re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text).split())

    def compute_f1(gold, predicted):
        gold_tokens, tokens = normalize_answer(gold).split(), normalize_answer(predicted).split()
        same = sum((Counter(gold_tokens) & Counter(tokens)).values())
        if len(gold_tokens) == 0 or len(tokens) == 0:
            return int(gold_tokens == tokens)
        if same == 0:
            return 0
        precision, recall = 1.0 * same / len(tokens), 1.0 * same / len(gold_tokens)
        return (2 * precision * recall) / (precision + recall)

    found = ["The red fox.", "a dog", "", "five", "the", "an old, red fox"]
    answers = [["red fox", "fox"], ["cat"], [""], ["", "six"], ["five"], ["old red dog", "fox"]]
    f1, exact = [], []
    for text, references in zip(found, answers, strict=True):
        gold = [each for each in references if normalize_answer(each)] or [""]
        f1.append(max(compute_f1(each, text) for each in gold))
        exact.append(max(normalize_answer(each) == normalize_answer(text) for each in gold))
    assert METRICS["squad_f1"].load()(found, answers) == pytest.approx(np.mean(f1))
    assert METRICS["squad_exact_match"].load()(found, answers) == pytest.approx(np.mean(exact))
    assert 0 < np.mean(exact) < np.mean(f1) < 1


def test_an_adapter_predicts_the_same_in_plain_peft(tiny_models, tmp_path):
    bench = bench_of(tiny_models)
    row = bench.row()
    bench.backbone.load_row(row)
    logits, _ = bench.logits()
    model = bench.plain_peft(row, tmp_path).float().eval()
    batch = bench.task.collate(bench.runtime.examples, bench.rows)
    del batch["labels"]
    with torch.no_grad():
        output = model(**batch)
    inside = batch["attention_mask"].bool()
    assert_near(logits[:, 0][inside], output.start_logits[inside])
    assert_near(logits[:, 1][inside], output.end_logits[inside])


@pytest.mark.parametrize("strategy", ["fedmerge", "fedem"])
def test_a_run_predicts_exports_and_reports(tmp_path, strategy):
    rows = [
        {
            "client": client,
            "question": "Which one?",
            "context": f"Number {row} is {client}",
            "answers": {"text": [str(row)], "answer_start": [7]},
        }
        for client in ("north", "south")
        for row in range(6)
    ]
    sections = {"backbone": {"model": "tiny:bert"}, "lora": {"r": 2, **LORA}}
    run = run_of(tmp_path / "run", rows, {"name": NAME}, **sections, strategy=strategy)
    write_report([run.path], tmp_path / "report.html")
    assert "squad f1" in (tmp_path / "report.html").read_text()
    if strategy == "fedem":
        return
    inputs = [("Which one?", "Number 2 is north"), {"question": "Who?", "context": LONG}]
    found = run.predict({"north": inputs, "south": inputs[:1]}, device="cpu")
    assert [len(found[client]) for client in ("north", "south")] == [2, 1]
    assert all(
        text[each["start"] : each["end"]] == each["answer"] != ""
        for each, text in zip(found["north"], ("Number 2 is north", LONG), strict=True)
    )
    with pytest.raises(DataError, match="an input must be a question and a context"):
        run.predict({"north": ["Who?"]}, device="cpu")
    with pytest.raises(RunError, match=r"transformers .* has no pipeline for question-answering"):
        run.client("north").pipeline()
    card = (run.client("north").save(tmp_path / "north") / "README.md").read_text()
    assert "AutoModelForQuestionAnswering.from_pretrained('tiny:bert', num_labels=2" in card


# --- edge cases -----------------------------------------------------------------------------------
def test_answers_that_no_window_holds_are_counted(tiny_models):
    table = rows_of(["Where?", "Who?", "Who?"], [LONG, LONG, ""], [LONG[:90], "Rollo", ""])
    bench = bench_of(tiny_models, table, no_answer=True)
    cuts = {what: rows for what, rows in bench.runtime.examples.cuts.items() if rows}
    assert cuts == {
        "have more than 40 tokens and become several windows": [0, 1],
        "have an answer that no window contains (a larger task.stride may help)": [0],
        "have an empty context": [2],
    }
    assert bench.scores(bench.row())["squad_exact_match"] <= 1


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": ["red"], "answer_start": [3]}, r"row 0 .*does not have the answer 'red' at ans"),
        ({"text": ["It"], "answer_start": [-10]}, r"does not have the answer 'It' at answer_start"),
        ({"text": [], "answer_start": []}, r"row 0 .*no answer .*; set task.no_answer: true"),
        ({"text": ["red"]}, r"row 0 .*expected {text: \[...\], answer_start: \[...\]}"),
        ("red", r"row 0 .*has 'red', expected"),
        (None, r"row 0 .*has 'None', expected"),
        ({"text": ["red"], "answer_start": [6.5]}, r"row 0 .*expected {text"),
    ],
)
def test_unsuitable_answers_are_refused(task_of, answers, message):
    table = Dataset.from_dict({"question": ["a"], "context": ["It is red."], "answers": [answers]})
    with pytest.raises(DataError, match=message):
        task_of("bert", table, name=NAME, stride=8).encode(table)


def test_a_long_answer_is_shown_where_it_differs_from_the_context(task_of):
    answers = {"text": ["a" * 99 + "b"], "answer_start": [5]}
    table = Dataset.from_dict({"question": ["a"], "context": ["a" * 120], "answers": [answers]})
    with pytest.raises(
        DataError,
        match=r"answer 'a{40}b' at answer_start 5, but 'a{41}' \(shown from character 59 .*; corr",
    ):
        task_of("bert", table, name=NAME, stride=8).encode(table)


@pytest.mark.parametrize(
    "answers",
    ['{"text": ["red"], "answer_start": [6]}', [{"text": "red", "answer_start": 6}]],
)
def test_answers_may_be_json_or_a_list(task_of, answers):
    table = Dataset.from_dict({"question": ["a"], "context": ["It is red."], "answers": [answers]})
    (label,) = task_of("bert", table, name=NAME, stride=8).encode(table).columns["labels"][0]
    assert label[0] > 0


def test_a_question_of_more_than_half_a_window_is_cut_and_counted(task_of):
    table = rows_of(["Where? " * 20, "Who?"], CONTEXTS[:2], TEXTS[:2])
    task = task_of("bert", table, name=NAME, max_length=40, stride=8)
    examples = task.encode(table)
    assert examples.cuts["have a question cut to 18 tokens"] == [0]
    first = examples.columns["sequences"][0][0]
    kinds = examples.columns["token_type_ids"][0][:first]
    assert int((kinds == 0).sum()) <= 18 + 2  # with [CLS] and [SEP]
    assert int((kinds == 1).sum()) > 8


def test_a_stride_that_leaves_no_room_is_refused(task_of):
    message = r"windows of 40 tokens .*set task.stride to less than 18, or raise task.max_length$"
    with pytest.raises(DataError, match=message):
        task_of("bert", rows_of(), name=NAME, max_length=40, stride=18)
    with pytest.raises(DataError, match=r"less than 62, or use a model with a higher limit$"):
        task_of("bert", rows_of(), name=NAME, stride=70)


def test_a_model_without_a_cls_token_has_a_place_for_no_answer(task_of):
    table = rows_of(QUESTIONS[3:], CONTEXTS[3:], [""])
    for kind in ("llama", "gpt2"):
        task = task_of(kind, table, name=NAME, stride=8, no_answer=True)
        assert task.encode(table).columns["labels"][0].tolist() == [[0, 0]]
