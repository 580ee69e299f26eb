"""The files that only some runs have: blocks, private heads, decisions, releases, baselines."""

import random
import shutil

import pytest
from tests.runs.conftest import TINY
from tests.runs.test_damage import DAMAGE, attempt, flipped, places, reading

from fedmerge_peft import federate
from fedmerge_peft.cli import main
from fedmerge_peft.runs.cleanup import files_in
from fedmerge_peft.runs.verify import verify

pytestmark = pytest.mark.slow
KINDS = {
    "blocks": [
        "strategy={name: fedmerge, adapters: 3, blocks: modules, start: independent}",
        "baselines=[fedavg]",
        "training.learning_rate=auto",
    ],
    "private heads": ["strategy={name: fedavg, head: private}"],
    "private": ["strategy=fedavg", "privacy={mode: central, clip: 1.0, noise: 1.0}"],
}
FLIPS, DAMAGED = 100, 60


@pytest.fixture(scope="module", params=KINDS)
def other(request, smoke, smoke_engine, tmp_path_factory):
    path = tmp_path_factory.mktemp("other") / "run"
    recipe = smoke(*TINY, "baselines=[]", *KINDS[request.param])
    return federate(recipe, path, engine=smoke_engine.with_recipe(recipe)).path


@pytest.fixture
def copied(other, tmp_path):
    return shutil.copytree(other, tmp_path / "run")


def test_a_single_flipped_bit_is_harmless_or_reported(copied):
    chance, whole, told = random.Random(1), reading(copied), 0
    for path, at, bit in places(copied, chance, FLIPS):
        content = path.read_bytes()
        path.write_bytes(flipped(content, at, bit))
        _, error = attempt(lambda: verify(copied))
        told += bool(error)
        assert path.name in error or not error
        if not error:
            read, refused = attempt(lambda: reading(copied))
            assert path.name in refused if refused else read == whole, (path, at, bit)
        path.write_bytes(content)
    assert told > 0.9 * FLIPS


def test_damaged_json_is_one_error(copied, capsys):
    chance = random.Random(1)
    files = sorted(path for path in files_in(copied) if path.suffix in (".json", ".jsonl"))
    for trial in range(DAMAGED):
        path, damage = chance.choice(files), DAMAGE[trial % len(DAMAGE)]
        text = path.read_text()
        path.write_text(damage(text, chance))
        command = ["verify", "scores"][trial % 2]
        with pytest.raises(SystemExit) as stopped:
            main([command, str(copied)])
        error = capsys.readouterr().err
        assert stopped.value.code in (None, 0, 2)
        assert "Traceback" not in error
        if command == "verify" and path.read_text() != text:
            assert stopped.value.code == 2
            assert path.name in error
        path.write_text(text)
