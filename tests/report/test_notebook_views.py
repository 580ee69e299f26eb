"""Views of runs in notebooks: escaped tables, and figures as PNG."""

from html.parser import HTMLParser

import pytest

from fedmerge_peft import Comparison, RunError
from report.made_runs import family

HOSTILE = ["<script>alert(1)</script>", 'a"><img src=x onerror=alert(1)>', "b\u202e\x1b[31m", "c&d"]
PNG = b"\x89PNG"


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.text, self.open = set(), "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return family(tmp_path_factory.mktemp("made") / "run", HOSTILE, groups=["<b>", "<i>"] * 2)


def test_a_run_is_a_table_of_methods_and_clients_with_escaped_names(run):
    page = Tags(run._repr_html_())
    assert not {"script", "img", "b>"} & page.found
    assert "<script>alert(1)</script>" in page.text
    assert "\u202e" not in page.text
    assert "\x1b" not in page.text
    mean = run.summary["final"]["served"]["mean"]
    assert f"{mean:.3f}" in page.text
    assert "fedmerge is better than local for" in page.text


def test_a_run_without_rounds_is_shown_too(run, tmp_path):
    for name in ("recipe.yaml", "clients.json", "environment.json"):
        (tmp_path / name).write_bytes((run.path / name).read_bytes())
    assert "0 of 8 rounds, 4 clients" in type(run).open(tmp_path)._repr_html_()


def test_a_single_client_and_round_are_no_plurals(tmp_path):
    page = Tags(family(tmp_path / "run", ["a"], rounds=1)._repr_html_())
    assert "1 of 1 round, 1 client" in page.text
    assert "1 client, the worst first" in page.text


@pytest.mark.parametrize("name", ["accuracy", "loss", "weights", "clients", "traffic"])
def test_figures_of_a_run_are_shown_and_saved(run, tmp_path, name):
    picture = getattr(run.plot, name)()
    assert picture._repr_png_().startswith(PNG)
    assert picture.save(tmp_path / "figure.svg").read_text().lstrip().startswith("<?xml")


def test_figures_without_data_are_refused(run):
    with pytest.raises(RunError, match="all clients share one adapter"):
        run.baselines["fedavg"].plot.weights()


def test_pictures_without_a_known_suffix_are_refused(run, tmp_path):
    for picture in (run.plot.accuracy(), Comparison.of([run]).plot()):
        with pytest.raises(RunError, match=r"figures are written as \.png, \.svg, \.pdf"):
            picture.save(tmp_path / "figure")
    assert not any(tmp_path.iterdir())


def test_all_clients_are_in_one_figure_without_baselines_too(run, tmp_path):
    names = [f"client {number}" for number in range(40)]
    assert len(family(tmp_path / "many", names).plot.clients().drawing.names) == 40
    alone = run.baselines["local"].plot.clients().drawing
    assert [len(method.values) for method in alone.methods] == [4]


def test_comparisons_are_shown(run):
    comparison = Comparison.of([run])
    page = Tags(comparison._repr_html_())
    for _, row in comparison.methods.iterrows():
        assert row["method"] in page.text
        assert f"{row['mean']:.3f}" in page.text
    assert comparison.plot()._repr_png_().startswith(PNG)


def test_recipes_and_soups_are_shown(run, smoke):
    recipe = smoke("name='<script>x</script>'")
    page = Tags(recipe._repr_html_())
    assert "script" not in page.found
    assert recipe.backbone.model in page.text
    import torch

    from fedmerge_peft.adapters.layout import AdapterLayout
    from fedmerge_peft.adapters.soup import AdapterSoup

    layout = AdapterLayout.from_tensors([("w", (2, 3), "lora")])
    soup = AdapterSoup(torch.arange(18.0).reshape(3, 6), layout)
    assert "3 adapters of 6 parameters" in Tags(soup._repr_html_()).text
