"""Files are read once, and again if they have changed."""

from fedmerge_peft.runs.cached_files import CachedFiles
from fedmerge_peft.util.files import write_text


def test_a_file_is_read_again_only_if_it_has_changed(tmp_path):
    path, read = tmp_path / "file", []
    files = CachedFiles()

    def content(path):
        read.append(path)
        return path.read_text() if path.is_file() else None

    assert files.get(path, content) is None
    write_text(path, "one")
    assert [files.get(path, content) for _ in range(3)] == ["one"] * 3
    assert len(read) == 2
    write_text(path, "two")  # of the same size
    assert files.get(path, content) == "two"
    with path.open("a") as file:
        file.write(" and three")
    assert files.get(path, content) == "two and three"
    path.unlink()
    assert files.get(path, content) is None
