"""States of the frozen layers on disk: later runs read them, with the same results bit for bit."""

import dataclasses
from pathlib import Path

import pytest
import torch

from equality import tolerance
from fedmerge_peft import Recipe
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.models.frozen_prefix import Prefix
from fedmerge_peft.sites.config import SiteSettings
from fedmerge_peft.training import prefix_cache
from fedmerge_peft.training.prefix_disk import computation, disk_cache
from fedmerge_peft.util.tensor_cache import TensorCache


@pytest.fixture
def computed(monkeypatch):
    """Numbers of examples whose states were computed, one entry per pass."""
    counts = []
    plain = Prefix.states

    def counted(prefix, run):
        states = plain(prefix, run)
        counts.append(len(states))
        return states

    monkeypatch.setattr(Prefix, "states", counted)
    return counts


def results(bench):
    return bench.train(), bench.losses(bench.row)


@pytest.mark.equality
@pytest.mark.parametrize("kind", ["bert", "gpt2", "vit"])
def test_the_first_run_the_next_one_and_one_without_have_the_same_bits(
    make_bench, tmp_path, computed, kind
):
    plain = results(make_bench(kind))
    first = results(make_bench(kind, disk=TensorCache(tmp_path, 1e9)))
    assert sum(computed) == 24
    again = make_bench(kind, disk=TensorCache(tmp_path, 1e9))
    found = results(again)
    assert sum(computed) == 24  # read, not computed
    assert again.used
    for one, other, third in zip(plain, first, found, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


@pytest.mark.equality
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_states_in_half_precision_need_half_of_the_space(make_bench, tmp_path, computed, dtype):
    options = {"optimizer": "sgd", "learning_rate": 0.1}
    plain = make_bench(**options)
    expected = results(plain)
    rounded = make_bench(disk=TensorCache(tmp_path, 1e9), dtype=dtype, **options)
    first = results(rounded)
    assert rounded.used
    assert 2 * rounded.cache.nbytes == plain.cache.nbytes
    passes = sum(computed)
    again = results(make_bench(disk=TensorCache(tmp_path, 1e9), dtype=dtype, **options))
    assert sum(computed) == passes
    starts = plain.row, torch.zeros_like(expected[1])
    for one, other, exact, start in zip(first, again, expected, starts, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == torch.float32
        assert 0 < (one - exact).norm() <= tolerance(dtype) * (exact - start).norm()
    make_bench(disk=TensorCache(tmp_path, 1e9), **options).train()
    assert sum(computed) == passes + 12  # exact states are others


def test_states_beyond_the_range_of_float16_are_refused(make_bench):
    bench = make_bench(dtype=torch.float16)
    last = bench.backbone.model.get_submodule("base_model.model.bert.encoder.layer.1.output")
    with torch.no_grad():
        last.LayerNorm.bias[0] = 1e5
    with pytest.raises(
        RecipeError,
        match=r"prefix_dtype: .* reach 1e\+05, .* float16; use bfloat16",
    ):
        bench.train()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["training.prefix_cache=0", "lora.layers_to_transform=[1]"], "training.prefix_cache is 0"),
        ([], "no layers are known to precede the first trainable one"),
        (["lora.layers_to_transform=[1]"], None),
    ],
    ids=str,
)
def test_a_format_of_states_that_are_not_kept_is_warned_of(smoke, caplog, changes, reason):
    LocalEngine.from_recipe(smoke("training.prefix_dtype=bfloat16", *changes))
    assert ("prefix_dtype has no effect" in caplog.text) == (reason is not None)
    assert reason is None or reason in caplog.text


def test_states_do_not_depend_on_the_passes_that_need_them(make_bench):
    one, other = make_bench(), make_bench()
    one.evaluate(one.row, batch_size=1)
    other.train()
    assert torch.equal(one.train(), other.train())


@pytest.mark.equality
def test_damaged_states_are_computed_again(make_bench, tmp_path, computed, caplog):
    expected = results(make_bench(disk=TensorCache(tmp_path, 1e9)))
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = results(make_bench(disk=TensorCache(tmp_path, 1e9)))
    assert "damaged" in caplog.text
    assert sum(computed) == 24
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    results(make_bench(disk=TensorCache(tmp_path, 1e9)))
    assert sum(computed) == 24


def other_weights(bench):
    with torch.no_grad():
        next(bench.backbone.prefix.layers[0].parameters()).view(-1)[0] += 1e-3


def other_setting(bench):
    bench.backbone.model.get_base_model().config.layer_norm_eps *= 2


def other_tokens(bench):
    columns = {name: list(each) for name, each in bench.examples.columns.items()}
    changed = columns["input_ids"][3].clone()
    changed[1] += 1
    columns["input_ids"][3] = changed
    bench.examples = dataclasses.replace(bench.examples, columns=columns)
    bench.cache._examples = bench.examples


@pytest.mark.parametrize("change", [other_weights, other_setting, other_tokens])
def test_states_of_another_model_or_of_other_tokens_are_not_used(
    make_bench, tmp_path, computed, change
):
    results(make_bench(disk=TensorCache(tmp_path, 1e9)))
    bench = make_bench(disk=TensorCache(tmp_path, 1e9))
    change(bench)
    results(bench)
    assert sum(computed) == 24


@pytest.mark.parametrize(
    "options",
    [{"mixed_precision": "bf16"}, {"lora": {"layers_to_transform": [3]}}],
    ids=["precision", "layer"],
)
def test_states_of_another_precision_or_layer_are_not_used(make_bench, tmp_path, computed, options):
    results(make_bench(disk=TensorCache(tmp_path, 1e9)))
    results(make_bench(disk=TensorCache(tmp_path, 1e9), **options))
    assert sum(computed) == 24


def test_keys_contain_the_number_of_threads():
    usual, cpu = torch.get_num_threads(), torch.device("cpu")
    try:
        torch.set_num_threads(1)
        one = computation(cpu)
        torch.set_num_threads(2)
        assert computation(cpu) != one
    finally:
        torch.set_num_threads(usual)
    assert len(computation(cpu)) == len(one)


def test_heads_labels_and_adapters_do_not_matter(make_bench, tmp_path, computed):
    results(make_bench(disk=TensorCache(tmp_path, 1e9)))
    bench = make_bench(disk=TensorCache(tmp_path, 1e9), lora={"r": 4}, batch_size=3)
    results(bench)
    assert sum(computed) == 12


def test_long_groups_are_computed_in_parts(make_bench, tmp_path, monkeypatch, computed):
    monkeypatch.setattr(prefix_cache, "_POSITIONS", 20)
    results(make_bench(disk=TensorCache(tmp_path, 1e9)))
    assert len(computed) > 2
    assert sum(computed) == 12
    assert len(list(tmp_path.iterdir())) == len(computed)


def recipe(*overrides):
    return Recipe.load("smoke", ["baselines=[]", *overrides])


def test_recipe_and_environment_place_and_bound_the_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("FEDMERGE_PREFIX_DISK", raising=False)
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path))
    assert disk_cache(recipe()).folder == tmp_path / "prefix"
    assert disk_cache(recipe("training.prefix_disk=2"))._max_bytes == 2e9
    assert disk_cache(recipe("training.prefix_disk=0")) is None
    monkeypatch.setenv("FEDMERGE_PREFIX_DISK", "3")
    assert disk_cache(recipe("training.prefix_disk=0"))._max_bytes == 3e9
    monkeypatch.setenv("FEDMERGE_PREFIX_DISK", "0")
    assert disk_cache(recipe()) is None
    for text in ("much", "-1", "nan"):
        monkeypatch.setenv("FEDMERGE_PREFIX_DISK", text)
        with pytest.raises(RecipeError, match="FEDMERGE_PREFIX_DISK: expected a number of GB"):
            disk_cache(recipe())


def test_a_user_without_a_home_has_no_cache_on_disk(monkeypatch, caplog):
    for name in ("FEDMERGE_PREFIX_DISK", "FEDMERGE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: Path("~nobody-of-this-name").expanduser())
    assert disk_cache(recipe()) is None
    assert "set FEDMERGE_CACHE" in caplog.text


def test_models_with_code_of_their_own_have_no_cache_on_disk(monkeypatch):
    monkeypatch.delenv("FEDMERGE_PREFIX_DISK", raising=False)
    assert disk_cache(recipe("backbone.trust_remote_code=true")) is None
    assert disk_cache(recipe("backbone.model=memory:0123456789abcdef")) is None


def test_a_site_keeps_states_only_if_its_own_environment_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path))
    monkeypatch.delenv("FEDMERGE_PREFIX_DISK", raising=False)
    applied = SiteSettings().apply_to(recipe("training.prefix_disk=7"))
    assert disk_cache(applied) is None
    monkeypatch.setenv("FEDMERGE_PREFIX_DISK", "1")
    assert disk_cache(applied)._max_bytes == 1e9
