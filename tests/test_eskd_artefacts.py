"""ESKD's artefacts: every scale can be built without training, smoke runs end to end, what is in several tables is one run, pictures are of what runs."""

import itertools
from functools import lru_cache

import pandas as pd
import pytest
import torch
from helpers import create_narrow, create_on_meta, shape_of, shorten

from snnkd_nb.core import UserError
from snnkd_nb.data.images import list_datasets, opener
from snnkd_nb.losses.zoo import create_distiller
from snnkd_nb.models.zoo import create_model
from snnkd_nb.papers.eskd import (
    compare_printed_settings,
    compare_rate_gradients,
    cost_growth,
    curve_records,
    draw_curves,
    judge_costs,
    measure_map_likeness,
    step_costs,
    tabulate_curves,
    teacher_gaps,
    training_settings,
)
from snnkd_nb.papers.experiments import (
    SCALES,
    artefact,
    artefacts,
    build_grid,
    build_run,
    grid_for,
    specs_for,
)
from snnkd_nb.papers.published import claims, published
from snnkd_nb.reports.claims import judge_cells, judge_records
from snnkd_nb.reports.diagrams import draw_eskd_overview
from snnkd_nb.reports.snapshots import compute_hybrid_maps, fit_adapters, snapshot_step
from snnkd_nb.reports.tables import Report, summarize_grid, tabulate_by_epoch
from snnkd_nb.spec import RunSpec
from snnkd_nb.store import Store
from snnkd_nb.training.job import run_train

BIG = ("medium", "paper")
TABLES = ("table01", "table02", "table03", "table04", "table05", "table06")
FIGURES = ("figure01", "figure02", "figure03", "figure05")
EVENTS = "CIFAR10-DVS"
IMAGENET = "ImageNet"


def student(scale, network, dataset, T=4, method="eskd", **options):
    "The run of a student on rates, by the paper's name."
    variables = {"network": network, "dataset": dataset, "T": T, "method": method}
    return build_run("eskd", "student", scale, **variables, options=options)


def teacher(scale, network, dataset):
    return build_run("eskd", "teacher", scale, network=network, dataset=dataset)


@lru_cache
def grids(scale):
    made = {name: build_grid(f"eskd/{name}", scale) for name in TABLES + FIGURES}
    return made | {"study": grid_for("studies/eskd", scale)}


@lru_cache
def specs(scale):
    return tuple(dict.fromkeys(s for g in grids(scale).values() for s in g.specs))


@lru_cache
def with_teachers(scale):
    return tuple(dict.fromkeys(t for s in specs(scale) for t in (s, s.teacher) if t))


@pytest.mark.parametrize("scale", BIG)
def test_every_network_of_the_large_scales_exists_at_full_size(scale):
    for spec in {(s.model.canonical(), s.data.name): s for s in with_teachers(scale)}.values():
        network = create_on_meta(spec.model, *shape_of(spec.data))
        assert spec.model.width == 1
        assert network.T == spec.model.T


def hybrids_of(spec):
    "The hybrid models of a run at full size, without memory for their weights."
    networks = [
        create_on_meta(model, *shape_of(spec.data)) for model in (spec.model, spec.teacher.model)
    ]
    with torch.device("meta"):
        distiller = create_distiller("eskd", *networks, **dict(spec.method_args))
    return distiller.methods[0].hybrids


def test_every_pair_has_the_hybrid_models_it_should():
    pairs = {
        (s.model.name, s.teacher.model.name, str(s.method_args.get("positions"))): s
        for scale in BIG
        for s in specs(scale)
        if s.teacher
    }
    for (_, teacher_name, _), spec in pairs.items():
        names = hybrids_of(spec).names
        if "positions" in spec.method_args:
            assert len(names) == len(spec.method_args["positions"])
        elif teacher_name == "resnet19_rate":
            assert names == ("M0", "M1")
        else:
            assert names == ("M0", "M1", "M2")


@pytest.mark.parametrize(
    "network, dataset",
    [("ResNet-18", "CIFAR-100"), ("ResNet-34*", IMAGENET), ("ResNet-34", IMAGENET)],
)
def test_the_adapters_have_the_printed_size(network, dataset):
    hybrids = hybrids_of(student("paper", network, dataset))
    assert round(sum(p.numel() for p in hybrids.parameters()) / 1e6, 2) == 0.17


@pytest.mark.parametrize("scale", SCALES)
def test_every_data_set_has_a_known_name_and_teachers_see_what_their_students_see(scale):
    kinds = {name.partition(":")[0] for name in list_datasets()}
    for spec in with_teachers(scale):
        assert spec.data.name.partition(":")[0] in kinds
        assert opener(spec.data.name)
        if "frames" in spec.data.args:
            assert spec.model.T in (None, spec.data.args["frames"])
        if spec.teacher:
            assert spec.teacher.model.T is None
            same = {"subset": None, "val": 0, "augment": "none"}
            assert spec.teacher.data.replace(**same) == spec.data.replace(**same)


def test_the_printed_settings_are_ours_at_paper_scale():
    settings = training_settings("paper")
    assert len(settings) == 8
    assert compare_printed_settings(settings).agree.all()


def budget(spec):
    optim = spec.optim
    return optim.epochs, optim.batch_size, optim.lr, optim.weight_decay, optim.schedule


def test_the_papers_budgets():
    spiking = [s for s in specs("paper") if s.model.T]
    on_cifar = [s for s in spiking if s.data.name.startswith("cifar")]
    assert {budget(s) for s in on_cifar} == {(300, 128, 0.1, 5e-4, "cosine")}
    assert not any(s.optim.decay_norm for s in on_cifar)
    still = [s for s in on_cifar if "dvs" not in s.data.name]
    assert {s.data.augment for s in still} == {"crop+flip+autoaugment+cutout"}
    rates = [s for s in grids("paper")["table01"].specs if s.model.neuron == "rate"]
    on_imagenet = [s for s in rates if "imagenet" in s.data.name]
    assert {budget(s) for s in on_imagenet} == {(100, 512, 0.2, 2e-5, "cosine")}
    teachers = {s.teacher.model.name for s in on_imagenet if s.teacher}
    assert teachers == {"timm:resnet34", "timm:resnet50"}


def test_students_of_the_tables_learn_on_rates_at_the_papers_time_steps():
    for key in TABLES:
        for spec in grids("paper")[key].specs:
            if spec.model.T and spec.model.neuron == "rate":
                assert spec.optim.gradient == "rate"
    time_steps = {
        key: {s.model.T for s in grids("paper")[key].specs if s.model.T} for key in TABLES
    }
    assert time_steps["table02"] == time_steps["table03"] == time_steps["table04"] == {4}
    assert time_steps["table05"] == {2, 4, 6, 8}


def test_five_seeds_as_in_the_paper_and_one_on_imagenet():
    for key in TABLES:
        for cell in grids("paper")[key].cells:
            if cell.specs:
                is_one = cell.column in ("ImageNet", "teacher accuracy")
                assert len(cell.groups) == (1 if is_one else 5)


def test_schedules_and_places_are_those_of_the_tables():
    cells = {c.index["branches"]: c.specs[0] for c in grids("paper")["table03"].cells}
    assert set(cells) == {r["branches"] for r in published("eskd/table03").records}
    assert cells["none"].teacher is None
    places = {name: dict(spec.method_args) for name, spec in cells.items()}
    assert places["yA"] == {"positions": ()}
    assert places["yA + 0, 1, 2"] == {}
    assert places["yA + H, 0, 1, 2, fc"] == {"positions": ("H", 0, 1, 2, "fc")}
    options = {
        (c.index["beta"], c.index["alpha"]): dict(c.specs[0].method_args)
        for c in grids("paper")["table04"].cells
    }
    assert options["1/2^(n-k)", "increase"] == {"alpha": "increase", "beta": "decay"}
    assert options["1/n_b", "0.5"] == {}
    assert options["1/n_b", "decrease"] == {"alpha": "decrease"}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("key", TABLES)
def test_cells_are_published_ones_and_all_are_run(key, scale):
    grid = grids(scale)[key]
    report = Report(grid, {})
    assert len(report.rows) == len(published(grid.key).records)
    assert all(bool(c.specs) == (c.note != "–") for c in grid.cells)
    assert all(r["paper"] is None for r in report.rows if r["note"] == "–")
    num_run = sum(bool(c.specs) for c in grid.cells)
    assert sum(r["note"] == "not run" for r in report.rows) == num_run
    judged = report.claims()
    assert len(judged) == len(claims(grid.key))
    assert set(judged["ours"]) <= {"not run"}


def test_our_cells_of_table_1():
    cells = [c for c in grids("small")["table01"].cells if c.specs]
    assert {c.index["method"] for c in cells} == {"Ours", "RateBP", "SEW ResNet"}
    assert sum(c.index["method"] == "Ours" for c in cells) == 11
    groups = {
        dataset: {
            (c.index["method"], c.index["model"], c.index["T"]): c.groups
            for c in cells
            if c.column == dataset
        }
        for dataset in ("CIFAR-10", "CIFAR-100")
    }
    assert groups["CIFAR-10"] == groups["CIFAR-100"]
    for (_, model, _), of_cell in groups["CIFAR-10"].items():
        assert len(of_cell) == (3 if model == "ResNet-18" else 1)
    alone = [s for c in cells if c.index["method"] == "RateBP" for s in c.specs]
    assert all(s.teacher is None for s in alone)
    assert {s.optim.gradient for s in alone} == {"rate"}


@pytest.mark.parametrize("scale", SCALES)
def test_what_is_in_several_artefacts_is_one_run(scale):
    of = {k: {s.canonical() for s in g.specs} for k, g in grids(scale).items()}
    resnets = {teacher(scale, "ResNet-18", d).canonical() for d in ("CIFAR-10", "CIFAR-100")}
    assert of["figure01"] <= of["table01"] | resnets
    assert of["figure02"] <= of["table01"]
    assert of["figure03"] <= of["table01"]
    assert of["table03"] & of["table04"]
    assert len(of["table05"] & of["table01"]) >= 4
    if scale in ("smoke", "small"):
        assert of["table03"] <= of["study"]
        assert len(of["study"] & of["table01"]) >= 4
    else:
        teachers = {s.teacher.canonical() for s in grids(scale)["table01"].specs if s.teacher}
        assert of["figure05"] <= of["table01"] | teachers


def test_the_sew_baseline_and_two_teachers_are_other_papers_runs():
    sew = {"network": "ResNet34", "dataset": IMAGENET}
    for scale, T in zip(SCALES, (2, 2, 4, 4), strict=True):
        cells = grids(scale)["table01"].cells
        found = {s for c in cells if c.index["method"] == "SEW ResNet" for s in c.specs}
        assert found == {build_run("ckdsnn", "student", scale, method="none", T=T, **sew)}
    for scale in ("smoke", "medium", "paper"):
        assert teacher(scale, "Spikingformer-4-256", "CIFAR-10") == build_run(
            "ckdsnn", "teacher", scale, network="Spikformer-4-384", dataset="CIFAR-10"
        )
    assert teacher("smoke", "ResNet-34", IMAGENET) == build_run("ckdsnn", "teacher", "smoke", **sew)


@pytest.mark.parametrize("scale", SCALES)
def test_only_the_papers_hybrid_models_are_watched(scale):
    for spec in specs(scale):
        is_default = spec.method == "eskd" and not spec.method_args
        is_on_rates = spec.optim.gradient == "rate"
        is_drawn = spec.data.size == 32  # for Supplement Figure A
        is_watched = spec.model.name == "resnet18" and is_default and is_on_rates and not is_drawn
        assert bool(spec.probes) == is_watched, spec.id


def test_the_registry_asks_for_these_runs_and_all_pages_are_there():
    for key in TABLES + FIGURES:
        assert artefact(f"eskd/{key}").built
        assert specs_for(f"eskd/{key}", "smoke") == grids("smoke")[key].specs
    assert all(a.built for a in artefacts() if a.paper == "eskd")
    assert specs_for("eskd/table07", "smoke") == []
    assert specs_for("eskd/figure04", "smoke") == []


def test_scales_do_not_mix():
    found = {
        scale: {
            s.canonical()
            for s in with_teachers(scale)
            if s.optim.lr > 0 and not s.model.args.get("pretrained")
        }
        for scale in SCALES
    }
    for scale, other in itertools.combinations(SCALES, 2):
        assert not found[scale] & found[other]


def test_smoke_is_small():
    found = with_teachers("smoke")
    assert len(found) <= 46
    for spec in found:
        assert spec.data.name.startswith("digits")
        assert spec.optim.epochs <= 10
        assert spec.model.width <= 0.25


def test_the_study():
    grid = grids("small")["study"]
    assert len(grid.specs) == 46
    assert all(len(c.groups) == 3 for c in grid.cells if c.index["method"] != "Teacher")
    assert {s.data.name for s in grid.specs} == {"folder:cifar10-jpeg"}
    ways = {(c.index["panel"], c.index["method"]): c.specs[0] for c in grid.cells}
    gradients = {"BPTT": "bptt", "BPTT + KD": "bptt"}
    gradients |= {"rates": "rate", "rates + KD": "rate", "ESKD": "rate"}
    for T in (2, 4):
        for way, gradient in gradients.items():
            spec = ways[f"T = {T}", way]
            assert (spec.optim.gradient, spec.model.T) == (gradient, T)
    frame = summarize_grid(grid, dict.fromkeys(grid.specs))
    assert len(frame) == 19
    assert set(judge_cells(claims(grid.key), grid, {}).ours) == {"not run"}


# figures


class Fake:
    def __init__(self, acc, history=None):
        self.metrics, self.history = {"acc_last": acc}, history or {}


def test_curves_are_read_from_records():
    grid = grids("small")["figure03"]

    def history(s):
        return {
            f"hybrids_{m}": [v + s.seed, v + 10 + s.seed, v + 20 + s.seed]
            for m, v in (
                ("S", 50),
                ("M0", 40),
                ("M1", 51 + 0.1 * s.seed),
                ("M2", 49 - 0.1 * s.seed),
            )
        }

    frame = tabulate_by_epoch(grid, {s: Fake(70, history(s)) for s in grid.specs}, "hybrids")
    records = curve_records(frame)
    at_four = {(r["method"], r["column"]): r for r in records if r["T"] == 4}
    assert at_four["M0", "distance to S"]["value"] == 10
    assert at_four["M0", "distance to S"]["n"] == 3
    assert tabulate_curves(records).loc[(2, "S"), "end"] == 71
    assert judge_records(claims("eskd/figure03"), records).ours.tolist() == ["holds"] * 3
    fig, numbers = draw_curves(frame, "accuracy")
    assert len(fig.axes) == 3
    assert len(numbers) == 3 * 4 * 3
    worse = [r | {"value": -r["value"]} for r in records]
    assert judge_records(claims("eskd/figure03"), worse).ours.tolist() == ["fails"] * 3


def test_a_figure_without_records_is_empty():
    grid = grids("small")["figure03"]
    frame = tabulate_by_epoch(grid, {}, "hybrids")
    _, numbers = draw_curves(frame, "accuracy")
    assert numbers.empty
    assert curve_records(frame) == []


def test_claims_select_what_the_figures_give():
    found = [c for c in claims("eskd") if "figure" in c.key]
    assert [sum(c.key == f"eskd/figure0{n}" for c in found) for n in (2, 3, 5)] == [3, 3, 13]
    columns = {"first", "end", "rose in (%)", "distance to S"}
    for claim in found:
        if claim.key != "eskd/figure05":
            assert {claim.better["column"], claim.worse["column"]} <= columns


def test_no_verdict_on_a_cost_that_was_not_measured():
    nothing = judge_costs({"rows": []})
    assert set(nothing["ESKD"]) == {"not measured"}
    assert len(nothing) == 8
    assert step_costs({"rows": []}).empty
    assert cost_growth({"rows": []}).empty


def memory_row(gradient, way):
    return {
        "what": "rate",
        "name": f"net, batch 1, peak memory, T=4: through time / {way}",
        **{"ratio": 2.0, "low": 2.0, "high": 2.0, "n": 1},
        "mib": {"bptt, T=4": 200.0, f"{gradient}, T=4": 100.0},
    }


def test_costs_are_read_from_a_measurement():
    rows = [memory_row("eskd", "ESKD"), memory_row("rate", "rates"), memory_row("parts", "parts")]
    costs = step_costs({"rows": rows})
    assert costs[["way", "T", "MiB"]].values.tolist() == [
        ["ESKD", 4, 100.0],
        ["rates", 4, 100.0],
        ["through time", 4, 200.0],
    ]
    verdicts = judge_costs({"rows": rows}).set_index(["of a step", "T"])["ESKD"]
    assert verdicts["memory", 4] == "less than BPTT"
    assert verdicts["memory", 2] == verdicts["time", 4] == "not measured"
    grown = {**memory_row("eskd", "ESKD"), "name": "net, batch 1, peak memory, eskd: T=8 / T=2"}
    growth = cost_growth({"rows": [grown]})
    assert growth.iloc[0].tolist() == ["memory", "ESKD", 2.0, 2.0, 2.0, 1]


def test_gradients_on_rates_are_exact_at_one_step_and_for_the_classifier():
    frame = compare_rate_gradients((1, 3), width=0.125, size=8, batch=4, depth=0.34)
    assert frame.cosine[0] > 0.9999
    assert abs(frame.length[0] - 1) < 1e-3
    assert frame.cosine[1] < 0.99
    assert (frame["cosine, classifier"] > 0.9999).all()


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    small = {"width": 0.125, "depth": 0.34, "in_channels": 1, "image_size": 16}
    return create_model(
        "resnet18", T=3, neuron="rate", neuron_args={"v_threshold": 0.3}, **small
    ), create_model("resnet18", **small)


@pytest.mark.parametrize("positions", [None, ["H", 1, "fc"], [2]])
def test_the_overview_has_a_box_for_everything_that_runs_and_nothing_else(pair, positions):
    student, teacher = pair
    d = create_distiller("eskd", student, teacher, positions=positions)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    x, y = torch.randn(4, 1, 16, 16), torch.arange(4)
    calls, terms = snapshot_step(d, x, y)
    stages = [*teacher.stage_names, "head"]
    for b in d.methods[0].hybrids.branches:
        own = [c.name for c in calls if c.row == b.name]
        assert own == [f"C{b.name[1:]}", *stages[stages.index(b.teacher) + 1 :]]
    assert (
        [c.name for c in calls if c.row == "teacher"]
        == [c.name for c in calls if c.row == "student"]
        == stages
    )
    assert sum(terms.values()) == pytest.approx(
        sum(terms[k] for k in ("ce", "kd", *d.methods[0].hybrids.names))
    ) and all(c.has_gradient != (c.row == "teacher") for c in calls)
    fig, numbers = draw_eskd_overview(d, x, y, x[0, 0].numpy())
    words = [t.get_text() for t in fig.axes[0].texts]
    assert sum(w == "head" for w in words) == 2 + len(d.methods[0].hybrids.names) and len(
        numbers
    ) == len(calls) + len(terms)
    assert (
        all(v.equal(before[k]) for k, v in student.state_dict().items())
        and student.gradient == "bptt"
    )


def test_maps_of_hybrid_models_do_not_depend_on_the_company(pair):
    student, teacher = pair
    d = create_distiller("eskd", student, teacher)
    x, y = torch.randn(6, 1, 16, 16), torch.arange(6)
    whole, one = compute_hybrid_maps(d, x, y), compute_hybrid_maps(d, x[2:3], y[2:3])
    assert (
        set(whole) == {"ANN", "SNN", "M0", "M1", "M2"}
        and all(torch.allclose(whole[n][2:3], one[n], atol=1e-5) for n in whole)
        and all(not m.requires_grad for m in whole.values())
    )
    assert not any(m._forward_hooks for net in (student, teacher) for m in net.modules())


def test_adapters_are_fitted_and_nothing_else_moves(pair):
    from snnkd_nb.data.images import load_spec
    from snnkd_nb.spec import DataSpec

    student, teacher = pair
    before = [v.clone() for net in pair for v in net.state_dict().values()]
    _d, losses = fit_adapters(
        student, teacher, load_spec(DataSpec("digits", size=16)), steps=8, size=32
    )
    assert losses[-1] < losses[0] and all(
        v.equal(b) for v, b in zip((v for net in pair for v in net.state_dict().values()), before)
    )
    assert (
        fit_adapters(student, teacher, load_spec(DataSpec("digits", size=16)), steps=0)[1] == []
        and student.training
    )


def test_likeness_of_maps_is_measured_for_every_network(pair):
    from snnkd_nb.data.images import load_spec
    from snnkd_nb.spec import DataSpec

    spiking, ordinary = pair
    networks = {"Teacher": ordinary, "ESKD": spiking, "rates alone": spiking}
    data = load_spec(DataSpec("digits", size=16))
    x, y = torch.randn(6, 1, 16, 16), torch.arange(6)
    distiller, frame = measure_map_likeness(lambda seed: networks, [0, 1], data, x, y, steps=1)
    assert distiller.student is spiking
    assert frame.groupby("seed").size().tolist() == [5, 5]
    first = frame[frame.seed == 0].set_index("map")
    assert set(first.index) == {"SNN", "M0", "M1", "M2", "rates alone"}
    assert first.pearson["rates alone"] == pytest.approx(first.pearson["SNN"])
    assert first["pearson, SNN"].idxmax() == "rates alone"  # the same network as the SNN
    chance = first["pearson"] - first["pearson, another image"]
    assert first["pearson over chance"].tolist() == chance.tolist()


def test_mistakes_are_named():
    with pytest.raises(UserError, match="paper"):
        build_grid("eskd/table01", "papr")
    with pytest.raises(UserError, match="did you mean 'ResNet-18'"):
        student("smoke", "ResNet18", "CIFAR-10")
    with pytest.raises(UserError, match="CIFAR-100"):
        student("smoke", "ResNet-18", "CIFAR100")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("alone")


@pytest.fixture
def alone(folder, monkeypatch):
    "A store and a cache of their own, which the tests share."
    monkeypatch.setenv("SNNKD_CACHE", str(folder / "cache"))
    monkeypatch.setenv("SNNKD_ROOT", str(folder))
    return Store(folder / "runs")


def through_time(spec):
    return spec.replace(optim=spec.optim.replace(gradient="bptt"))


KINDS = {
    "rates": student("smoke", "ResNet-18", "CIFAR-10", 2, "none"),
    "eskd": student("smoke", "ResNet-18", "CIFAR-10", 6),
    "bptt": through_time(student("smoke", "ResNet-18", "CIFAR-10", 2, positions=[])),
    "schedule": student("smoke", "ResNet-18", "CIFAR-10", alpha="increase", beta="decay"),
    "r19": student("smoke", "ResNet-19", "CIFAR-10", 2),
    "sew": student("smoke", "ResNet-34*", IMAGENET),
    "preact": student("smoke", "ResNet-34†", IMAGENET),
    "former": student("smoke", "Spikingformer-4-256", "CIFAR-10"),
    "events": student("smoke", "ResNet-19", EVENTS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_student_of_every_kind_runs_to_its_record(kind, alone):
    spec = shorten(KINDS[kind], images=100, warmup=0)
    record = run_train(spec, alone, weak_teacher="accept")
    assert (
        record.id == spec.id
        and 0 <= record.metrics["acc_last"] <= 100
        and (spec.teacher is None) == (record.teacher is None)
        and RunSpec.from_dict(record.spec) == spec
    )
    columns = {"cosine_M0", "hybrids_M2", "hybrids_S"} if spec.probes else set()
    assert columns <= set(record.history) and bool(spec.probes) == any(
        k.startswith("cosine") for k in record.history
    )


@pytest.mark.filterwarnings("error:snnkd_nb:DeprecationWarning")  # a name that the package gave up
def test_every_method_steps_on_a_narrow_copy():
    "Student, teacher and options of every kind of run."
    torch.manual_seed(0)
    kinds = {
        (s.model.name, s.teacher.model.name, str(s.method_args), s.optim.gradient): s
        for scale in BIG
        for s in specs(scale)
        if s.teacher
    }
    for spec in kinds.values():
        num_classes, _, channels = shape_of(spec.data)
        num_classes = min(num_classes, 10)
        narrow = create_narrow(spec.model, num_classes, channels, T=2, neuron=spec.model.neuron)
        ordinary = create_narrow(spec.teacher.model, num_classes, channels)
        distiller = create_distiller(spec.method, narrow, ordinary, **dict(spec.method_args))
        distiller.begin_epoch(0, 3)
        narrow.gradient = spec.optim.gradient
        x = torch.randn(2, channels, 32, 32)
        if "frames" in spec.data.args:
            x = torch.randn(2, 2, channels, 32, 32)
        terms, _ = distiller(x, torch.tensor([1, 3]))
        assert all(value.isfinite() for value in terms.values()), (spec.id, terms)


def test_gaps_join_teacher_and_student():
    grid = grids("smoke")["table06"]
    runs = {s: Fake(90.0 if s.model.T is None else 80.0) for s in grid.specs}
    frame = teacher_gaps(Report(grid, runs))
    assert isinstance(frame, pd.DataFrame)
    assert frame.ours.tolist() == [-10.0] * 4
    assert frame.printed.tolist() == [-14.30, -14.15, -3.67, -2.97]
    assert frame.paper.tolist() == frame.printed.tolist()
