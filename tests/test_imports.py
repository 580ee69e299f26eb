"""The modules of the package import each other in one direction."""

from graphlib import TopologicalSorter

import grimp


def test_no_modules_import_each_other_in_a_circle():
    """Imports in functions and for type checkers count, and so does a package's own module."""
    graph = grimp.build_graph("fedmerge_peft", cache_dir=None)
    imported = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    assert any(imported.values())
    TopologicalSorter(imported).prepare()  # raises CycleError, which names the circle
