"""DSAS: searches and runs of its artefacts at every scale, what a search finds, cells, claims and shared runs."""

import json
import os
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from helpers import create_on_meta, shape_of, shorten

from snnkd_nb.core import UserError, canonical_json, sha256_of
from snnkd_nb.data.images import list_datasets, opener
from snnkd_nb.losses.zoo import create_distiller
from snnkd_nb.models.genome import EXAMPLES, create_space, genome_parameters
from snnkd_nb.models.zoo import create_model, model_info
from snnkd_nb.papers.dsas import (
    add_parameters,
    build_search,
    compare_settings,
    depth_records,
    find_figure,
    found_model,
    read_search,
    summarize_depths,
)
from snnkd_nb.papers.experiments import (
    SCALES,
    NotKnownYet,
    artefacts,
    build_grid,
    build_run,
    has_cells,
    specs_for,
)
from snnkd_nb.papers.published import claims, published
from snnkd_nb.reports.claims import judge_cells, judge_records
from snnkd_nb.reports.tables import Report, tabulate_by_seed
from snnkd_nb.runner.jobs import Outcome, execute_all, plan
from snnkd_nb.search.job import create_engine_options, run_search
from snnkd_nb.search.score import Scoring
from snnkd_nb.spec import ModelSpec, RunSpec, SearchSpec, to_dict
from snnkd_nb.store import SearchRecord, Store
from snnkd_nb.training.job import run_train

GOLDEN = json.loads((Path(__file__).parent / "golden" / "dsas_grids.json").read_text())
BIG = ("medium", "paper")
EVENTS, GESTURE = "CIFAR10-DVS", "DVS128-Gesture"
IMAGES = ("Tiny-ImageNet", "CIFAR-10", "CIFAR-100")


EXAMPLE_OF = {  # search space -> data set
    "imagenet": "ImageNet",
    "tiny-imagenet": "Tiny-ImageNet",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "cifar10-dvs": EVENTS,
    "dvs128-gesture": GESTURE,
}
KEYS = [a.id for a in artefacts() if a.paper == "dsas" and has_cells(a.id)]
STUDENTS = [key for key in KEYS if build_grid(key, "smoke", with_deviations=False).searches]
TABLES = [key for key in STUDENTS if "table" in key]


@lru_cache
def grid(key: str, scale: str):
    "The grid of an artefact while all searches are stored."
    return build_grid(f"dsas/{key}", scale)


def pretend(spec: SearchSpec) -> SearchRecord:
    "The record of a search that found an example of the paper's size, or a network that fits its small space."
    channels = spec.space_args.get("channels")
    if channels:
        normal = [f"n{channels[0]}"] * spec.space_args["normal"][0]
        downsample = [f"d{channels[1]}"] * spec.space_args["downsample"][0]
        blocks = [*normal, *downsample, *[f"n{channels[-1]}"] * (spec.seed + 1)]
        genome = " ".join(blocks)
    else:
        genome = EXAMPLES[EXAMPLE_OF[spec.space]]
    best = {"genome": genome, "fitness": 0.1}
    extra = {"slopes": [2.0, 2.5, 3.0 + spec.seed / 10]}
    return SearchRecord(to_dict(spec, full=True), best, {}, [], [], {}, {}, {}, extra=extra)


@pytest.fixture(scope="module")
def project_with_searches(tmp_path_factory):
    top = tmp_path_factory.mktemp("pretended")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SNNKD_ROOT", str(top))
        grids = [build_grid(key, scale) for key in STUDENTS for scale in SCALES]
        for spec in {search for found in grids for search in found.searches}:
            Store().put(pretend(spec))
    return top


@pytest.fixture
def pretended(project_with_searches, monkeypatch):
    "A project in which all searches are stored."
    monkeypatch.setenv("SNNKD_ROOT", str(project_with_searches))
    monkeypatch.setenv("SNNKD_CACHE", str(project_with_searches / "cache"))
    return Store()


@lru_cache
def searches(scale: str) -> tuple[SearchSpec, ...]:
    needs = [spec for key in KEYS for spec in build_grid(key, scale, with_deviations=False).needs]
    return tuple(dict.fromkeys(spec for spec in needs if isinstance(spec, SearchSpec)))


@lru_cache
def runs(scale: str) -> tuple[RunSpec, ...]:
    specs = [spec for key in STUDENTS for spec in grid(key.removeprefix("dsas/"), scale).specs]
    return tuple(dict.fromkeys(specs))


def count_parameters(net) -> int:
    return sum(p.numel() for p in net.parameters())


# runs and cells are what they were


@pytest.mark.parametrize("key", KEYS)
def test_runs_and_cells_are_what_they_were(key, pretended):
    for scale in SCALES:
        found = grid(key.removeprefix("dsas/"), scale)
        cells = [
            [dict(c.index), c.column, [[s.id for s in group] for group in c.groups], c.note]
            for c in found.cells
        ]
        text = canonical_json([[spec.id for spec in found.needs], cells])
        assert sha256_of(text)[:10] == GOLDEN[f"{key}@{scale}"], scale


def test_scales_do_not_mix(pretended):
    found = {scale: {s.id for s in (*runs(scale), *searches(scale))} for scale in SCALES}
    for a in SCALES:
        for b in SCALES:
            assert a == b or not found[a] & found[b]


@pytest.mark.parametrize("scale", SCALES)
def test_artefacts_share_runs(scale, pretended):
    of = {key: set(grid(key.removeprefix("dsas/"), scale).specs) for key in KEYS}

    def runs_of(name):
        return of[f"dsas/{name}"]

    for name in ("figure01", "figure02", "table03", "table06", "table09"):
        assert runs_of(name) <= runs_of("table05"), name
    assert runs_of("table10") & runs_of("table03") and runs_of("table11") & runs_of("table05")
    on_images = {spec for spec in runs_of("table07") if not spec.data.args}
    assert on_images <= runs_of("figure03")
    assert set(grid("table01", scale).searches) <= runs_of("table08")
    for dataset in (*IMAGES, EVENTS, GESTURE):
        assert build_run("dsas", "teacher", scale, dataset=dataset) in runs_of("table15")


def test_smoke_is_small(pretended):
    for spec in runs("smoke"):
        assert spec.data.name in ("digits", "digits-events") and spec.optim.epochs <= 8
        if spec.model.name == "dsas":
            assert max(int(gene[1:]) for gene in spec.model.args["genome"].split()) <= 36
    num_candidates = sum(s.population * (s.generations + 1) for s in searches("smoke"))
    assert len(runs("smoke")) <= 40 and num_candidates <= 1000


# settings


@pytest.mark.parametrize("scale", BIG)
def test_every_network_of_the_large_scales_exists_at_full_size(scale, pretended):
    trained = [*runs(scale), *(spec.teacher for spec in (*runs(scale), *searches(scale)))]
    networks = {(s.model.canonical(), s.data.name): s for s in trained if s is not None}
    for spec in networks.values():
        net = create_on_meta(spec.model, *shape_of(spec.data))
        assert spec.model.width == 1 and net.T == spec.model.T
        if spec.model.name == "dsas":
            num_classes, _, channels = shape_of(spec.data)
            wanted = genome_parameters(spec.model.args["genome"], num_classes, channels)
            assert count_parameters(net) == wanted


@pytest.mark.parametrize(
    "table, dataset",
    [
        ("table01", "Tiny-ImageNet"),
        ("table02", "ImageNet"),
        ("table03", "CIFAR-10"),
        ("table06", EVENTS),
        ("table06", GESTURE),
    ],
)
def test_the_examples_have_the_papers_parameters(table, dataset, pretended):
    student = build_run("dsas", "student", "paper", dataset=dataset)
    assert student in grid(table, "paper").specs
    ours = count_parameters(create_on_meta(student.model, *shape_of(student.data))) / 1e6
    printed = [
        record["text"]
        for record in published(f"dsas/{table}").records
        if "DSAS" in record["method"] and record["column"] == "params"
    ]
    assert any(f"{ours:.2f}" in text for text in printed), (ours, printed)


@pytest.mark.parametrize("scale", SCALES)
def test_every_search_can_be_run(scale):
    small_sizes = {"digits": 8, "digits-events": 10}
    for spec in searches(scale):
        options = to_dict(spec)
        how = Scoring(spec.metric, T=spec.T, neuron=spec.neuron, **options.get("metric_args", {}))
        if scale in BIG:
            num_classes, size, _ = shape_of(spec.data)
        else:
            num_classes = 20 if "tiny" in spec.data.name else 10
            size = spec.data.size or small_sizes[spec.data.name]
        space = create_space(spec.space, image_size=size, **options.get("space_args", {}))
        assert space.size() > 1000
        assert create_engine_options(spec)["selection"] == "tournament"
        assert spec.data.args.get("frames", 4) == how.T == 4
        if how.mode != "sample" and "tgs" in how.metrics:
            assert spec.batch >= num_classes
        assert spec.teacher.model.T is None
        without = {"subset": None, "augment": "none"}
        assert spec.data.replace(**without) == spec.teacher.data.replace(**without)


def test_spaces_of_small_scale_have_the_papers_blocks_and_fewer_channels():
    for dataset in ("ImageNet", *IMAGES, EVENTS, GESTURE):
        small, paper = (build_search(scale, dataset) for scale in ("small", "paper"))
        printed = create_space(paper.space)
        assert small.space_args["normal"] == printed.normal
        assert small.space_args["downsample"] == printed.downsample
        pairs = zip(small.space_args["channels"], printed.channels, strict=True)
        ratios = {paper_width / width for width, paper_width in pairs}
        assert len({round(ratio / 2) * 2 for ratio in ratios}) == 1 and min(ratios) > 3.9


def test_the_papers_search_settings():
    assert {(s.population, s.generations) for s in searches("paper")} == {(200, 20)}
    assert all(not s.space_args and not s.algorithm_args for s in searches("paper"))
    assert {(s.population, s.generations) for s in searches("small")} == {(60, 10)}
    assert {s.seed for s in build_grid("dsas/figure04", "small").specs} == {0, 1, 2}
    assert compare_settings("dsas/table13").same.eq("yes").all()
    assert build_search("paper", "ImageNet").metric_args == {"mode": "sample"}
    assert build_search("paper", "ImageNet", fitness="mas").metric_args == {}
    assert build_search("smoke", "CIFAR-100") == build_search("smoke", "CIFAR-10")
    assert build_search("paper", "CIFAR-100") != build_search("paper", "CIFAR-10")


@pytest.mark.parametrize("scale", BIG)
def test_the_papers_training_settings(scale, pretended):
    for spec in runs(scale):
        if spec.model.T is None:
            continue
        assert spec.model.neuron == "dsas"
        assert (spec.method, spec.teacher is None) in (("none", True), ("logits-mse", False))
        if scale == "paper":
            epochs, batch_size = (200, 32) if "frames" in spec.data.args else (300, 64)
            optim = spec.optim
            assert (optim.epochs, optim.batch_size) == (epochs, batch_size)
            assert (optim.lr, optim.weight_decay) == (0.01, 1e-6)
    assert {spec.model.T for spec in grid("table07", scale).specs} == {1, 2, 4, 6}


def test_teachers_have_the_alpha_that_the_channel_sets_give():
    models = {
        dataset: build_run("dsas", "teacher", "paper", dataset=dataset).model
        for dataset in ("ImageNet", *IMAGES, EVENTS, GESTURE)
    }
    assert {dataset: model.name[-3:] for dataset, model in models.items()} == {
        "ImageNet": "101",
        "Tiny-ImageNet": "200",
        "CIFAR-10": "200",
        "CIFAR-100": "200",
        EVENTS: "110",
        GESTURE: "110",
    }
    alphas = {dataset: model.args.get("alpha") for dataset, model in models.items()}
    assert alphas.pop("Tiny-ImageNet") == 270 and alphas.pop(GESTURE) == 48
    assert set(alphas.values()) == {None}


@pytest.mark.parametrize("scale", SCALES)
def test_teachers_see_what_their_students_see(scale, pretended):
    known = [name.partition(":")[0] for name in list_datasets()]
    without = {"subset": None, "augment": "none"}
    for spec in runs(scale):
        assert spec.data.name.partition(":")[0] in known and opener(spec.data.name)
        if "frames" in spec.data.args:
            assert spec.model.T in (None, spec.data.args["frames"])
        if spec.teacher:
            assert spec.teacher.model.T is None
            assert spec.teacher.data.replace(**without) == spec.data.replace(**without)


# what a search found


def test_a_student_has_what_its_search_found(pretended):
    first, second = (
        build_run("dsas", "student", "small", dataset="CIFAR-10", seed=seed) for seed in (0, 1)
    )
    record = read_search(build_search("small", "CIFAR-10", seed=1))
    assert second.seed == 1 and second.model.args["genome"] == record.best["genome"]
    assert second.model.args["slopes"] == (2.0, 2.5, 3.1)
    assert second.model.args["genome"] != first.model.args["genome"]


def test_all_arms_of_table_10_have_the_same_slopes(pretended):
    arms = [
        build_run("dsas", "student", "smoke", dataset="CIFAR-10", fitness=fitness)
        for fitness in ("as", "mas", "tgs", "mas+tgs")
    ]
    assert len({arm.model.args["slopes"] for arm in arms}) == 1


def test_a_changed_record_is_read_again(pretended):
    spec = build_search("smoke", "CIFAR-10", seed=77)
    model = ("smoke", "CIFAR-10", "PyramidNet", "mas+tgs", "guided", 77)
    with pytest.raises(NotKnownYet, match="search not run"):
        found_model(*model)
    record = pretend(spec)
    path = pretended.path(pretended.put(record).id)
    assert found_model(*model)["args"]["genome"] == record.best["genome"]
    best, extra = {"genome": "n8"}, {"slopes": [2.0]}
    changed = SearchRecord(record.spec, best, {}, [], [], {}, {}, {}, extra=extra)
    pretended.put(changed, replace=True)
    os.utime(path, ns=(1, 1))
    assert found_model(*model)["args"] == {"genome": "n8", "slopes": [2.0]}
    path.unlink()
    with pytest.raises(NotKnownYet):
        found_model(*model)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("key", TABLES)
def test_cells_are_published_ones_and_explain_why_they_are_empty(
    key, scale, tmp_path, monkeypatch, pretended
):
    full = grid(key.removeprefix("dsas/"), scale)
    report = Report(full, {})
    assert len(report.rows) == len(published(key).records) and full.deviations
    assert all(row["note"] for row in report.rows)
    assert {cell.note for cell in full.cells if not cell.specs} <= {"larger scales"}
    monkeypatch.setenv("SNNKD_ROOT", str(tmp_path))
    empty = build_grid(key, scale)
    notes = {cell.note for cell in empty.cells if not cell.specs}
    assert notes <= {"search not run", "larger scales"}
    assert empty.searches == full.searches and empty.deviations == full.deviations
    assert all(spec.model.T is None for spec in empty.specs)


def test_nothing_waits_at_the_large_scales(pretended):
    for scale in BIG:
        notes = [c.note for key in STUDENTS for c in grid(key.removeprefix("dsas/"), scale).cells]
        assert not any(notes)


def test_the_registry_asks_for_searches_and_runs(pretended):
    for key in KEYS:
        assert specs_for(key, "smoke") == grid(key.removeprefix("dsas/"), "smoke").needs != []
    assert specs_for("dsas/table13") == specs_for("dsas/table14") == []


def test_rounds_make_searches_first_and_then_what_they_found(alone, monkeypatch):
    "`snnkd run` asks again after every round."

    def asked():
        return build_grid("dsas/table01", "smoke").needs

    assert all(isinstance(spec, SearchSpec) for spec in asked())
    jobs = [type(job.spec).__name__ for job in plan(asked(), alone)]
    assert jobs == ["RunSpec", "SearchSpec"]
    rounds = []

    def pretend_to(specs, *args):
        rounds.append([type(spec).__name__ for spec in specs])
        for spec in specs:
            if isinstance(spec, SearchSpec):
                alone.put(pretend(spec))
        return Outcome(len(specs), [spec.id for spec in specs])

    monkeypatch.setattr("snnkd_nb.runner.jobs.execute", pretend_to)
    assert execute_all(asked).ok and rounds == [["SearchSpec"], ["RunSpec"]]


# reports and claims


def fake_record(accuracy, parameters=2e6):
    return SimpleNamespace(metrics={"acc_last": accuracy, "params": parameters})


def test_parameters_of_two_data_sets_are_a_note(pretended):
    table = grid("table03", "paper")

    def notes(records):
        rows = add_parameters(Report(table, records), records).rows
        return [r["note"] for r in rows if r["column"] == "params" and "DSAS" in r["method"]]

    assert notes({}) == ["not run"] * 2
    records = {s: fake_record(90.0, 2e6 if s.data.name == "cifar10" else 3e6) for s in table.specs}
    assert notes(records) == ["2.00/3.00"] * 2


def test_parameters_are_compared_with_the_papers(pretended):
    table = grid("table06", "paper")
    records = {spec: fake_record(80.0 + spec.seed) for spec in table.specs}
    rows = add_parameters(Report(table, records), records).rows
    ours = [row for row in rows if row["column"] == "params" and row["n"]]
    assert [(row["ours"], row["n"], row["std"]) for row in ours] == [(2.0, 3, 0.0)] * 2
    assert ours[0]["delta"] == 2.0 - 13.83


@pytest.mark.parametrize("name", ["figure02", "figure03"])
def test_figures_have_claims_about_their_arms(name, pretended):
    figure = grid(name, "smoke")
    assert tabulate_by_seed(figure, {}).empty
    judged = judge_cells(claims(f"dsas/{name}"), figure, {})
    assert set(judged.ours) == {"not run"}


@pytest.mark.parametrize("gain, verdicts", [(8, ["holds", "holds"]), (-8, ["fails", "fails"])])
def test_gains_by_time_steps_are_judged(gain, verdicts, pretended):
    figure = grid("figure03", "small")

    def accuracy(cell):
        with_teacher = cell.index["method"] == "with KD"
        return 80 + cell.index["T"] + (gain / cell.index["T"] if with_teacher else 0)

    def noise(cell, seed):
        return (seed * 7 * cell.index["T"] + len(cell.index["method"]) * seed**2) % 5 / 1000

    records = {
        spec: fake_record(accuracy(cell) + noise(cell, spec.seed))
        for cell in figure.cells
        for spec in cell.specs
    }
    assert judge_cells(claims("dsas/figure03"), figure, records).ours.tolist() == verdicts


def test_trajectories_and_architectures_belong_to_their_figures():
    datasets = ("ImageNet", "Tiny-ImageNet", "CIFAR", EVENTS, GESTURE)
    for number, dataset in enumerate(datasets):
        architecture = find_figure("dsas/figure09", dataset)
        trajectory = find_figure("dsas/figure14", dataset)
        assert architecture == f"dsas/figure{9 + number:02}"
        assert trajectory == f"dsas/figure{14 + number}" and claims(trajectory)
        (found,) = build_grid(architecture, "smoke").cells
        shown = build_grid(trajectory, "smoke").cells
        assert found.index == {"method": dataset} and found.index in [c.index for c in shown]
        assert found.specs[0] in [spec for cell in shown for spec in cell.specs]


def test_claims_are_about_artefacts_with_cells():
    assert {claim.key for claim in claims("dsas")} <= set(KEYS)


def test_depths_of_searches_that_prefer_shallow_networks():
    networks = {
        ("AS", "first draw"): lambda seed: (5, 5, 5),
        ("AS", "last generation"): lambda seed: (13 - seed, 2 + seed, 0),
        ("MAS", "first draw"): lambda seed: (5, 5, 5),
        ("MAS", "last generation"): lambda seed: (5, 5 + seed, 5 + seed % 2),
    }
    rows = [
        {"method": method, "seed": seed, "when": moment, "blocks": blocks, "networks": number}
        for (method, moment), counts in networks.items()
        for seed in range(3)
        for blocks, number in enumerate(counts(seed), 2)
    ]
    records = depth_records(summarize_depths(pd.DataFrame(rows)))
    about_depth = [*claims("dsas/figure04"), *claims("dsas/figure05")]
    assert judge_records(about_depth, records).ours.tolist() == ["holds"] * 5


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: build_grid("dsas/table01", "papr"), "paper"),
        (lambda: build_search("smoke", "CIFAR"), "CIFAR-10"),
        (lambda: find_figure("dsas/figure14", "Gesture"), GESTURE),
        (lambda: build_search("smoke", "CIFAR-10", "PyramidNet-110"), "PyramidNet110"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


# searching and training


@pytest.fixture
def alone(tmp_path, monkeypatch):
    "An empty project."
    monkeypatch.setenv("SNNKD_ROOT", str(tmp_path))
    monkeypatch.setenv("SNNKD_CACHE", str(tmp_path / "cache"))
    return Store()


@pytest.mark.parametrize("dataset", ["CIFAR-10", EVENTS])
def test_a_search_and_then_its_student(dataset, alone):
    "From nothing: a short search, then the training of what it found."
    spec = build_search("smoke", dataset)
    short = spec.replace(
        teacher=shorten(spec.teacher),
        data=spec.data.replace(subset=200),
        population=3,
        generations=1,
    )
    record = run_search(short, alone)
    slopes = [round(slope, 4) for slope in record.extra["slopes"]]
    args = {"genome": record.best["genome"], "slopes": slopes}
    student = build_run("dsas", "trained student", "smoke", dataset=dataset)
    model = ModelSpec("dsas", 4, neuron="dsas", args=args)
    trained = run_train(shorten(student.replace(model=model)), alone)
    assert trained.metrics["params"] == record.best["parameters"]
    assert trained.teacher["id"] == short.teacher.id == record.teacher["id"]
    neurons = trained.environment["neurons"]
    lines = [line for line in neurons if "alpha" in line.lower() or "Sigmoid" in line]
    for slope in slopes:
        assert any(f"{slope:g}"[:4] in line for line in lines)


@pytest.mark.parametrize("T", [None, 2])
def test_the_student_and_every_teacher_step_together(T, pretended):
    "Logits of one shape, a finite loss, on narrow copies of the paper's networks."
    for spec in {run.teacher.model.name: run for run in runs("paper") if run.teacher}.values():
        num_classes, _, channels = shape_of(spec.data)
        name = spec.teacher.model.name
        common = {"num_classes": min(num_classes, 10), "in_channels": channels, "image_size": 32}
        small = {"depth": 0.05} if "depth" in model_info(name)["options"] else {}
        if name == "pyramidnet101":
            small["stem"] = "small"
        teacher = create_model(name, width=0.125, **common, **small)
        args = spec.model.args
        student = create_model("dsas", T=T or 1, neuron="dsas", width=0.125, **common, **args)
        frames = (T or 1,) if spec.data.args else ()
        x = torch.randn(*frames, 2, channels, 32, 32)
        terms, _ = create_distiller(spec.method, student, teacher)(x, torch.tensor([1, 3]))
        assert set(terms) == {"ce", "logits"}, spec.id
        assert all(term.isfinite() for term in terms.values()), spec.id
