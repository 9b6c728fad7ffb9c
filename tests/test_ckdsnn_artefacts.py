"""CKDSNN's tables and accuracy figures: every scale can be built without training, smoke runs end to end, small scale shares the study's runs."""

from functools import lru_cache

import pytest
import torch
from helpers import create_narrow, create_on_meta, shape_of, shorten

from snnkd_nb.core import UserError
from snnkd_nb.data.images import list_datasets, opener
from snnkd_nb.losses.zoo import create_distiller
from snnkd_nb.papers.experiments import (
    SCALES,
    artefact,
    build_grid,
    build_run,
    load_settings,
    specs_for,
)
from snnkd_nb.papers.published import claims, published
from snnkd_nb.reports.claims import judge_cells
from snnkd_nb.reports.tables import Report, tabulate_by_seed
from snnkd_nb.spec import RunSpec
from snnkd_nb.training.job import run_train

BIG = ("medium", "paper")
TABLES = ["table01", "table02", "table03", "table04"]
ARTEFACTS = [*TABLES, "figure04", "figure05"]
FEWER_STEPS = ("smoke", "small")  # scales at which the paper's 2, 4 and 10 steps are 1, 2 and 4


@lru_cache
def grid_of(name, scale):
    return build_grid(f"ckdsnn/{name}", scale)


@lru_cache
def specs(scale):
    return list(dict.fromkeys(s for name in ARTEFACTS for s in grid_of(name, scale).specs))


def with_teachers(scale):
    return list(dict.fromkeys(t for s in specs(scale) for t in (s, s.teacher) if t))


@pytest.mark.parametrize("scale", BIG)
def test_every_network_of_the_large_scales_exists_at_full_size(scale):
    for spec in {(s.model, s.data.name): s for s in with_teachers(scale)}.values():
        net = create_on_meta(spec.model, *shape_of(spec.data))
        size = net.feature_shapes()[net.stage_names[-1]][-1]
        assert spec.model.width == 1 and net.T == spec.model.T and len(net.stage_names) > 2
        assert size > 1, (
            f"{spec.model.name}: a last map of {size}x{size} has no positions to compare"
        )


@pytest.mark.parametrize("scale", SCALES)
def test_every_data_set_has_a_known_name_and_as_many_frames_as_there_are_steps(scale):
    for s in with_teachers(scale):
        kind = s.data.name.partition(":")[0]
        assert kind in [n.partition(":")[0] for n in list_datasets()] and opener(s.data.name)
        if "frames" in s.data.args:
            assert s.model.T in (None, s.data.args["frames"])
        if s.teacher:
            assert s.teacher.model.T is None and s.teacher.data.replace(
                subset=None, val=0, augment="none"
            ) == s.data.replace(subset=None, val=0, augment="none")


@pytest.mark.parametrize("scale", BIG)
def test_real_recordings_have_the_papers_ten_frames(scale):
    found = grid_of("table04", scale).specs
    assert {s.model.T for s in found} == {10}
    assert {s.data.name for s in found} == {"cifar10-dvs:cifar10-dvs"}


@pytest.mark.parametrize("scale", BIG)
def test_every_method_is_made_and_steps_on_a_narrow_copy(scale):
    "Student, teacher, method and options of every kind of run, at an eighth of the width and on small images."
    kinds = {
        (s.model.name, s.teacher.model.name if s.teacher else None, s.method, str(s.method_args)): s
        for s in specs(scale)
    }
    for s in kinds.values():
        k, _, channels = shape_of(s.data)
        k = min(k, 10)
        options = {**s.model.args, "T": min(s.model.T, 2), "neuron": s.model.neuron}
        net = create_narrow(s.model, k, channels, **options)
        teacher = create_narrow(s.teacher.model, k, channels) if s.teacher else None
        d = create_distiller(s.method, net, teacher, s.variant, **dict(s.method_args))
        x = (
            torch.randn(2, 2, channels, 32, 32)
            if "frames" in s.data.args
            else torch.randn(2, channels, 32, 32)
        )
        terms, _ = d(x, torch.tensor([1, 3]))
        assert all(v.isfinite() for v in terms.values()), (s.id, terms)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("key", TABLES)
def test_cells_are_the_published_ones_and_all_that_can_be_run_is(key, scale):
    grid = grid_of(key, scale)
    report = Report(grid, {})
    assert len(report.rows) == len(published(grid.key).records) and all(
        r["note"] for r in report.rows
    )
    ours = [r for r in report.rows if r["paper"] is not None and r["note"] == "not run"]
    few = [c for c in grid.cells if not c.specs and c.note != "–"]
    assert len(ours) + len(few) + sum(r["paper"] is None for r in report.rows) == len(
        grid.cells
    ) and all(
        "fewer steps" in c.note
        or (c.note == "as CIFAR-10" and c.index["dataset"] == "CIFAR-100" and scale in FEWER_STEPS)
        for c in few
    )
    assert bool(few) == (scale in FEWER_STEPS and key == "table01")
    assert set(report.claims()["ours"]) == {"not run"} and grid.deviations


@pytest.mark.parametrize("key", [k for k in ARTEFACTS if k not in TABLES])
def test_figures_have_arms_with_three_seeds_and_claims_about_them(key):
    grid = grid_of(key, "smoke")
    assert all(
        len(c.groups) == 3 and [g[0].seed for g in c.groups] == [0, 1, 2] for c in grid.cells
    )
    assert tabulate_by_seed(grid, {}).empty and set(
        judge_cells(claims(f"ckdsnn/{key}"), grid, {}).ours
    ) == {"not run"}


def test_the_registry_asks_for_these_runs():
    for key in ARTEFACTS:
        assert artefact(f"ckdsnn/{key}")
        assert specs_for(f"ckdsnn/{key}", "smoke") == grid_of(key, "smoke").specs


def test_scales_do_not_mix():
    found = {scale: set(specs(scale)) for scale in SCALES}
    for a in SCALES:
        for b in SCALES:
            assert a == b or not found[a] & found[b]


def test_small_scale_shares_the_pair_of_a_study():
    grid = build_grid("studies/sastc", "small")
    study = {s for s in grid.specs if not s.data.label_noise and s.data.shots == 1}
    mine = {s for s in specs("small") if s.model.name == "resnet20" and s.model.T in (None, 2)}
    assert (
        len({s.canonical() for s in study} & {s.canonical() for s in with_teachers("small")})
        == 1 + 3
    ), "the teacher, and the baseline of three seeds"
    assert {(s.model, s.data, s.optim) for s in mine if s.model.T} <= {
        (s.model, s.data, s.optim) for s in study
    } and len({s for s in mine if s.model.T}) % 3 == 0
    row = [
        c
        for c in grid_of("table01", "small").cells
        if c.index["model"] == "ResNet20"
        and c.index["dataset"] == "CIFAR-10"
        and c.index["method"] == "CKDSNN (Ours)"
    ]
    assert {c.index["T"]: {s.model.T for s in c.specs} for c in row} == {
        1: set(),
        2: {1},
        4: {2},
    }
    assert not any("digits" in s.data.name for s in specs("small"))


def test_smoke_is_small():
    for s in with_teachers("smoke"):
        assert s.data.name.startswith("digits") and s.optim.epochs <= 5 and s.model.width <= 1


def test_mistakes_are_named():
    wrong = {"network": "ResNet-19", "dataset": "CIFAR-10", "T": 1, "method": "none"}
    for bad, named in (
        (lambda: build_grid("ckdsnn/table01", "papr"), "paper"),
        (lambda: build_grid("ckdsnn/figure6", "smoke"), "figure06"),
        (lambda: build_run("ckdsnn", "student", "smoke", **wrong), "ResNet19"),
    ):
        with pytest.raises(UserError, match=named):
            bad()


ONE_EACH = {
    s.method
    + ("/" + ",".join(f"{k}={v}" for k, v in s.method_args.items()) if s.method_args else ""): s
    for s in specs("smoke")
}


@pytest.mark.parametrize("method", ONE_EACH)
def test_one_student_of_every_method_runs_to_its_record(method, alone):
    spec = shorten(ONE_EACH[method])
    record = run_train(spec, alone, weak_teacher="accept")
    assert (
        record.id == spec.id
        and 0 <= record.metrics["acc_last"] <= 100
        and (spec.teacher is None) == (record.teacher is None)
    )
    assert (
        alone.get(spec).metrics == pytest.approx(record.metrics, rel=1e-5)
        and RunSpec.from_dict(record.spec) == spec
    )


def test_every_method_of_the_paper_is_among_them():
    made = {s.method for s in specs("smoke")}
    assert set(load_settings("ckdsnn").sections["means"]["method"].values()) == made
    assert {"tet", "ckdsnn/noise=none"} <= set(ONE_EACH)
