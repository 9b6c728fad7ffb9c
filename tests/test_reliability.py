"""The trials of `runner.reliability`: a few of each kind, and that they notice a fault."""

import pytest

from snnkd_nb.runner import reliability
from snnkd_nb.runner.reliability import KINDS, Bench, attempt, format_tallies, run_trials


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    reliability.threads(1)
    return Bench(tmp_path_factory.mktemp("bench"))


QUICK = {kind.name: 1 if kind.count < 60 else 3 for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_few_trials_of_each_kind(bench, kind):
    for number in range(QUICK[kind.name]):
        assert attempt(kind, bench, f"{kind.name} {number}") == ""


def test_there_are_a_thousand_trials():
    assert sum(kind.count for kind in KINDS) == 1000
    assert len({kind.name for kind in KINDS}) == len(KINDS)


def kind_named(name):
    return next(kind for kind in KINDS if kind.name == name)


def test_a_reader_that_trusts_damaged_records_is_noticed(bench, monkeypatch):
    def trust(store, path, run_id):
        record = bench.record
        return type(record)(record.spec, {"acc_last": 0.0}, {}, {}, {}) if path.exists() else None

    monkeypatch.setattr(reliability.Store, "_read", trust)
    assert attempt(kind_named("damaged record"), bench, "seed") == "a wrong record was accepted"


def test_a_write_that_is_not_atomic_is_noticed(bench, monkeypatch):
    def write_slowly(path, data):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            for start in range(0, len(data), 100):
                file.write(data[start : start + 100])
                file.flush()

    monkeypatch.setattr(reliability, "atomic_write", write_slowly)
    kind = kind_named("SIGKILL during rendering")
    losses = (attempt(kind, bench, f"seed {number}") for number in range(20))
    assert any("half written" in loss for loss in losses)  # ends at the first


def test_a_trial_that_raises_counts_as_failed(bench, monkeypatch):
    broken = reliability.Kind("broken", "none", lambda *arguments: 1 / 0, 1)
    assert attempt(broken, bench, "seed") == "ZeroDivisionError: division by zero"


def test_the_table_counts_trials_and_failures(monkeypatch):
    class NoBench:
        def __init__(self, folder):
            self.folder = folder

    monkeypatch.setattr(reliability, "Bench", NoBench)
    good = reliability.Kind("good", "nothing", lambda *arguments: "", 90)
    bad = reliability.Kind("bad", "a loss", lambda *arguments: "it is lost", 10)
    lines = []
    tallies = run_trials(20, on_line=lines.append, kinds=(good, bad))
    text = format_tallies(tallies)
    assert "20 trials, 2 failed" in text and "| bad | a loss | 2 | 2 |" in text
    assert "| good | nothing | 18 | 0 |" in text and text.count("- bad: it is lost") == 2
    stopped = run_trials(20, seconds=-1, on_line=lines.append, kinds=(good, bad))
    assert sum(tally.trials for tally in stopped) == 0 and "stopped after" in lines[-1]


def test_a_student_that_ends_before_its_record_is_stored_keeps_all_numbers(
    bench, tmp_path, monkeypatch
):
    from snnkd_nb.training import job

    measure = job.measure_metrics
    calls = []

    def end_before_the_record(*arguments):
        calls.append(1)
        if len(calls) == 2:  # 1: the teacher, 2: the student after its last epoch
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(job, "measure_metrics", end_before_the_record)
    with reliability.inside(tmp_path):
        with pytest.raises(KeyboardInterrupt):
            reliability.train_one_run()
        reliability.train_one_run()
        record = reliability.Store().get(reliability.STUDENT)
    assert len(calls) == 3
    assert reliability.numbers_of(record) == bench.numbers[1]


def test_a_damaged_header_of_an_image_cache_is_not_a_traceback(bench):
    # the damage of this seed makes numpy raise tokenize.TokenError
    assert attempt(kind_named("damaged image cache"), bench, "damaged image cache 20") == ""
