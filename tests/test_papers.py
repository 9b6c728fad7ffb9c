"Papers as data: a fifth paper is one folder, mistakes in a folder are named, runs keep their ids, wheels carry the data."

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import run_command

from snnkd_nb.core import UserError, canonical_json, sha256_of
from snnkd_nb.papers.experiments import (
    SCALES,
    Cell,
    Grid,
    artefacts,
    build_grid,
    build_run,
    fill_in,
    find_paper,
    grid_for,
    match,
    networks_by_method,
    papers,
    parse_deviations,
)
from snnkd_nb.papers.published import (
    claims,
    failing,
    paper_folders,
    published,
    read_toml,
    stated,
)
from snnkd_nb.reports.tables import join_published

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "nbs" / "guides" / "example_paper"
GOLDEN = json.loads((ROOT / "tests" / "golden" / "grids.json").read_text())


@pytest.mark.parametrize("key", sorted({place.partition("@")[0] for place in GOLDEN}))
def test_runs_and_cells_are_what_they_were(key):
    for scale in SCALES:
        grid = grid_for(key, scale, with_deviations=False)
        cells = [
            [dict(c.index), c.column, [[s.id for s in group] for group in c.groups], c.note]
            for c in grid.cells
        ]
        found = canonical_json([[spec.id for spec in grid.needs], cells])
        assert sha256_of(found)[:10] == GOLDEN[f"{key}@{scale}"], scale


@pytest.fixture
def fifth(tmp_path, monkeypatch):
    "A copy of the example paper that the registry finds."
    folder = tmp_path / "papers" / "example_paper"
    shutil.copytree(EXAMPLE, folder)
    monkeypatch.setenv("SNNKD_PAPERS", str(folder.parent))
    return folder


def test_a_folder_is_a_paper(fifth):
    assert list(paper_folders())[-1] == "example_paper" and len(papers()) == 5
    assert find_paper("example_paper").authors == ("You",)
    assert match("example_paper") == match(["example_paper"])
    assert [a.id for a in match(["example_paper"])] == [
        "example_paper/table01",
        "example_paper/figure01",
    ]
    assert all(a.built and a.path.parent == fifth for a in match(["example_paper"]))
    assert published("example_paper/table01").value(method="KD", T=2) == 96.6
    assert [c.id for c in claims("example_paper")] == ["kd"]
    assert failing(stated("example_paper")) == set()


def test_its_cells_are_runs(fifth):
    grid = build_grid("example_paper/table01", "smoke")
    assert [(c.index["method"], c.index["T"]) for c in grid.cells] == [
        ("Baseline", 1),
        ("Baseline", 2),
        ("KD", 1),
        ("KD", 2),
    ]
    assert {len(c.groups) for c in grid.cells} == {1}
    assert {len(c.groups) for c in build_grid("example_paper/table01", "paper").cells} == {3}
    baseline, kd = grid.cells[1].specs[0], grid.cells[3].specs[0]
    assert baseline.teacher is None and kd.teacher.model.T is None
    assert baseline.model == kd.model and kd.method == "kd" and kd.optim.epochs == 1
    assert grid.deviations[-1] == "one seed (paper: 3)"
    assert grid.specs == build_grid("example_paper/figure01", "smoke").specs


def test_it_is_listed_trained_and_rendered_without_an_edit(fifth, tmp_path):
    root = tmp_path / "project"
    (root / "nbs").mkdir(parents=True)
    env = {"SNNKD_ROOT": str(root), "SNNKD_CACHE": str(tmp_path / "cache")}
    listed = run_command("list", "example_paper", **env)
    assert "example_paper/table01   table    0/4 runs" in listed.stdout, listed.stderr
    done = run_command("reproduce", "example_paper", "--scale", "smoke", "-j", "1", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    table = (root / "results/tables/example_paper/table01-smoke.csv").read_text()
    ids = [spec.id for spec in build_grid("example_paper/table01", "smoke").specs]
    assert all(run in table for run in ids)
    assert "Δ" in (root / "results/tables/example_paper/table01-smoke.md").read_text()
    assert (root / "figures/example_paper/figure01-smoke.png").stat().st_size > 1000
    assert "4/4 runs, rendered" in run_command("list", "example_paper", **env).stdout


MISTAKES = [
    ("paper.toml", 'kind = "figure"', 'kind = "picture"', "unknown kind in .*figure01.*'picture'"),
    ("paper.toml", 'where = "Table 1"', 'wher = "Table 1"', "paper.toml .table01.*'wher'"),
    ("paper.toml", 'title = "', 'titel = "', "paper.toml.*'titel'"),
    ("settings.toml", "[model.student]", "[modell.student]", "settings.toml.*'modell'"),
    ("settings.toml", 'from = "teacher"', 'from = "techer"', "settings.toml.*'techer'.*'teacher'"),
    ("settings.toml", "width = 0.25", "widht = 0.25", "run.student.*'widht'.*'width'"),
    ("settings.toml", 'T = "{T}"', 'T = "{Tt}"', "settings.toml.*run.*student.*'Tt'"),
    ("settings.toml", "seeds = 1", "seeds = ", "settings.toml.*line"),
    ("cells.toml", 'run = "student"', 'run = "studnet"', "'studnet'.*'student'"),
    ("cells.toml", "each =", "eahc =", "cells.toml .*table01.cells.* 1 'eahc'"),
    ("deviations.md", "smoke, small", "smoke, smal", "deviations.md, line 4.*'smal'"),
    ("deviations.md", "budget: student", "budget: studnet", "'studnet'.*'student'"),
    ("claims.toml", "better =", "beter =", "claims.toml .*claim.* kd 'beter'"),
    ("claims.toml", "[[statement]]", "[[statment]]", "claims.toml 'statment'"),
    ("published/tables.toml", "unit =", "units =", "tables.toml .table01.*'units'"),
    ("published/table01.csv", "94.8", "94,8", "table01.csv: line 5: 4 cells"),
    ("published/table01.csv", "94.8", "94.8 %", "table01.csv: line 5, column accuracy: '94.8 %'"),
    ("published/table01.csv", "KD,1", "KD,2", "table01.csv: line 6: KD, 2 is already in line 5"),
]


@pytest.mark.parametrize("file, right, wrong, message", MISTAKES)
def test_a_mistake_is_named_with_its_file_and_key(fifth, file, right, wrong, message):
    path = fifth / file
    text = path.read_text()
    assert right in text
    path.write_text(text.replace(right, wrong, 1))
    with pytest.raises(UserError, match=message):
        find_paper("example_paper")
        artefacts()
        claims("example_paper")
        stated("example_paper")
        published("example_paper/table01")
        build_grid("example_paper/table01", "smoke")


def test_a_variable_folder_without_papers_and_a_key_twice_are_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("SNNKD_PAPERS", str(tmp_path))
    with pytest.raises(UserError, match="no paper.toml"):
        paper_folders()
    shutil.copytree(EXAMPLE, tmp_path / "sastc")
    with pytest.raises(UserError, match="already a paper 'sastc'"):
        paper_folders()


def test_exceptions_apply_in_order_and_tables_change_what_names_replace(fifth):
    settings = fifth / "settings.toml"
    settings.write_text(
        settings.read_text()
        + """
[[run.student.except]]
when = { T = 2 }
unless = { method = "none" }
optim = { epochs = 7 }

[run.wide]
from = "student"
model = { width = 2.0, args = { drop = ["depth"] } }
drop = ["teacher"]
method = "none"
"""
    )
    epochs = {
        (method, T): build_run("example_paper", "student", "smoke", method=method, T=T).optim.epochs
        for method in ("none", "kd")
        for T in (1, 2)
    }
    assert epochs == {("none", 1): 1, ("none", 2): 1, ("kd", 1): 1, ("kd", 2): 7}
    wide = build_run("example_paper", "wide", "smoke", method="kd", T=2, seed=3)
    assert (wide.model.width, dict(wide.model.args), wide.seed) == (2.0, {}, 3)
    assert wide.teacher is None and wide.optim.lr == 0.1


def test_exceptions_replace_what_comes_before_them_and_set_variables(fifth):
    with open(fifth / "settings.toml", "a") as out:
        out.write(
            """
[run.replaced]
from = "student"
with = { T = 1 }
optim = { epochs = 5 }
smoke = { with = { T = 2 }, optim = { lr = 0.5 } }

[[run.replaced.except]]
when = { T = 2, method = "kd" }
from = "student"
with = { T = 3 }
"""
        )
    student = build_run("example_paper", "student", "smoke", method="kd", T=3)
    assert build_run("example_paper", "replaced", "smoke", method="kd") == student
    kept = build_run("example_paper", "replaced", "smoke", method="none")
    assert (kept.model.T, kept.optim.epochs, kept.optim.lr) == (2, 5, 0.5)


@pytest.mark.parametrize("method", ["none", "tet", "2*tet", "1e-3*tet", "1e-3 * tet + none"])
def test_methods_that_learn_alone_have_no_teacher(fifth, method):
    assert build_run("example_paper", "student", "smoke", method=method, T=2).teacher is None


@pytest.mark.parametrize("method", ["kd", "kd + tet", "1e-3*tet + 1e-3*kd"])
def test_a_method_with_a_teacher_keeps_it(fifth, method):
    assert build_run("example_paper", "student", "smoke", method=method, T=2).teacher is not None


def test_braces_as_text_are_written_twice():
    assert fill_in("{{x}}", {}) == "{x}"
    assert fill_in("{{x}} of {x}", {"x": 2}) == "{x} of 2"
    assert fill_in("{x}", {"x": 2}) == 2
    with pytest.raises(UserError, match="a brace as text is written twice"):
        fill_in("{x", {"x": 2})


def test_a_cell_without_runs_has_no_network(fifth):
    teacher = build_run("example_paper", "teacher", "smoke")
    cells = [
        Cell({"method": "Teacher"}, "accuracy", ((teacher,),)),
        Cell({"method": "KD"}, "accuracy", note="not built yet"),
    ]
    grid = Grid("example_paper/table01", "smoke", cells)
    assert networks_by_method(grid, {teacher: "network"}) == {"Teacher": "network"}
    with pytest.raises(UserError, match="KD of example_paper/table01"):
        networks_by_method(grid, {teacher: "network"}, every=True)


def test_a_cell_without_a_published_number_is_named_with_its_file(fifth):
    with open(fifth / "cells.toml", "a") as out:
        out.write('[[table01.cells]]\neach = { method = ["KD"], T = [9] }\n')
        out.write('column = "accuracy"\nrun = "student"\n')
    grid = build_grid("example_paper/table01", "smoke")
    with pytest.raises(UserError, match="cells.toml .table01.: the cell .*'T': 9.*accuracy"):
        join_published(grid, {})


def test_defaults_are_values_of_variables_that_cells_leave_out(fifth):
    with open(fifth / "settings.toml", "a") as out:
        out.write('\n[defaults]\nT = 4\nmethod = "kd"\n')
    with open(fifth / "cells.toml", "a") as out:
        out.write('[[table02.cells]]\neach = { T = [1, 2] }\ncolumn = "a"\nrun = "student"\n')
    assert build_run("example_paper", "student", "smoke").model.T == 4
    assert build_run("example_paper", "student", "smoke", method="none").method == "none"
    runs = build_grid("example_paper/table02", "smoke").specs
    assert [(run.method, run.model.T) for run in runs] == [("kd", 1), ("kd", 2)]


SEARCH = """
[search.found]
teacher = "teacher"
seeds = 1
space_args = { channels = [4, 8], normal = [1, 3], downsample = [2, 2] }
smoke = { population = 6, seeds = 2 }
"""


def test_a_cell_may_show_a_number_of_a_search(fifth):
    for file, text in (
        ("settings.toml", SEARCH),
        ("cells.toml", '[[table02.cells]]\nindex = { x = 1 }\ncolumn = "a"\nsearch = "found"\n'),
        ("deviations.md", "- [table02] {value: found.population}: {space: found}\n"),
    ):
        with open(fifth / file, "a") as out:
            out.write(text)
    grid = build_grid("example_paper/table02", "smoke")
    assert [(search.population, search.seed) for search in grid.specs] == [(6, 0), (6, 1)]
    assert grid.searches == () and grid.needs == grid.specs
    words = "6: channels 4, 8; 1 to 3 normal and 2 downsample blocks"
    assert grid.deviations[-1] == words
    with open(fifth / "cells.toml", "a") as out:
        out.write('run = "student"\n')
    read_toml.cache_clear()
    with pytest.raises(UserError, match="table02.cells.* 1: give either run or search"):
        build_grid("example_paper/table02", "smoke")


def test_what_is_computed_may_not_be_known_yet(fifth, tmp_path, monkeypatch):
    (tmp_path / "found_networks.py").write_text(
        "from snnkd_nb.papers.experiments import NotKnownYet\n"
        "def width(seed):\n"
        "    if seed == 1:\n"
        "        raise NotKnownYet('search not run')\n"
        "    return {'name': 'resnet20', 'width': 0.25 + seed}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for file, text in (
        ("settings.toml", '[run.found]\nfrom = "student"\n[run.found.model]\nT = 2\n'),
        ("settings.toml", 'from = "searched"\n[model.searched]\n'),
        ("settings.toml", 'call = "found_networks:width"\nseed = "{seed}"\n'),
        ("cells.toml", '[[table02.cells]]\nindex = { x = 1 }\ncolumn = "a"\n'),
        ("cells.toml", 'run = "found"\nwith = { method = "kd", T = 2 }\nseeds = [0, 1, 2]\n'),
        ("cells.toml", '[[table02.cells]]\nindex = { x = 2 }\ncolumn = "a"\n'),
        ("cells.toml", 'run = "found"\nwith = { method = "kd", T = 2 }\nseeds = [1]\n'),
    ):
        with open(fifth / file, "a") as out:
            out.write(text)
    known, unknown = build_grid("example_paper/table02", "smoke").cells
    assert [group[0].model.width for group in known.groups] == [0.25, 2.25] and known.note == ""
    assert unknown.groups == () and unknown.note == "search not run"


def test_sentences_may_run_over_several_lines():
    found = parse_deviations("# head\n- one\n  line\n\n- [table01; paper] other\n")
    assert [sentence.text for sentence in found] == ["one line", "other"]
    assert found[1].artefacts == ("table01",) and found[1].scales == ("paper",)


def test_a_wheel_has_the_papers(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "settings.ini", "README.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("snnkd_nb", "nbs", "results"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    build = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path)]
    made = subprocess.run(build, cwd=source, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import snnkd_nb; from snnkd_nb.papers import published, experiments\n"
        "print(snnkd_nb.__file__, len(experiments.artefacts()),"
        " published.value('ckdsnn/table03', scaling='Softmax'),"
        " len(experiments.build_grid('ckdsnn/table01', 'paper').specs))"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "SNNKD_ROOT": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    path, *numbers = run.stdout.split()
    assert path.startswith(str(tmp_path / "site")), run.stderr
    want = len(build_grid("ckdsnn/table01", "paper").specs)
    assert numbers == [str(len(artefacts())), "79.11", str(want)]
    notebooks = [sys.executable, "-m", "snnkd_nb.cli", "notebooks", "--to", str(tmp_path / "work")]
    copied = subprocess.run(notebooks, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert copied.returncode == 0, copied.stderr
    assert (tmp_path / "work" / "nbs" / "index.ipynb").is_file()
    env["SNNKD_ROOT"] = str(tmp_path / "work")
    listing = [sys.executable, "-m", "snnkd_nb.cli", "list", "sastc/table02"]
    listed = subprocess.run(listing, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "at scale small: 1 built" in listed.stdout, listed.stdout + listed.stderr


def test_headline_takes_the_weight_that_its_pilot_chose():
    from snnkd_nb.papers.studies import choose_weights
    from snnkd_nb.reports.tables import tabulate_by_seed
    from snnkd_nb.store import Store

    pilot = build_grid("studies/weights", "small", False)
    records = {spec: Store().get(spec) for spec in pilot.specs}
    chosen = choose_weights(tabulate_by_seed(pilot, records, "val_best"))
    arms = build_grid("studies/headline", "small", False).cells
    methods = {cell.index["method"]: cell.specs[0].method for cell in arms}
    assert methods["KD"] == "kd" and chosen["KD"] == 1.0
    assert methods["NLD"] == f"{chosen['NLD']:g}*nld"
    assert methods["Feature KD"] == f"kd+{chosen['Feature KD']:g}*feature"
    assert methods["SASTC"] == f"kd+{chosen['SASTC']:g}*sastc"
    assert methods["BKD"] == f"{chosen['BKD']:g}*bkd"
    assert methods["SAMD"] == f"{chosen['SAMD']:g}*samd"
    assert methods["SAMD, scaled"] == f"{chosen['SAMD, scaled']:g}*samd"
    options = {cell.index["method"]: cell.specs[0].method_args for cell in arms}
    for reading in ("", ", scaled"):
        beta = chosen[f"SAMD{reading}"]
        assert options[f"CKDSNN{reading}"] == {"beta": beta, "gamma": chosen["NLD"]}


def test_an_arm_of_headline_is_compared_from_three_seeds_on():
    from snnkd_nb.papers.studies import select_trained_arms

    grid = build_grid("studies/headline", "small", False)
    by_method = {cell.index["method"]: cell.specs for cell in grid.cells}
    stored = [*by_method["KD"][:3], *by_method["NLD"][:2]]
    selected = select_trained_arms(grid, dict.fromkeys(stored, "a record"))
    assert [cell.index["method"] for cell in selected.cells] == ["Teacher", "KD"]
    smoke = build_grid("studies/headline", "smoke", False)  # one seed is planned
    first = {cell.specs[0]: "a record" for cell in smoke.cells}
    assert select_trained_arms(smoke, first).cells == smoke.cells
