"""Settings of generated text: sampling, stop strings, streaming."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe.tasks import CausalLMRecipe
from fedmerge_peft.tasks.chat_messages import add_system
from fedmerge_peft.tasks.chat_template import set_chat_template
from tasks.causal_lm_tables import CHATS, NAME, PAIRS

CPU = torch.device("cpu")


@pytest.fixture
def completed(task_of, tiny_models):
    """``completed(prompts, **settings)``: the task, the model, the encoded prompts, the texts."""
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_models / "llama").eval()

    def complete(prompts, **settings):
        task = task_of(
            "llama", PAIRS, name=NAME, metrics=["exact_match"], **{"max_new_tokens": 12, **settings}
        )
        examples = task.encode_prompts(prompts)
        rows = np.arange(len(prompts))
        return task, model, examples, task.complete(model, examples, rows, CPU)

    return complete


PROMPTS = ["Two", "Name a colour of the rainbow and"]


def test_sampling_is_random_and_repeatable(completed):
    *_, greedy = completed(PROMPTS)
    task, model, examples, sampled = completed(PROMPTS, do_sample=True, temperature=5.0)
    assert sampled != greedy
    state = torch.get_rng_state()
    assert task.complete(model, examples, np.arange(2), CPU) == sampled
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("settings", [{"temperature": 1e-4}, {"top_p": 1e-9}])
def test_sampling_of_the_most_likely_tokens_alone_is_greedy(completed, settings):
    assert completed(PROMPTS, do_sample=True, **settings)[-1] == completed(PROMPTS)[-1]


def test_a_sample_follows_the_softmax_of_tempered_logits(completed):
    """Frequencies of the first token, from 400 prompts, against the model's probabilities."""
    task, model, examples, _ = completed(["Two"], do_sample=True, temperature=2.0, max_new_tokens=1)
    prompt = examples.columns["prompt"][0]
    with torch.no_grad():
        expected = torch.softmax(model(prompt[None]).logits[0, -1].double() / 2, dim=-1)
    texts = task.complete(model, examples, np.zeros(400, dtype=int), CPU)
    likely = int(expected.argmax())
    share = np.mean([text == task.processor.decode([likely]).strip() for text in texts])
    deviation = (float(expected[likely]) * (1 - float(expected[likely])) / 400) ** 0.5
    assert abs(share - float(expected[likely])) < 5 * deviation


@pytest.mark.parametrize("adapted", [False, True])
def test_a_models_generation_config_has_no_effect_but_for_its_tokens(completed, adapted):
    task, model, examples, expected = completed(PROMPTS)
    likely = int(task.next_logits(model, examples, np.arange(2), CPU)[0, 0].argmax())
    values = {"no_repeat_ngram_size": 1, "suppress_tokens": [likely], "num_beams": 3, "top_k": 7}
    model.generation_config.update(**values, temperature=9.0, do_sample=True, max_length=3)
    if adapted:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    before = model.generation_config.to_dict()
    assert task.complete(model, examples, np.arange(2), CPU) == expected
    assert model.generation_config.to_dict() == before
    model.generation_config.eos_token_id = likely
    (first, _) = task.complete(model, examples, np.arange(2), CPU)
    assert first == task.processor.decode([likely]) != expected[0]  # it ends after this token


def test_a_text_ends_before_the_first_stop_string(completed):
    *_, whole = completed(PROMPTS)
    stop = whole[0][3:5]
    task, model, examples, texts = completed(PROMPTS, stop_strings=["nowhere", stop])
    assert texts == [text.partition(stop)[0].strip() for text in whole]
    assert texts[0] != whole[0]
    task.next_logits(model, examples, np.arange(2), CPU)  # its two tokens are not cut


@pytest.mark.parametrize("has_stop", [False, True])
def test_a_stream_is_the_completion_in_parts(completed, has_stop):
    *_, (whole,) = completed(PROMPTS[:1])
    settings = {"stop_strings": [whole[4:7]]} if has_stop else {}
    task, model, examples, (text,) = completed(PROMPTS[:1], **settings)
    parts: list[str] = []
    assert task.stream(model, examples, parts.append, CPU) == text == "".join(parts)
    assert len(parts) > 1


@pytest.mark.parametrize("key", ["temperature", "top_p"])
def test_settings_of_sampling_need_sampling(key):
    with pytest.raises(RecipeError, match=f"{key}: has an effect on sampled tokens only"):
        CausalLMRecipe(**{key: 0.5})


@pytest.mark.parametrize("own", [False, True])
def test_a_tokenizer_writes_the_system_prompt_of_the_recipe(task_of, own):
    recipe = CausalLMRecipe(system_prompt='Say "no"\n\\ ü')
    tokenizer = task_of("llama", CHATS, name=NAME).processor
    chat = [{"role": "user", "content": "Hello"}]
    chat = [{"role": "system", "content": "Mine"}, *chat] if own else chat
    expected = tokenizer.apply_chat_template(add_system(recipe.system_prompt, chat), tokenize=False)
    set_chat_template(tokenizer, recipe)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == expected
    assert ("Mine" if own else 'Say "no"\n\\ ü') in expected
