"""Faults around runs: weights that come with the project, damaged records, wrong settings."""

import json
from types import SimpleNamespace

import pytest
import torch

from snnkd_nb.cli import main
from snnkd_nb.core import UserError, canonical_json, raises, root, sha256_of, thread_limits
from snnkd_nb.data.decode import Source, prepare_source
from snnkd_nb.deploy.runs import model_card, ship_weights
from snnkd_nb.kernels.lif import lif
from snnkd_nb.runner import doctor, jobs
from snnkd_nb.runner.book import subject_of
from snnkd_nb.runner.jobs import has_weights, plan, watch
from snnkd_nb.runner.notebooks import clean_notebook, read_parameters
from snnkd_nb.runner.status import Row
from snnkd_nb.runner.timing import measure_durations
from snnkd_nb.spec import ModelSpec, RunSpec, to_dict
from snnkd_nb.store import BadRecord, Record, Store, dump, find_weights, parse_record
from snnkd_nb.training.loop import History
from snnkd_nb.training.progress import EventLog, progress_folder

TEACHER = RunSpec(model=ModelSpec("resnet20", width=0.5))
STUDENT = RunSpec(model=ModelSpec("resnet20", T=2), method="kd", teacher=TEACHER)


@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty project and an empty cache."
    monkeypatch.setenv("SNNKD_ROOT", str(tmp_path))
    monkeypatch.setenv("SNNKD_CACHE", str(tmp_path / "cache"))
    return tmp_path


def store_with_weights(spec, content=b"weights", history=None):
    "Store a record, and its weights as they come with the project; return record and file."
    record = Record(
        to_dict(spec, full=True),
        {"acc_last": 90.0, "params": 1000},
        history or {},
        {},
        {"sizes": {"train": 10, "test": 10}, "fingerprint": "0"},
        weights={"sha256": sha256_of(b"weights"), "bytes": 7},
    )
    file = root() / "results" / "weights" / f"{spec.id}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return Store().put(record), file


def test_weights_that_come_with_the_project_need_no_training(home):
    record, file = store_with_weights(TEACHER)
    assert find_weights(record) == file
    assert has_weights(TEACHER, Store())
    assert [(job.spec, job.state) for job in plan([STUDENT])] == [
        (TEACHER, "stored"),
        (STUDENT, "needed"),
    ]
    file.write_bytes(b"others")
    assert not has_weights(TEACHER, Store())
    assert [job.state for job in plan([STUDENT])] == ["needed", "needed"]


def test_damaged_weights_are_not_shipped(home):
    store_with_weights(TEACHER, b"damaged")
    with pytest.raises(UserError, match="damaged or not on this machine"):
        ship_weights([TEACHER])


def test_a_card_has_no_energy_if_it_was_not_finite(home):
    record, _ = store_with_weights(TEACHER, history={"microjoules_45nm": [1.5, None]})
    assert "energy" not in model_card(record)
    record.history["microjoules_45nm"][-1] = 2.5
    assert "2.5 µJ" in model_card(record)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"kind": "measure"}, "kind 'measure', this version reads run, search"),
        ({"id": None}, "no id"),
        ({"spec": {"nothing": 1}}, "cannot read its fields.*nothing"),
        ({"more": 1}, "cannot read its fields.*more"),
    ],
)
def test_a_record_that_this_version_cannot_read_is_damaged(home, change, said):
    record, _ = store_with_weights(TEACHER)
    content = json.loads(dump(record)) | change
    del content["sha256"]
    if content["id"] is None:
        del content["id"]
    text = json.dumps({**content, "sha256": sha256_of(canonical_json(content))})
    with pytest.raises(BadRecord, match=said):
        parse_record(text)
    Store().path(TEACHER.id).write_text(text)
    with pytest.warns(UserWarning, match="counts as not done"):
        assert Store().get(TEACHER) is None


def test_a_term_that_begins_later_is_in_the_columns():
    history = History([{"epoch": 1, "test_acc": 1.0}, {"epoch": 2, "kd": 0.5, "test_acc": 2.0}])
    columns = history.columns()
    assert list(columns.items()) == [
        ("epoch", [1, 2]),
        ("kd", [None, 0.5]),
        ("test_acc", [1.0, 2.0]),
    ]


def test_watching_does_not_take_an_old_end_for_the_new_one(home, monkeypatch):
    log = EventLog(progress_folder() / f"{TEACHER.id}.jsonl")
    done = {"event": "done", "seconds": 1.0, "acc_last": 50.0}
    log(done)
    looks = []

    def is_locked(run_id):
        "Another process trains the run again: it ends between the second and the third look."
        looks.append(run_id)
        if len(looks) == 2:
            log({**done, "acc_last": 60.0})
        return len(looks) < 3

    monkeypatch.setattr(jobs, "_is_locked", is_locked)
    lines = []
    assert watch(TEACHER.id, lines.append, every=0)
    assert [line.split(" after")[0] for line in lines] == ["done: 50.00 %", "done: 60.00 %"]


def test_an_error_of_a_source_does_not_blame_the_cache(home):
    def read():
        raise PermissionError(13, "Permission denied", "/data/list.txt")

    source = Source("own", [], read)
    message = raises(UserError, prepare_source, source, match="own: cannot read /data/list.txt")
    assert "free some space" not in message


def test_the_doctor_reports_a_wrong_variable(home, monkeypatch):
    monkeypatch.setenv("SNNKD_BF16", "x")
    monkeypatch.setattr(doctor, "check_packages", list)
    monkeypatch.setattr(doctor, "check_torch", list)
    lines = []
    assert not doctor.doctor(lines.append)
    assert any(line.startswith("FAIL  CPU: unknown value of SNNKD_BF16") for line in lines)


def test_the_doctor_reports_a_user_without_home(home, monkeypatch):
    def home_of_nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SNNKD_CACHE")
    monkeypatch.setattr(doctor.Path, "home", home_of_nobody)
    monkeypatch.setattr(doctor, "check_packages", list)
    monkeypatch.setattr(doctor, "check_torch", list)
    lines = []
    assert not doctor.doctor(lines.append)
    assert any("this user has no home directory" in line for line in lines)


def test_a_case_is_refused_or_dead_by_a_field():
    def task(fields, factor):
        if fields["kind"] == "refused":
            raise doctor.Refused("refused: too large")
        raise ValueError("refused is only a word here")

    cases = [{"kind": "refused"}, {"kind": "error"}]
    first, second = doctor.run_group(task, cases, 20.0)
    assert first == {"index": 0, "failure": "refused: too large", "refused": True}
    assert second == {"index": 1, "failure": "ValueError: refused is only a word here"}
    assert not doctor.is_death(second)
    assert doctor.is_death({"index": 0, "failure": "hangs", "died": True})


def test_wrong_numbers_name_what_is_allowed():
    with pytest.raises(UserError, match=r"v_threshold must be below 1e30 in size, got 1e\+31"):
        lif(torch.zeros(2, 1), v_threshold=1e31)
    with pytest.raises(UserError, match="scale of a measurement of durations.*small"):
        measure_durations("smoke")


def test_deploy_has_a_subject_of_its_own():
    assert subject_of("deploy.runs") == "Trained networks in use"


def test_one_function_limits_the_threads_of_new_processes():
    assert set(thread_limits(3).values()) == {"3"}
    assert "NUMBA_NUM_THREADS" in thread_limits(1)


def test_download_is_obeyed_next_to_a_config(home, monkeypatch, capsys):
    from snnkd_nb.data import images

    file = home / "run.yaml"
    file.write_text("data: {name: digits, size: 8}\nmodel: {name: resnet20}\n")
    asked = []
    monkeypatch.setattr(images, "load", lambda *args, **options: asked.append((args, options)))
    assert main(["train", "--config", str(file), "--download", "--print-config"]) == 0
    assert asked == [(("digits",), {"download": True, "size": 8})]


@pytest.mark.parametrize("command", ["train", "search"])
def test_the_width_of_a_stored_teacher_cannot_be_given(home, capsys, command):
    words = [command, "--teacher", f"run:{TEACHER.id}", "--teacher-width", "2"]
    assert main(words) == 2
    assert "--teacher-width with --teacher run:" in capsys.readouterr().err


def test_no_jobs_are_an_error_for_pages_too(monkeypatch, capsys):
    assert main(["render", "sastc/table02", "-j", "0"]) == 2
    assert "jobs = 0: give at least 1" in capsys.readouterr().err


def notebook_with_parameters(source):
    cell = {"cell_type": "code", "id": "a", "metadata": {"tags": ["parameters"]}, "outputs": []}
    return {
        "cells": [{**cell, "source": source, "execution_count": None}],
        "metadata": {},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def test_values_are_inserted_behind_letters_of_several_bytes():
    source = "größe = 'äöü'; rest = 1  # für\nnext_name = 2\n"
    text = clean_notebook(notebook_with_parameters(source), {"größe": "x", "rest": 3})
    cell = json.loads(text)["cells"][0]
    assert "".join(cell["source"]) == "größe = 'x'; rest = 3  # für\nnext_name = 2\n"


@pytest.mark.parametrize("line", ["a, b = (1, 2)", "a = b = 1", "a.b = 1"])
def test_a_parameter_has_one_line_of_its_own(line):
    with pytest.raises(UserError, match="write one line per parameter") as raised:
        read_parameters(notebook_with_parameters(line))
    assert repr(line) in str(raised.value)


def test_a_page_from_elsewhere_is_rendered_elsewhere():
    built = SimpleNamespace(built=True)
    assert Row(built, "small", 3, 2, None, True).state == "2/3 runs, rendered elsewhere"
    assert Row(built, "small", 0, 0, None).state == "no runs needed, not rendered"
