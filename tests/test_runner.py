"""Jobs and pages: order, failure, sharing; papermill driven strictly and plainly."""

import csv
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snnkd_nb.core import UserError
from snnkd_nb.papers.experiments import SCALES, artefact, artefacts, match, specs_for
from snnkd_nb.runner import jobs as runner_jobs
from snnkd_nb.runner import notebooks as runner_notebooks
from snnkd_nb.runner.jobs import (
    START_RUNS,
    BarDisplay,
    Clock,
    Networks,
    ensure,
    estimate_page_seconds,
    estimate_seconds,
    execute,
    make_tasks,
    plan,
    run_tasks,
)
from snnkd_nb.runner.notebooks import coerce, prepare, read_parameters, render, reproduce
from snnkd_nb.runner.status import list_rows, rendered_path, status_text
from snnkd_nb.runner.workers import Task
from snnkd_nb.spec import DataSpec, ModelSpec, OptimSpec, RunSpec, to_dict
from snnkd_nb.store import Record, Store

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A project of its own with the real notebooks, and a stand-in for training."
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    (tmp_path / "nbs").symlink_to(ROOT / "nbs")
    (tmp_path / "standin.py").write_text(STANDIN)
    monkeypatch.setenv("SNNKD_ROOT", str(tmp_path))
    monkeypatch.setenv("SNNKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


STANDIN = """
import warnings
from snnkd_nb.spec import RunSpec
from snnkd_nb.store import Record, Store

def train(spec, store, weights, emit):
    run = RunSpec.from_dict(spec)
    if run.seed == 99:
        raise ValueError("seed 99")
    if run.seed == 98:
        warnings.warn("mind the seed")
    for epoch in range(1, run.optim.epochs + 1):
        emit({"event": "epoch", "id": run.id, "epoch": epoch, "epochs": run.optim.epochs})
    Store(store).put(Record(spec, {"acc_last": 80.0 + run.seed}, {}, {}, {}))
    return {"acc": 80.0 + run.seed, "seconds": 0.1}

def train_or_die(spec, store, weights, emit):
    "Kill the worker when a run is trained for the first time."
    import os
    import signal
    from pathlib import Path

    run = RunSpec.from_dict(spec)
    marker = Path(os.environ["SNNKD_ROOT"], f"died-{run.seed}")
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return train(spec, store, weights, emit)

def chore(name, bad, emit):
    if bad:
        raise ValueError(name)
    return {"name": name}
"""

# --- the plan --------------------------------------------------------------------------------------------------------

OPTIM = OptimSpec(epochs=1)
TEACHERS = [RunSpec(model=ModelSpec("resnet20", width=w), optim=OPTIM) for w in (0.5, 1.0)]
CHAINS = [
    RunSpec(model=ModelSpec("resnet18"), optim=OPTIM, method="kd", teacher=t) for t in TEACHERS
]
STUDENTS = [
    RunSpec(model=ModelSpec("resnet20", T=T), optim=OPTIM, method="kd", teacher=t)
    for T in (1, 2)
    for t in [*TEACHERS, *CHAINS]
]
ALL = [*TEACHERS, *CHAINS, *STUDENTS, RunSpec(optim=OPTIM, seed=3)]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(wanted=st.lists(st.sampled_from(ALL), max_size=12), stored=st.sets(st.sampled_from(ALL)))
def test_a_plan_has_each_run_once_and_what_it_needs_before_it(home, wanted, stored):
    class Some:
        def get(self, spec):
            return Record(to_dict(spec), {}, {}, {}, {}) if spec in stored else None

    jobs = plan(wanted, Some())
    ids = [j.id for j in jobs]
    assert len(ids) == len(set(ids)) and {s.id for s in wanted} <= set(ids)
    assert all(d in ids[:i] for i, j in enumerate(jobs) for d in j.deps)
    for j in jobs:
        assert j.state == ("stored" if j.spec in stored and not j.weights else "needed")
        if j.state == "needed" and j.spec.teacher:
            assert j.deps == (j.spec.teacher.id,)


def test_the_longest_chain_starts_first(home):
    long = RunSpec(
        model=ModelSpec("resnet20", T=8),
        optim=OptimSpec(epochs=50),
        method="kd",
        teacher=TEACHERS[0],
    )
    tasks = {
        t.id: t.rank for t in make_tasks(plan([STUDENTS[1], long, TEACHERS[1]], Store()), Store())
    }
    assert tasks[TEACHERS[0].id] > tasks[long.id] > tasks[TEACHERS[1].id]


# --- the executor -----------------------------------------------------------------------------------------------------


def simulate(tasks, bad):
    ends = {}
    for task in tasks:
        ends[task.id] = "failed" if task.id in bad else "ok"
        if any(ends[dep] != "ok" for dep in task.deps):
            ends[task.id] = "skipped"
    return ends


@pytest.mark.parametrize("seed", range(4))
def test_any_graph_of_tasks_ends_as_it_must(home, seed):
    r = random.Random(seed)
    names = [f"t{i}" for i in range(12)]
    bad = set(r.sample(names, 3))
    tasks = [
        Task(
            n,
            "standin:chore",
            {"name": n, "bad": n in bad},
            tuple(r.sample(names[:i], min(i, r.randint(0, 2)))),
            r.random(),
        )
        for i, n in enumerate(names)
    ]
    done, ends = [], {}
    for task, m in run_tasks(r.sample(tasks, len(tasks)), 1 + seed % 3):
        if m.get("event") == "started":
            assert set(task.deps) <= {i for i in done if ends[i] == "ok"}
        if "result" in m:
            ends[task.id] = m["result"]
            done.append(task.id)
    assert ends == simulate(tasks, bad) and len(done) == len(tasks)


def test_a_failed_teacher_takes_only_its_students_with_it(home):
    bad = TEACHERS[0].replace(seed=99)
    lost, fine = STUDENTS[0].replace(teacher=bad), STUDENTS[1]
    lines = []
    out = execute([lost, fine], 2, on_line=lines.append, call="standin:train")
    assert not out.ok
    assert list(out.failed) == [bad.id]
    assert list(out.skipped) == [lost.id]
    assert set(out.done) == {fine.id, fine.teacher.id}
    assert lines[-1] == "2 of 4 runs done · 1 failed · 1 skipped"
    assert "ValueError: seed 99" in (home / "results/progress" / f"{bad.id}.log").read_text()


def test_a_warning_is_told_once(home, monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    lines = []
    specs = [TEACHERS[0].replace(seed=98), TEACHERS[1].replace(seed=98)]
    assert execute(specs, 1, on_line=lines.append, call="standin:train").ok
    assert [x for x in lines if "mind" in x] == ["note: mind the seed"]


def test_bars_show_what_is_going_and_lines_scroll_past(home, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    with BarDisplay() as display:
        task = Task("a", "", {})
        display.show_epoch(task, {"id": "run-a", "epoch": 1, "epochs": 2})
        assert [bar.description for bar in display.bars.tasks] == ["run-a"]
        assert display.bars.tasks[0].completed == 1
        display.print_line("[1/2] finished [brackets]")
        display.show_epoch(task, {"id": "run-a", "epoch": 2, "epochs": 2})
        display.end_task(task)
        assert not display.bars.tasks
    assert "[1/2] finished [brackets]" in capsys.readouterr().out


def test_a_terminal_gets_bars_and_a_file_gets_lines(home):
    code = "from snnkd_nb.runner.jobs import execute\nfrom snnkd_nb.spec import *\nexecute([RunSpec(seed=1)], 1, call='standin:train')"
    env = {**os.environ, "PYTHONPATH": str(home), "TERM": "xterm"}
    plain = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert plain.stdout.startswith("[1/1] digits-resnet20-ann-s1") and "\x1b" not in plain.stdout
    for p in (home / "results/runs").glob("*.json"):
        p.unlink()
    leader, follower = os.openpty()
    live = subprocess.run(
        [sys.executable, "-c", code], env=env, stdout=follower, stderr=subprocess.PIPE
    )
    os.close(follower)
    shown = os.read(leader, 1 << 16).decode()
    assert live.returncode == 0 and "\x1b[" in shown and "[1/1] digits-resnet20-ann-s1" in shown


@pytest.mark.skipif(
    importlib.util.find_spec("distributed") is not None, reason="dask.distributed is installed"
)
def test_without_dask_the_error_says_what_to_install(home):
    with pytest.raises(UserError, match="snnkd_nb\\[extra\\]"):
        execute([TEACHERS[0]], executor="dask")


def test_on_dask_the_same_happens(home):
    pytest.importorskip("distributed")
    bad = TEACHERS[0].replace(seed=99)
    lost, fine = STUDENTS[0].replace(teacher=bad), STUDENTS[1]
    out = execute([lost, fine], 1, executor="dask", call="standin:train")
    assert list(out.failed) == [bad.id]
    assert list(out.skipped) == [lost.id]
    assert set(out.done) == {fine.id, fine.teacher.id}


def test_on_dask_a_worker_that_is_killed_costs_no_run(home):
    pytest.importorskip("distributed")
    run = TEACHERS[0]
    out = execute([run], 1, executor="dask", call="standin:train_or_die")
    assert (home / f"died-{run.seed}").exists()
    assert list(out.done) == [run.id] and not out.failed
    assert Store().get(run).metrics["acc_last"] == 80.0 + run.seed


def test_ensure_says_one_line_and_answers_by_spec(home, capsys):
    runs = ensure([TEACHERS[0], STUDENTS[0]], call="standin:train", progress=False)
    assert capsys.readouterr().out.strip() == "2 needed · 2 stored · 0 missing"
    assert runs[STUDENTS[0]].metrics["acc_last"] == 80.0 and runs.get(ALL[-1]) is None


def test_ensure_follows_the_environment(home, monkeypatch, capsys):
    monkeypatch.setenv("SNNKD_MISSING", "show")
    assert (
        ensure(TEACHERS)[TEACHERS[0]] is None
        and capsys.readouterr().out.strip() == "2 needed · 0 stored · 2 missing"
    )
    monkeypatch.setenv("SNNKD_MISSING", "error")
    with pytest.raises(UserError, match="2 runs are missing"):
        ensure(TEACHERS)


def test_a_page_that_shows_missing_runs_tells_how_to_train_them(home, capsys):
    runs = ensure(TEACHERS, missing="show")
    assert runs.missing == TEACHERS and Store().ids() == []
    assert 'missing = "run" trains the missing runs' in capsys.readouterr().out
    assert Networks(runs).if_missing == "show"


@pytest.mark.parametrize("missing", ["show", "error"])
def test_a_page_is_told_what_to_do_about_missing_runs_and_keeps_its_own_value(
    home, monkeypatch, missing
):
    told = []

    def note_values(path, values, missing):
        told.append((values["missing"], missing))
        return json.loads(json.dumps(nbformat.read(path, as_version=4)))

    monkeypatch.setattr(runner_notebooks, "run_notebook", note_values)
    page = render("dsas/table15", missing=missing)
    assert told == [(missing, missing)]
    assert read_parameters(json.loads(page.read_text()))["missing"] == "show"
    with pytest.raises(UserError, match="use --missing"):
        render("dsas/table15", given={"missing": "run"})


def test_threads_follow_the_number_asked_for_and_not_what_is_left(home, monkeypatch):
    given = []

    def note_threads(tasks, jobs, threads, envs):
        given.append((jobs, threads))
        yield from ()

    monkeypatch.setitem(runner_jobs.EXECUTORS, "local", note_threads)
    monkeypatch.setattr(runner_jobs, "cores", lambda: 8)
    for n in (1, 3):
        execute([RunSpec(seed=s) for s in range(n)], 2, on_line=lambda x: None)
    assert given == [(2, 4), (2, 4)]


def test_a_reproduction_says_first_what_it_will_do_and_how_long_it_takes(home, monkeypatch):
    lines = []
    assert reproduce(["dsas/figure08"], jobs=1, on_line=lines.append).ok
    assert re.fullmatch(
        r"1 page to render; (less than a minute|about \d+ minutes?) on 1 core", lines[0]
    )
    monkeypatch.setattr(runner_notebooks, "measure_slowdown", lambda: 2.0)
    monkeypatch.setattr(runner_notebooks, "cores", lambda: 2)
    specs = [RunSpec(seed=seed, optim=OptimSpec(epochs=20)) for seed in range(8)]
    slowdown, after = runner_notebooks._announce(specs, 30, 4, lines.append)
    expected = 2 * (sum(map(estimate_seconds, specs)) / 2 + START_RUNS) + after
    assert slowdown == 2.0
    assert after == estimate_page_seconds(30, 2, 2.0) > estimate_page_seconds(3, 2, 2.0)
    assert (
        lines[-1]
        == f"8 runs to train and 30 pages to render; about {round(expected / 60)} minutes on 2 cores"
    )
    monkeypatch.setattr(runner_notebooks, "list_gpus", lambda: ["0"])
    assert runner_notebooks._announce(specs, 30, 1, lines.append) == (None, 0.0)
    assert (
        lines[-1]
        == "8 runs to train and 30 pages to render; the time left is shown once the first runs are done"
    )


def test_the_time_left_counts_what_comes_after_the_runs(home):
    lines = []
    specs = [RunSpec(seed=seed, optim=OPTIM) for seed in range(3)]
    estimates = {"slowdown": 1e-6, "seconds_after": 3600}
    assert execute(specs, 1, on_line=lines.append, call="standin:train", **estimates).ok
    assert ["1 h 00 min left" in line for line in lines] == [True, True, False]


def test_an_estimate_moves_from_the_measured_speed_to_what_runs_take():
    clock = Clock(slowdown=1.0)
    spec = RunSpec(optim=OptimSpec(epochs=10))
    estimate = estimate_seconds(spec)
    assert clock.seconds(spec) == pytest.approx(estimate)
    for _ in range(100):
        clock.add(spec, 3 * estimate)
    assert 2.5 * estimate < clock.seconds(spec) < 3 * estimate
    for longer in (
        RunSpec(optim=OptimSpec(epochs=20)),
        spec.replace(model=ModelSpec("resnet20", T=8)),
        spec.replace(data=DataSpec("digits", size=64)),
    ):
        assert estimate_seconds(longer) > estimate


# --- the registry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_every_artefact_that_is_built_has_runs_that_are_well_formed(scale):
    for a in artefacts():
        specs = specs_for(a.id, scale)
        assert len({s.id for s in specs}) == len(specs)
        for s in specs:
            assert type(s).from_dict(to_dict(s)) == s
        if not a.built:
            assert not specs, f"{a.id} has runs but no notebook"


def test_there_is_no_notebook_without_an_artefact():
    pages = {
        p.relative_to(ROOT / "nbs/papers").with_suffix("").as_posix()
        for p in (ROOT / "nbs/papers").rglob("*.ipynb")
    }
    assert {p for p in pages if not p.endswith("00_paper") and ".ipynb_checkpoints" not in p} <= {
        a.page for a in artefacts()
    }


def test_patterns_keep_the_papers_order_and_repeat_nothing():
    keys = [a.id for a in match(["sastc/table02", "dsas", "sastc/*", "all"])]
    assert keys == [a.id for a in artefacts()]


# --- pages ------------------------------------------------------------------------------------------------------------


def outputs(path):
    cells = json.loads(Path(path).read_text())["cells"]
    return [
        [
            {k: v for k, v in o.items() if k not in ("metadata", "execution_count", "transient")}
            for o in c.get("outputs", [])
        ]
        for c in cells
        if "injected-parameters" not in c["metadata"].get("tags", [])
    ]


@pytest.mark.skipif(not artefact("dsas/figure08").built, reason="not built yet")
def test_a_page_renders_to_the_same_bytes_and_plain_papermill_agrees(home):
    first = render("dsas/figure08", given={"reach": "3"}).read_bytes()
    made = {p: p.read_bytes() for p in (home / "figures").rglob("*") if p.is_file()}
    assert {p.suffix for p in made} == {".png", ".csv"}
    assert float(next(csv.DictReader((home / "figures/dsas/figure08.csv").open()))["x"]) == -3.0
    for p in made:
        p.unlink()
    assert render("dsas/figure08", given={"reach": 3.0}).read_bytes() == first
    assert {p: p.read_bytes() for p in made} == made
    nb = json.loads(first)
    assert (
        read_parameters(nb)["reach"] == 3.0
        and all(c.get("execution_count") is None for c in nb["cells"])
        and set(nb["metadata"]) == {"kernelspec", "language_info"}
    )
    plain = home / "plain.ipynb"
    r = subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            "nbs/papers/dsas/figure08.ipynb",
            plain,
            "-p",
            "reach",
            "3.0",
        ],
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0, r.stderr[-2000:]
    assert outputs(plain) == outputs(rendered_path("dsas/figure08", "smoke"))


@pytest.mark.skipif(not artefact("dsas/table15").built, reason="not built yet")
def test_a_table_without_runs_is_rendered_with_holes_and_nothing_is_trained(home):
    text = render("dsas/table15").read_text()
    assert "0 stored" in text and Store().ids() == [] and not (home / "results/progress").exists()
    row = list_rows(["dsas/table15"])[0]
    assert row.rendered and row.missing == row.needed > 0
    smoke = status_text(scales=("smoke",))
    assert (
        smoke == status_text(scales=("smoke",))
        and f"| 0/{row.needed} " in smoke
        and "smoke |" not in status_text()
    )


@pytest.mark.parametrize(
    "value, default",
    [
        ("1e3", 1),
        ("", 1),
        ("None", 1),
        ("[1", [1]),
        ("{}", [1]),
        (float("nan"), 1.0),
        (object(), "x"),
        (b"x", "x"),
        ("4.5", 4),
        ("many", 4),
        ("maybe", True),
        ("x", 0.5),
        (Path("x"), "x"),
        ({1, 2}, None),
        (True, 1),
    ],
)
def test_values_that_do_not_fit_are_refused(value, default):
    with pytest.raises(UserError, match="give a"):
        coerce("x", value, default)


def test_numbers_and_tuples_are_converted():
    assert coerce("lr", "1", 0.5) == 1.0
    assert coerce("seeds", (3, 4), [0]) == [3, 4]
    assert coerce("T", 3, 4) == 3


@given(
    st.one_of(
        st.integers(),
        st.booleans(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(),
        st.lists(st.integers()),
    )
)
def test_the_text_of_a_value_is_read_back_as_the_value(value):
    assert coerce("x", value if isinstance(value, str) else repr(value), value) == value
    assert type(coerce("x", value, value)) is type(value)


def test_every_built_page_takes_its_scale(home):
    for a in artefacts():
        if a.built:
            prepare(a.id, "smoke")
