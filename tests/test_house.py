"""The structure, by `ast`: a floor for every file, no import upwards, no circle, programs apart from concepts, sizes.

`python tests/test_house.py` writes the import graph into docs/structure.md.
"""

import ast
import functools
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STRUCTURE = ROOT / "docs/structure.md"
FLOORS = [  # low to high; a file may import from its own row and from the rows before it
    ("system.errors", "system.files"),
    ("system.config",),
    ("kernels_gpu",),
    ("kernels",),
    ("system.lora", "system.costs"),
    ("system.parallel",),
    ("mamba", "attention"),
    ("model",),
    ("text.*", "system.checkpoint", "system.huggingface", "system.machine", "system.muon", "system.presets"),
    ("system.objective",),
    ("system.loop", "system.rundir"),
    ("nested",),
    ("importance", "routers", "thoughts"),
    ("rlp", "elastic"),
    ("evals", "views.*"),
    ("train", "generate"),
    ("tools.*",),
]
PROGRAMS = ("train", "generate", "tools.*")
PARSERS = {"argparse", "click", "fire", "getopt", "optparse", "tyro"}
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(ROOT.rglob("*.py"))
    if not {"tests", "build"} & set(file.relative_to(ROOT).parts) and "/." not in str(file.relative_to(ROOT.parent))
}
MODULES = [name for name, file in FILES.items() if file.name != "__init__.py"]


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


def imported(nodes: ast.AST) -> list[str]:
    """The names behind `import` and `from`, anywhere inside: of modules, and of what may be one."""
    found = []
    for node in ast.walk(nodes):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not followed here"
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def own_imports(name: str) -> list[str]:
    """The modules of the repo that a file imports, those inside functions too."""
    return sorted({found for found in imported(tree(name)) if found in MODULES and found != name})


def floor_of(name: str) -> int:
    floors = [i for i, row in enumerate(FLOORS) for pattern in row if fnmatch(name, pattern)]
    assert len(floors) == 1, f"{name} must stand on one floor of FLOORS, and stands on {len(floors)}"
    return floors[0]


def is_program(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in PROGRAMS)


def test_the_files_that_are_looked_at_are_those_of_the_repo():
    assert {"train", "rlp", "system.config", "text.corpus", "views.estimate", "tools.report"} <= set(MODULES)
    assert "text.corpus" in own_imports("train")
    assert not [name for name in MODULES if name.startswith("tests")]


@pytest.mark.parametrize("name", MODULES)
def test_no_import_runs_upwards(name):
    upwards = [found for found in own_imports(name) if floor_of(found) > floor_of(name)]
    assert not upwards, f"{name} imports from above: {upwards}"


def test_every_row_of_the_floors_is_a_file_that_exists():
    patterns = [pattern for row in FLOORS for pattern in row]
    assert not [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in MODULES)]


def test_no_imports_run_in_a_circle():
    """Files without imports of what is left are taken away until none is left."""
    left = {name: set(own_imports(name)) for name in MODULES}
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        left = {name: needed for name, needed in left.items() if name not in free}
    assert not left


@pytest.mark.parametrize("name", MODULES)
def test_no_import_of_our_own_hides_inside_a_function(name):
    functions = [node for node in ast.walk(tree(name)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [found for function in functions for found in imported(function) if found in MODULES]


def test_packages_import_nothing():
    assert not [found for name in FILES if name not in MODULES for found in imported(tree(name))]


@pytest.mark.parametrize("name", [name for name in MODULES if not is_program(name)])
def test_no_program_hides_in_a_concept_file(name):
    """No `main`, no `__main__`, no command line."""
    nodes = list(ast.walk(tree(name)))
    assert "main" not in [node.name for node in nodes if isinstance(node, ast.FunctionDef)]
    assert "__main__" not in [node.value for node in nodes if isinstance(node, ast.Constant)]
    assert not PARSERS & {found.split(".")[0] for found in imported(tree(name))}


def test_the_top_level_holds_at_most_14_files():
    assert len(list(ROOT.glob("*.py"))) <= 14


@pytest.mark.parametrize("name", FILES)
def test_no_line_is_wider_than_100_columns(name):
    lines = FILES[name].read_text().splitlines()
    assert not [f"{i}: {len(line)}" for i, line in enumerate(lines, 1) if len(line) > 100]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 11 * 1024


def import_table() -> str:
    """Each file with its lines and imports, from the lowest floor up, in Markdown."""
    rows = ["| file | lines | imports |", "| --- | ---: | --- |"]
    for name in sorted(MODULES, key=lambda name: (floor_of(name), name)):
        path = FILES[name].relative_to(ROOT)
        n_lines = len(FILES[name].read_text().splitlines())
        rows.append(f"| {path} | {n_lines:,} | {', '.join(own_imports(name))} |")
    return "\n".join(rows)


def test_the_table_of_imports_has_a_row_for_each_file():
    assert len(import_table().splitlines()) == 2 + len(MODULES)


def shown() -> str:
    """docs/structure.md with today's table in its place."""
    head, rest = STRUCTURE.read_text().split("## Today, lowest floor first\n\n")
    return f"{head}## Today, lowest floor first\n\n{import_table()}\n\n{rest[rest.index('## Before') :]}"


def test_the_graph_in_docs_is_that_of_the_files():
    """But for the numbers of lines, which every change moves; `python tests/test_house.py` writes them anew."""
    kept, now = (re.sub(r"\| [\d,]+ \|", "|", text) for text in (STRUCTURE.read_text(), shown()))
    assert kept == now


if __name__ == "__main__":
    STRUCTURE.write_text(shown())
