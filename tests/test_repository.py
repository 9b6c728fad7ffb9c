"""The tree itself: notebooks and package agree, layers point down, everything runs from a fresh process."""

import ast
import configparser
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import ScriptServer

import snnkd_nb
from snnkd_nb.runner.notebooks import LANGUAGE_INFO

ROOT = Path(__file__).resolve().parents[1]
LIB = sorted((ROOT / "nbs/lib").glob("*.ipynb"))
ALL = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
CELLS = {p: json.loads(p.read_text())["cells"] for p in ALL}


def source(cell):
    return "".join(cell["source"])


def code(path):
    return [source(c) for c in CELLS[path] if c["cell_type"] == "code"]


def module(path):
    return next(m[1] for s in code(path) if (m := re.search(r"^#\|\s*default_exp (\S+)", s, re.M)))


def modules(folder):
    return {p.relative_to(folder): p for p in folder.rglob("*.py")}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A copy of the notebooks, cleaned and exported into an empty package."
    top = tmp_path_factory.mktemp("export")
    for name in ("settings.ini", "setup.py"):
        shutil.copy(ROOT / name, top)
    shutil.copytree(ROOT / "nbs", top / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    bin_, env = Path(sys.executable).parent, {**os.environ, "PYTHONPATH": ""}
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([bin_ / command], cwd=top, check=True, env=env, capture_output=True)
    return top


def test_fresh_export_equals_the_package(exported):
    ours, fresh = modules(ROOT / "snnkd_nb"), modules(exported / "snnkd_nb")
    assert set(ours) == set(fresh)
    assert [str(k) for k in ours if ours[k].read_text() != fresh[k].read_text()] == []


def test_cleaning_changes_nothing(exported):
    changed = [p for p in ALL if not filecmp.cmp(p, exported / p.relative_to(ROOT), shallow=False)]
    assert changed == []


def test_every_library_notebook_is_one_module_with_title_and_subtitle():
    assert len({module(p) for p in LIB}) == len(LIB)
    for p in LIB:
        title = module(p).replace("__init__", "snnkd_nb")
        assert re.match(rf"# {re.escape(title)}\n+> \S", source(CELLS[p][0])), p.name


def test_library_pages_are_few_and_their_numbers_unique():
    "A reader finds a page by its number. A new page needs a subject that no other page has."
    numbers = [p.name[:2] for p in LIB]
    assert len(set(numbers)) == len(numbers), sorted(n for n in numbers if numbers.count(n) > 1)
    assert len(LIB) <= 80


def test_nothing_outside_lib_exports():
    assert [
        p.name for p in ALL if p not in LIB for s in code(p) if re.search(r"^#\|\s*export", s, re.M)
    ] == []


def imported_modules(source: str, known: set[str]) -> set[str]:
    "The modules of the package that a cell imports, anywhere in it and in any form."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            path = name.removeprefix("snnkd_nb.")
            found.add(f"snnkd_nb.{snnkd_nb.MOVED_MODULES.get(path, path)}")
    return found & known


def test_imports_point_down():
    numbers = {f"snnkd_nb.{module(p)}": p.name[:2] for p in LIB}
    upwards = []
    for p in LIB:
        own = p.name[:2]
        for s in code(p):
            if re.search(r"^#\|\s*export", s, re.M):
                for name in imported_modules(s, set(numbers)):
                    if numbers[name] >= own:
                        upwards.append(f"{p.name} imports {name} of number {numbers[name]}")
    assert not upwards, "\n".join(upwards)


@pytest.mark.parametrize(
    "line",
    [
        "from snnkd_nb.data.images import load",
        "from snnkd_nb.data import images",
        "import snnkd_nb.data.images as pictures",
        "def f():\n    from snnkd_nb.data import images",
    ],
)
def test_every_form_of_import_is_seen(line):
    assert imported_modules(line, {"snnkd_nb.data.images"}) == {"snnkd_nb.data.images"}


def test_no_star_imports_and_no_development_tools_at_run_time():
    for p in (ROOT / "snnkd_nb").rglob("*.py"):
        for node in ast.walk(ast.parse(p.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not {n.split(".")[0] for n in names} & {"nbdev", "fastcore", "execnb"}, p
            assert not (isinstance(node, ast.ImportFrom) and node.names[0].name == "*"), p


def test_artefact_notebooks_are_thin():
    "A page of an artefact has parameters, calls, and at most one function that draws its picture."
    for p in ALL:
        if p in LIB or p.name in ("index.ipynb", "00_paper.ipynb") or p.parent.name == "guides":
            continue
        cells = CELLS[p]
        tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
        assert len(tagged) == 1, p.name
        nodes = [node for s in code(p) for node in ast.walk(ast.parse(s))]
        assert not any(isinstance(n, (ast.ClassDef, ast.While)) for n in nodes), p.name
        functions = [n for n in nodes if isinstance(n, ast.FunctionDef)]
        assert len(functions) <= 1, p.name
        assert all(n.end_lineno - n.lineno < 25 for n in functions), p.name


def test_ids_are_unique_and_the_kernel_is_plain():
    for p in ALL:
        ids = [c.get("id") for c in CELLS[p]]
        assert None not in ids and len(set(ids)) == len(ids), p.name


def test_notebooks_keep_what_jupyterlab_would_add():
    for p in ALL:
        assert json.loads(p.read_text())["metadata"]["language_info"] == LANGUAGE_INFO, p.name


def test_readme_is_the_front_page():
    r = subprocess.run(
        [sys.executable, "-m", "snnkd_nb.cli", "readme", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0, r.stderr


def test_settings_name_every_third_party_import():
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    said = re.findall(
        r"[\w-]+",
        " ".join(
            config["DEFAULT"][k]
            for k in (
                "requirements",
                "extra_requirements",
                "lab_requirements",
                "export_requirements",
                "book_requirements",
            )
        ),
    )
    known = {
        "sklearn": "scikit-learn",
        "PIL": "pillow",
        "IPython": "ipykernel",
        "dask": "dask",
        "distributed": "dask",
        "yaml": "pyyaml",
    }
    used = set()
    for p in (ROOT / "snnkd_nb").rglob("*.py"):
        for node in ast.walk(ast.parse(p.read_text())):
            if isinstance(node, ast.Import):
                used |= {a.name.split(".")[0] for a in node.names}
            if isinstance(node, ast.ImportFrom) and not node.level:
                used.add((node.module or "").split(".")[0])
    third = {u for u in used if u and u not in sys.stdlib_module_names and u != "snnkd_nb"}
    assert [u for u in third if known.get(u, u) not in said] == []


@pytest.fixture(scope="module")
def scripts():
    server = ScriptServer()
    yield server
    server.close()


@pytest.mark.parametrize(
    "path",
    [p for p in ALL if p in LIB or p.name == "index.ipynb" or p.parent.name == "guides"],
    ids=lambda p: p.stem,
)
def test_notebook_runs_from_top_to_bottom(path, tmp_path, scripts):
    "Its cells, in order, in a fresh process and with a cache of their own."
    cells = [s for s in code(path) if not re.search(r"^#\|\s*eval: false", s, re.M)]
    script = tmp_path / "notebook.py"
    script.write_text("import matplotlib\nmatplotlib.use('Agg')\n" + "\n\n".join(cells))
    env = {
        **os.environ,
        "SNNKD_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    output = tmp_path / "output"
    code_of_exit = scripts.run(script, path.parent, output, env)
    assert code_of_exit == 0, output.read_text(errors="replace")[-3000:]
