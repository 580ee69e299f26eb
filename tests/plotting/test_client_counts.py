"""The figure of the clients' labels and splits."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from PIL import Image

from fedmerge_peft.data import Client, FederatedData
from fedmerge_peft.errors import RunError
from fedmerge_peft.plotting.client_counts import ClientCounts


@pytest.fixture
def large():
    """200 clients with a long name, 150 labels."""
    labels = np.arange(200 * 12) * 7 % 150
    clients = [
        Client(f"a-rather-long-client-name-{i:03}", rows[:8], rows[8:10], rows[10:])
        for i, rows in enumerate(np.split(np.arange(len(labels)), 200))
    ]
    return FederatedData(
        datasets.Dataset.from_dict({"label": [f"label {i:03} $x" for i in labels]}), clients
    )


@pytest.mark.parametrize("column", ["label", None])
def test_figures_are_written_as_png_and_svg(tmp_path, large, column):
    picture = ClientCounts(large, column)
    with Image.open(picture.save(tmp_path / "clients.png")) as image:
        assert min(image.size) > 300
        assert max(image.size) < 3000
    assert "<svg" in picture.save(tmp_path / "clients.svg").read_text(encoding="utf-8")


def test_every_count_is_in_the_figure(large):
    heat, bars = ClientCounts(large, "label").draw().axes[:2]
    (image,) = heat.images
    assert image.get_array().shape == (200, 150)
    assert image.get_array().sum() == 200 * 8
    widths = [bar.get_width() for bar in bars.patches]
    assert [sum(widths[:200]), sum(widths[200:400]), sum(widths[400:])] == [1600, 400, 400]


def test_other_formats_are_refused(tmp_path, large):
    with pytest.raises(RunError, match=r"figures are written as \.png, \.svg, \.pdf"):
        ClientCounts(large, "label").save(tmp_path / "clients.doc")


def test_figures_leave_pyplot_alone(large):
    import matplotlib.pyplot as plt

    ClientCounts(large, "label").draw()
    assert plt.get_fignums() == []
