"""Data flows one way: a module imports modules below it, in functions too, and none above."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "rope_cupy"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# Modules that only compute, and so run and are tested everywhere.
PURE = (
    *("access", "arguments", "bounded", "checks", "choices", "frequencies"),
    *("launch_arguments", "memory"),
    *("options", "plan", "problem", "row_order", "table_check", "template"),
)
KNOW_TORCH = (
    *("rope_cupy.arrays", "rope_cupy.private_torch", "rope_cupy.torch", "rope_cupy.ways"),
    *("rope_cupy.compat", "rope_cupy.integrations"),
)
KNOW_JAX = ("rope_cupy.ways.jax",)
KNOW_CUPY = "rope_cupy.arrays.cupy", "rope_cupy.environment"


def is_for_types(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(node):
    """All import statements below a node, but those for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not is_for_types(child):
            yield from imports(child)


def imported(name):
    """The modules that a module imports: rope_cupy's by their whole names, others' packages."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in imports(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif not node.level:
            yield (node.module or "").partition(".")[0]
        else:
            base = [*package[: len(package) - node.level + 1], *filter(None, [node.module])]
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                yield whole if whole in MODULES else ".".join(base)


GRAPH = {name: {*imported(name)} for name in MODULES}


def test_no_module_imports_one_that_imports_it():
    place = {name: i for i, name in enumerate(TopologicalSorter(GRAPH).static_order())}
    stair = (
        *("memory", "options", "problem", "tables", "call", "prepared", "eager"),
        *("ways.autograd", "ways.graphs", "dispatch", "rotary", "torch"),
    )
    assert [*stair] == sorted(stair, key=lambda name: place[f"rope_cupy.{name}"])
    places = [place[f"rope_cupy.{name}"] for name in ("eager", "ways.jax", "dispatch")]
    assert places == sorted(places)


@pytest.mark.parametrize("library", ["torch", "cupy", "jax"])
def test_few_modules_know_a_library(library):
    known = {"torch": KNOW_TORCH, "cupy": KNOW_CUPY, "jax": KNOW_JAX}[library]
    knowing = [name for name, others in GRAPH.items() if library in others]
    assert [name for name in knowing if not name.startswith(known)] == []
    assert knowing


@pytest.mark.parametrize("name", PURE)
def test_what_only_computes_reaches_no_library(name):
    reached, todo = set(), [each for each in GRAPH if each.removeprefix("rope_cupy.") == name]
    while todo:
        each = todo.pop()
        reached |= GRAPH.get(each, set())
        todo += [other for other in GRAPH.get(each, ()) if other in GRAPH and other not in reached]
    assert not reached & {"cupy", "torch", "jax"}


def test_the_graph_sees_imports_of_every_kind():
    assert "rope_cupy.ways.dtensor" in GRAPH["rope_cupy.dispatch"], "in a function"
    assert "rope_cupy.ways.autograd" in GRAPH["rope_cupy.ways.graphs"], "from its own package"
    assert "rope_cupy.memory" in GRAPH["rope_cupy.arrays.base"], "from the package above"
    assert "numpy" not in GRAPH["rope_cupy.rotary"], "for type checkers alone"


@pytest.mark.parametrize("name", MODULES)
def test_no_file_is_longer_than_500_lines(name):
    num_lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert num_lines <= 500
