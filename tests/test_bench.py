"""The benchmarks run, tell what they measured, and keep it; how fast anything is, is nobody's business here."""

import json

import pytest

from snnkd_nb.core import UserError
from snnkd_nb.reports import speed
from snnkd_nb.runner import bench as module
from snnkd_nb.runner.bench import BENCHMARKS, bench


@pytest.mark.parametrize("what", BENCHMARKS)
def test_every_row_runs_tiny(what, capsys):
    rows = bench(what, tiny=True)
    out = capsys.readouterr()
    assert {r["what"] for r in rows} == {what} and all(
        (r["ratio"] > 0 or what == "loss") and r["low"] <= r["ratio"] <= r["high"] for r in rows
    )
    assert "machine: copy_gb_s" in out.out and f"measuring {what}" in out.err


def test_json_is_all_that_is_printed(capsys):
    bench("gram", tiny=True, as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert {r["what"] for r in said["rows"]} == {"gram"} and said["machine"]["copy_gb_s"] > 0


def test_one_line_errors():
    with pytest.raises(UserError, match="did you mean 'step'"):
        bench("stepp")
    with pytest.raises(UserError, match="tiny"):
        bench("gram", tiny=True, save=True)


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
    monkeypatch.setattr(speed, "root", lambda: tmp_path)
    module.keep([line("step", 4.0), line("gram", 5.0)], {"copy_gb_s": 10.0})
    module.keep([line("gram", 6.0)], {"copy_gb_s": 11.0})
    kept = speed.measured(module.machine_class())
    assert [(r["what"], r["ratio"]) for r in kept["rows"]] == [
        ("gram", 6.0),
        ("step", 4.0),
    ] and kept["environment"]["torch"]
    monkeypatch.setattr(module, "environment", lambda: {"cpu": "another"})
    (tmp_path / "results/bench" / f"{module.machine_class()}.json").write_text('{"rows": [')
    module.keep([line("gram", 6.5)], {"copy_gb_s": 11.0})  # a file cut short is no obstacle
    module.keep([line("gram", 7.0)], {"copy_gb_s": 11.0})
    assert [r["ratio"] for r in speed.measured(module.machine_class())["rows"]] == [
        7.0
    ]  # rows of two machines never stand together
