"""Wheels in kits: packed again from an installation, with the sums of its record."""

import hashlib
import zipfile

import pytest

from fedmerge_peft.errors import FederateError
from fedmerge_peft.sites import wheel

RECORD = """fedmerge_peft/__init__.py,sha256={init},{size}
fedmerge_peft/__pycache__/__init__.cpython-311.pyc,,
fedmerge_peft-{version}.dist-info/METADATA,sha256={metadata},{metadata_size}
fedmerge_peft-{version}.dist-info/INSTALLER,sha256=zuuue4knoyJ-UwPPXg8fezS7VCrXJQrAP7zeNuwvFQg,4
fedmerge_peft-{version}.dist-info/RECORD,,
../../../bin/fedmerge,sha256=zuuue4knoyJ-UwPPXg8fezS7VCrXJQrAP7zeNuwvFQg,4
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder as site-packages, in which a small package of our name is installed."""
    packages = tmp_path / "site-packages"
    info = packages / f"fedmerge_peft-{wheel.__version__}.dist-info"
    info.mkdir(parents=True)
    package = packages / "fedmerge_peft"
    (package / "__pycache__").mkdir(parents=True)
    (package / "__pycache__" / "__init__.cpython-311.pyc").write_bytes(b"compiled")
    init, metadata = b"x = 1\n", b"Metadata-Version: 2.4\nName: fedmerge-peft\nVersion: 1\n"
    (package / "__init__.py").write_bytes(init)
    (info / "METADATA").write_bytes(metadata)
    (info / "INSTALLER").write_bytes(b"pip\n")
    record = RECORD.format(
        version=wheel.__version__,
        init=wheel._record_digest(init),
        size=len(init),
        metadata=wheel._record_digest(metadata),
        metadata_size=len(metadata),
    )
    (info / "RECORD").write_text(record)
    monkeypatch.setattr(wheel, "_PACKAGE", package)
    return packages


def test_a_wheel_has_the_files_of_the_package_and_their_sums(packages, tmp_path):
    digest = wheel.write_wheel(tmp_path)
    content = (tmp_path / wheel.WHEEL).read_bytes()
    assert digest == hashlib.sha256(content).hexdigest()
    assert (tmp_path / wheel.SUMS).read_text() == f"{digest}  {wheel.WHEEL}\n"
    with zipfile.ZipFile(tmp_path / wheel.WHEEL) as archive:
        assert archive.read("fedmerge_peft/__init__.py") == b"x = 1\n"
        info = f"fedmerge_peft-{wheel.__version__}.dist-info"
        names = ["fedmerge_peft/__init__.py", f"{info}/METADATA", f"{info}/RECORD"]
        assert sorted(archive.namelist()) == sorted(names)
        lines = archive.read(f"{info}/RECORD").decode().splitlines()
    assert [line.partition(",")[0] for line in lines] == [*sorted(names[:2]), names[2]]


def test_equal_packages_are_equal_wheels(packages, tmp_path):
    (tmp_path / "other").mkdir()
    assert wheel.write_wheel(tmp_path) == wheel.write_wheel(tmp_path / "other")


def test_a_file_that_has_changed_since_the_installation_goes_to_nobody(packages, tmp_path):
    (packages / "fedmerge_peft" / "__init__.py").write_text("x = 2\n")
    with pytest.raises(FederateError, match=r"__init__\.py has changed since the package was"):
        wheel.write_wheel(tmp_path)


def test_there_is_no_wheel_without_a_record_or_a_build_backend(packages, tmp_path, monkeypatch):
    record = next(packages.glob("*.dist-info")) / "RECORD"
    record.write_text("__editable__.pth,sha256=abc,3\n")
    assert wheel.write_wheel(tmp_path) is None
    (tmp_path / "pyproject.toml").touch()  # a checkout: site-packages is its src
    monkeypatch.setattr(wheel, "find_spec", lambda _: None)
    assert wheel.write_wheel(tmp_path) is None
