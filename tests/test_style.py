"""The style that CONTRIBUTING.md describes: formatter, linter, types, and what no tool counts."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIB = sorted((ROOT / "nbs/lib").glob("*.ipynb"))
TOOLS = Path(sys.executable).parent


def code_cells(path: Path) -> Iterator[tuple[int, str]]:
    "Number and source of the code cells of a notebook."
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] == "code":
            yield number, "".join(cell["source"])


def run(*command: str) -> subprocess.CompletedProcess:
    "Run a tool of this environment in the project folder; skip the test if the tool is missing."
    if not (TOOLS / command[0]).exists():
        pytest.skip(f"{command[0]} is not installed: pip install -e .[dev]")
    return subprocess.run(
        [TOOLS / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True
    )


def test_code_is_formatted():
    done = run("ruff", "format", "--check", "nbs", "tests", "setup.py")
    assert done.returncode == 0, f"run `ruff format .`, then nbdev_export:\n{done.stdout[-3000:]}"


def test_linter_finds_nothing():
    done = run("ruff", "check", "--output-format", "concise", "nbs", "tests", "setup.py")
    assert done.returncode == 0, f"run `ruff check --fix .`:\n{done.stdout[-3000:]}"


@pytest.mark.timeout(900)
def test_types_are_consistent():
    done = run("mypy")
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("path", LIB, ids=lambda p: p.stem)
def test_no_line_is_longer_than_100_columns(path):
    "URLs aside: nobody can break them."
    long = [
        f"cell {number}: {line.strip()[:80]}…"
        for number, source in code_cells(path)
        for line in source.splitlines()
        if len(line) > 100 and "://" not in line
    ]
    assert not long, "\n".join(long)
    title = "".join(json.loads(path.read_text())["cells"][0]["source"])
    subtitle = title.partition("\n> ")[2].partition("\n")[0]
    assert len(f'"""{subtitle}"""') <= 100, "the subtitle becomes the docstring of the module"


def folded_statements(source: str) -> Iterator[str]:
    "Statements that hide a second one: tuples used as statements, and lambdas with a name."
    lines = re.sub(r"^%.*$", "pass", source, flags=re.M)
    tree = ast.parse(lines)
    last = tree.body[-1] if tree.body else None
    for node in ast.walk(tree):
        is_tuple = isinstance(node, ast.Expr) and isinstance(node.value, ast.Tuple)
        is_lambda = isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)
        if is_tuple and node is not last:
            yield f"a tuple as a statement: {ast.unparse(node)[:80]}"
        if is_lambda and isinstance(node.targets[0], ast.Name):
            yield f"a lambda with a name: {ast.unparse(node)[:80]}"


@pytest.mark.parametrize("path", LIB, ids=lambda p: p.stem)
def test_every_statement_does_one_thing(path):
    "The last expression of a cell is what it shows, and may be a tuple."
    found = [
        f"cell {number}: {what}"
        for number, source in code_cells(path)
        for what in folded_statements(source)
    ]
    assert not found, "\n".join(found)


def test_folded_statements_are_found():
    "The check itself can fail."
    assert len(list(folded_statements("f(), g()\nx = lambda: 1\ny = 2"))) == 2
    assert list(folded_statements("x = [lambda: 1]\n(x, 2)")) == []
