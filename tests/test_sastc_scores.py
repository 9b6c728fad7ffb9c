"""SASTC's scores and maps: every scale can be built without training, watched runs end to end, what is in several artefacts is one run."""

import math
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import create_on_meta, shape_of, shorten
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from snnkd_nb.core import UserError
from snnkd_nb.data.images import list_datasets, load, load_spec, opener
from snnkd_nb.losses.zoo import create_distiller
from snnkd_nb.metrics.activity import check_probes, create_probes
from snnkd_nb.metrics.likeness import fixed_batch, stm_score
from snnkd_nb.models.zoo import create_model, model_info
from snnkd_nb.papers.experiments import SCALES, artefact, build_grid, build_run, resolve, specs_for
from snnkd_nb.papers.published import claims, published
from snnkd_nb.reports.claims import judge_records
from snnkd_nb.reports.layers import (
    brightest_share,
    fisher_records,
    interval_map,
    likeness_records,
    make_meta_network,
    mismatch_measure,
    tabulate_fisher,
    tabulate_normalizations,
    tabulate_score_parts,
    tabulate_scores,
    teacher_of,
    teachers_of,
)
from snnkd_nb.reports.maps import attention_history, load_picture, load_test_images
from snnkd_nb.reports.tables import Measure, Report, tabulate_by_epoch
from snnkd_nb.runner.jobs import load_network
from snnkd_nb.training.job import run_train

BIG = ("medium", "paper")
TABLES = ("table01", "table05")
FIGURES = ("figure01", "figure03", "figure04")
PAPER_TEACHERS = {"CIFAR-100": ("resnet32x4", 32), "ImageNet": ("resnet34_imagenet", 224)}


@lru_cache
def grids(scale):
    return {name: build_grid(f"sastc/{name}", scale) for name in TABLES + FIGURES}


def last_epochs(scale):
    return resolve("sastc", "options", "score", scale=scale)["last_epochs"]


def score(scale):
    return mismatch_measure(last_epochs(scale))


def row_teacher(scale, dataset):
    "The teacher of a row of Table 5."
    if dataset == "ImageNet":
        return build_run("sastc", "ImageNet teacher", scale)
    return build_run("sastc", "teacher", scale, dataset=dataset, teacher="ResNet-32x4")


@lru_cache
def specs(scale):
    return tuple(dict.fromkeys(s for g in grids(scale).values() for s in g.specs))


@lru_cache
def every_network(scale):
    return tuple(dict.fromkeys(t for s in specs(scale) for t in (s, s.teacher, s.reference) if t))


@pytest.mark.parametrize("scale", BIG)
def test_every_network_of_the_large_scales_exists_at_full_size_with_the_layers_it_needs(scale):
    for spec in {(s.model, s.data.name): s for s in every_network(scale)}.values():
        net = create_on_meta(spec.model, *shape_of(spec.data))
        assert spec.model.width == 1 and net.T == spec.model.T, spec.model
    for s in specs(scale):
        mine, theirs = (
            create_on_meta(m.model, *shape_of(m.data)).stage_names if m else ()
            for m in (s, s.teacher)
        )
        assert all(a in mine and b in theirs for a, b in s.method_args.get("pairs", ())), s.id
    last = create_on_meta(grids(scale)["figure03"].specs[1].model, 1000, 224, 3)
    assert last.feature_shapes(224)[last.stage_names[-1]][-2:] == (7, 7), (
        "a map that can be looked at"
    )


@pytest.mark.parametrize("scale", SCALES)
def test_data_have_known_names_and_all_that_are_compared_see_the_same(scale):
    for s in every_network(scale):
        assert s.data.name.partition(":")[0] in [
            n.partition(":")[0] for n in list_datasets()
        ] and opener(s.data.name)
        for of in filter(None, (s.teacher, s.reference)):
            assert of.model.T is None and of.data.replace(
                subset=None, val=0, augment="none"
            ) == s.data.replace(subset=None, val=0, augment="none")


@pytest.mark.parametrize("scale", SCALES)
def test_probes_are_known_and_have_something_to_compare_with(scale):
    for s in specs(scale):
        check_probes(s.probes, bool(s.teacher or s.reference))
    assert {p for s in specs(scale) for p in s.probes} == {"stm", "attention", "fisher"}
    assert all("sastc" in s.method for s in specs(scale) if "attention" in s.probes)


@pytest.mark.parametrize("scale", SCALES)
def test_a_row_is_scored_against_one_teacher_and_named_like_the_papers(scale):
    for row in published("sastc/table01").frame().index:
        of = {
            s.teacher or s.reference
            for c in grids(scale)["table05"].cells
            if tuple(c.index.values()) == row
            for s in c.specs
        }
        assert of == {row_teacher(scale, row[1])}
    assert (
        row_teacher("paper", "CIFAR-100").model.name == "resnet32x4"
        and "resnet34" in row_teacher("paper", "ImageNet").model.name
    )


@pytest.mark.parametrize("scale", SCALES)
def test_scores_are_taken_in_the_runs_of_the_tables_of_accuracy(scale):
    watched, known = (
        set(grids(scale)["table05"].specs),
        {s for k in ("table02", "table03") for s in build_grid(f"sastc/{k}", scale).specs},
    )
    assert watched <= known and {s for s in known if s.probes} == watched, (
        "one run a student, whatever tables it stands in"
    )
    names = {"vgg11_sastc", "resnet19_tet", "resnet18_imagenet"}
    assert {s.model.name for s in watched} == names and len(
        {s.replace(probes={}, reference=None) for s in known}
    ) == len(known)


@pytest.mark.parametrize("scale", SCALES)
def test_without_probes_figure_4_has_the_runs_of_the_sweep(scale):
    plain = {s.replace(probes={}, reference=None) for s in grids(scale)["figure04"].specs}
    swept = build_grid("sastc/figure05", scale)
    known = {
        s.replace(probes={}, reference=None)
        for c in swept.cells
        if c.index["panel"] == "CIFAR-10" and c.index["method"] in ("Baseline", "KD", "β = 1300")
        for s in c.specs
    }
    assert {s for s in plain if s.method != "kd+feature"} == known


@pytest.mark.parametrize("key", TABLES)
@pytest.mark.parametrize("scale", SCALES)
def test_cells_are_published_ones_and_all_can_be_run(key, scale):
    report = Report(grids(scale)[key], {}, score(scale))
    assert len(report.rows) == len(published(f"sastc/{key}").records) and {
        r["note"] for r in report.rows
    } == {"not run"}
    assert (
        set(report.claims().ours) == {"not run"}
        and len(report.claims()) == {"table01": 1, "table05": 3}[key]
    )
    assert last_epochs(scale) <= min(s.optim.epochs for s in grids(scale)[key].specs) and any(
        "128" in d for d in grids(scale)[key].deviations
    )


def test_what_is_in_several_artefacts_is_one_run():
    for scale in SCALES:
        g = grids(scale)
        assert set(g["table01"].specs) < set(g["table05"].specs) and set(
            g["figure01"].specs[1:]
        ) < set(g["table05"].specs)
    assert set(grids("small")["figure03"].specs) <= set(build_grid("studies/sastc", "small").specs)
    assert set(grids("paper")["figure03"].specs) <= set(build_grid("sastc/table03", "paper").specs)
    assert len([s for s in specs("smoke") if s.probes]) <= 20 and all(
        s.optim.epochs <= 5 and s.data.name == "digits" for s in specs("smoke")
    )


def test_scales_share_no_run_but_the_teacher_that_is_taken_as_it_is():
    shared = {s for a in SCALES for b in SCALES if a != b for s in set(specs(a)) & set(specs(b))}
    assert (
        shared == {row_teacher("paper", "ImageNet")}
        and row_teacher("paper", "ImageNet").optim.lr == 0
    )


def test_the_registry_asks_for_these_runs():
    for key, grid in grids("smoke").items():
        assert artefact(f"sastc/{key}")
        assert specs_for(f"sastc/{key}", "smoke") == grid.specs


@pytest.mark.parametrize("scale", BIG)
def test_every_method_is_made_and_its_probes_look_on_a_narrow_copy(scale):
    "Student, teacher, method and probes of every kind of run, at an eighth of the width, on digits in colour."
    data, seen = load("digits", size=16), set()
    kinds = {
        (s.model.name, s.teacher.model.name if s.teacher else None, s.method, *s.probes): s
        for s in specs(scale)
        if s.probes
    }
    for s in kinds.values():
        net, of = (
            narrow(m, T)
            for m, T in (
                (s.model, 2),
                (
                    (s.teacher or s.reference or row_teacher(scale, "CIFAR-10")).model,
                    None,
                ),
            )
        )
        d = create_distiller(
            s.method, net, of if s.teacher else None, s.variant, **dict(s.method_args)
        )
        probes = create_probes(
            {p: {} if p == "attention" else {"images": 6} for p in s.probes}, net, of, data, d
        )
        found = {k: f() for k, f in probes.items()}
        seen |= set(found)
        assert all(
            math.isfinite(v)
            for f in found.values()
            for v in (f.values() if isinstance(f, dict) else [f])
        ), s.id
    assert seen == {"stm", "attention", "fisher"}


def narrow(model, T):
    torch.manual_seed(0)
    name = {"torchvision:resnet34": "resnet34_imagenet"}.get(model.name, model.name)
    small = {"depth": 0.2} if "depth" in model_info(name)["options"] else {}
    return create_model(
        name,
        T=T,
        width=0.0625,
        in_channels=1,
        image_size=16,
        **small,
        **({"stem": "small"} if "imagenet" in name else {}),
    )


@pytest.fixture(scope="module")
def watched_runs(alone):
    "{(key, method): (brief spec, record)} of one student alone and one under SASTC, scored, and one with Fisher information."
    row = {
        c.column: c.specs for c in grids("smoke")["table05"].cells if c.index["student"] == "VGG-11"
    }
    chosen = {
        "Baseline": row["Baseline"][0],
        "SASTC": row["SASTC"][0],
        "fisher": grids("smoke")["figure04"].specs[1],
    }
    briefly = {k: shorten(s, images=150, epochs=2) for k, s in chosen.items()}
    return {k: (s, run_train(s, alone, weak_teacher="accept")) for k, s in briefly.items()}


def test_scores_of_a_run_are_those_of_its_network(watched_runs, alone):
    "What the probe wrote after the last epoch is what the trained networks give."
    for k in ("Baseline", "SASTC"):
        spec, record = watched_runs[k]
        assert len(record.history["stm"]) == 2
        of = alone.get(spec.teacher or spec.reference)
        x = fixed_batch(load_spec(spec.data))[0]
        assert record.history["stm"][-1] == pytest.approx(
            stm_score(load_network(record), load_network(of), x)[0], rel=1e-5
        )
    assert watched_runs["Baseline"][1].teacher is None


def test_tables_of_one_row_are_made_from_records(watched_runs, alone):
    grid, runs, nets = grids("smoke")["table05"], {}, {}
    for k in ("Baseline", "SASTC"):
        spec = next(
            c.specs[0] for c in grid.cells if c.column == k and c.index["student"] == "VGG-11"
        )
        runs[spec], nets[spec] = watched_runs[k][1], load_network(watched_runs[k][1])
    nets[teacher_of(grid.cells[0])] = load_network(alone.get(watched_runs["SASTC"][0].teacher))
    report = Report(grid, runs, score("smoke"))
    ours = {r["column"]: r["ours"] for r in report.rows if r["n"]}
    assert ours == {
        k: pytest.approx(np.mean(watched_runs[k][1].history["stm"])) for k in ("Baseline", "SASTC")
    }
    some = "1 of 3 comparisons run: undecided (one seed)"
    assert report.claims().ours.tolist() == [some, "not run", "not run"]
    lead = report.claims()["smallest lead [95 %]"][0]
    assert float(lead) == pytest.approx(ours["Baseline"] - ours["SASTC"], abs=0.02)
    made = tabulate_normalizations(grid, nets)
    assert len(made) == 4 and made["SASTC"][0] == pytest.approx(
        watched_runs["SASTC"][1].history["stm"][-1], rel=1e-5
    )
    sizes = tabulate_score_parts(report, nets, PAPER_TEACHERS)
    assert (
        set(sizes.whose) == {"paper", "ours"}
        and np.allclose(sizes.n * sizes["one product"], np.exp(sizes.score / 2))
        and len(sizes[sizes.whose == "ours"]) == 1
    )
    assert len(tabulate_scores(grid, runs)) == 4 and set(tabulate_scores(grid, runs).method) == {
        "Baseline",
        "SASTC",
    }


def test_attention_of_a_run_sums_to_one_and_names_the_calibrated_layers(watched_runs):
    spec, record = watched_runs["SASTC"]
    grid = grids("smoke")["figure01"]
    rows = attention_history(tabulate_by_epoch(grid, {grid.specs[1]: record}, "attention"))
    assert set(rows.student) == set(spec.method_args["student_layers"]) and set(
        rows.teacher
    ) == set(spec.method_args["teacher_layers"])
    assert np.allclose(rows.groupby(["epoch", "student", "t"]).weight.sum(), 1, atol=1e-4) and set(
        rows.epoch
    ) == {1, 2}


def test_fisher_information_of_a_run_is_there_for_every_step(watched_runs):
    grid, record = grids("smoke")["figure04"], watched_runs["fisher"][1]
    frame = tabulate_by_epoch(grid, {grid.specs[1]: record}, "fisher")
    assert (
        set(frame.part) == {"1", "2", "3"}
        and (frame.value > 0).all()
        and len(frame) == 6
        and set(frame.method) == {"KD"}
    )
    assert (
        tabulate_fisher(frame).shape == (1, 9)
        and judge_records(claims("sastc/figure04"), fisher_records(frame)).ours.tolist()
        == ["not run"] * 5
    )


def test_a_measure_of_the_accuracy_is_the_table_of_accuracies():
    grid = build_grid("sastc/table09", "smoke")
    runs = {s: SimpleNamespace(metrics={"acc_last": 50 + i}) for i, s in enumerate(grid.specs)}
    by_name, by_measure = (
        Report(grid, runs),
        Report(grid, runs, Measure("acc", "accuracy", lambda r: r.metrics["acc_last"])),
    )
    assert (
        by_name.rows == by_measure.rows
        and by_name.claims().equals(by_measure.claims())
        and by_name.table().equals(by_measure.table())
    )
    assert by_measure.markdown() == by_name.markdown().replace(by_name.says, "accuracy")


def test_a_run_whose_score_is_not_a_number_counts_as_not_run():
    grid = grids("smoke")["table01"]
    rows = Report(
        grid,
        {s: SimpleNamespace(history={"stm": [1.0, None, -math.inf, math.nan]}) for s in grid.specs},
        score("smoke"),
    ).rows
    assert {r["note"] for r in rows} == {"not run"} and {r["ours"] for r in rows} == {None}


def test_tables_are_saved_under_their_own_name(tmp_path, monkeypatch):
    monkeypatch.setenv("SNNKD_ROOT", str(tmp_path))
    report = Report(
        grids("smoke")["table05"],
        {s: SimpleNamespace(history={"stm": [9.0, 8.0]}) for s in grids("smoke")["table05"].specs},
        score("smoke"),
    )
    path = report.save()
    assert path.name == "table05-smoke.csv" and path.read_bytes() == report.save().read_bytes()
    text = path.with_name("table05-smoke.md").read_text()
    assert (
        "mean over the last 2 epochs" in text
        and "lower is better" in text
        and "SASTC has less mismatch than KD" in text
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Pictures in ImageNet's layout."
    top, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split in ("train", "val"):
        for c in ("n01", "n02", "n03"):
            (top / split / c).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(
                    top / split / c / f"{i}.png"
                )
    return load(f"imagefolder-stream:{top}", size=32)


def test_images_in_files_are_looked_at_and_scored_like_those_in_memory(folder):
    x, y = load_test_images(folder, torch.tensor([0, 5, 9]))
    pictures = [load_picture(folder, i) for i in (0, 5, 9)]
    assert (
        x.shape == (3, 3, 32, 32)
        and y.tolist() == [0, 1, 2]
        and pictures[0].shape == (32, 32, 3)
        and 0 <= min(p.min() for p in pictures) <= max(p.max() for p in pictures) <= 1
    )
    whole = next(iter(folder.loader("test", 12, shuffle=False)))[0]
    assert torch.allclose(x, whole[[0, 5, 9]], atol=1e-6)
    size = {"in_channels": 3, "image_size": 32, "width": 0.125, "depth": 0.2}
    student, of = (
        create_model("resnet18_imagenet", 3, T=2, **size),
        create_model("resnet34_imagenet", 3, **size),
    )
    watch = create_probes(
        {"stm": {"images": 8}, "fisher": {"images": 2}}, student, of, folder, None
    )
    assert (
        math.isfinite(watch["stm"]())
        and watch["stm"]() == watch["stm"]()
        and len(watch["fisher"]()) == 2
    )


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 6),
    st.floats(0.1, 10),
    st.integers(0, 10**6),
)
def test_the_brightest_part_knows_no_size_and_no_place(batch, h, w, factor, seed):
    g = torch.Generator().manual_seed(seed)
    m = torch.rand(batch, h, w, generator=g) + 1e-3
    part = brightest_share(m)
    assert torch.allclose(brightest_share(factor * m), part, rtol=1e-4) and torch.allclose(
        brightest_share(m.flip(1, 2)), part, rtol=1e-5
    )
    assert ((part >= max(1, round(0.2 * h * w)) / (h * w) - 1e-5) & (part <= 1 + 1e-5)).all()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.floats(0.1, 100), st.integers(1, 3)
)
def test_how_early_a_curve_falls_does_not_depend_on_its_height(values, factor, last):
    end = sum(values[-last:]) / len(values[-last:])
    assume(abs(math.log(values[0] / end)) > 1e-6)
    frame = pd.DataFrame(
        [
            {"method": "KD", "run": "a", "epoch": e + 1, "part": "1", "value": v}
            for e, v in enumerate(values)
        ]
    )

    def read(f):
        return {r["column"]: r["value"] for r in fisher_records(f, last)}

    share = 0.0
    for v in values:
        share += (
            max(0.0, min(1.0, math.log(values[0] / v) / math.log(values[0] / end)))
            if end < values[0]
            else 0.0
        )
    assert (
        read(frame)["end"] == pytest.approx(end)
        and read(frame)["early"] == pytest.approx(share / len(values), abs=1e-6)
        and 0 <= read(frame)["early"] < 1
    )
    assert read(frame.assign(value=frame.value * factor))["early"] == pytest.approx(
        read(frame)["early"], abs=1e-6
    )


def test_a_network_that_fires_once_has_an_empty_map_and_claims_about_maps_are_judged():
    class Once:
        training, T, stage_names = False, 3, ("s",)

        def modules(self):
            return []

        def eval(self):
            return self

        def train(self, mode=True):
            return self

        def __call__(self, x, features=False):
            return torch.zeros(3, len(x), 2), {
                "s": torch.stack([torch.ones(len(x), 1, 2, 2), *torch.zeros(2, len(x), 1, 2, 2)])
            }

    assert not interval_map(Once(), torch.zeros(2, 1, 4, 4)).any()
    frame = pd.DataFrame(
        [
            {"map": m, "pearson": p, "iou": p, "in the brightest fifth": -p}
            for m, p in (("Baseline", 0.1), ("KD", 0.5), ("Feature KD", 0.3), ("SASTC", 0.4))
        ]
    )
    judged = judge_records(claims("sastc/figure03"), likeness_records(frame))
    assert set(judged.ours) == {"undecided (one seed)"}
    assert judged["smallest lead [95 %]"].tolist() == [
        *("+0.3", "-0.1", "+0.1"),
        *("+0.3", "-0.1", "+0.1"),
        *("-0.3", "+0.1", "-0.1"),
    ]


def test_the_papers_teachers_have_the_sizes_that_are_told():
    assert [
        max(math.prod(v) for v in net.feature_shapes(size).values())
        for net, size in ((make_meta_network(*of), of[1]) for of in PAPER_TEACHERS.values())
    ] == [65_536, 200_704]
    assert teachers_of(grids("paper")["table05"]) == [
        row_teacher("paper", d) for d in ("CIFAR-100", "ImageNet")
    ]


def test_mistakes_are_named():
    for name in TABLES + FIGURES:
        with pytest.raises(UserError, match="did you mean 'paper'"):
            build_grid(f"sastc/{name}", "papr")
