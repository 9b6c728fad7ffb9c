"""SASTC's accuracy artefacts: every scale can be built without training, smoke runs end to end, what is in several tables is one run."""

from functools import lru_cache

import pandas as pd
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
    build_spec,
    specs_for,
)
from snnkd_nb.papers.published import claims, published
from snnkd_nb.reports.claims import judge_cells
from snnkd_nb.reports.layers import (
    add_energy,
    draw_pairs,
    tabulate_energy_shares,
    tabulate_pairs,
)
from snnkd_nb.reports.tables import Report, tabulate_by_seed
from snnkd_nb.spec import RunSpec, to_dict
from snnkd_nb.training.job import run_train

BIG = ("medium", "paper")
TABLES = ["table02", "table03", "table04", "table06", "table07", "table08", "table09", "table10"]
FIGURES = ["figure02", "figure05"]
PANELS = ["VGG-11 & ResNet-19", "ResNet-18 & Pyramidnet-20", "WRN-16-2 & WRN-28-4"]
STUDENTS = {"VGG-11": 34.4, "ResNet-18": 12.6, "WRN-16-2": 20.5}  # millions of parameters


@lru_cache
def grids(scale):
    return {name: build_grid(f"sastc/{name}", scale) for name in TABLES + FIGURES}


@lru_cache
def specs(scale):
    return tuple(dict.fromkeys(s for g in grids(scale).values() for s in g.specs))


@lru_cache
def with_teachers(scale):
    return tuple(dict.fromkeys(t for s in specs(scale) for t in (s, s.teacher) if t))


@pytest.mark.parametrize("scale", BIG)
def test_every_network_of_the_large_scales_exists_at_full_size_and_has_the_layers_that_are_distilled(
    scale,
):
    for spec in {(s.model.canonical(), s.data.name): s for s in with_teachers(scale)}.values():
        net = create_on_meta(spec.model, *shape_of(spec.data))
        assert spec.model.width == 1 and net.T == spec.model.T, spec.model
    for s in specs(scale):
        mine, theirs = (
            create_on_meta(m.model, *shape_of(m.data)).stage_names if m else ()
            for m in (s, s.teacher)
        )
        assert all(a in mine and b in theirs for a, b in s.method_args.get("pairs", ())), s.id


def test_feature_kd_of_the_paper_is_the_mean_over_all_pairs_of_layers():
    for cell in grids("paper")["table02"].cells:
        if cell.column != "Feature KD":
            continue
        spec = cell.specs[0]
        mine, theirs = (
            create_on_meta(m.model, *shape_of(m.data)).stage_names for m in (spec, spec.teacher)
        )
        if spec.teacher.model.name == "pyramidnet20":  # its published code never records this stage
            theirs = [name for name in theirs if name != "stage2"]
        pairs = [[[a, b]] for a in mine for b in theirs]
        for group in cell.groups:
            assert [to_dict(run)["method_args"]["pairs"] for run in group] == pairs


def test_the_students_have_the_sizes_that_are_told():
    def count(name):
        model = build_spec("sastc", "model", name, "paper").replace(T=2)
        return round(sum(p.numel() for p in create_on_meta(model, 10, 32, 3).parameters()) / 1e6, 1)

    assert {name: count(name) for name in STUDENTS} == STUDENTS
    told = "\n".join(grids("paper")["table02"].deviations)
    for name, millions in STUDENTS.items():
        line = next(line for line in told.splitlines() if line.startswith(f"{name} is "))
        assert f"{millions} M parameters" in line


@pytest.mark.parametrize("scale", SCALES)
def test_every_data_set_has_a_known_name_and_teachers_see_what_their_students_see(scale):
    for s in with_teachers(scale):
        kind = s.data.name.partition(":")[0]
        assert kind in [n.partition(":")[0] for n in list_datasets()] and opener(s.data.name)
        if "frames" in s.data.args:
            assert s.model.T in (None, s.data.args["frames"])
        if s.teacher:
            assert s.teacher.model.T is None and s.teacher.data.replace(
                subset=None, val=0, augment="none"
            ) == s.data.replace(subset=None, val=0, augment="none")


@pytest.mark.parametrize("scale", SCALES)
def test_the_teachers_of_corrupted_data_see_as_many_images_as_their_students(scale):
    for k in ("table07", "table08"):
        assert all(
            s.teacher.data.subset == s.data.subset and s.teacher.data == s.data
            for s in grids(scale)[k].specs
            if s.teacher
        )


@pytest.mark.parametrize("scale", BIG)
def test_the_papers_settings(scale):
    cifar = [
        s
        for k in ("table02", "table07", "table08", "table10", "figure02", "figure05")
        for s in grids(scale)[k].specs
        if s.model.T
    ]
    assert (
        {s.model.T for s in cifar} == {2, 3, 7}
        and {s.model.T for s in grids(scale)["table04"].specs if s.method == "tet"} == {6}
        and {s.optim.batch_size for s in cifar} == {128}
    )
    assert {
        (s.data.name, s.method_args["beta"])
        for s in grids(scale)["table02"].specs
        if "sastc" in s.method
    } == {
        ("cifar10", 1300.0 if scale == "paper" else 13.0),
        ("cifar100", 700.0 if scale == "paper" else 7.0),
    }
    assert {(s.data.name.partition(":")[0], s.model.T) for s in grids(scale)["table06"].specs} == {
        ("cifar10-dvs", 10),
        ("dvs-gesture", 16),
    }
    assert {s.model.T for s in grids(scale)["table03"].specs if s.model.T} == {4}
    if scale == "paper":
        assert {(s.optim.epochs, s.optim.lr, s.optim.milestones) for s in cifar} == {
            (240, 0.01, (150, 180, 210))
        }
        assert {
            (s.optim.epochs, s.optim.batch_size, s.optim.weight_decay)
            for s in grids(scale)["table03"].specs
            if s.model.T
        } == {(90, 256, 1e-4)}


@pytest.mark.parametrize("scale", SCALES)
def test_the_embeddings_of_sastc_are_as_wide_as_the_batch(scale):
    made = [s for s in specs(scale) if "sastc" in s.method]
    assert made and all(s.method_args["batch_size"] == s.optim.batch_size for s in made)
    assert {s.optim.batch_size for s in grids(scale)["table09"].specs} >= {16, 32, 64, 128, 256}


def kinds_of_runs():
    "One run of every student under every method, and one of every teacher."
    found, met = {}, set()
    for s in specs("paper"):
        of = s.teacher.model.name if s.teacher else None
        if (s.model.name, s.method) in found and of in met:
            continue
        found.setdefault((s.model.name, s.method, of), s)
        met.add(of)
    return {(k[0], k[1], k[2] if k[1] == "kd+sastc" else None): s for k, s in found.items()}


@pytest.mark.parametrize("kind", kinds_of_runs())
def test_every_method_is_made_and_steps_on_a_narrow_copy(kind):
    "Student, teacher, method and options, at an eighth of the width and on small images."
    s = kinds_of_runs()[kind]
    k, _, channels = shape_of(s.data)
    k = min(k, 10)
    options = {"T": 2, "neuron": s.model.neuron} if s.model.T else {}
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
def test_cells_are_published_ones_and_all_that_can_be_run_is(key, scale):
    grid = grids(scale)[key]
    report = Report(grid, {})
    assert len(report.rows) == len(published(grid.key).records) and all(
        r["note"] for r in report.rows
    )
    few = [c for c in grid.cells if not c.specs]
    assert sum(r["note"] == "not run" for r in report.rows) == len(grid.cells) - len(few) and all(
        c.note == "larger scales" for c in few
    )
    assert bool(few) == (scale in ("smoke", "small") and key in ("table02", "table04"))
    ours = report.claims()
    assert grid.deviations and set(ours["ours"] if len(ours) else ["not run"]) == {"not run"}


def test_our_cells_of_the_tables_of_methods():
    cells = grids("paper")["table04"].cells
    assert {c.index["method"] for c in cells} == {"Ours", "TET", "ANN", "SEW ResNet"} and len(
        [c for c in cells if c.index["method"] == "Ours"]
    ) == 8
    assert all(
        len(c.groups)
        == (1 if c.index["dataset"] == "ImageNet" or c.index["method"] == "ANN" else 3)
        for c in cells
    )
    assert {(c.index["dataset"], c.index["method"]) for c in grids("paper")["table06"].cells} == {
        ("DVS-Gesture", "Ours"),
        ("DVS-CIFAR10", "Ours"),
        ("DVS-CIFAR10", "TET"),
    }
    assert (
        grids("paper")["table06"].specs[2].teacher is None
        and grids("paper")["table06"].specs[2].method == "tet"
    )


@pytest.mark.parametrize("key", FIGURES)
def test_figures_have_claims_about_their_arms(key):
    grid = grids("smoke")[key]
    assert tabulate_by_seed(grid, {}).empty
    assert set(judge_cells(claims(grid.key), grid, {}).ours) == {"not run"}
    places = [c.index for c in grids("paper")[key].cells]
    for c in claims(f"sastc/{key}"):
        for at in (c.better, c.worse):
            for name, wanted in at.items():
                for one in wanted if isinstance(wanted, tuple) else (wanted,):
                    assert any(p[name] == one for p in places), (c.id, name, one)


def test_figure_2_has_every_pair_once():
    for scale in SCALES:
        cells = [c for c in grids(scale)["figure02"].cells if c.index["method"] == "pair"]
        assert [sum(c.index["panel"] == p for c in cells) for p in PANELS] == [20, 12, 16]
        assert len({str(c.specs[0].method_args["pairs"]) + c.index["panel"] for c in cells}) == 48


class Fake:
    def __init__(self, acc):
        self.metrics = {"acc_last": acc, "firing_rate": 0.1}


def test_figure_2_tells_harm_from_gain():
    grid = grids("smoke")["figure02"]

    def worth(c):
        return {"KD": 80.0, "SASTC": 85.0, "Baseline": 70.0}.get(
            c.index["method"], 80.0 + c.index["s"] - c.index["a"]
        )

    runs = {s: Fake(worth(c)) for c in grid.cells for s in c.specs}
    frame = tabulate_pairs(grid, runs)
    assert frame.query("method == 'pair' and s == 4 and a == 1").minus_kd.tolist() == [3.0] * 3
    found = judge_cells(claims("sastc/figure02"), grid, runs).set_index("claim")
    assert set(found.ours) == {"undecided (one seed)"}
    leads = found["smallest lead [95 %]"]
    of_kd = leads.filter(like="(the paper: certain ones)").iloc[0]
    assert of_kd == "-4; 6 of 20 are positive"
    assert all(lead.startswith("+") for lead in leads.filter(like="SASTC beats single"))
    fig = draw_pairs(frame)
    assert [t.get_text() for t in fig.axes[3].texts][:2] == ["+0.0", "+1.0"]


def test_energy_joins_the_papers_rows():
    grid = grids("smoke")["table10"]
    frame = pd.DataFrame(
        [{"method": "SASTC", "T": 2, "seed": int(v), "45nm": v, "run": f"r{v}"} for v in (3.0, 5.0)]
        + [{"method": "ANN", "seed": 0, "T": "-", "45nm": 9.0, "run": "a"}]
    )
    rows = {
        (r["method"], str(r["T"])): r
        for r in add_energy(Report(grid, {}), frame).rows
        if r["column"] == "energy"
    }
    assert (rows["SASTC", "2"]["ours"], rows["SASTC", "2"]["n"], rows["SASTC", "2"]["runs"]) == (
        4.0,
        2,
        "r3.0 r5.0",
    ) and rows["SASTC", "2"]["delta"] is None
    assert (
        next(r for r in add_energy(Report(grids("paper")["table10"], {}), frame).rows if r["n"])[
            "delta"
        ]
        == 4.0 - 614.1
    )
    assert (
        round(
            tabulate_energy_shares(add_energy(Report(grid, {}), frame)).loc["SASTC", ("ours", 2)], 1
        )
        == 44.4
    )
    assert (
        rows["ANN", "-"]["ours"] == 9.0
        and rows["KD", "7"]["ours"] is None
        and rows["KD", "7"]["note"]
    )
    with pytest.raises(UserError, match="45nm"):
        add_energy(Report(grid, {}), frame, "46nm")


def test_the_registry_asks_for_these_runs():
    for key, grid in grids("smoke").items():
        assert artefact(f"sastc/{key}") and specs_for(f"sastc/{key}", "smoke") == list(
            dict.fromkeys(grid.specs)
        )


def test_scales_do_not_mix():
    found = {
        scale: {s.canonical() for s in specs(scale) if s.optim.lr > 0} for scale in SCALES
    }  # a pretrained teacher is itself at every scale
    for a in SCALES:
        for b in SCALES:
            assert a == b or not found[a] & found[b]


@pytest.mark.parametrize("scale", SCALES)
def test_what_is_in_several_tables_is_one_run(scale):
    of = {k: {s.canonical() for s in g.specs} for k, g in grids(scale).items()}
    teacher = {s.teacher.canonical() for s in grids(scale)["table02"].specs if s.teacher}
    assert of["table10"] <= of["table02"] | teacher and len(of["table07"] & of["table08"]) >= 4
    assert len(of["table07"] & of["table02"]) >= (
        1 if scale == "small" else 4
    )  # at small scale the teacher of Table 2 sees more images than that of Table 7
    assert (
        len(of["figure05"] & of["table02"]) >= 3
        and len(of["figure02"] & of["table02"]) >= 9
        and len(of["table09"] & of["table02"]) >= 3
    )


def test_smoke_is_small():
    for s in with_teachers("smoke"):
        assert s.data.name.startswith("digits") and s.optim.epochs <= 5 and s.model.width <= 0.25
    assert len(with_teachers("smoke")) <= 205


@pytest.mark.parametrize("scale", ["smoke", "medium", "paper"])
def test_the_study_shares_its_clean_runs_but_at_small_scale(scale):
    study = {s.canonical() for s in build_grid("studies/sastc", scale).specs}
    first_seed = [s for s in build_grid("studies/kd", scale).specs if s.seed == 0]
    assert {s.canonical() for s in first_seed} <= study


def test_the_study_teaches_with_what_is_seen():
    grid = build_grid("studies/sastc", "small")
    assert len(grid.specs) == 57 and {(s.data.size, s.optim.precision) for s in grid.specs} == {
        (16, "fp32")
    }
    for c in grid.cells:
        for s in c.specs:
            assert {s.data.label_noise, s.data.shots} == {
                "clean": {0.0, 1.0},
                "40 % noisy labels": {0.4, 1.0},
                "25 % of the images": {0.0, 0.25},
            }[c.index["panel"]]
            if s.teacher and c.index["panel"] != "clean":
                assert s.teacher.data == s.data
    assert (
        all(len(c.groups) == 3 for c in grid.cells if c.index["method"] != "Teacher")
        and len(build_grid("studies/sastc", "smoke").specs) == 21
    )


def test_small_scale_gives_every_share_of_the_images_as_many_steps():
    runs = [*grids("small")["table07"].specs, *grids("small")["table08"].specs]

    def images(s):
        return s.data.subset * s.data.shots * s.optim.epochs

    assert {images(s) for s in runs if s.model.T} == {30_000} and {
        images(s) for s in runs if not s.model.T
    } == {90_000}
    assert all(s.teacher.data == s.data for s in runs if s.teacher) and {
        s.model.args["neuron_args"]["v_threshold"] for s in runs if s.model.T
    } == {0.5}
    assert {s.optim.epochs for s in grids("medium")["table08"].specs if s.model.T} == {60}


def test_ids_of_the_other_studies_are_what_they_were():
    assert [s.id for s in build_grid("studies/kd", "small").specs] == [
        "cifar10_jpeg-resnet20x2-ann-s0-49c7e9c8ca",
        *(
            f"cifar10_jpeg-resnet20-T2-s{i}-{h}"
            for i, h in enumerate(("96edefdbea", "3f7026c322", "cb7efe0b1e"))
        ),
        *(
            f"cifar10_jpeg-resnet20-T2-kd-s{i}-{h}"
            for i, h in enumerate(("3281ad2b85", "69d13e4dfa", "fbfa0c55bf"))
        ),
    ]
    maps = build_grid("studies/ckdsnn", "small")
    assert maps.specs[-3].id == "cifar10_jpeg-resnet20-T2-ckdsnn-s0-a6e5ce5555"


def test_mistakes_are_named():
    cifar = {"dataset": "CIFAR-10", "student": "ResNet18", "T": 2, "method": "none"}
    imagenet = {"student": "ResNet18", "T": 2, "method": "kd"}
    events = {"dataset": "CIFAR10-DVS", "T": 4, "method": "tet"}
    for bad, named in (
        (lambda: build_grid("sastc/table02", "papr"), "paper"),
        (lambda: build_grid("sastc/figure06", "smoke"), "figure05"),
        (lambda: build_run("sastc", "student", "smoke", **cifar), "ResNet-18"),
        (lambda: build_run("sastc", "ImageNet student", "smoke", **imagenet), "ResNet-18"),
        (lambda: build_run("sastc", "events student", "smoke", **events), "DVS-CIFAR10"),
        (lambda: build_grid("studies/sastc", "smal"), "small"),
    ):
        with pytest.raises(UserError, match=named):
            bad()


def kinds():
    return {
        f"{s.data.name}-{s.model.name}-{s.method}": s
        for s in specs("smoke")
        if s.model.T and (s.model.name != "vgg11_sastc" or s.method != "none" or s.data.shots == 1)
    }


@pytest.mark.parametrize(
    "kind",
    [
        "digits-vgg11_sastc-kd+feature",
        "digits-vgg11_sastc-kd+sastc",
        "digits-bottleneck_sastc-kd+sastc",
        "digits-resnet19_tet-tet",
        "digits-resnet18_imagenet-kd+sastc",
        "digits-events-vggsnn-kd+sastc",
        "digits-events-resnet19_tet-kd+sastc",
    ],
)
def test_one_student_of_every_kind_runs_to_its_record(kind, alone):
    spec = shorten(kinds()[kind])
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


def test_every_figure_with_arms_has_claims():
    assert all(claims(f"sastc/{name}") for name in [*FIGURES, "figure03", "figure04"])
