"""Tokenizer, configuration and weights are checked against each other before training."""

from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from datasets import Dataset
from torch import nn

from fedmerge_peft.errors import BackboneError, DataError
from fedmerge_peft.models.pretrained import set_pad_token_id
from fedmerge_peft.tasks.vocabulary import check_vocabulary, position_limit, warn_of_unknown
from made_models import config_of, tokenizer_of, write

CLASSIFICATION, LANGUAGE = "sequence-classification", "causal-lm"


def knowing(size, **config):
    """The parts of a model that the checks read."""
    table = nn.Embedding(size, 4)
    return SimpleNamespace(
        config=hf.LlamaConfig(vocab_size=size, **config),
        generation_config=None,
        get_input_embeddings=lambda: table,
        named_modules=lambda: [],
    )


@pytest.fixture
def tokenizer(tiny_models):
    return tokenizer_of(tiny_models, "llama")


def test_a_vocabulary_of_the_same_size_passes(tokenizer):
    assert check_vocabulary(tokenizer, knowing(400), "x", reads_end=False) == 400


def test_a_tokenizer_without_its_files_is_refused(tmp_path):
    hf.BertTokenizer().save_pretrained(tmp_path)
    empty = hf.AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"tokenizer of x has no tokens but special ones"):
        check_vocabulary(empty, knowing(400), "x", reads_end=False)


def test_many_unknown_tokens_are_warned_about(tiny_models, caplog):
    tokenizer = tokenizer_of(tiny_models, "bert")
    unknown, other = tokenizer.unk_token_id, 42
    warn_of_unknown([[unknown, other, other, other, other, other]], tokenizer)
    assert not caplog.records
    warn_of_unknown([[tokenizer.cls_token_id, unknown, other], [other, unknown]], tokenizer)
    assert "does not know 50 % of the texts' tokens" in caplog.text


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"pad_token": "[PAD]"}, r"has {more} tokens, such as '\[PAD\]' \({size}\), but x has emb"),
        ("refund", r"such as 'refund' \({size}\), but x has embeddings for {size}; name the model"),
    ],
    ids=["pad", "word"],
)
def test_tokens_without_an_embedding_are_refused(tokenizer, added, message):
    size = len(tokenizer)
    if isinstance(added, dict):
        tokenizer.add_special_tokens(added)
    else:
        tokenizer.add_tokens([added])
    with pytest.raises(BackboneError, match=message.format(size=size, more=size + 1)):
        check_vocabulary(tokenizer, knowing(size), "x", reads_end=False)


def test_spare_special_tokens_may_lack_embeddings_until_a_text_has_them(
    tokenizer, tmp_path, task_of
):
    model = hf.LlamaForCausalLM(config_of("llama", tokenizer))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    table = Dataset.from_dict({"text": ["a plain text", "one <image> here"]})
    task = task_of("llama", table, name=LANGUAGE, folder=tmp_path, special_tokens="tokens")
    task.match_inputs(model)
    task.encode(table.select([0]))
    with pytest.raises(
        DataError, match=r"row 1 \(from 0, of .*not among the \d+ that the model knows"
    ):
        task.encode(table)


def test_an_ordinary_token_is_not_the_end_of_a_text(tokenizer):
    word = tokenizer.convert_tokens_to_ids("e")
    model = knowing(400, eos_token_id=word)
    with pytest.raises(
        BackboneError, match=r"treats 'e' \(\d+\) as the end of a text, but the end"
    ):
        check_vocabulary(tokenizer, model, "x", reads_end=True)
    assert check_vocabulary(tokenizer, model, "x", reads_end=False) == 400


def test_the_end_in_a_nested_configuration_is_checked_too(tokenizer):
    word = tokenizer.convert_tokens_to_ids("e")
    model = knowing(400)
    model.config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(vocab_size=400, eos_token_id=word), eos_token_id=None
    )
    with pytest.raises(BackboneError, match="as the end of a text"):
        check_vocabulary(tokenizer, model, "x", reads_end=True)


def test_the_padding_id_reaches_nested_configurations():
    config = hf.LlavaConfig()
    set_pad_token_id(config, 3)
    assert config.text_config.pad_token_id == config.vision_config.pad_token_id == 3


def test_an_ordinary_token_is_not_padding_without_a_position(tiny_models, tmp_path, tokenizer):
    word = tokenizer.convert_tokens_to_ids("e")
    model = hf.RobertaModel(config_of("roberta", tokenizer, pad_token_id=word))
    with pytest.raises(
        BackboneError, match=r"treats 'e' \(\d+\) as padding and gives it no position"
    ):
        check_vocabulary(tokenizer, model, "x", reads_end=False)


LIMITS = [
    ("bert", 128),
    ("roberta", 126),
    ("xlm-roberta", 126),
    ("camembert", 126),
    ("data2vec-text", 126),
    ("mpnet", 126),
    ("longformer", 126),
    ("deberta-v2", 128),
    ("gpt2", 128),
    ("llama", 128),
    ("bart", 128),
    ("opt", 128),
]


@pytest.mark.parametrize(("kind", "limit"), LIMITS, ids=[kind for kind, _ in LIMITS])
def test_tables_of_positions_limit_the_length(kind, limit, tokenizer):
    sizes = {"n_positions": 128} if kind == "gpt2" else {}
    assert position_limit(config_of(kind, tokenizer, pad_token_id=1, **sizes)) == limit


@pytest.mark.parametrize("kind", ["roberta", "mpnet", "xlm-roberta"])
def test_texts_at_the_limit_run_through_the_model(kind, tokenizer, tmp_path, task_of):
    tokenizer.model_max_length = 10**6
    config = config_of(kind, tokenizer, pad_token_id=1, max_position_embeddings=20)
    write(tmp_path, hf.AutoModel, config, tokenizer)
    table = Dataset.from_dict({"text": ["word " * 50], "label": [0]})
    task = task_of("bert", table, name=CLASSIFICATION, folder=tmp_path)
    ids = task.encode(table).columns["input_ids"][0]
    assert len(ids) == 18
    model = hf.AutoModel.from_pretrained(tmp_path)
    assert torch.isfinite(model(input_ids=ids[None]).last_hidden_state).all()


# --- special tokens that are written in texts -----------------------------------------------------
WRITTEN = "the end </s> of it"


def ends(task, ids):
    return ids.tolist().count(task.processor.eos_token_id)


def test_special_tokens_in_classified_texts_are_characters(task_of):
    table = Dataset.from_dict({"text": ["plain", WRITTEN], "label": [0, 1]})
    task = task_of("llama", table, name=CLASSIFICATION)
    ids = task.encode(table).columns["input_ids"][1]
    assert ends(task, ids) == 0
    assert task.processor.decode(ids, skip_special_tokens=True) == WRITTEN


def test_a_tokenizer_that_reads_them_as_tokens_is_refused_with_the_row(task_of):
    table = Dataset.from_dict({"text": ["plain", WRITTEN], "label": [0, 1]})
    task = task_of("llama", table, name=CLASSIFICATION)
    task.processor.split_special_tokens = False
    with pytest.raises(
        DataError,
        match=r"row 1 \(from 0, of the rows that the run uses\): .* takes '</s>' in the te",
    ):
        task.encode(table)


def test_pipelines_read_them_as_characters_too(task_of, tiny_models):
    table = Dataset.from_dict({"text": [WRITTEN], "label": [0]})
    task = task_of("llama", table, name=CLASSIFICATION)
    backbone = SimpleNamespace(tokenizer=None, revision=None, trust_remote_code=False, model="x")
    options = task.pipeline_options(task.recipe, backbone, str(tiny_models / "llama"))
    ids = options["tokenizer"](WRITTEN)["input_ids"]
    assert ids == task.encode(table).columns["input_ids"][0].tolist()


@pytest.mark.parametrize(
    "columns",
    [{"text": ["a", WRITTEN]}, {"prompt": ["a", "b"], "completion": ["c", WRITTEN]}],
    ids=["text", "pairs"],
)
def test_generated_texts_with_special_tokens_need_a_reading(columns, task_of):
    table = Dataset.from_dict(columns)
    with pytest.raises(DataError, match=r"row 1 .* special token '</s>'; set task.special_tokens"):
        task_of("llama", table, name=LANGUAGE).encode(table)
    for reading, count in (("text", 1), ("tokens", 2)):  # one is at the end
        task = task_of("llama", table, name=LANGUAGE, special_tokens=reading)
        ids = task.encode(table).columns["input_ids"][1]
        assert ends(task, ids) == count


def test_messages_have_the_special_tokens_of_the_template_only(task_of):
    chat = [{"role": "user", "content": WRITTEN}, {"role": "assistant", "content": "yes"}]
    table = Dataset.from_dict({"messages": [chat]})
    task = task_of("llama", table, name=LANGUAGE, metrics=["exact_match"])
    examples = task.encode(table)
    assert ends(task, examples.columns["input_ids"][0]) == 2
    assert ends(task, examples.columns["prompt"][0]) == 1
    assert WRITTEN in task.processor.decode(examples.columns["prompt"][0])
