"Distances that mean what they say: golden values, invariances, the dead last, the same in every process and thread."

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from snnkd_nb.core import UserError, root, torchvision
from snnkd_nb.metrics.activity import sops
from snnkd_nb.models.genome import create_space, set_slopes
from snnkd_nb.models.taps import Foreign
from snnkd_nb.models.zoo import create_model
from snnkd_nb.search import score as module
from snnkd_nb.search.candidate import copy_for_gradients, create_candidate, guided_slopes
from snnkd_nb.search.score import METRICS, Scorer, Scoring
from snnkd_nb.search.similarity import (
    NORMS,
    activation_similarity,
    compute_slopes,
    density,
    group_by_depth,
    log_determinant,
    mas,
    match_density,
    matrix_distance,
    pick_layers,
    similarity_matrix,
    sort_values,
    spike_kernel,
    sum_over_time,
    tgs,
)

GOLDEN = {
    k: torch.from_numpy(v)
    for k, v in np.load(root() / "tests" / "golden" / "similarity.npz").items()
}
SHAPES = st.tuples(st.integers(2, 7), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))


def features(shape, seed, signed=False):
    a = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return a if signed else a.relu()


def spikes(shape, seed, rate=0.3, T=3):
    return (
        torch.rand((T, *shape), generator=torch.Generator().manual_seed(seed + 1)) < rate
    ).float()


def test_golden_values():
    assert matrix_distance(
        similarity_matrix(GOLDEN["a"]), similarity_matrix(GOLDEN["b"])
    ) == pytest.approx(GOLDEN["sp"].item(), rel=1e-5)
    assert tgs(GOLDEN["grad_teacher"], GOLDEN["grad_student"], mode="ickd") == pytest.approx(
        GOLDEN["ickd"].item(), rel=1e-5
    )


@given(
    shape=SHAPES,
    seed=st.integers(0, 999),
    rho=st.floats(0, 1),
    signed=st.booleans(),
    levels=st.sampled_from([0, 2, 5]),
)
@settings(max_examples=150, deadline=None)
def test_the_aligned_teacher_is_as_dense_as_ties_allow(shape, seed, rho, signed, levels):
    a = features(shape, seed, signed)
    if levels:
        a = (a * levels).round() / levels
    kept = match_density(a, rho)
    wanted, order = round(rho * a.numel()), sort_values(a)
    larger = (a > order[wanted]).sum().item()
    assert larger <= wanted and (
        wanted == a.numel() or larger + (a == order[wanted]).sum().item() > wanted
    ), "as many as can be, and no more"
    assert (
        kept[a > order[wanted]].equal(a[a > order[wanted]]) and not kept[a <= order[wanted]].any()
    )
    if signed and not levels:
        assert abs(density(kept) - rho) <= 0.5 / a.numel() + 1e-9


@given(
    shape=SHAPES,
    other=SHAPES,
    seed=st.integers(0, 999),
    norm=st.sampled_from(NORMS),
    scale=st.sampled_from([1e-6, 0.5, 64.0, 1e6]),
    signed=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_what_must_not_matter(shape, other, seed, norm, scale, signed):
    a, s = features(shape, seed, signed), spikes((shape[0], *other[1:]), seed)
    if not s.any():
        return
    value, near = mas([a], [s], ("last",), norm), {"rel": 1e-3, "abs": 1e-9}
    g = torch.Generator().manual_seed(seed)
    turn, cells, theirs = (
        torch.randperm(shape[0], generator=g),
        torch.randperm(a[0].numel(), generator=g),
        torch.randperm(s[0, 0].numel(), generator=g),
    )
    assert mas([a * scale], [s], ("last",), norm) == pytest.approx(value, **near)
    assert mas([a[turn]], [s[:, turn]], ("last",), norm) == pytest.approx(value, **near)
    assert mas(
        [a.flatten(1)[:, cells].view_as(a)], [s.flatten(2)[..., theirs].view_as(s)], ("last",), norm
    ) == pytest.approx(value, **near)
    assert mas([a], [s / len(s)], ("last",), norm) == pytest.approx(value, **near), (
        "the mean over time is the sum over time"
    )
    assert activation_similarity([scale * a], [s], norm) == pytest.approx(
        activation_similarity([a], [s], norm), **near
    )
    cl = a.contiguous(memory_format=torch.channels_last)
    assert mas([cl], [s], ("last",), norm) == pytest.approx(value, **near)


@given(shape=SHAPES, seed=st.integers(0, 999), norm=st.sampled_from(NORMS))
@settings(max_examples=40, deadline=None)
def test_a_network_and_itself(shape, seed, norm):
    s = spikes(shape, seed, T=1)
    if s.any():
        assert (
            mas([s[0]], [s], ("first", "last"), norm)
            == 0
            == activation_similarity([s[0]], [s], norm)
        )
    g = features((shape[0], shape[1]), seed, signed=True)
    assert tgs(g, g, norm) == tgs(g, g, mode="ickd") == 0


@pytest.mark.parametrize("where", [0, 1, 2])
def test_silence_is_never_a_perfect_score(where):
    a, s = (
        [features((4, 3, 2, 2), i) for i in range(3)],
        [spikes((4, 3, 2, 2), i) for i in range(3)],
    )
    s[where] = 0 * s[where]
    assert mas(a, s) == math.inf and tgs(torch.ones(3, 4), torch.zeros(3, 5)) == math.inf
    assert log_determinant(spike_kernel(s[where])) == -math.inf
    s[where] = s[where] * math.nan
    assert mas(a, s) == math.inf


@given(
    sizes=st.lists(st.integers(2, 40), min_size=3, max_size=9),
    seed=st.integers(0, 999),
    alpha0=st.floats(0.5, 5),
    scale=st.sampled_from([1e-9, 1.0, 1e5]),
)
@settings(max_examples=60, deadline=None)
def test_slopes_lie_between_alpha0_and_twice_that(sizes, seed, alpha0, scale):
    layers = [features((n,), seed + i, signed=True) for i, n in enumerate(sizes)]
    got = compute_slopes(group_by_depth(layers), alpha0)
    assert all(alpha0 <= a < 2 * alpha0 for a in got) and min(got) == alpha0
    ratio = [v.sub(v.min()).div(v.max() - v.min()) for v in group_by_depth(layers)]
    assert (
        got[int(np.argmax([(v.mean() / v.std(correction=0)).item() for v in ratio]))] == alpha0
    ), "the steadiest group has α0"
    assert compute_slopes(
        group_by_depth([scale * g.double() for g in layers]), alpha0
    ) == pytest.approx(got, rel=1e-3)


@given(c=st.integers(1, 6), factor=st.integers(1, 4), n=st.integers(2, 6), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_gradient_distances(c, factor, n, seed):
    g, h = features((n, c), seed, signed=True), features((n, c * factor), seed + 1, signed=True)
    turn = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert tgs(g[turn], h[turn]) == pytest.approx(tgs(g, h), rel=1e-4) and tgs(
        g, h[:, torch.randperm(c * factor)]
    ) == pytest.approx(tgs(g, h), rel=1e-4)
    assert 0 <= tgs(g, h) <= 4 / c + 1e-6, "rows of length one are at most 2 apart"
    unit = (
        F.normalize(
            h.unflatten(1, (c, factor)).mean(2)[:, :, None]
            * h.unflatten(1, (c, factor)).mean(2)[:, None],
            dim=2,
        ),
        F.normalize(g[:, :, None] * g[:, None], dim=2),
    )
    assert tgs(g, h, mode="ickd") == pytest.approx(
        (unit[0] - unit[1]).square().sum().item() / (n * c), rel=1e-3, abs=1e-6
    )


torch.manual_seed(0)
X, Y = torch.randn(24, 1, 8, 8), torch.arange(24) % 10
TEACHER = create_model("resnet18", width=0.125, in_channels=1, image_size=8)
GENOME, SPACE = "n8 d16 n16", create_space("digits", width=0.5)


def scores(scorer, n=4):
    return [scorer(SPACE.sample(np.random.default_rng(i))).fitness for i in range(n)]


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_and_the_dead(metric):
    score = Scorer(TEACHER, X, Y, metric, T=2)(GENOME)
    assert (
        math.isfinite(score.fitness)
        and score.dead == ""
        and list(score.parts) == [metric]
        and score.parameters
        == sum(p.numel() for p in create_candidate(GENOME, in_channels=1).parameters())
    )
    dead = Scorer(TEACHER, X, Y, metric, T=2, neuron_args={"v_threshold": 90.0})(GENOME)
    if metric in ("params", "random"):
        assert dead.fitness == score.fitness and math.isnan(score.sops)
    else:
        assert dead.fitness == math.inf and "silent" in dead.dead and dead.fitness > score.fitness


def test_weights_and_joined_metrics():
    both, heavy = (
        Scorer(TEACHER, X, Y, T=2, weights=w)(GENOME) for w in (None, {"mas": 3.0, "tgs": 0.5})
    )
    assert (
        both.parts == heavy.parts
        and both.fitness == sum(both.parts.values())
        and heavy.fitness == pytest.approx(3 * both.parts["mas"] + 0.5 * both.parts["tgs"])
    )


def test_a_score_leaves_no_trace_and_depends_on_nothing_else():
    before, state = {k: v.clone() for k, v in TEACHER.state_dict().items()}, torch.get_rng_state()
    scorer = Scorer(TEACHER, X, Y, T=2)
    first = scores(scorer)
    assert (
        torch.get_rng_state().equal(state)
        and all(v.equal(before[k]) for k, v in TEACHER.state_dict().items())
        and TEACHER.training
        and all(p.requires_grad and p.grad is None for p in TEACHER.parameters())
    )
    torch.manual_seed(123)
    assert (
        scores(scorer)
        == first
        == list(
            reversed(
                [scorer(SPACE.sample(np.random.default_rng(i))).fitness for i in reversed(range(4))]
            )
        )
    )
    with ThreadPoolExecutor(3) as pool:
        assert (
            list(
                pool.map(
                    lambda i: scorer(SPACE.sample(np.random.default_rng(i))).fitness,
                    [0, 1, 2, 3] * 3,
                )
            )
            == first * 3
        )


def test_another_process_agrees(tmp_path):
    import pickle

    scorer = Scorer(TEACHER, X, Y, T=2)
    (tmp_path / "scorer").write_bytes(pickle.dumps(scorer))
    code = f"import pickle, json; s = pickle.load(open({str(tmp_path / 'scorer')!r}, 'rb')); print(json.dumps([s('{GENOME}').fitness, s.key]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root())
    assert (
        json.loads(done.stdout)
        == [scorer(GENOME).fitness, scorer.key]
        == [scorer(GENOME).fitness, Scorer(TEACHER, X, Y, T=2).key]
    ), done.stderr


def test_one_pass_equals_the_network_and_its_full_gradient():
    common = {"num_classes": 10, "T": 2, "neuron": "dsas", "in_channels": 1, "image_size": 8}
    scorer = Scorer(TEACHER, X, Y, T=2, silence=1.0)
    copy = create_model("resnet18", width=0.125, in_channels=1, image_size=8)
    copy.load_state_dict(TEACHER.state_dict())
    logits, f_t = copy.eval()(X, features=True)
    (g_t,) = torch.autograd.grad(F.cross_entropy(logits, Y), copy.head.out.weight)
    for i in range(4):
        g = SPACE.sample(np.random.default_rng(i))
        net = set_slopes(create_candidate(g, **common), scorer.slopes).requires_grad_(True)
        logits, f_s = net(X, features=True)
        (g_s,) = torch.autograd.grad(F.cross_entropy(logits.mean(0), Y), net.head.out.weight)
        score = scorer(g)
        assert score.parts["mas"] == pytest.approx(
            mas([f.detach() for f in f_t.values()], [f.detach() for f in f_s.values()]), rel=1e-4
        )
        assert score.parts["tgs"] == pytest.approx(tgs(g_t, g_s), rel=1e-3)
        assert score.sops == pytest.approx(sum(r["sops"] for r in sops(net, X)), rel=1e-4)


def small(act=nn.ReLU, scale=1.0, bias=True):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=bias),
        nn.BatchNorm2d(8) if bias else nn.Identity(),
        act(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10, bias=bias),
    )
    with torch.no_grad():
        net[0].weight.mul_(scale)
    return Foreign(net, ["2"], 8, 1)


def test_the_order_of_the_batch_and_the_scale_of_a_linear_teacher_do_not_matter():
    turn = torch.randperm(len(X), generator=torch.Generator().manual_seed(1))
    assert scores(Scorer(TEACHER, X[turn], Y[turn], "mas", T=2)) == pytest.approx(
        scores(Scorer(TEACHER, X, Y, "mas", T=2)), rel=1e-6
    )
    plain, loud = (
        scores(Scorer(small(nn.Identity, scale, bias=False), X, Y, "as+mas", T=2))
        for scale in (1.0, 3.0)
    )
    assert loud == pytest.approx(plain, rel=1e-6)


def test_a_teacher_is_asked_once_a_batch():
    calls, net = [], small()
    net.register_forward_hook(lambda *a: calls.append(1))
    for metric in ("mas", "mas+tgs"):
        scorer = Scorer(net, [X[:12], X[12:]], [Y[:12], Y[12:]], metric, T=1, K=2)
        assert len(calls) == 2 and math.isfinite(scorer(GENOME).fitness)
        assert len(calls) == 2, "no candidate asks it"
        calls.clear()


def test_over_batches_and_seeds_the_mean_is_taken():
    halves = [X[:12], X[12:]], [Y[:12], Y[12:]]
    single = [
        Scorer(TEACHER, x, y, T=2, seeds=[s])(GENOME) for s in (3, 4) for x, y in zip(*halves)
    ]
    both = Scorer(TEACHER, *halves, T=2, seeds=(3, 4))(GENOME)
    assert (
        both.fitness == pytest.approx(np.mean([s.fitness for s in single]))
        and both.sops == pytest.approx(np.mean([s.sops for s in single]))
        and len({s.fitness for s in single}) == 4
    )


def test_the_key_knows_what_a_teacher_computes_and_the_version(monkeypatch):
    relu, tanh = (Scorer(small(act), X, Y, "mas", T=2) for act in (nn.ReLU, nn.Tanh))
    assert (
        relu(GENOME).fitness != tanh(GENOME).fitness
        and relu.key != tanh.key
        and relu.key == Scorer(small(), X, Y, "mas", T=2).key
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert Scorer(small(), X, Y, "mas", T=2).key == relu.key and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(module, "METRIC_VERSION", 3)
    assert (again := Scorer(small(), X, Y, "mas", T=2)).key != relu.key and again.key.startswith(
        "mas-v3-"
    )


def test_batch_statistics_switch_no_dropout_on():
    for mode in ("eval", "train"):
        made = copy_for_gradients(small(), mode)
        assert [m.training for m in made.net] == [False, mode == "train", *[False] * 5] and all(
            p.requires_grad for p in made.parameters()
        )
    assert (
        Scorer(small(), X, Y, "mas", T=1, teacher_mode="train").key
        == Scorer(small(), X, Y, "mas", T=1, teacher_mode="train").key
    )


def test_other_types_of_the_same_numbers_are_the_same():
    assert Scorer(TEACHER, X.double(), Y.int(), T=1).key == Scorer(TEACHER, X, Y, T=1).key


def test_frames_and_foreign_teachers():
    resnet18 = torchvision("models").resnet18
    frames, seen = torch.rand(3, 12, 2, 10, 10), []
    events = create_model("resnet18", width=0.125, in_channels=2, image_size=10)
    assert math.isfinite(Scorer(events, frames, Y[:12], T=3)("n8 d8").fitness)
    with pytest.raises(UserError, match="3 frames, the model runs T=4"):
        Scorer(events, frames, Y[:12], T=4)("n8 d8")
    images = torch.rand(12, 3, 32, 32)
    for net in (
        resnet18(num_classes=10),
        create_model("torchvision:resnet18").requires_grad_(False),
    ):
        scorer = Scorer(net, images, Y[:12], T=1)
        seen.append(scorer(GENOME).fitness)
        assert math.isfinite(seen[-1]) and len(scorer.slopes) == 3
    assert seen[0] != seen[1]


@pytest.mark.parametrize(
    "option",
    [
        {"norm": "frobenius"},
        {"norm": "spectral"},
        {"R": "rank"},
        {"reduce": "mean"},
        {"mode": "ickd"},
        {"mode": "sample"},
        {"layers": ("last",)},
        {"teacher_mode": "train"},
        {"seeds": (1,)},
        {"neuron": "tet"},
        {"T": 3},
        {"weights": {"mas": 2.0}},
    ],
)
def test_every_reading_changes_the_number_and_the_key(option):
    plain, other = Scorer(TEACHER, X, Y, T=2), Scorer(TEACHER, X, Y, **{"T": 2, **option})
    assert other(GENOME).fitness != plain(GENOME).fitness and other.key != plain.key


@pytest.mark.parametrize(
    "option", [{"alpha": 3.0}, {"alpha0": 3.0}, {"gradients": "activation"}, {"K": 2}]
)
def test_slopes_change_neither(option):
    plain, other = Scorer(TEACHER, X, Y, T=2), Scorer(TEACHER, X, Y, T=2, **option)
    assert (
        other(GENOME) == plain(GENOME) and other.key == plain.key and other.slopes != plain.slopes
    )


class Closed(nn.Module):
    def __init__(self):
        super().__init__()
        setattr(self, "fc", nn.Linear(64, 10))

    def forward(self, x):
        return torch.no_grad()(self.fc)(x.flatten(1))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Scorer(Closed(), X, Y), "has no gradients"),
        (lambda: guided_slopes(Closed(), X, Y), "has no gradients"),
        (lambda: Scorer(Closed(), X, Y, "mas"), "no stages to compare"),
        (lambda: Scorer(TEACHER, X[:6], Y[:6]), "6 images for 10 classes"),
        (lambda: Scorer(TEACHER, X[:6], Y[:6], mode="ickd"), "6 images for 10 classes"),
        (lambda: Scorer(TEACHER, X, Y, "tgs+mass"), "did you mean 'mas'"),
        (lambda: Scorer(TEACHER, [X, X], [Y]), "2 batches of images and 1 of labels"),
        (lambda: Scorer(create_model("resnet18", T=2), X, Y), "is a spiking network"),
        (lambda: Scorer(TEACHER, 0 * X, Y), "stem is silent or not finite"),
        (lambda: Scorer(TEACHER, X, Y)("n0"), "above 0"),
        (lambda: Scorer(TEACHER, X, Y, seeds=()), "at least one each"),
        (lambda: Scoring(alpha=-1), "above 0"),
        (lambda: Scorer(TEACHER, X, Y, mode="ickd", T=2)("n8 d9"), "no multiple of"),
        *(
            (lambda kw=kw: Scorer(TEACHER, X[:1], Y[:1], **kw), "a batch of 1 image")
            for kw in (
                {"metric": "as"},
                {"metric": "mas"},
                {"metric": "snasnet"},
                {"mode": "sample"},
            )
        ),
        (lambda: Scorer(TEACHER, X, Y + 5), "labels from 5 to 14"),
        (lambda: Scorer(TEACHER, X, Y - 1, "mas"), "labels from -1"),
        (lambda: Scorer(TEACHER, X.byte(), Y), "floating point"),
        (lambda: Scorer(TEACHER, X, Y.float()), "whole numbers"),
        (
            lambda: compute_slopes([torch.arange(3.0), torch.ones(3), torch.arange(3.0)]),
            "part 2 of 3",
        ),
        (lambda: compute_slopes([torch.ones(3)] * 3), "part 1 of 3"),
        (lambda: Scorer(TEACHER, X, Y, K=99), "lower K"),
    ],
)
@pytest.mark.filterwarnings("ignore:Closed has no stages")
def test_mistakes_are_one_line(make, words):
    with pytest.raises(UserError, match=words) as e:
        make()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "option, words",
    [
        ({"K": 0}, "at least 1"),
        ({"K": 2.0}, "at least 1"),
        ({"alpha": math.inf}, "above 0"),
        ({"alpha": math.nan}, "above 0"),
        ({"alpha0": 0}, "alpha0 = 0"),
        ({"alpha0": "2"}, "alpha0"),
        ({"seeds": 3}, "give a list"),
        ({"seeds": ["0"]}, "whole numbers"),
        ({"seeds": "01"}, "give a list"),
        ({"weights": {"as": 1.0}}, "no part of metric"),
        ({"weights": {"mass": 1.0}}, "did you mean 'mas'"),
        ({"weights": {"mas": math.nan}}, "not a finite number"),
        ({"weights": [1]}, "give a dict"),
        ({"metric": "mas+tgs+mas"}, "each metric once"),
        ({"neuron_args": {"taus": 2.0}}, "did you mean 'tau'"),
        ({"neuron_args": {"tau": "2"}}, "neuron_args"),
        ({"neuron_args": 2}, "give a dict"),
    ],
)
def test_options_that_cannot_be_are_one_line(option, words):
    with pytest.raises(UserError, match=words) as e:
        Scoring(**option)
    assert "\n" not in str(e.value)


def test_totals_are_over_time():
    assert sum_over_time(torch.ones(3, 2, 1, 1, 1)).flatten().tolist() == [3, 3]


def test_hardly_a_spike_is_not_perfect():
    "A student that fires once, where the teacher is largest, is at no distance; the scorer counts it as dead."
    a, s = (
        torch.randn(16, 32, 4, 4, generator=torch.Generator().manual_seed(0)).relu(),
        torch.zeros(2, 16, 32, 4, 4),
    )
    s[0, int(a.flatten().argmax()) // a[0].numel(), 0, 0, 0] = 1
    assert (
        mas([a], [s], ("last",)) == 0
        and module.find_mostly_silent_block({2: s}, 0.5) == "block 3 is silent on 94% of the images"
    )
    strict, lax = (
        Scorer(TEACHER, X, Y, "mas", T=2, neuron_args={"v_threshold": 3.0}, silence=v)
        for v in (0.5, 1.0)
    )
    genomes = [SPACE.sample(np.random.default_rng(i)) for i in range(12)]
    lives = [(strict(g), lax(g)) for g in genomes]
    assert (
        strict.key != lax.key
        and any("is silent on" in a.dead and not b.dead for a, b in lives)
        and all(a == b for a, b in lives if not a.dead)
    )


@pytest.mark.parametrize(
    "metric, words", [("as", "last stage is zero"), ("tgs", "gradient at the last layer is zero")]
)
def test_a_teacher_that_says_nothing_is_refused(metric, words):
    net = small()
    for p in net.parameters():
        p.data.zero_()
    with pytest.raises(UserError, match=words):
        Scorer(net, X, Y, metric, T=2, alpha=2.0)
    with pytest.raises(UserError, match="not finite"):
        Scorer(
            small(),
            torch.where(torch.arange(len(X)).view(-1, 1, 1, 1) == 3, torch.nan, X),
            Y,
            metric,
            T=2,
        )


def test_a_teacher_in_half_precision_is_asked_in_single():
    assert Scorer(small().double(), X, Y, "mas", T=2).key == Scorer(small(), X, Y, "mas", T=2).key


@pytest.mark.parametrize(
    "change, words",
    [
        ({"metric": "mas+tgz"}, "did you mean 'tgs'"),
        ({"norm": "rows"}, "did you mean 'row'"),
        ({"T": 0}, "T = 0"),
        ({"alpha": "guide"}, "or 'guided'"),
        ({"seeds": ()}, "at least one each"),
        ({"layers": ["frist"]}, "did you mean 'first'"),
        ({"K": 0}, "K = 0"),
        ({"weights": {"as": 1.0}}, "no part of metric"),
        ({"neuron_args": {"tau": "2"}}, "neuron_args"),
    ],
)
def test_wrong_options_of_a_score_are_errors(change, words):
    with pytest.raises(UserError, match=words):
        Scoring(**change)


def test_wrong_options_of_similarities_are_errors():
    gradient = torch.randn(10, 16)
    identity = torch.eye(2)
    cases = [
        (lambda: similarity_matrix(identity, "rows"), "did you mean 'row'"),
        (lambda: matrix_distance(identity, identity, 2), "unknown R"),
        (lambda: pick_layers("ab", ["lst"]), "did you mean 'last'"),
        (lambda: tgs(gradient, gradient, mode="icdk"), "did you mean 'ickd'"),
        (lambda: tgs(gradient, gradient[:, :12], mode="ickd"), "no multiple of 12"),
        (lambda: group_by_depth([identity] * 2), "lower K"),
        (lambda: compute_slopes([torch.zeros(9)] * 2), "no gradients to guide"),
        (lambda: compute_slopes([torch.tensor([math.nan])] * 2), "no gradients to guide"),
    ]
    for make, words in cases:
        with pytest.raises(UserError, match=words):
            make()


def test_a_scorer_names_wrong_arguments():
    teacher = create_model("resnet18", width=0.25, in_channels=1, image_size=8)
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    spiking = create_model("resnet18", T=2, in_channels=1)
    cases = [
        (lambda: Scorer(spiking, x, y), "spiking network"),
        (lambda: Scorer(teacher, x, y, norms="row"), "did you mean 'norm'"),
        (lambda: Scorer(teacher, x, y[:5]), r"images \(16, 1, 8, 8\) and labels \(5,\)"),
        (lambda: Scorer(teacher, x, y, "mas")("d4 d4 d4 d4"), "downsample"),
        (lambda: Scorer(teacher, 0 * x, y, "mas"), "no student can be compared"),
    ]
    for make, words in cases:
        with pytest.raises(UserError, match=words):
            make()
    with pytest.warns(DeprecationWarning, match=r"Scorer\.scoring"):
        assert Scorer(teacher, x, y, "mas").how.metric == "mas"
