"""Every exception of a library becomes one error of one line."""

import builtins

import pytest
from datasets import Dataset

from fedmerge_peft.errors import BackboneError, DataError
from fedmerge_peft.util.library_errors import library_errors, reason_of

BUILTIN = [
    kind
    for kind in vars(builtins).values()
    if isinstance(kind, type)
    and issubclass(kind, BaseException)
    and not issubclass(kind, KeyboardInterrupt | SystemExit | GeneratorExit)
]
TEXTS = Dataset.from_dict({"text": ["a parcel", "a refund"], "label": [0, 1]})
CHATS = Dataset.from_dict({"messages": [[{"role": "user", "content": "hello"}]]})
CHAT_TASK = {"name": "causal-lm"}
CLASSES = {"name": "sequence-classification"}


def instance(kind):
    if issubclass(kind, UnicodeDecodeError):
        return kind("utf-8", b"x", 0, 1, "why")
    if issubclass(kind, UnicodeEncodeError):
        return kind("utf-8", "x", 0, 1, "why")
    if issubclass(kind, UnicodeTranslateError):
        return kind("x", 0, 1, "why")
    if issubclass(kind, BaseExceptionGroup):
        return kind("why", [ValueError("inner")])
    return kind("why\nmore lines")


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.fixture(params=BUILTIN, ids=lambda kind: kind.__name__)
def error(request):
    return instance(request.param)


def check(found, kind, start):
    assert type(found.value) is kind
    assert str(found.value).startswith(start)
    assert "\n" not in str(found.value)
    assert "why" in str(found.value)


def test_tokenizers(error, task_of, monkeypatch):
    task = task_of("bert", TEXTS, **CLASSES)
    usual = type(task.processor).__call__

    def fail(self, text, *rest, **options):
        if "a refund" in ([text] if isinstance(text, str) else text):
            raise error
        return usual(self, text, *rest, **options)

    monkeypatch.setattr(type(task.processor), "__call__", fail)
    with pytest.raises(DataError) as found:
        task.encode(TEXTS)
    check(
        found,
        DataError,
        "row 1 (from 0, of the rows that the run uses): the tokenizer fails on 'a refund': ",
    )


def test_tokenizers_that_are_loaded(error, task_of, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", raising(error))
    with pytest.raises(BackboneError) as found:
        task_of("bert", TEXTS, **CLASSES)
    check(found, BackboneError, "backbone.tokenizer: Tokenizer of ")


def test_chat_templates(error, task_of, monkeypatch):
    task = task_of("llama", CHATS, **CHAT_TASK)
    monkeypatch.setattr(task.processor, "apply_chat_template", raising(error))
    with pytest.raises(DataError) as found:
        task.encode(CHATS)
    check(
        found,
        DataError,
        "row 0 (from 0, of the rows that the run uses): the chat template rejects the messages",
    )


def test_models_that_are_loaded(error, make_backbone, monkeypatch):
    from transformers import AutoModelForSequenceClassification

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", raising(error))
    with pytest.raises(BackboneError) as found:
        make_backbone("bert", {"target_modules": ["query"]})
    check(found, BackboneError, "backbone.model: ")


def test_adapters(error, make_backbone, monkeypatch):
    monkeypatch.setattr("peft.get_peft_model", raising(error))
    with pytest.raises(BackboneError) as found:
        make_backbone("bert", {"target_modules": ["query"]})
    check(found, BackboneError, "lora: ")


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(1), DataError("own")])
def test_own_errors_and_requests_to_stop_pass(stop):
    with pytest.raises(type(stop)) as found, library_errors(BackboneError):
        raise stop
    assert found.value is stop


def test_a_template_that_fails_is_one_line_and_code_2(tmp_path, tiny_models, capsys, monkeypatch):
    import json

    from transformers import AutoTokenizer

    from fedmerge_peft.cli import main

    monkeypatch.setenv("COLUMNS", "300")
    tokenizer = AutoTokenizer.from_pretrained(tiny_models / "llama")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    rows = [json.dumps({"messages": turns, "site": f"s{n % 2}"}) for n in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    recipe = {
        "name": "chats",
        "rounds": 1,
        "task": {"name": "causal-lm"},
        "backbone": {"model": "tiny:llama", "tokenizer": str(tmp_path / "tokenizer")},
        "lora": {"target_modules": ["q_proj"]},
        "data": {
            "path": str(tmp_path / "data.jsonl"),
            "partition": {"scheme": "natural", "by": "site"},
        },
        "training": {"device": "cpu"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(SystemExit) as code:
        main(["run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")])
    assert code.value.code == 2
    written = capsys.readouterr().err
    assert "chat template rejects the messages: TypeError: " in written
    assert "Traceback" not in written


def test_several_templates_without_a_default_are_refused(task_of):
    task = task_of("llama", CHATS, **CHAT_TASK)
    template = task.processor.chat_template
    task.processor.chat_template = {"tool_use": template, "rag": template}
    with pytest.raises(
        DataError, match=r"several chat templates \(rag, tool_use\) and none is called"
    ):
        task.encode(CHATS)


def test_reasons_have_no_final_period():
    assert reason_of(ValueError("No head. Name one.\nMore lines.")) == "No head. Name one"
    assert reason_of(KeyError("layer.")) == "KeyError: 'layer.'"


def test_reasons_name_no_addresses_of_objects():
    error = ValueError("cannot identify image file <_io.BytesIO object at 0x7f8653802980>")
    assert reason_of(error) == "cannot identify image file"
