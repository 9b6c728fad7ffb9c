"""Every built artefact at every scale, and one of them from nothing to bytes that do not change."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from snnkd_nb.losses.zoo import parse_methods
from snnkd_nb.models.zoo import create_model
from snnkd_nb.papers.experiments import SCALES, build_grid, grid_for
from snnkd_nb.papers.published import published
from snnkd_nb.reports.tables import Report

ROOT = Path(__file__).resolve().parents[1]
SASTC = ("table02", "table07", "table08")
GRIDS = {
    **{f"sastc/{name}": partial(build_grid, f"sastc/{name}") for name in SASTC},
    "dsas/table12": partial(build_grid, "dsas/table12"),
    "dsas/table15": partial(build_grid, "dsas/table15"),
    "studies/kd": partial(build_grid, "studies/kd"),
    "studies/events": partial(build_grid, "studies/events"),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("key", GRIDS)
def test_every_run_of_a_grid_can_be_built(key, scale):
    "Names, widths and time steps exist at medium and paper scale too, without training anything."
    seen = set()
    for s in GRIDS[key](scale).specs:
        parse_methods(s.method) if s.method != "none" else None
        if s.model in seen:
            continue
        seen.add(s.model)
        with torch.device("meta"):
            create_model(
                s.model.name,
                10,
                T=s.model.T,
                neuron=s.model.neuron,
                width=s.model.width,
                **s.model.args,
            )


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("key", [k for k in GRIDS if not k.startswith("studies")])
def test_every_cell_has_its_published_number_and_an_empty_table_says_why(key, scale):
    report = Report(GRIDS[key](scale), {})
    assert len(report.rows) == len(published(key).records)
    assert all(r["note"] for r in report.rows) and not any(r["n"] for r in report.rows)
    assert set(report.claims()["ours"]) <= {"not run"}


@pytest.mark.parametrize("key", GRIDS)
def test_scales_do_not_mix(key):
    specs = {scale: set(GRIDS[key](scale).specs) for scale in SCALES}
    for a in SCALES:
        for b in SCALES:
            assert a == b or not specs[a] & specs[b]


@pytest.mark.parametrize(
    "page",
    sorted((ROOT / "nbs" / "papers").glob("*/*.ipynb")),
    ids=lambda p: f"{p.parent.name}/{p.stem}",
)
def test_a_page_that_judges_saves_its_verdicts(page):
    source = "\n".join(
        "".join(c["source"])
        for c in json.loads(page.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == "code"
    )
    judging = r"(?:judged?|judge_records|judge_cells)\("
    saved = set(re.findall(r"save_claims\((\w+), grid\)", source))
    for judged in re.finditer(rf"(?:(\w+) = )?\b{judging}", source):
        is_inside = source[: judged.start()].rstrip().endswith("save_claims(")
        assert is_inside or judged[1] in saved, f"{judged[0]}…) is not saved: save_claims(…, grid)"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A project folder of its own: notebooks, no results."
    top = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "settings.ini", top)
    shutil.copytree(ROOT / "nbs", top / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    return top, {
        **os.environ,
        "SNNKD_ROOT": str(top),
        "SNNKD_CACHE": str(top / "cache"),
        "OMP_NUM_THREADS": "1",
    }


def snnkd(project, *args, ok=True):
    top, env = project
    r = subprocess.run(
        [sys.executable, "-m", "snnkd_nb.cli", *args],
        cwd=top,
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert not ok or r.returncode == 0, r.stdout + r.stderr
    return r


def derived(top):
    return {
        p.relative_to(top): p.read_bytes()
        for f in ("results/tables", "figures")
        for p in sorted((top / f).rglob("*"))
        if p.is_file()
    }


def test_reproduce_trains_once_and_renders_the_same_bytes(project):
    top, _env = project
    snnkd(project, "reproduce", "dsas/table15", "dsas/figure08", "--scale", "smoke", "-j", "2")
    first, records = (
        derived(top),
        {p.name: p.read_bytes() for p in (top / "results/runs").glob("*.json")},
    )
    assert {str(p) for p in first} >= {
        "results/tables/dsas/table15-smoke.csv",
        "results/tables/dsas/table15-smoke.md",
        "figures/dsas/figure08.png",
        "figures/dsas/figure08.csv",
    }
    assert len(records) == len(build_grid("dsas/table15", "smoke").specs)
    for f in ("results/tables", "figures"):
        shutil.rmtree(top / f)
    snnkd(project, "render", "dsas/table15", "dsas/figure08", "--scale", "smoke")
    assert derived(top) == first, "tables and figures come back byte for byte"
    again = snnkd(project, "reproduce", "dsas/table15", "--scale", "smoke", "-j", "2")
    assert {p.name: p.read_bytes() for p in (top / "results/runs").glob("*.json")} == records, (
        again.stdout
    )


def test_the_table_says_what_stands_behind_each_number(project):
    top, _ = project
    text = (top / "results/tables/dsas/table15-smoke.csv").read_text()
    ids = {p.stem for p in (top / "results/runs").glob("*.json")}
    named = set(re.findall(r"digits(?:_events)?-[\w.]+(?:-[\w.]+)+-[0-9a-f]{10}", text))
    assert named == ids
    record = json.loads((top / "results/runs" / f"{sorted(ids)[0]}.json").read_text())
    assert {
        "id",
        "spec",
        "metrics",
        "history",
        "environment",
        "dataset",
        "weights",
        "sha256",
    } <= set(record)
    assert {"acc_last", "acc_best_val", "acc_best_test", "params"} <= set(record["metrics"])
    assert all(p.stat().st_size <= 16 * 1024 for p in (top / "results/runs").glob("*.json"))


def test_plain_papermill_works_without_the_driver(project):
    top, env = project
    out = top / "out.ipynb"
    command = [
        sys.executable,
        "-m",
        "papermill",
        "nbs/papers/dsas/table15.ipynb",
        out,
        "-p",
        "scale",
        "smoke",
        "-k",
        "python3",
    ]
    r = subprocess.run(command, cwd=top, env=env, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr[-2000:]
    text = out.read_text()
    assert "0 missing" in text and "PyramidNet200" in text


def test_an_executed_notebook_is_the_same_twice(project):
    top, _ = project
    path = top / "results/notebooks/dsas/table15-smoke.ipynb"
    if not path.exists():
        snnkd(
            project, "reproduce", "dsas/table15", "--scale", "smoke"
        )  # whichever test of this process came first
    before = path.read_bytes()
    snnkd(project, "render", "dsas/table15", "--scale", "smoke")
    assert path.read_bytes() == before


def deviations_shown():
    "`(page, lines of its list)` of every page that lists the deviations of a grid; DSAS's may name what a search found."
    for path in sorted((ROOT / "nbs" / "papers").glob("*/*.ipynb")):
        if path.parent.name == "dsas":
            continue
        for c in json.loads(path.read_text())["cells"]:
            if c["cell_type"] == "code" and "".join(c["source"]) == "bullet_list(grid.deviations)":
                shown = "".join(
                    line for o in c["outputs"] for line in o["data"].get("text/markdown", [])
                )
                yield path, shown


def test_pages_show_the_deviations_of_the_stored_scale():
    pages = list(deviations_shown())
    for path, shown in pages:
        grid = grid_for(f"{path.parent.name}/{path.stem}", "small")
        assert shown == "\n".join(f"- {d}" for d in grid.deviations), f"{path}: run it again"
    assert len(pages) > 30


@pytest.mark.parametrize(
    "page",
    sorted((ROOT / "nbs").glob("papers/*/*.ipynb")),
    ids=lambda p: f"{p.parent.name}/{p.stem}",
)
def test_a_page_begins_with_its_answer_at_the_stored_scale(page):
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    answering = [c for c in cells if "answer_page(" in "".join(c["source"])]
    answering += [c for c in cells if "report.answer()" in "".join(c["source"])]
    for cell in answering:
        texts = [
            "".join(o["data"].get("text/markdown", [])) for o in cell["outputs"] if "data" in o
        ]
        assert texts[0].startswith("**At small scale"), "run it again with --scale small"
