"""No module imports itself through others; the layers are contracts in pyproject.toml (`make lint`)."""

from __future__ import annotations

import graphlib

import grimp


def test_no_import_cycles() -> None:
    graph = grimp.build_graph("mmedpo_ray", exclude_type_checking_imports=True, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    graphlib.TopologicalSorter(imports).prepare()
