"""A search as a job: planned after its teacher, made once, resumed, its record read back; by hand from the command line."""

import json
import warnings
from pathlib import Path

import pytest

from snnkd_nb.cli import main
from snnkd_nb.core import UserError
from snnkd_nb.papers.dsas import build_search
from snnkd_nb.papers.experiments import build_run
from snnkd_nb.runner.jobs import execute, plan
from snnkd_nb.search import job as module
from snnkd_nb.search.job import (
    check_search,
    create_distillation_run,
    create_engine_options,
    read_candidates,
    read_population,
    run_search,
)
from snnkd_nb.spec import DataSpec, ModelSpec, OptimSpec, RunSpec, SearchSpec, to_dict
from snnkd_nb.store import SearchRecord, Store, dump, parse_record

TEACHER = RunSpec(
    model=ModelSpec("resnet20", width=0.25, args={"depth": 0.34}),
    optim=OptimSpec(epochs=1, batch_size=128),
)
SPEC = SearchSpec(
    teacher=TEACHER,
    space_args={"normal": [1, 3], "channels": [4, 8]},
    T=2,
    population=6,
    generations=3,
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SNNKD_ROOT", str(tmp_path))
    monkeypatch.setenv("SNNKD_CACHE", str(tmp_path / "cache"))
    return tmp_path


def plain(record):
    return {
        k: v
        for k, v in json.loads(dump(record)).items()
        if k not in ("environment", "cost", "sha256")
    } | {"trajectory": {k: v for k, v in record.trajectory.items() if k != "seconds"}}


def test_a_stopped_search_ends_as_one_that_was_not(home, monkeypatch):
    whole = run_search(SPEC, Store(home / "a"))
    calls, real = [], module.Scorer

    class Fragile:
        def __init__(self, *a, **kw):
            self.scorer = real(*a, **kw)
            self.key, self.slopes = self.scorer.key, self.scorer.slopes

        def __call__(self, g):
            calls.append(g)
            if len(calls) == 9:
                raise KeyboardInterrupt
            return self.scorer(g)

    monkeypatch.setattr(module, "Scorer", Fragile)
    with pytest.raises(KeyboardInterrupt):
        run_search(SPEC, Store(home / "b"))
    assert Store(home / "b").get(SPEC) is None
    again = run_search(SPEC, Store(home / "b"))
    assert plain(again) == plain(whole) and len(calls) == len(whole.candidates) - 1 + 1, (
        "only the broken call is made again"
    )
    assert not list((home / "cache" / "checkpoints").glob("*.search"))


def test_searches_run_beside_trainings_and_once(home, capsys):
    store, lines = Store(home / "runs"), []
    assert [j.spec for j in plan([SPEC], store)] == [TEACHER, SPEC]
    out = execute([SPEC, SPEC], 1, store, lines.append)
    assert out.ok and out.total == 2 and any("best " in line and SPEC.id in line for line in lines)
    assert execute([SPEC], 1, store).total == 0
    record = store.get(SPEC)
    assert (
        isinstance(record, SearchRecord)
        and parse_record(dump(record)) == record
        and record.run == SPEC
        and record.teacher["id"] == TEACHER.id
    )
    found, last = read_candidates(record), read_population(record)
    assert (
        len(found) == sum(record.trajectory["evaluated"])
        and len(last) == SPEC.population
        and min(found, key=lambda c: c["fitness"])["genome"] == record.best["genome"]
    )
    run = create_distillation_run(record, OptimSpec(epochs=1))
    assert (
        run.teacher == TEACHER
        and run.model.args["genome"] == record.best["genome"]
        and [j.spec for j in plan([run], store) if j.state == "needed"] == [run]
    )


def test_a_damaged_record_counts_as_not_there(home):
    store = Store(home / "runs")
    run_search(SPEC, store)
    path = store.path(SPEC.id)
    path.write_text(path.read_text().replace('"best"', '"bets"', 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert store.get(SPEC) is None
        assert run_search(SPEC, store).best and store.get(SPEC)


def test_workers_do_not_change_the_record(home):
    assert plain(run_search(SPEC, Store(home / "a"))) == plain(
        run_search(SPEC, Store(home / "b"), workers=2)
    )


@pytest.mark.parametrize(
    "kw, words",
    [
        ({"metric": "mass"}, "did you mean 'mas'"),
        ({"space": "cifar11"}, "did you mean"),
        ({"batch": 9}, "classes"),
        ({"batch": 5000}, "training images"),
        ({"neuron": "tett"}, "tet"),
        ({"algorithm_args": {"mutation": -1}}, "from 0 to 1"),
        ({"space_args": {"downsample": [4, 4]}}, "pixels allow"),
        ({"teacher": TEACHER.replace(model=ModelSpec("resnet2O"))}, "resnet20"),
        *(
            ({"metric_args": {k: v}}, f"{k!r} is a field of the search")
            for k, v in (("T", 2), ("neuron", "tet"), ("metric", "mas"))
        ),
        ({"metric_args": {"neuron_args": {"taus": 2.0}}}, "did you mean 'tau'"),
        ({"metric_args": {"K": 0}}, "at least 1"),
        ({"metric_args": {"K": 99}}, "give at most"),
        ({"metric_args": {"K": 9, "gradients": "activation"}}, "stages of the teacher"),
        ({"metric_args": {"mode": "ickd"}, "space_args": {"channels": [8, 9]}}, "9 of the space"),
        ({"space_args": {"image_size": 32, "downsample": [1, 5]}}, "leave it out of space_args"),
        ({"space_args": {"in_channels": 3}}, "with 3 channels, these have 1"),
        (
            {"metric": "params", "algorithm": "nsga2", "algorithm_args": {"second": "sops"}},
            "runs no candidate",
        ),
        ({"metric": "mas", "batch": 1}, "a batch of 1 image"),
        ({"metric_args": {"mode": "sample"}, "batch": 1}, "a batch of 1 image"),
        ({"data": DataSpec(size=6)}, "images 1×8×8 of digits, these images are 1×6×6"),
    ],
)
def test_mistakes_are_said_before_a_teacher_is_trained(home, kw, words):
    store = Store(home / "runs")
    with pytest.raises(UserError) as e:
        run_search(SPEC.replace(**kw), store)
    assert words in str(e.value) and "\n" not in str(e.value) and not store.ids()


def test_what_is_distilled_has_the_slopes_of_its_teacher(home, monkeypatch):
    how = build_search("smoke", "CIFAR-10")
    record = SearchRecord(
        to_dict(how, full=True),
        {"genome": "n8 d8", "fitness": 0.1},
        {},
        [],
        [],
        {},
        {},
        {},
        extra={"slopes": [2.0, 2.123456, 3.5]},
    )
    Store().put(record)
    student = build_run("dsas", "student", "smoke", dataset="CIFAR-10")
    assert create_distillation_run(record).model == student.model
    assert student.model.args["slopes"] == (2.0, 2.1235, 3.5)
    assert create_distillation_run(record, slopes=3).model.args["slopes"] == (3.0,) and set(
        create_distillation_run(record, slopes=None).model.args
    ) == {"genome"}
    blind = SearchRecord(
        to_dict(
            how.replace(metric="mas", metric_args={"neuron_args": {"v_threshold": 0.5}}), full=True
        ),
        record.best,
        {},
        [],
        [],
        {},
        {},
        {},
        extra={"slopes": None},
    )
    assert create_distillation_run(blind).model.args == {
        "genome": "n8 d8",
        "neuron_args": {"v_threshold": 0.5},
    }
    for kw in ({"slopes": "guide"}, {"neuron_args": {"alpha": 2.0}}):
        with pytest.raises(UserError, match="slopes"):
            create_distillation_run(record, **kw)


def test_by_hand(home, capsys):
    words = [
        "search",
        "--teacher",
        "resnet20",
        "--teacher-width",
        "0.25",
        "--teacher-epochs",
        "1",
        "--space-width",
        "0.25",
        "--population",
        "4",
        "--generations",
        "2",
        "--T",
        "2",
        "-j",
        "1",
    ]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "generation   2/2" in said and "12 candidates" in said and "parameters" in said
    record = parse_record(Path(said.split()[-1]).read_text())
    assert record.run.population == 4 and record.best["genome"] in said
    assert main(words) == 0 and "generation" not in capsys.readouterr().out
    assert main(["watch", record.id]) == 0
    assert (
        main(
            [
                *words,
                "--algorithm",
                "nsga2",
                "--metric",
                "tgs",
                "--metric-args",
                "mode=sample",
                "--batch",
                "4",
                "--batches",
                "2",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out.splitlines()
    record = parse_record(Path(said[-1].split()[-1]).read_text())
    assert (record.run.batches, dict(record.run.metric_args)) == (2, {"mode": "sample"}) and [
        line.split("  ")[-1] for line in said[said.index("front, from small to fit:") + 1 : -1]
    ] == list(record.front)
    assert (
        main([*words, "--population", "1"]) == 2
        and "population = 1: give a whole number of at least 2" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "args, words",
    [
        ({"mutate": 0.5}, "unknown option of a search"),
        ({"mutation": 5}, "mutation = 5"),
        ({"selection": "roulette"}, "above 0"),
        ({"second": "sop"}, "did you mean 'sops'"),
    ],
)
def test_wrong_options_of_the_algorithm_are_errors(args, words):
    with pytest.raises(UserError, match=words):
        create_engine_options(SPEC.replace(algorithm_args=args))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"metric": "mass"}, "did you mean 'mas'"),
        ({"metric_args": {"norms": "row"}}, "did you mean 'norm'"),
        ({"space": "digit"}, "did you mean 'digits'"),
        ({"space_args": {"normal": [2, 1]}}, "fewest, most"),
        ({"batch": 2000}, "training images, give less"),
        ({"batch": 9}, "give at least 10 images"),
        ({"neuron": "lift"}, "did you mean"),
        ({"metric_args": {"T": 3}}, "a field of the search itself"),
        ({"metric_args": {"mode": "ickd"}, "space_args": {"channels": [5]}}, "no multiples"),
        ({"space_args": {"image_size": 32, "downsample": [2, 5]}}, "8×8 pixels allow 3"),
    ],
)
def test_a_wrong_search_is_an_error_before_its_teacher_is_trained(change, words):
    with pytest.raises(UserError, match=words):
        check_search(SPEC.replace(**change))
