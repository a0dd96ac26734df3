"""The import graph has no circle of modules, not even one that is closed by imports inside functions.

`lint-imports` (`make lint`) checks the rules between packages, in pyproject.toml; it does not look at single modules.
"""

from graphlib import CycleError, TopologicalSorter

import grimp
import pytest


def circle(graph: grimp.ImportGraph) -> list[str]:
    """The modules of one circle, the first one again at the end; none where there is no circle."""
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = grimp.build_graph("model_compose", cache_dir=None, exclude_type_checking_imports=True)
    assert graph.find_modules_directly_imported_by("model_compose.registry") >= {"model_compose.schema"}
    assert circle(graph) == []


def test_a_circle_through_a_function_is_found(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("circle")
    package = folder / "in_a_circle"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "one.py").write_text("def late():\n    import in_a_circle.two\n", encoding="utf-8")
    (package / "two.py").write_text("import in_a_circle.one\n", encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    found = circle(grimp.build_graph("in_a_circle", cache_dir=None))
    assert sorted(set(found)) == ["in_a_circle.one", "in_a_circle.two"]
