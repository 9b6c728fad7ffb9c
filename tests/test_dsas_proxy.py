"""Does the proxy work: τ and its intervals, SNASNet's score, the genomes that are drawn, and what is said of them."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from snnkd_nb.core import UserError
from snnkd_nb.metrics import statistics
from snnkd_nb.models.genome import check_genome, create_space, genome_parameters
from snnkd_nb.models.zoo import create_model
from snnkd_nb.papers import studies as proxy
from snnkd_nb.papers.dsas import build_search
from snnkd_nb.papers.experiments import SCALES, artefact, build_grid, match, specs_for
from snnkd_nb.search.candidate import create_candidate
from snnkd_nb.search.score import Scorer
from snnkd_nb.spec import RunSpec

PIXELS = {"smoke": 8, "small": 16, "medium": 32, "paper": 32}


def frame_of(accuracy, parameters=None, seed=0, **given):
    "A frame as `joined` makes it; what is not given is noise."
    rng, n = np.random.default_rng(seed), len(accuracy)
    own = {m: rng.normal(size=n) for m in proxy.METRICS} | {
        "parameters": rng.permutation(n) * 100 + 50 if parameters is None else parameters,
        "blocks": rng.integers(3, 9, n),
    }
    return pd.DataFrame(
        {
            "genome": [f"n{i + 1}" for i in range(n)],
            **own,
            **given,
            "accuracy": accuracy,
            "dead": "",
            "run": [f"run{i}" for i in range(n)],
        }
    )


# genomes and runs


@pytest.mark.parametrize("scale", SCALES)
def test_genomes_are_distinct_valid_and_fixed(scale):
    found = proxy.draw_genomes(scale)
    search = build_search(scale, "CIFAR-10")
    where = create_space(search.space, image_size=PIXELS[scale], **search.space_args)
    assert len(found) == len(set(found)) == {"smoke": 8, "small": 24}.get(
        scale, 48
    ) and found == proxy.draw_genomes(scale)
    assert [where.why_not(g) for g in found] == [""] * len(found) and all(
        check_genome(g, PIXELS[scale]) for g in found
    )
    assert not set(proxy.draw_genomes(scale, seed=1)) & set(found[:5])


def test_a_draw_that_repeats_itself_gives_every_genome_once(monkeypatch):
    small = create_space("cifar10", channels=[4], normal=[1, 2], downsample=[1, 1])
    monkeypatch.setattr(proxy, "proxy_space", lambda scale: small)
    every = ["d4 n4", "n4 d4", "d4 n4 n4", "n4 d4 n4", "n4 n4 d4"]
    assert sorted(proxy.draw_genomes("smoke", 5)) == sorted(every)
    with pytest.raises(UserError, match="5 genomes"):
        proxy.draw_genomes("smoke", 6)


@pytest.mark.parametrize("scale", SCALES)
def test_runs_differ_in_their_genome_alone(scale):
    grid = build_grid("studies/dsas_proxy", scale)
    first, *rest = grid.specs
    assert (
        first == proxy.teacher_run(scale)
        and first.model.T is None
        and [s.model.args["genome"] for s in rest] == proxy.draw_genomes(scale)
    )
    assert (
        len({s.canonical().replace(s.model.args["genome"], "") for s in rest}) == 1
        and {s.teacher for s in rest} == {first}
        and {s.method for s in rest} == {"logits-mse"}
    )
    how = proxy.scoring_spec(scale)
    assert (
        how.T == rest[0].model.T
        and how.neuron == rest[0].model.neuron
        and how.data.subset == rest[0].data.subset
        and how.data.augment == "none"
    )
    assert how.metric_args.get("neuron_args") == rest[0].model.args.get("neuron_args"), (
        "scored as it is trained"
    )
    assert all(isinstance(s, RunSpec) for s in specs_for("studies/dsas_proxy", scale)) and len(
        specs_for("studies/dsas_proxy", scale)
    ) == len(grid.specs)


def test_the_page_is_found_and_the_teacher_is_shared():
    a = artefact("studies/dsas_proxy")
    cells = json.loads(a.path.read_text())["cells"]
    assert (
        a.built
        and a in match(["studies"])
        and len(cells) <= 12
        and "".join(cells[0]["source"]).startswith("# Does the proxy work?")
    )
    assert (
        proxy.teacher_run("small") in build_grid("studies/sastc", "small").specs
        and proxy.teacher_run("smoke") in build_grid("studies/kd", "smoke").specs
    )


# SNASNet


def slowly(net, x):
    "The published score: every neuron's spikes by a hook, kernels by loops over pairs, divided by their number."
    T, seen = net.T, []
    hooks = [
        m.register_forward_hook(lambda m, i, o: seen.append(o.detach()))
        for m in net.modules()
        if hasattr(m, "v_threshold")
    ]
    with torch.no_grad():
        net(x)
    for h in hooks:
        h.remove()
    B, kernels = len(x), []
    for out in seen:
        for c in out.reshape(T, B, -1).tolist():
            N, K = len(c[0]), np.zeros((B, B))
            for i in range(B):
                for j in range(B):
                    r, s = sum(c[i]) / N, sum(c[j]) / N
                    expected = r * (1 - s) + s * (1 - r)
                    K[i, j] = N - (
                        0.5 * sum(a != b for a, b in zip(c[i], c[j])) / expected if expected else 0
                    )
            kernels.append(K)
    return (
        np.linalg.slogdet(sum(kernels))[1],
        np.linalg.slogdet(sum(kernels) / len(kernels))[1],
        len(kernels),
    )


@pytest.mark.parametrize("genome", ["n4 d8", "d4 n4 n8"])
def test_snasnet_against_a_slow_loop(genome):
    torch.manual_seed(0)
    x, y = torch.randn(12, 1, 8, 8), torch.arange(12) % 10
    kw = {"T": 2, "neuron": "dsas", "neuron_args": {"v_threshold": 0.5}}
    score = Scorer(
        create_model("resnet20", in_channels=1, image_size=8, width=0.25),
        x,
        y,
        metric="as+mas+tgs+snasnet",
        **kw,
    )(genome)
    total, mean, m = slowly(
        create_candidate(genome, 0, num_classes=10, in_channels=1, image_size=8, **kw), x
    )
    how = proxy.scoring_spec("smoke").replace(batch=12)
    got = proxy.proxy_values(genome, score, how)
    assert m == 2 * len(genome.split()) * 2 and score.dead == "" and math.isfinite(total)
    assert got["SNASNet"] == pytest.approx(total, rel=1e-5) and got[
        "SNASNet (mean)"
    ] == pytest.approx(mean, rel=1e-5)
    assert got["MAS+TGS"] == score.parts["mas"] + score.parts["tgs"] and (
        got["parameters"],
        got["blocks"],
    ) == (genome_parameters(genome, 10, 1), len(genome.split()))


# τ


@given(n=st.integers(2, 12), ties=st.integers(2, 30), seed=st.integers(0, 999))
@settings(max_examples=80, deadline=None)
def test_tau_is_scipys(n, ties, seed):
    x, y = np.random.default_rng(seed).integers(ties, size=(2, n)).astype(float)
    theirs, ours = (
        kendalltau(x, y).statistic,
        statistics.kendall_tau(statistics.pair_signs(x), statistics.pair_signs(y)),
    )
    assert math.isnan(ours) if math.isnan(theirs) else ours == pytest.approx(theirs, abs=1e-12)


def test_tau_by_hand():
    p = statistics.pair_signs
    assert (
        statistics.kendall_tau(p([1, 2, 3, 4]), p([2, 1, 3, 4])) == 4 / 6
        and statistics.kendall_tau(p([1, 2, 3]), p([3, 2, 1])) == -1
    )
    assert statistics.kendall_tau(p([1, 1, 2]), p([1, 2, 3])) == pytest.approx(2 / math.sqrt(2 * 3))
    assert statistics.kendall_tau(p([1, 2, math.inf, math.inf]), p([1, 2, 3, 3])) == 1, (
        "the dead are last, and tied"
    )
    assert p([1, math.inf, math.inf]).tolist() == [[0, -1, -1], [1, 0, 0], [1, 0, 0]]


@given(seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_partial_tau_is_what_least_squares_leaves(seed):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=15)
    x, y = rng.normal(size=(2, 15)) + z
    a, b, c = (statistics.pair_signs(v).astype(float).ravel() for v in (x, y, z))
    left = [v - c * np.linalg.lstsq(c[:, None], v, rcond=None)[0] for v in (a, b)]

    def tau(u, v):
        return statistics.kendall_tau(statistics.pair_signs(u), statistics.pair_signs(v))

    assert statistics.partial_tau(tau(x, y), tau(x, z), tau(y, z)) == pytest.approx(
        left[0] @ left[1] / np.linalg.norm(left[0]) / np.linalg.norm(left[1]), abs=1e-9
    )


def test_partial_tau_closed_form():
    assert (
        statistics.partial_tau(0.6, 0.0, 0.0) == 0.6
        and statistics.partial_tau(0.25, 0.5, 0.5) == 0
        and statistics.partial_tau(0.5, 0.5, 0.5) == pytest.approx(1 / 3)
    )
    assert math.isnan(statistics.partial_tau(0.5, 1.0, 0.5))


# intervals


def test_a_resample_is_what_scipy_says_of_it():
    rng = np.random.default_rng(3)
    x, y = rng.integers(9, size=(2, 14))
    picks = statistics.draw_resamples(14, 50)
    found = statistics.kendall_tau(
        statistics.resample_signs(statistics.pair_signs(x), picks),
        statistics.resample_signs(statistics.pair_signs(y), picks),
    )
    assert found == pytest.approx([kendalltau(x[p], y[p]).statistic for p in picks], abs=1e-12)
    assert (
        (statistics.draw_resamples(14, 50) == picks).all()
        and not (statistics.draw_resamples(14, 50, seed=1) == picks).all()
        and statistics.draw_resamples(14).shape == (5000, 14)
    )


@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_intervals_cover_the_truth_about_as_often_as_they_say(rho):
    rng, picks, truth, hits, excluded = (
        np.random.default_rng(0),
        statistics.draw_resamples(24, 400),
        2 / math.pi * math.asin(rho),
        0,
        0,
    )
    for _ in range(200):
        x = rng.normal(size=24)
        y = rho * x + math.sqrt(1 - rho**2) * rng.normal(size=24)
        low, high = statistics.percentile_interval(
            statistics.kendall_tau(
                statistics.resample_signs(statistics.pair_signs(x), picks),
                statistics.resample_signs(statistics.pair_signs(y), picks),
            )
        )
        hits, excluded = hits + (low <= truth <= high), excluded + (low > 0)
    assert 0.88 <= hits / 200 <= 0.99
    assert excluded / 200 < 0.06 if rho == 0 else excluded / 200 > 0.7


def test_interval_by_hand():
    assert statistics.percentile_interval(np.array([np.nan, *np.arange(101.0)])) == (
        2.5,
        97.5,
    ) and statistics.percentile_interval(np.arange(101.0), 80) == (10, 90)
    assert all(map(math.isnan, statistics.percentile_interval(np.array([np.nan, np.nan]))))


# what is said


def by_name(frame, times=1000):
    return proxy.assess_proxies(frame, times).set_index("metric")


def test_each_score_is_read_in_its_own_direction():
    acc = np.random.default_rng(0).normal(40, 3, 24)
    at = by_name(frame_of(acc, AS=-acc, MAS=acc, SNASNet=acc))
    assert at.tau[["AS", "MAS", "SNASNet"]].tolist() == [1, -1, 1] and at.place[
        ["AS", "MAS", "SNASNet"]
    ].tolist() == [1, 24, 1]
    assert (
        at.chosen["AS"] == acc.max()
        and at.chosen["MAS"] == acc.min()
        and at.top["AS"] == pytest.approx(np.sort(acc)[-3:].mean())
    )


def test_dead_ones_are_last_for_the_scores_that_run_them_and_not_drawn():
    acc = np.arange(24.0)
    frame = frame_of(acc, TGS=np.where(acc < 4, np.inf, -acc))
    assert (
        by_name(frame).tau["TGS"]
        == pytest.approx(kendalltau(np.where(acc < 4, -1, acc), acc).statistic)
        and by_name(frame).place["TGS"] == 1
    )
    fig = proxy.draw_proxies(frame, proxy.assess_proxies(frame, 100))
    assert [len(ax.collections[0].get_offsets()) for ax in fig.axes[:8]] == [
        24,
        24,
        20,
        24,
        24,
        24,
        24,
        24,
    ] and "4 dead" in fig.axes[2].get_xlabel()


def test_a_score_that_only_counts_parameters_is_found_out():
    rng = np.random.default_rng(5)
    size = rng.permutation(24) * 100.0 + 10
    acc = 30 + size / 200 + rng.normal(size=24)
    twin, noisy = -size, -(size + rng.normal(scale=300, size=24))
    table = proxy.assess_proxies(frame_of(acc, size, TGS=twin, MAS=noisy), 2000)
    at, said = (
        table.set_index("metric"),
        {r["metric"]: proxy.describe_proxy(r) for r in table.to_dict("records")},
    )
    assert (
        at.tau["TGS"] == at.tau["parameters"]
        and at.lead["TGS"] == at["lead low"]["TGS"] == at["lead high"]["TGS"] == 0
    )
    assert (
        "orders students better than chance" in said["MAS"]
        and "nothing significant is left" in said["MAS"]
        and "better than counting" not in said["MAS"]
    )
    assert (
        "given the parameters nothing is left (none); not significantly different from counting parameters"
        in said["TGS"]
    )
    assert "given" not in said["parameters"] and math.isnan(at.lead["parameters"])


def test_chance_is_called_chance():
    frame = frame_of(np.random.default_rng(11).normal(40, 3, 24), seed=2)
    table = proxy.assess_proxies(frame, 2000)
    lines = proxy.describe_proxies(frame, table)
    spans = {r["metric"]: r["tau low"] <= 0 <= r["tau high"] for r in table.to_dict("records")}
    assert (
        all(spans.values())
        and lines[0]
        == "Scores that order students better than chance: none; the wrong way round: none. "
        "Given the parameters: none. Better than counting parameters: none."
    )
    assert (
        all("does not differ significantly from chance" in s for s in lines[3:])
        and len(lines) == 3 + len(proxy.PROXIES)
        and set(proxy.judge_proxies(table).ours) == {"undecided"}
    )


def test_what_works_is_said_to_work():
    rng = np.random.default_rng(11)
    acc = rng.normal(40, 3, 24)
    frame = frame_of(acc, seed=2, MAS=-acc + rng.normal(scale=0.5, size=24), TGS=acc)
    table = proxy.assess_proxies(frame, 2000)
    lines, kept = (
        proxy.describe_proxies(frame, table),
        proxy.judge_proxies(table).set_index("claim").ours,
    )
    assert (
        lines[0] == "Scores that order students better than chance: MAS; the wrong way round: TGS. "
        "Given the parameters: MAS. Better than counting parameters: MAS."
    )
    mas = next(s for s in lines if s.startswith("MAS:"))
    assert (
        "orders students better than chance: of two it names the better one in 9" in mas
        and "still does" in mas
        and "better than counting parameters" in mas
    )
    chosen = acc[frame.MAS.argmin()]
    place = 1 + (acc > chosen).sum()
    assert (
        f"The student with the best score reaches {chosen:.2f} %, place {place} by accuracy." in mas
    )
    assert (
        "orders students the wrong way round: of two it names the better one in only 0 of 100 cases"
        in next(s for s in lines if s.startswith("TGS:"))
    )
    assert (
        kept[[k for k in kept.index if k.startswith("MAS ")]].tolist() == ["holds"] * 3
        and kept[[k for k in kept.index if k.startswith("TGS ")]].tolist() == ["fails"] * 3
    )
    assert f"accuracy {acc.min():.2f} to {acc.max():.2f} %, mean {acc.mean():.2f} %" in lines[2]
    shown = proxy.proxy_table(table).set_index("score")
    assert (
        shown.loc["TGS"].iloc[0] == "-1.00 [-1.00, -1.00]"
        and shown.loc["parameters"].iloc[1] == ""
        and shown["place"]["TGS"] == 24
    )


def test_too_little_is_not_judged():
    flat = frame_of(np.full(6, 10.0))
    table = proxy.assess_proxies(flat, 200)
    assert (
        table.tau.isna().all()
        and all("cannot be judged" in proxy.describe_proxy(r) for r in table.to_dict("records"))
        and set(proxy.judge_proxies(table).ours) == {"not judged"}
    )
    empty = proxy.tabulate_proxies("smoke", {}, {})
    assert (
        empty.empty
        and proxy.assess_proxies(empty).empty
        and proxy.describe_proxies(empty, proxy.assess_proxies(empty)) == ["Not run."]
        and proxy.judge_proxies(proxy.assess_proxies(empty)).empty
    )


def test_a_loop_that_cannot_be_computed_is_one_line():
    from snnkd_nb.papers import experiments

    assert [c.index["method"] for c in build_grid("studies/dsas_proxy", "smoke").cells[1:]] == (
        proxy.draw_genomes("smoke")
    )
    loop = {"method": {"call": "snnkd_nb.papers.studies:no_such"}}
    block = {"each": loop, "column": "accuracy", "run": "drawn student"}
    made = experiments._Block("studies", "dsas_proxy", 1, block, "smoke")
    with pytest.raises(UserError, match="no_such") as error:
        made.cells()
    assert "\n" not in str(error.value)
