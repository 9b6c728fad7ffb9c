"""The benchmarks run, report what they measured, and keep it. These tests do not check speed."""

import json

import pytest

from snnkd_nb.core import UserError
from snnkd_nb.papers.experiments import build_grid
from snnkd_nb.reports import efficiency
from snnkd_nb.runner import bench as module
from snnkd_nb.runner import timing
from snnkd_nb.runner.bench import BENCHMARKS, bench


@pytest.mark.parametrize("what", BENCHMARKS)
def test_every_row_runs_tiny(what, capsys):
    rows = bench(what, tiny=True)
    out = capsys.readouterr()
    assert {row["what"] for row in rows} == {what}
    for row in rows:
        assert row["ratio"] > 0 or what == "loss"
        assert row["low"] <= row["ratio"] <= row["high"]
    assert "machine: copy_gb_s" in out.out
    assert f"measuring {what}" in out.err


def test_json_is_all_that_is_printed(capsys):
    bench("gram", tiny=True, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert {row["what"] for row in printed["rows"]} == {"gram"}
    assert printed["machine"]["copy_gb_s"] > 0


def test_one_line_errors():
    with pytest.raises(UserError, match="did you mean 'step'"):
        bench("stepp")
    with pytest.raises(UserError, match="tiny"):
        bench("gram", tiny=True, save=True)
    with pytest.raises(UserError, match="--rate"):
        bench("gram", tiny=True, rate=True)


def line(what, ratio):
    return {
        "what": what,
        "name": f"{what} {ratio}",
        "ratio": ratio,
        "low": ratio,
        "high": ratio,
        "n": 1,
        "goal": "",
        "ms": {},
    }


def test_a_measurement_is_kept_with_its_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "root", lambda: tmp_path)
    monkeypatch.setattr(efficiency, "root", lambda: tmp_path)
    module.save_rows([line("step", 4.0), line("gram", 5.0)], {"copy_gb_s": 10.0})
    module.save_rows([line("gram", 6.0)], {"copy_gb_s": 11.0})
    kept = efficiency.load_measurement(module.machine_class())
    ratios = [(row["what"], row["ratio"]) for row in kept["rows"]]
    assert ratios == [("gram", 6.0), ("step", 4.0)]
    assert kept["environment"]["torch"]
    monkeypatch.setattr(module, "environment", lambda: {"cpu": "another"})
    (tmp_path / "results/bench" / f"{module.machine_class()}.json").write_text('{"rows": [')
    module.save_rows([line("gram", 6.5)], {"copy_gb_s": 11.0})  # a file cut short is no obstacle
    module.save_rows([line("gram", 7.0)], {"copy_gb_s": 11.0})
    rows = efficiency.load_measurement(module.machine_class())["rows"]
    assert [row["ratio"] for row in rows] == [7.0], "the file has rows of one machine only"


@pytest.mark.parametrize("scale", ["small", "paper"])
def test_the_steps_that_are_timed_are_those_of_the_tables_of_accuracy(scale, monkeypatch):
    timed = []

    def record(alone, arms, *rounds, **shape):
        timed.append((alone, arms))
        return []

    monkeypatch.setattr(timing, "measure_group", record)
    timing.measure_cifar(scale)
    timing.measure_imagenet(scale)
    assert len(timed) == 5 * 3 + 2
    known = set(build_grid("sastc/table02", scale).specs + build_grid("sastc/table03", scale).specs)
    for alone, arms in timed:
        assert alone.teacher is None and alone.method == "none"
        for (_, method), spec in arms.items():
            assert spec.model == alone.model and spec.teacher is not None
            assert scale == "small" or method == "Feature KD" or spec in known
