"""Tensors on disk: what is read is what was written, whatever else happens to the folder."""

import os
import stat
import threading

import pytest
import torch

from fedmerge_peft.util import private_folder, tensor_cache
from fedmerge_peft.util.tensor_cache import TensorCache

SIZE = 4 * 1000


def tensor(seed, size=1000):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def get(cache, key, size=1000, dtype=torch.float32):
    return cache.get(key, (size,), dtype)


@pytest.mark.parametrize("size", [0, 1000, 300_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_another_object_reads_the_same_bits(tmp_path, dtype, size):
    written = tensor(0, size).to(dtype)
    TensorCache(tmp_path / "new", 1e9).put("one", written)
    assert torch.equal(get(TensorCache(tmp_path / "new", 1e9), "one", size, dtype), written)


def test_a_key_that_was_not_written_is_missing(tmp_path):
    assert get(TensorCache(tmp_path / "new", 1e9), "one") is None
    assert not (tmp_path / "new").exists()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-8])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def forget_the_sum(path):
    from safetensors.torch import save_file

    save_file({"tensor": tensor(0)}, path)


def write_another_shape(path):
    TensorCache(path.parent, 1e9).put(path.stem, tensor(0, 7))


@pytest.mark.parametrize(
    "damage",
    [truncate, flip_a_bit, forget_the_sum, write_another_shape, lambda path: path.write_bytes(b"")],
)
def test_a_damaged_file_is_missing_until_it_is_written_again(tmp_path, caplog, damage):
    cache = TensorCache(tmp_path, 1e9)
    cache.put("one", tensor(0))
    damage(tmp_path / "one.safetensors")
    assert get(cache, "one") is None
    assert "damaged" in caplog.text
    assert list(tmp_path.iterdir()) == []
    cache.put("one", tensor(0))
    assert torch.equal(get(cache, "one"), tensor(0))


def test_a_read_tensor_can_be_changed_without_changing_the_file(tmp_path):
    cache = TensorCache(tmp_path, 1e9)
    cache.put("large", tensor(0, 300_000))
    get(cache, "large", 300_000).zero_()
    assert torch.equal(get(cache, "large", 300_000), tensor(0, 300_000))


def test_the_least_recently_used_go_first_and_the_limit_holds(tmp_path):
    earlier = TensorCache(tmp_path, 1e9)
    for number in range(4):
        earlier.put(f"old{number}", tensor(number))
        os.utime(tmp_path / f"old{number}.safetensors", (number, number))
    size = (tmp_path / "old0.safetensors").stat().st_size
    cache = TensorCache(tmp_path, 4.5 * size)
    assert get(cache, "old0") is not None  # used now
    for number in range(2):
        cache.put(f"new{number}", tensor(10 + number))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 4.5 * size
    names = sorted(path.stem for path in tmp_path.iterdir())
    assert names == ["new0", "new1", "old0", "old3"]


def test_a_process_does_not_remove_what_it_uses(tmp_path):
    cache = TensorCache(tmp_path, 2.5 * SIZE)
    for number in range(4):
        cache.put(f"own{number}", tensor(number))
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["own0", "own1"]
    assert get(cache, "own3") is None


def test_remains_of_a_killed_process_are_removed_in_their_turn(tmp_path):
    remains = tmp_path / ".one.safetensors.1.2"
    remains.write_bytes(bytes(SIZE))
    os.utime(remains, (0, 0))
    TensorCache(tmp_path, 1.5 * SIZE).put("one", tensor(0))
    assert [path.stem for path in tmp_path.iterdir()] == ["one"]


def test_a_full_disk_is_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_cache, "_RESERVE", 1 << 62)
    TensorCache(tmp_path, 1e9).put("one", tensor(0))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_reported_once(tmp_path, caplog):
    (tmp_path / "file").touch()
    cache = TensorCache(tmp_path / "file" / "folder", 1e9)
    cache.put("one", tensor(0))
    cache.put("two", tensor(0))
    assert caplog.text.count("cannot be written") == 1


# ---- other users ---------------------------------------------------------------------------------
posix = pytest.mark.skipif(os.name != "posix", reason="permissions of files")


@posix
@pytest.mark.parametrize("mode", [None, 0o755, 0o777])
def test_only_the_user_may_open_folder_and_files(tmp_path, mode):
    folder = tmp_path / "new"
    if mode is not None:
        folder.mkdir()
        folder.chmod(mode)
    before = os.umask(0)
    try:
        TensorCache(folder, 1e9).put("one", tensor(0))
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "one.safetensors").stat().st_mode) == 0o600


@posix
def test_a_folder_of_another_user_is_neither_read_nor_written(tmp_path, monkeypatch, caplog):
    TensorCache(tmp_path, 1e9).put("one", tensor(0))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    cache = TensorCache(tmp_path, 1e9)
    assert get(cache, "one") is None
    cache.put("two", tensor(0))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert caplog.text.count("belongs to another user") == 1


@posix
def test_a_file_of_another_user_is_replaced(tmp_path, monkeypatch, caplog):
    TensorCache(tmp_path, 1e9).put("one", tensor(1))
    own = private_folder.is_own
    monkeypatch.setattr(tensor_cache, "is_own", lambda path: False)
    cache = TensorCache(tmp_path, 1e9)
    assert get(cache, "one") is None
    assert "belongs to another user" in caplog.text
    monkeypatch.setattr(tensor_cache, "is_own", own)
    cache.put("one", tensor(0))
    assert torch.equal(get(cache, "one"), tensor(0))


@posix
@pytest.mark.parametrize("name", ["folder", "one.safetensors"])
def test_links_are_not_followed(tmp_path, name):
    elsewhere = TensorCache(tmp_path / "elsewhere", 1e9)
    elsewhere.put("one", tensor(1))
    target = tmp_path / "elsewhere" / "one.safetensors"
    before = target.read_bytes()
    folder = tmp_path / "folder"
    if name == "folder":
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        (folder / name).symlink_to(target)
    cache = TensorCache(folder, 1e9)
    assert get(cache, "one") is None
    cache.put("one", tensor(0))
    cache.put("two", tensor(0))
    assert target.read_bytes() == before
    assert len(list(target.parent.iterdir())) == 1
    assert not (folder / "one.safetensors").is_symlink()


def test_several_writers_and_readers_never_see_a_part_of_a_file(tmp_path, caplog):
    faults = []

    def work():
        cache = TensorCache(tmp_path, 1e9)
        for number in range(20):
            cache.put(f"key{number % 3}", tensor(number % 3))
            found = get(cache, f"key{number % 3}")
            if found is None or not torch.equal(found, tensor(number % 3)):
                faults.append(number)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert "damaged" not in caplog.text
