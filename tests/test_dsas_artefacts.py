"""DSAS: every search and every run of its artefacts can be built at every scale; what a search finds becomes runs; cells, claims and shared runs."""

import os
from functools import lru_cache

import pandas as pd
import pytest
import torch

from snnkd_nb.core import UserError
from snnkd_nb.data.images import list_datasets, opener
from snnkd_nb.losses.zoo import create_distiller
from snnkd_nb.models.genome import EXAMPLES, genome_parameters
from snnkd_nb.models.zoo import create_model, model_info
from snnkd_nb.papers import dsas, dsas_search, dsas_students, dsas_views
from snnkd_nb.papers.dsas import DATASETS, EVENTS, GESTURE
from snnkd_nb.papers.experiments import SCALES
from snnkd_nb.papers.published import claims, published
from snnkd_nb.papers.registry import specs_for
from snnkd_nb.reports.claims import judge_cells
from snnkd_nb.reports.tables import Report, tabulate_by_seed
from snnkd_nb.runner.jobs import execute_all
from snnkd_nb.runner.planning import plan
from snnkd_nb.search.job import create_engine_options, run_search
from snnkd_nb.search.score import Scoring
from snnkd_nb.search.space import create_space
from snnkd_nb.spec import RunSpec, SearchSpec, to_dict
from snnkd_nb.store import SearchRecord, Store
from snnkd_nb.training.job import run_train

BIG = ("medium", "paper")
SHAPES = {
    "cifar10": (10, 32, 3),
    "cifar100": (100, 32, 3),
    "imagefolder-stream": (1000, 224, 3),
    "tiny-imagenet": (200, 64, 3),
    "cifar10-dvs": (10, 48, 2),
    "dvs-gesture": (11, 64, 2),
}
TABLES = [k for k in dsas_students.ARTEFACTS if k.startswith("table")]


@pytest.fixture(scope="module")
def pretended(tmp_path_factory):
    "A project whose searches are all stored; each found an example of the size of the paper's network, or one that fits its space."
    top, before = tmp_path_factory.mktemp("pretended"), dict(os.environ)
    os.environ.update(SNNKD_ROOT=str(top), SNNKD_CACHE=str(top / "cache"))
    store = Store()
    for s in {
        s for scale in SCALES for f in dsas_students.ARTEFACTS.values() for s in f(scale).searches
    }:
        store.put(pretend(s))
    yield store
    os.environ.clear()
    os.environ.update(before)


def pretend(s):
    names = {
        "imagenet": "ImageNet",
        "tiny-imagenet": "Tiny-ImageNet",
        "cifar10": "CIFAR-10",
        "cifar100": "CIFAR-100",
        "cifar10-dvs": "CIFAR10-DVS",
        "dvs128-gesture": "DVS128-Gesture",
    }
    c = s.space_args.get("channels")
    genome = (
        " ".join(
            [f"n{c[0]}"] * s.space_args["normal"][0]
            + [f"d{c[1]}"] * s.space_args["downsample"][0]
            + [f"n{c[-1]}"] * (s.seed + 1)
        )
        if c
        else EXAMPLES[names[s.space]]
    )
    return SearchRecord(
        to_dict(s, full=True),
        {"genome": genome, "fitness": 0.1},
        {},
        [],
        [],
        {},
        {},
        {},
        extra={"slopes": [2.0, 2.5, 3.0 + s.seed / 10]},
    )


@lru_cache
def searches(scale):
    return tuple(
        dict.fromkeys(
            s
            for f in (*dsas_views.ARTEFACTS.values(), *dsas_students.ARTEFACTS.values())
            for s in f(scale).needs
            if isinstance(s, SearchSpec)
        )
    )


def runs(scale):
    return list(dict.fromkeys(s for f in dsas_students.ARTEFACTS.values() for s in f(scale).specs))


def shape(data):
    return SHAPES[data.name.partition(":")[0]]


@lru_cache
def on_meta(model, k, size, channels):
    "The network of a spec at full size."
    with torch.device("meta"):
        return create_model(
            model.name,
            k,
            T=model.T,
            neuron=model.neuron,
            width=model.width,
            in_channels=channels,
            image_size=size,
            **model.args,
        )


@pytest.mark.parametrize("scale", BIG)
def test_every_network_of_the_large_scales_exists_at_full_size(scale, pretended):
    for s in {
        (t.model.canonical(), t.data.name): t
        for r in (*runs(scale), *searches(scale))
        for t in ((r, r.teacher) if isinstance(r, RunSpec) else (r.teacher,))
        if t
    }.values():
        net = on_meta(s.model, *shape(s.data))
        assert s.model.width == 1 and net.T == s.model.T
        if s.model.name == "dsas":
            assert sum(p.numel() for p in net.parameters()) == genome_parameters(
                s.model.args["genome"], *shape(s.data)[::2]
            )


def test_the_examples_have_the_papers_parameters(pretended):
    for key, at in (
        ("table01", "Tiny-ImageNet"),
        ("table02", "ImageNet"),
        ("table03", "CIFAR-10"),
        ("table06", EVENTS),
        ("table06", GESTURE),
    ):
        s = next(
            s
            for s in dsas_students.ARTEFACTS[key]("paper").specs
            if s.data.name.partition(":")[0] == dsas.data("paper", at).name.partition(":")[0]
        )
        ours = sum(p.numel() for p in on_meta(s.model, *shape(s.data)).parameters()) / 1e6
        said = {
            r["text"]
            for r in published(f"dsas/{key}").records
            if "DSAS" in r["method"] and r["column"] == "params"
        }
        assert any(f"{ours:.2f}" in t for t in said), (key, ours, said)


@pytest.mark.parametrize("scale", SCALES)
def test_every_search_can_be_what_it_says(scale):
    for s in searches(scale):
        how, size = (
            Scoring(s.metric, T=s.T, neuron=s.neuron, **to_dict(s).get("metric_args", {})),
            {"smoke": 10 if s.data.args else 8, "small": s.data.size}.get(scale)
            or shape(s.data)[1],
        )
        space = create_space(s.space, image_size=size, **to_dict(s).get("space_args", {}))
        classes = {"smoke": 10, "small": 20 if "tiny" in s.data.name else 10}.get(scale) or shape(
            s.data
        )[0]
        assert (
            space.size() > 1000
            and create_engine_options(s)["selection"] == "tournament"
            and s.data.args.get("frames", 4) == how.T
        )
        assert how.mode == "sample" or "tgs" not in how.metrics or s.batch >= classes
        assert s.teacher.model.T is None and s.data.replace(
            subset=None, augment="none"
        ) == s.teacher.data.replace(subset=None, augment="none")
    assert {(s.population, s.generations) for s in searches(scale)} == {dsas_search.effort(scale)}


def test_the_papers_search_settings():
    assert dsas_search.effort("paper") == (200, 20) and all(
        not s.space_args and not s.algorithm_args for s in searches("paper")
    )
    n, g = dsas_search.effort("small")
    assert n >= 60 and g >= 10 and len({s.seed for s in dsas_views.figure04("small").specs}) == 3
    assert dsas_search.settings("dsas/table13").same.eq("yes").all()


@pytest.mark.parametrize("scale", BIG)
def test_the_papers_training_settings(scale, pretended):
    for s in runs(scale):
        if s.model.T is None:
            continue
        recorded = "frames" in s.data.args
        assert (
            s.method in ("none", "logits-mse")
            and s.model.neuron == "dsas"
            and (s.teacher is None) == (s.method == "none")
        )
        if scale == "paper":
            assert (s.optim.epochs, s.optim.batch_size, s.optim.lr, s.optim.weight_decay) == (
                (200, 32) if recorded else (300, 64)
            ) + (0.01, 1e-6)
    assert {s.model.T for s in dsas_students.table07(scale).specs} == {1, 2, 4, 6}


@pytest.mark.parametrize("scale", SCALES)
def test_every_data_set_has_a_known_name_and_teachers_see_what_their_students_see(scale, pretended):
    for s in runs(scale):
        assert s.data.name.partition(":")[0] in [
            n.partition(":")[0] for n in list_datasets()
        ] and opener(s.data.name)
        if "frames" in s.data.args:
            assert s.model.T in (None, s.data.args["frames"])
        if s.teacher:
            assert s.teacher.model.T is None and s.teacher.data.replace(
                subset=None, augment="none"
            ) == s.data.replace(subset=None, augment="none")


def test_what_a_search_found_is_in_the_spec(pretended):
    spec = dsas_search.search("smoke", "CIFAR-10")
    run = dsas_students.student("smoke", "CIFAR-10")
    assert run.model.args["genome"] == dsas_search.found(spec) and list(
        run.model.args["slopes"]
    ) == dsas_search.guided(spec)
    two = dsas_students.student("small", "CIFAR-10", 1)
    assert (
        two.seed == 1
        and two.model.args["slopes"] == (2.0, 2.5, 3.1)
        and two.model.args["genome"]
        != dsas_students.student("small", "CIFAR-10", 0).model.args["genome"]
    )
    ablated = {
        m: dsas_students.student("smoke", "CIFAR-10", metric=m)
        for m in dsas_search.METRICS.values()
    }
    assert len({a.model.args["slopes"] for a in ablated.values()}) == 1, (
        "all arms of Table 10 train with the same slopes"
    )


def test_a_changed_record_is_read_again(pretended):
    spec = dsas_search.search("smoke", "CIFAR-10", seed=77)
    assert dsas_search.found(spec) is None
    record = pretend(spec)
    path = pretended.path(pretended.put(record).id)
    first = dsas_search.found(spec)
    pretended.put(
        SearchRecord(
            record.spec, {"genome": "n8"}, {}, [], [], {}, {}, {}, extra={"slopes": [2.0]}
        ),
        replace=True,
    )
    os.utime(path, ns=(1, 1))
    assert first == record.best["genome"] and dsas_search.found(spec) == "n8"
    path.unlink()
    assert dsas_search.found(spec) is None


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("key", TABLES)
def test_cells_are_published_ones_and_say_why_they_are_empty(
    key, scale, tmp_path, monkeypatch, pretended
):
    grid = dsas_students.ARTEFACTS[key](scale)
    report = Report(grid, {})
    assert (
        len(report.rows) == len(published(f"dsas/{key}").records)
        and all(r["note"] for r in report.rows)
        and grid.deviations
    )
    assert {c.note for c in grid.cells if not c.specs} <= {"larger scales"} and (
        {*grid.needs} >= {*grid.searches}
    )
    monkeypatch.setenv("SNNKD_ROOT", str(tmp_path))
    empty = dsas_students.ARTEFACTS[key](scale)
    found = [c for c in empty.cells if not c.specs]
    assert (
        {c.note for c in found} <= {"search not run", "larger scales"}
        and empty.searches == grid.searches
        and all(s.model.T is None for s in empty.specs)
    )


def test_nothing_waits_at_the_large_scales(pretended):
    for scale in BIG:
        assert not any(c.note for f in dsas_students.ARTEFACTS.values() for c in f(scale).cells)


def test_our_cells_of_the_tables_of_methods(pretended):
    for key in ("table01", "table02", "table03", "table06"):
        assert all("DSAS" in c.index["method"] for c in dsas_students.ARTEFACTS[key]("paper").cells)
    report = dsas_students.with_parameters(Report(dsas_students.table03("paper"), {}), {})
    assert [
        r["note"] for r in report.rows if r["column"] == "params" and "DSAS" in r["method"]
    ] == ["not run"] * 2


class Fake:
    def __init__(self, acc, params=2e6):
        self.metrics = {"acc_last": acc, "params": params}


def test_parameters_stand_beside_the_papers(pretended):
    grid = dsas_students.table06("paper")
    runs = {s: Fake(80.0 + s.seed) for s in grid.specs}
    rows = [
        r
        for r in dsas_students.with_parameters(Report(grid, runs), runs).rows
        if r["column"] == "params" and r["n"]
    ]
    assert [(r["ours"], r["n"], r["std"]) for r in rows] == [(2.0, 3, 0.0)] * 2 and rows[0][
        "delta"
    ] == 2.0 - 13.83


@pytest.mark.parametrize("key", ["figure02", "figure03"])
def test_figures_have_claims_about_their_arms(key, pretended):
    grid = dsas_students.ARTEFACTS[key]("smoke")
    assert tabulate_by_seed(grid, {}).empty and set(
        judge_cells(dsas_students.view_claims(f"dsas/{key}"), grid, {}).ours
    ) == {"not run"}


def test_gains_by_time_steps_are_judged(pretended):
    grid = dsas_students.figure03("small")

    def acc(c):
        return 80 + c.index["T"] + (8 / c.index["T"] if c.index["method"] == "with KD" else 0)

    def noise(c, seed):
        return (seed * 7 * c.index["T"] + len(c.index["method"]) * seed**2) % 5 / 1000

    got = judge_cells(
        dsas_students.view_claims("dsas/figure03"),
        grid,
        {s: Fake(acc(c) + noise(c, s.seed)) for c in grid.cells for s in c.specs},
    ).ours.tolist()
    assert got == ["holds", "holds"]


@pytest.mark.parametrize("scale", SCALES)
def test_what_is_in_several_artefacts_is_one_run(scale, pretended):
    of = {k: set(f(scale).specs) for k, f in dsas_students.ARTEFACTS.items()}
    assert (
        of["figure01"] | of["figure02"] | of["table09"] <= of["table05"]
        and of["table03"] <= of["table05"]
        and of["table06"] <= of["table05"]
    )
    assert (
        set(of["table10"]) & of["table03"]
        and of["table11"] & of["table05"]
        and {s for s in of["table07"] if not s.data.args} <= of["figure03"]
    )
    assert set(dsas_students.table01(scale).searches) <= set(dsas_search.table08(scale).specs) and {
        dsas.teacher(scale, d) for d in DATASETS if d != "ImageNet"
    } <= set(dsas.table15(scale).specs)


def test_scales_do_not_mix(pretended):
    found = {scale: {s.id for s in (*runs(scale), *searches(scale))} for scale in SCALES}
    for a in SCALES:
        for b in SCALES:
            assert a == b or not found[a] & found[b]


def test_smoke_is_small(pretended):
    for s in runs("smoke"):
        assert s.data.name in ("digits", "digits-events") and s.optim.epochs <= 8
        if s.model.name == "dsas":
            assert max(int(g[1:]) for g in s.model.args["genome"].split()) <= 36
    assert (
        len(runs("smoke")) <= 40
        and sum(s.population * (s.generations + 1) for s in searches("smoke")) <= 1000
    )


def test_the_registry_asks_for_searches_and_runs(pretended):
    for key, f in (dsas_students.ARTEFACTS | dsas_views.ARTEFACTS).items():
        assert specs_for(f"dsas/{key}", "smoke") == f("smoke").needs != []
    assert specs_for("dsas/table13") == specs_for("dsas/table14") == []


def test_trajectories_and_architectures_belong_to_their_figures():
    for i, d in enumerate(dsas_views.SEARCHED):
        a, t = dsas_views.architecture("smoke", d), dsas_views.trajectories("smoke", d)
        assert (
            (a.key, t.key) == (f"dsas/figure{9 + i:02}", f"dsas/figure{14 + i}")
            and a.specs[0] in t.specs
            and any(c.index["method"] == d for c in t.cells)
        )
        assert all(c.key == t.key for c in dsas_views.search_claims(t.key)) and d in dsas_views.SAID
    assert {c.key for c in dsas_views.PATH_CLAIMS} == {f"dsas/figure{n}" for n in range(14, 19)}


def test_every_table_with_claims_has_a_page_that_shows_them(pretended):
    told = {f"dsas/{k}" for k in (*TABLES, "table08", "table12", "table15")}
    assert {c.key for c in claims("dsas")} <= told


def test_mistakes_are_named(pretended):
    for bad, named in (
        (lambda: dsas_students.table01("papr"), "paper"),
        (lambda: dsas_search.search("smoke", "CIFAR"), "CIFAR-10"),
        (lambda: dsas_views.trajectories("smoke", "Gesture"), "DVS128-Gesture"),
        (lambda: dsas_views.search_claims("dsas/figure06"), "figure05"),
        (lambda: dsas_students.view_claims("dsas/figure04"), "figure03"),
        (lambda: dsas.teacher("smoke", "CIFAR-10", "PyramidNet-110"), "PyramidNet110"),
    ):
        with pytest.raises(UserError, match=named):
            bad()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "A project of its own without anything in it."
    top, before = tmp_path_factory.mktemp("alone"), dict(os.environ)
    os.environ.update(SNNKD_CACHE=str(top / "cache"), SNNKD_ROOT=str(top))
    yield Store()
    os.environ.clear()
    os.environ.update(before)


def brief(spec):
    "The same run for one epoch of 200 images."
    return spec.replace(
        data=spec.data.replace(subset=200),
        optim=spec.optim.replace(epochs=1),
        **({"teacher": brief(spec.teacher)} if spec.teacher else {}),
    )


@pytest.mark.parametrize("dataset", ["CIFAR-10", EVENTS])
def test_a_search_and_then_its_student(dataset, alone):
    "From nothing: the search is planned alone, then what it found, which runs to its record."
    spec = dsas_search.search("smoke", dataset)
    short = spec.replace(
        teacher=brief(spec.teacher), data=spec.data.replace(subset=200), population=3, generations=1
    )
    record = run_search(short, alone)
    model = dsas_students.ModelSpec(
        "dsas",
        4,
        neuron="dsas",
        args={
            "genome": record.best["genome"],
            "slopes": [round(a, 4) for a in record.extra["slopes"]],
        },
    )
    run = brief(
        RunSpec(
            dsas.data("smoke", dataset),
            model,
            dsas.optim("smoke", dataset=dataset, searched=True),
            "logits-mse",
            teacher=spec.teacher,
        )
    )
    trained = run_train(run, alone)
    assert (
        trained.metrics["params"] == record.best["parameters"]
        and trained.teacher["id"] == short.teacher.id == record.teacher["id"]
    )
    alphas = [
        line
        for line in trained.environment["neurons"]
        if "alpha" in line.lower() or "Sigmoid" in line
    ]
    assert alphas and all(
        any(f"{a:g}"[:4] in line for line in alphas) for a in model.args["slopes"]
    )


def test_rounds_make_searches_first_and_then_what_they_found(alone, monkeypatch):
    "`snnkd run` asks again after every round."

    def asked():
        return dsas_students.table01("smoke").needs

    assert all(isinstance(s, SearchSpec) for s in asked()) and [
        type(j.spec).__name__ for j in plan(asked(), alone)
    ] == ["RunSpec", "SearchSpec"]
    rounds = []

    def pretend_to(specs, *args):
        rounds.append([type(s).__name__ for s in specs])
        for s in specs:
            if isinstance(s, SearchSpec):
                alone.put(pretend(s))
        from snnkd_nb.runner.jobs import Outcome

        return Outcome(len(specs), [s.id for s in specs])

    monkeypatch.setattr("snnkd_nb.runner.jobs.execute", pretend_to)
    assert execute_all(asked).ok and rounds == [["SearchSpec"], ["RunSpec"]]


@pytest.mark.parametrize("T", [None, 2])
def test_the_student_and_every_teacher_step_together(T, pretended):
    "Logits of one shape, a finite loss, on narrow copies of the paper's networks."
    for s in {r.teacher.model.name: r for r in runs("paper") if r.teacher}.values():
        k, _, c = shape(s.data)
        common = {"num_classes": min(k, 10), "in_channels": c, "image_size": 32}
        shallow = {"depth": 0.05} if "depth" in model_info(s.teacher.model.name)["options"] else {}
        teacher = create_model(
            s.teacher.model.name,
            width=0.125,
            **common,
            **shallow,
            **({"stem": "small"} if s.teacher.model.name == "pyramidnet101" else {}),
        )
        student = create_model(
            "dsas", T=T or 1, neuron="dsas", width=0.125, **common, **s.model.args
        )
        x = torch.randn(T or 1, 2, c, 32, 32) if s.data.args else torch.randn(2, c, 32, 32)
        terms, _ = create_distiller(s.method, student, teacher)(x, torch.tensor([1, 3]))
        assert set(terms) == {"ce", "logits"} and all(v.isfinite() for v in terms.values()), s.id


def test_depths_of_a_search_that_prefers_shallow_networks():
    frame = pd.DataFrame(
        [
            {"method": m, "seed": s, "when": w, "blocks": b, "networks": n}
            for m in ("AS", "MAS")
            for s in range(3)
            for w, ns in (
                ("first draw", (5, 5, 5)),
                ("last generation", (13 - s, 2 + s, 0) if m == "AS" else (5, 5 + s, 5)),
            )
            for b, n in enumerate(ns, 2)
        ]
    )
    rows = dsas_views.depth_rows(dsas_views.depth_facts(frame))
    from snnkd_nb.reports.claims import judge_records

    assert judge_records(dsas_views.DEPTH_CLAIMS, rows).ours.tolist() == ["holds"] * 5
