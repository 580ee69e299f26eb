"""Words and tags become tokens with labels, and predictions become tags again."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

from fedmerge_peft import Recipe
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks import Predictions, check_table
from fedmerge_peft.tasks.cuts import warn_of_cuts
from fedmerge_peft.tasks.entity_metrics import continues_nothing
from fedmerge_peft.tasks.metrics import score
from fedmerge_peft.tasks.tagged_words import first_tokens, joined_bounds
from tasks.made_examples import tagged

NAME = "token-classification"
LABELS = ["B-LOC", "B-PER", "I-PER", "O"]


def table_of(words, tags):
    return Dataset.from_dict({"tokens": words, "ner_tags": tags})


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_the_first_token_of_a_word_has_its_tag_and_others_have_none(task_of, kind):
    task = task_of(kind, tagged(3), name=NAME)
    assert task.labels == LABELS
    examples = task.encode(tagged(3))
    for row, words in enumerate(tagged(3)["tokens"]):
        labels = examples.columns["labels"][row]
        ids = examples.columns["input_ids"][row]
        begins = torch.nonzero(labels != -100).flatten().tolist()
        parts = [
            task.processor.decode(ids[begin:end], skip_special_tokens=True).strip()
            for begin, end in zip(begins, [*begins[1:], len(ids)], strict=True)
        ]
        assert parts == words
        assert [LABELS[label] for label in labels[labels != -100]] == tagged(3)["ner_tags"][row]


def test_a_single_tag_is_refused(tmp_path):
    table = table_of([["Ada", "lives"]] * 9, [["O", "O"]] * 9)
    recipe = Recipe(
        name="tags",
        task={"name": NAME},
        backbone={"model": "tiny:bert"},
        data={"path": str(tmp_path), "partition": {"scheme": "iid", "clients": 1}},
    )
    message = "all labels in the data are 'O', so there is nothing to learn"
    with pytest.raises(DataError, match=message):
        check_table(recipe.task, table)
    with pytest.raises(DataError, match=message):
        LocalEngine.from_recipe(recipe, {"train": table})


def test_a_token_belongs_to_the_word_after_its_space_and_words_may_have_none():
    words = ["Ada", "", "lives"]  # "Ada  lives"
    assert first_tokens(
        joined_bounds(words), [(0, 0), (0, 2), (2, 3), (4, 8), (8, 10)]
    ).tolist() == [1, -1, 3]
    assert first_tokens(joined_bounds(["a"]), [(0, 0)]).tolist() == [-1]


def test_batches_are_padded_with_positions_without_loss(task_of):
    task = task_of("bert", tagged(2), name=NAME)
    batch = task.collate(task.encode(tagged(2)), np.arange(2))
    assert batch["labels"].shape == batch["input_ids"].shape
    assert bool((batch["labels"][batch["attention_mask"] == 0] == -100).all())
    assert task.count_terms(batch["labels"]) == sum(map(len, tagged(2)["tokens"]))


def test_long_texts_lose_words_and_dropped_words_are_counted(task_of, caplog):
    words = [["one"] * 60, ["a", "", "b"], ["Bo", "went"]]
    table = table_of(words, [["O"] * 60, ["O"] * 3, ["O", "I-PER"]])
    task = task_of("bert", table, name=NAME, max_length=32)
    examples = task.encode(table)
    warn_of_cuts(examples, {"training": np.arange(3)})
    assert "1 of 3 examples are longer than 32 tokens and were truncated" in caplog.text
    assert "1 of 3 examples have words that the tokenizer drops" in caplog.text
    assert "1 of 3 examples have a tag such as I-PER after O" in caplog.text
    logits = torch.zeros(1, 32, 2)
    answers = task.answers(logits, examples, np.array([0]))
    assert len(answers[0]["tags"]) == 60
    assert answers[0]["tags"][-1] is None
    assert task.answers(logits, examples, np.array([1]))[0]["tags"] == ["I-PER", None, "I-PER"]


def test_answers_are_read_at_the_words_on_either_side_of_padding(task_of):
    task = task_of("llama", tagged(4), name=NAME)
    examples = task.encode(tagged(4))
    for task.padding in ("right", "left"):
        labels = task.collate(examples, np.arange(4))["labels"]
        logits = torch.nn.functional.one_hot(labels.clamp_min(0), 4).float() * 9
        found = [each["tags"] for each in task.answers(logits, examples, np.arange(4))]
        assert found == tagged(4)["ner_tags"][:]


@pytest.mark.parametrize(
    ("words", "tags", "options", "message"),
    [
        ([["a", "b"]], [["O"]], {}, r"row 0 .*: 2 words in column 'tokens', but 1 tag in"),
        ([["a"], []], [["O"], []], {}, r"row 1 .*: no word has tokens"),
        ([["a", None]], [["O", "O"]], {}, r"row 0 .*'tokens' has a list with an empty value"),
        ([["a"], None], [["O"], ["O"]], {}, r"row 1 .*'tokens' is empty \(null\)"),
        (["a"], [["O"]], {}, r"task.words: column 'tokens' has the type string, expected lists"),
        ([[1]], [["O"]], {}, r"task.words: column 'tokens' has lists of int64"),
        ([["a"]], [[0.5]], {}, r"task.tags: column 'ner_tags' has lists of double"),
        ([["a"]], [["O"]], {"tags": "tag"}, r"task.tags: there is no column 'tag'"),
        ([["a"]], [["NOUN"]], {}, r"entity_f1 needs the tags of IOB2 or BIOES.*'NOUN'"),
        ([["a"]], [[3]], {}, r"entity_f1 needs the tags of IOB2 or BIOES"),
        ([["a"]], [[-1]], {"metrics": ["tag_accuracy"]}, r"has the label -1, expected ids from 0"),
        ([["a"]], [[]], {}, r"task.tags: column 'ner_tags' has no values to infer labels from"),
    ],
)
def test_unsuitable_rows_are_refused(task_of, words, tags, options, message):
    table = table_of(words, tags)
    with pytest.raises(DataError, match=message):
        task_of("bert", table, name=NAME, **options).encode(table)


def test_an_unknown_tag_is_refused_with_its_row_and_parts_of_speech_are_accepted(task_of):
    task = task_of("bert", tagged(3), name=NAME)
    with pytest.raises(DataError, match=r"row 1 .*'ner_tags': 'B-ORG' is not a known"):
        task.encode(table_of([["a"], ["b"]], [["O"], ["B-ORG"]]))
    table = table_of([["a", "b"]], [["DET", "NOUN"]])
    assert task_of("bert", table, name=NAME, metrics=["tag_accuracy"]).labels == ["DET", "NOUN"]


def test_tags_are_matched_by_name_whatever_their_order(task_of):
    def classes(names, ids):
        features = Features(
            {"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))}
        )
        return Dataset.from_dict({"tokens": [["a", "b"]], "ner_tags": [ids]}, features=features)

    table = classes(["O", "B-PER"], [0, 1])
    task = task_of("bert", table, name=NAME)
    assert task.labels == ["O", "B-PER"]
    for other in (classes(["B-PER", "O"], [1, 0]), table_of([["a", "b"]], [["O", "B-PER"]])):
        renamed = type(task).relabel(task.recipe, other, task.labels)
        assert renamed.features["ner_tags"].feature.names == task.labels
        assert renamed["ner_tags"][:] == [[0, 1]]
        assert torch.equal(
            torch.cat(list(task.encode(other).columns["labels"])),
            torch.cat(list(task.encode(table).columns["labels"])),
        )
    blank = type(task).placeholder(task.recipe, task.labels, ["tokens", "ner_tags", "by"])
    assert type(task).labels_in(task.recipe, blank) == task.labels


def test_metrics_equal_seqeval():
    random = np.random.default_rng(0)
    names = np.array(["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "S-PER", "E-PER"])
    sizes = random.integers(1, 9, 40)
    predicted, expected = ([names[random.integers(0, 7, n)].tolist() for n in sizes] for _ in "pe")
    found = score(
        ["entity_f1", "entity_precision", "entity_recall", "tag_accuracy"],
        Predictions(outputs={"tags": (predicted, expected)}),
    )
    assert found["entity_f1"] == f1_score(expected, predicted)
    assert found["entity_precision"] == precision_score(expected, predicted)
    assert found["entity_recall"] == recall_score(expected, predicted)
    assert found["tag_accuracy"] == accuracy_score(expected, predicted)


@pytest.mark.parametrize(
    ("predicted", "expected", "value"),
    [
        (["O", "O"], ["O", "O"], "nan"),
        (["O", "B-A"], ["O", "O"], "0.0"),
        (["O", "O"], ["O", "B-A"], "0.0"),
        (["I-A", "O"], ["B-A", "O"], "1.0"),  # as in CoNLL's script
        (["B-A", "B-A"], ["B-A", "I-A"], "0.0"),
    ],
)
def test_clients_with_few_entities_have_defined_scores_without_warnings(predicted, expected, value):
    predictions = Predictions(outputs={"tags": ([predicted], [expected])})
    assert str(score(["entity_f1"], predictions)["entity_f1"]) == value


def test_tags_that_continue_nothing():
    assert not continues_nothing(["B-A", "I-A", "O", "B-B", "E-B", "S-A"])
    assert continues_nothing(["O", "I-A"])
    assert continues_nothing(["B-A", "I-B"])
    assert continues_nothing(["E-A"])
