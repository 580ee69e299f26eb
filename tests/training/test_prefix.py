"""The frozen layers before the first that trains: skipping them changes no result."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

from equality import assert_near, tolerance
from fedmerge_peft import Federation, Recipe
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.models.frozen_prefix import find_prefix
from fedmerge_peft.training.plan import Mixture
from fedmerge_peft.training.prefix_cache import PrefixCache
from training.prefix_bench import ROWS, TARGETS

CASES = {
    "bert": {},
    "llama": {},
    "llama-classifier": {},
    "gpt2": {},
    "vit": {},
    "bert-multiple-choice": {},
    "bert-question-answering": {},
    "bert-sentence-embedding": {},
    "one layer": {"lora": {"layers_to_transform": [3]}},
    "a shared A": {"lora": {"merge": "shared_a"}},
    "accumulation": {"batch_size": 2, "gradient_accumulation": 3},
    "checkpointing": {"kind": "llama", "backbone": {"gradient_checkpointing": True}},
}


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", CASES)
def test_the_cache_changes_no_result(make_bench, case):
    options = {"kind": case if case.partition("-")[0] in TARGETS else "bert", **CASES[case]}
    with_cache, without = make_bench(**options), make_bench(cached=False, **options)
    expected = [without.train(), without.train(4)]
    for _ in range(2):  # while the states are recorded, and from the record
        found = [with_cache.train(), with_cache.train(4)]
        assert with_cache.used
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == torch.float64
            assert_near(one, other, without.row)
    assert not torch.allclose(expected[0], expected[1])
    assert with_cache.evaluate(expected[0]) == pytest.approx(
        without.evaluate(expected[0]), rel=tolerance(torch.float64)
    )
    some = np.array([7, 2, 11, 3, 4, 0])
    assert_near(with_cache.losses(expected[0], some), without.losses(expected[0], some))


@pytest.mark.equality
def test_in_bf16_the_cache_differs_by_its_rounding(make_bench):
    """Numbers are rounded differently in a batch that is padded to another length."""
    options = {"mixed_precision": "bf16", "optimizer": "sgd", "learning_rate": 0.1}
    with_cache, without = make_bench(**options), make_bench(cached=False, **options)
    expected = without.train()
    for _ in range(2):
        error, moved = with_cache.train() - expected, expected - without.row
        assert with_cache.used
        assert error.norm() <= tolerance(torch.bfloat16) * moved.norm()


def test_cached_examples_skip_the_frozen_layers(make_bench):
    bench = make_bench()
    frozen, trained = ("base_model.model.bert.encoder.layer." + index for index in "13")
    bench.train()
    assert bench.count(frozen, bench.train)[0] == 0
    assert bench.count(trained, bench.train)[0] > 0
    bench.cache = None
    assert bench.count(frozen, bench.train)[0] > 0


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
def test_a_mixture_is_evaluated_from_the_cache(make_bench):
    bench, plain = make_bench(), make_bench(cached=False)
    served = Mixture(torch.stack([bench.row, bench.train()]), torch.tensor([0.3, 0.7]))
    expected = plain.evaluate(served)
    assert bench.evaluate(served) == pytest.approx(expected, rel=tolerance(torch.float64))
    assert bench.evaluate(served) == pytest.approx(expected, rel=tolerance(torch.float64))


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
def test_generation_runs_all_layers(make_bench):
    bench = make_bench("gpt2", metrics=["exact_match", "rougeL", "perplexity"])
    plain = make_bench("gpt2", metrics=["exact_match", "rougeL", "perplexity"], cached=False)
    bench.evaluate(bench.row)
    runs, found = bench.count("base_model.model.transformer.h.0", lambda: bench.evaluate(bench.row))
    assert runs > 0
    assert bench.used
    assert found == pytest.approx(plain.evaluate(plain.row), rel=tolerance(torch.float64))


def test_the_frozen_prefix_has_no_dropout_in_training(make_bench):
    backbone = make_bench().backbone
    backbone.train()
    training = {
        name
        for name, module in backbone.model.named_modules()
        if isinstance(module, nn.Dropout) and module.training
    }
    assert training
    assert not any(
        "embeddings" in name or "layer.0." in name or "layer.1." in name for name in training
    )
    assert {
        "base_model.model.dropout",
        "base_model.model.bert.encoder.layer.2.output.dropout",
    } < training
    backbone.eval()
    assert not any(module.training for module in backbone.model.modules())


@pytest.mark.parametrize(
    "lora",
    [
        {"layers_to_transform": None},
        {"layers_to_transform": [0, 3]},
        {
            "layers_to_transform": None,
            "target_modules": r".*layer\.[23]\..*query|.*word_embeddings",
        },
        {"trainable_token_indices": [5, 6]},
        {"bias": "all"},
        {"modules_to_save": ["word_embeddings"]},
    ],
    ids=str,
)
def test_there_is_no_prefix_if_an_earlier_layer_trains(make_bench, lora):
    assert make_bench(lora=lora, cached=False).backbone.prefix is None


def test_there_is_no_prefix_if_two_stacks_train():
    def stack(trainable):
        return nn.ModuleList(
            nn.Linear(2, 2).requires_grad_(index >= 1 and trainable) for index in range(3)
        )

    assert find_prefix(nn.ModuleDict({"encoder": stack(True), "decoder": stack(True)})) is None
    assert find_prefix(nn.ModuleDict({"encoder": stack(False), "decoder": stack(False)})) is None
    found = find_prefix(nn.ModuleDict({"encoder": stack(False), "decoder": stack(True)}))
    assert len(found.layers) == 1


def embeddings_of(bench):
    return bench.backbone.model.get_submodule("base_model.model.bert.embeddings")


def drop_by_function(bench):
    """Dropout that belongs to no module, as in some models."""
    model = bench.backbone.model
    embeddings_of(bench).register_forward_hook(
        lambda _, __, output: nn.functional.dropout(output, 0.5, model.training)
    )
    return "dropout that cannot be disabled"


def reach_back(bench):
    """A later layer that uses a tensor inside an earlier one."""
    early, late = bench.backbone.prefix.layers[0], bench.backbone.prefix.first
    seen = {}
    embeddings_of(bench).register_forward_hook(lambda *_: seen.clear())
    early.attention.register_forward_hook(lambda _, __, output: seen.update(states=output[0]))
    late.register_forward_hook(lambda _, __, output: output + seen.get("states", 0))
    return "need more than the output of the first layers"


def require(bench):
    early, late = bench.backbone.prefix.layers[0], bench.backbone.prefix.first
    seen = {}
    embeddings_of(bench).register_forward_hook(lambda *_: seen.clear())
    early.attention.register_forward_hook(lambda _, __, output: seen.update(states=output[0]))
    late.register_forward_hook(lambda _, __, output: output + seen["states"])
    return "does not run without its first layers"


def train_in_front(bench):
    """A trainable tensor that the order of modules does not show."""
    scale = next(p for p in bench.backbone.model.parameters() if p.requires_grad).flatten()[0]
    embeddings_of(bench).register_forward_hook(lambda _, __, output: output * (1 + scale))
    return "trainable parameters precede"


def repeat(bench):
    first = bench.backbone.prefix.first
    bench.backbone.prefix.layers[0].register_forward_hook(lambda _, __, output: first(output))
    return "input is not one tensor"


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("alter", [drop_by_function, reach_back, require, train_in_front, repeat])
def test_models_that_need_their_first_layers_are_detected(make_bench, caplog, alter):
    bench, plain = make_bench(), make_bench(cached=False)
    alter(plain)
    reason = alter(bench)
    with caplog.at_level(logging.INFO, "fedmerge_peft"):
        found = bench.train(), bench.train()
    assert reason in caplog.text
    assert not bench.used
    for row in found:
        assert_near(row, plain.train(), plain.row)


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
def test_the_memory_limit_is_respected(make_bench, caplog):
    sizes = make_bench().examples.lengths.sum()
    needed = sizes * 32 * 8 / 1e9
    fits, tight = make_bench(gigabytes=needed), make_bench(gigabytes=needed * 0.99)
    assert_near(fits.train(), tight.train(), tight.row)
    assert fits.cache.nbytes == needed * 1e9
    assert not tight.used
    assert "training.prefix_cache allows" in caplog.text


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
def test_rows_of_no_client_run_all_layers(make_bench):
    bench = make_bench()
    bench.cache = PrefixCache(bench.backbone, bench.task, bench.examples, [ROWS[:6]], 1.0)
    expected = make_bench(cached=False).losses(bench.row)
    assert_near(bench.losses(bench.row), expected)
    assert_near(bench.losses(bench.row), expected)


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
def test_a_failing_client_leaves_the_model_intact(make_bench):
    bench = make_bench()
    names = [name for name, _ in bench.backbone.model.named_modules()]
    saved = list(bench.backbone.model.state_dict())
    expected = bench.train()

    def fail(*_):
        assert [name for name, _ in bench.backbone.model.named_modules()] == names
        assert list(bench.backbone.model.state_dict()) == saved
        raise KeyboardInterrupt

    handle = bench.backbone.prefix.first.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        bench.train()
    handle.remove()
    assert "forward" not in vars(bench.backbone.prefix.layers[0])
    assert torch.equal(bench.train(), expected)
    bench.cache = None
    assert_near(bench.train(), expected, bench.row)


def test_a_layers_own_forward_is_restored(make_bench):
    bench = make_bench()
    layer = bench.backbone.prefix.layers[0]
    own = layer.forward = layer.forward
    expected = bench.train()
    assert torch.equal(bench.train(), expected)
    assert layer.forward is own


def test_the_callers_random_numbers_and_the_models_mode_do_not_change(make_bench):
    bench = make_bench()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    bench.evaluate(bench.row)
    assert torch.equal(torch.rand(3), expected)
    assert not bench.backbone.model.training


SMALL = [
    "data.max_train=8",
    "data.max_test=6",
    "data.filter.provider=[Alder, Birch]",
    "training.device=cpu",
    "baselines=[]",
]


@pytest.mark.equality
def test_one_engine_serves_several_strategies_from_its_cache():
    def recipe(gigabytes, strategy):
        overrides = [
            f"training.prefix_cache={gigabytes}",
            f"strategy={strategy}",
            "lora.layers_to_transform=[1]",
            "training.optimizer=sgd",
            "training.learning_rate=0.1",
            "rounds=2",
        ]
        return Recipe.load("smoke", [*SMALL, *overrides])

    engines = {
        gigabytes: LocalEngine.from_recipe(recipe(gigabytes, "local")) for gigabytes in (0, 1)
    }
    assert engines[0].runtime.cache is None
    for strategy in ("local", "fedavg", "fedmerge", "fedem"):
        found = {}
        for gigabytes, engine in engines.items():
            federation = Federation(recipe(gigabytes, strategy), engine)
            records = list(federation.rounds())
            found[gigabytes] = federation.strategy.soup.rows, records[-1].served.mean
        start = Federation(recipe(0, strategy), engines[0]).strategy.soup.rows
        assert_near(found[1][0], found[0][0], start)
        assert found[1][1] == pytest.approx(found[0][1])
    assert engines[1].runtime.cache.used
