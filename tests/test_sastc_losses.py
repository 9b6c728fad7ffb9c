"""SASTC's loss beyond its notebooks: published numbers, slow loops, shapes, batches, students and teachers of many kinds, two processes."""

import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import create_small, load_golden, quiet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from snnkd_nb.core import UserError
from snnkd_nb.data.images import load
from snnkd_nb.kernels import projection
from snnkd_nb.kernels.projection import Winograd
from snnkd_nb.losses import kd
from snnkd_nb.losses.base import Batch, Distiller
from snnkd_nb.losses.sastc import (
    MIN_ELEMENTS,
    SASTC,
    Calibration,
    distance,
    mean_attention,
    similarity,
)
from snnkd_nb.losses.zoo import create_distiller
from snnkd_nb.models.taps import Foreign
from snnkd_nb.models.zoo import create_model
from snnkd_nb.training.loop import autocast, fit


def seen(B=4, T=None):
    return torch.rand(B, 1, 8, 8), torch.arange(B) % 10


# published numbers


def published(g):
    "The method of the code variant with the parameters of the golden file, and its batch."
    student, teacher = (create_small(T=T) for T in (3, None))
    method = SASTC(
        student, teacher, "code", batch_size=8, beta=1.0, layers={"teacher": ["stage1", "stage2"]}
    )
    c = method.calibration
    c.projections = Calibration((16, 32, 64), (24, 48), 8).projections
    state = {}
    for k, v in g.items():
        if not k.startswith("param."):
            continue
        _, module, rest = k.split(".", 2)
        if "weight" in module:
            state[
                f"{module.split('_')[0]}.mlps.{module[-1]}.{rest.replace('linear1', '0').replace('linear2', '2')}"
            ] = v
        else:
            state[f"projections.{module[-2]}.{module[-1]}.{rest.split('.', 1)[1]}"] = v
    missing, extra = c.load_state_dict(state, strict=False)
    assert not extra and all(k.endswith("num_batches_tracked") for k in missing)
    students = {f"stage{i + 1}": g[f"student{i}"].clone().requires_grad_() for i in range(3)}
    return method, Batch(
        None, None, None, None, students, {f"stage{j + 1}": g[f"teacher{j}"] for j in range(2)}
    )


def test_attention_loss_and_gradients_are_those_of_the_published_code():
    g = load_golden("sastc_loss")
    method, batch = published(g)
    torch.testing.assert_close(
        method.attention(batch).transpose(1, 2), g["attention"], atol=1e-5, rtol=1e-5
    )
    loss = method.terms(batch)["sastc"]
    loss.backward()
    torch.testing.assert_close(loss.detach(), g["loss"], atol=1e-6, rtol=1e-5)
    for i in range(3):
        theirs = g[f"grad_student{i}"]
        torch.testing.assert_close(
            batch.feats_s[f"stage{i + 1}"].grad,
            theirs,
            atol=1e-5 * float(theirs.abs().max()),
            rtol=1e-5,
        )


def test_statistics_of_all_steps_give_another_loss_than_the_published_one():
    g = load_golden("sastc_loss")
    method, batch = published(g)
    method.calibration.norm = "all"
    assert (method.terms(batch)["sastc"].detach() - g["loss"]).abs() > 1e-5


# slow loops


def mlp(m, rows, normalise):
    out = m[2](torch.relu(m[0](rows)))
    return out / out.norm(dim=-1, keepdim=True) if normalise else out


def slowly(module, students, teachers):
    "Loops over steps, student layers, teacher layers and groups of mates; a batch norm over all steps is applied by hand."
    T, B, total, size = *students[0].shape[:2], 0, module.size
    normalise, of = module.key.normalise, lambda e, i: e.mlps[i if len(e.mlps) > 1 else 0]

    def rows(f):
        out = torch.zeros(len(f), size, dtype=f.dtype)
        for lo in range(0, len(f), size):
            g = f[lo : lo + size].flatten(1)
            out = torch.cat([out[:lo], F.pad(g @ g.T, (0, size - len(g))), out[lo + len(g) :]])
        return out

    for i, f_s in enumerate(students):
        for j, f_t in enumerate(teachers):
            conv, bn, _act, mix = module.projections[i][j]
            pairs = []
            for t in range(T):
                a, b = f_s[t], f_t
                if a.shape[-1] > b.shape[-1]:
                    a = (
                        F.adaptive_max_pool2d(a, b.shape[-2:])
                        if module.pool == "max"
                        else F.adaptive_avg_pool2d(a, b.shape[-2:])
                    )
                else:
                    b = F.adaptive_avg_pool2d(b, a.shape[-2:])
                pairs.append((conv(a), b))
            for t, (h, b) in enumerate(pairs):
                over = h if module.norm == "step" else torch.cat([p for p, _ in pairs])
                mean, var = (
                    over.mean((0, 2, 3), keepdim=True),
                    over.var((0, 2, 3), keepdim=True, correction=0),
                )
                guess = mix(
                    torch.relu(
                        (h - mean) / (var + bn.eps).sqrt() * bn.weight.view(1, -1, 1, 1)
                        + bn.bias.view(1, -1, 1, 1)
                    )
                )
                q = mlp(of(module.query, i), rows(f_s[t]), normalise)
                scores = torch.stack(
                    [
                        (q * mlp(of(module.key, k), rows(f), normalise)).sum(-1)
                        for k, f in enumerate(teachers)
                    ],
                    -1,
                )
                total = (
                    total
                    + (scores.softmax(-1)[:, j] * (guess - b).square().flatten(1).mean(1)).sum()
                )
    return total / (T * B * len(students)) if module.reduction == "mean" else total


layer = st.tuples(st.integers(1, 3), st.integers(1, 5))
cases = st.tuples(
    st.integers(1, 3),
    st.integers(2, 5),
    st.integers(1, 6),
    st.lists(layer, min_size=1, max_size=3),
    st.lists(layer, min_size=1, max_size=3),
    st.sampled_from(["all", "step"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["mean", "sum"]),
    st.sampled_from(["max", "avg"]),
    st.integers(0, 999),
)


@settings(max_examples=30, deadline=None)
@given(cases)
def test_the_loss_is_that_of_three_loops(case):
    T, B, size, layers_s, layers_t, norm, normalise, shared, reduction, pool, seed = case
    torch.manual_seed(seed)
    students = [
        torch.rand(T, B, c, h, h, dtype=torch.float64).requires_grad_() for c, h in layers_s
    ]  # no ties: a maximum has one place
    teachers = [torch.rand(B, c, h, h, dtype=torch.float64) for c, h in layers_t]
    module = Calibration(
        [c for c, _ in layers_s],
        [c for c, _ in layers_t],
        size,
        shared,
        normalise,
        norm,
        pool,
        reduction=reduction,
    ).double()
    eta = module.attention(students, teachers)
    assert eta.shape == (T, len(layers_s), B, len(layers_t)) and torch.allclose(
        eta.sum(-1), torch.ones_like(eta[..., 0])
    )
    if len(layers_t) == 1:
        assert eta.eq(1).all()
    assert (
        module.distances(students, teachers).shape == eta.shape
        and (module.distances(students, teachers) >= 0).all()
    )
    leaves = [*students, *module.parameters()]
    ours, theirs = module(students, teachers), slowly(module, students, teachers)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-5)


def test_the_loops_over_memory_and_autograd_agree_within_the_loss():
    torch.manual_seed(0)
    students, teachers = (
        [torch.rand(2, 8, 9, 16, 16).requires_grad_()],
        [torch.rand(8, 19, 16, 16), torch.rand(8, 20, 32, 32)],
    )
    module = Calibration((9,), (19, 20), 8, norm="step")
    assert MIN_ELEMENTS <= 16 * 19 * 256
    leaves = [*students, *module.parameters()]
    ours, theirs = module(students, teachers), slowly(module, students, teachers)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)):
        torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()) + 1e-9, rtol=1e-3)


# projections in half precision on a CPU

MAPS = (
    [(256, 4), (64, 16), (1024, 2)],
    [(512, 4), (32, 16)],
)  # few pixels and many, few channels and many


def calibrated(norm, training=True):
    "A calibration, features of a student and a teacher, spikes of both kinds of maps."
    torch.manual_seed(0)

    def made(n, maps):
        return [
            torch.rand(n, c, h, h).contiguous(memory_format=torch.channels_last) for c, h in maps
        ]

    students = [f.lt(0.3).float().unflatten(0, (2, 8)).requires_grad_() for f in made(16, MAPS[0])]
    return (
        Calibration((256, 64, 1024), (512, 32), 8, norm=norm).train(training),
        students,
        made(8, MAPS[1]),
    )


def learnt(module, students, teachers, half=True):
    "Loss, all gradients, running statistics."
    leaves = [*students, *module.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = module(students, teachers)
    return [
        loss.detach(),
        *torch.autograd.grad(loss, leaves),
        *(b.clone() for n, b in module.named_buffers() if "num" not in n),
    ]


@pytest.mark.parametrize("norm", ["all", "step"])
@pytest.mark.parametrize("training", [True, False])
def test_projections_in_half_precision_round_like_their_modules_and_tiles_up_to_three_times_as_much(
    monkeypatch, norm, training
):
    monkeypatch.setenv(
        "SNNKD_BF16", "native"
    )  # tiles in bfloat16 are for CPUs that multiply it in hardware
    used, whole = [], projection.convolve_small_maps
    for name in ("Winograd", "NormReluMix"):
        apply = getattr(projection, name).apply
        monkeypatch.setattr(
            getattr(projection, name),
            "apply",
            lambda *a, name=name, apply=apply: used.append(name) or apply(*a),
        )
    monkeypatch.setattr(
        projection, "convolve_small_maps", lambda *a: used.append("whole") or whole(*a)
    )
    monkeypatch.setattr(projection, "MIN_TILES", 1)
    ours = learnt(*calibrated(norm, training))
    assert used.count("Winograd") == used.count("whole") == 1 and used.count("NormReluMix") == 3
    exact = learnt(*calibrated(norm, training), half=False)
    monkeypatch.setattr(projection, "MIN_PROJECTION_SIZE", 2**40)
    monkeypatch.setattr(projection, "can_fuse_norm", lambda *a: False)
    modules = learnt(*calibrated(norm, training))
    assert len(used) == 5 and len(ours) == len(exact) == len(modules)

    def off(a, b):
        return float((a - b).norm() / (b.norm() + 1e-9))

    for a, m, e in zip(ours, modules, exact):
        assert off(a, e) < 3 * off(m, e) + 2e-3, (off(a, e), off(m, e))
    monkeypatch.undo()
    monkeypatch.setenv("SNNKD_BF16", "native")
    monkeypatch.setattr(projection, "tiles_pay", lambda *a: False)
    for a, m, e in zip(learnt(*calibrated(norm, training)), modules, exact):
        assert off(a, e) < 1.5 * off(m, e) + 2e-3, (off(a, e), off(m, e))


def test_feature_kd_in_half_precision_rounds_like_its_module(monkeypatch):
    monkeypatch.setenv("SNNKD_BF16", "native")  # as above
    torch.manual_seed(0)
    x, target, project = (
        torch.rand(2, 12, 128, 8, 8).lt(0.3).float().requires_grad_(),
        torch.randn(12, 64, 8, 8),
        kd.create_projection(128, 64),
    )

    def learnt(half):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = kd.feature_loss(x, target, project)
        return [loss.detach(), *torch.autograd.grad(loss, (x, *project.parameters()))]

    done, sweep = [], projection.run_tile_pass
    monkeypatch.setattr(
        projection, "run_tile_pass", lambda name, *a: done.append(name) or sweep(name, *a)
    )
    ours, exact = learnt(True), learnt(False)
    assert {"to_tiles", "from_tiles", "spread", "collect"} == set(done)
    monkeypatch.setattr(projection, "MIN_PROJECTION_SIZE", 2**40)
    monkeypatch.setattr(projection, "can_fuse_norm", lambda *a: False)

    def off(a, b):
        return float((a - b).norm() / b.norm())

    for a, m, e in zip(ours, learnt(True), exact):
        assert off(a, e) < 3 * off(m, e) + 2e-3


def test_other_modules_and_whole_projections_that_are_listened_to_are_called():
    x, heard, module = torch.randn(2, 3, 4, 4), [], kd.create_projection(3, 2)
    module.register_forward_hook(lambda *a: heard.append(1))
    own, flat = nn.Conv2d(3, 2, 1), projection.project([module, nn.Identity()], x)
    assert heard == [1] and flat[1] is x and projection.project([own], x)[0].equal(own(x))


def test_single_precision_and_what_is_listened_to_pass_the_modules(monkeypatch):
    def never(*a):
        raise AssertionError("a kernel")

    monkeypatch.setattr(projection, "convolve_small_maps", never)
    monkeypatch.setattr(projection.Winograd, "apply", never)
    monkeypatch.setattr(projection.NormReluMix, "apply", never)
    module, students, teachers = calibrated("all")
    learnt(module, students, teachers, half=False)
    heard = [
        m.register_forward_hook(lambda m, args, out: None)
        for m in module.projections.modules()
        if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))
    ]
    learnt(module, students, teachers)
    assert len(heard) == 6 * 3


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 9),
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 99),
)
def test_convolutions_by_tiles_are_those_of_torch(n, c, h, w, filters, last, seed):
    torch.manual_seed(seed)
    order = torch.channels_last if last else torch.contiguous_format
    x, weights = (
        torch.randn(n, c, h, w).contiguous(memory_format=order).requires_grad_(),
        [torch.randn(f, c, 3, 3, requires_grad=True) for f in filters],
    )
    gs = [torch.randn(n, f, h, w).contiguous(memory_format=order) for f in filters]
    ours, theirs = (
        Winograd.apply(x, *weights),
        [F.conv2d(x.double(), k.double(), padding=1) for k in weights],
    )
    ours = [*ours, *torch.autograd.grad(ours, (x, *weights), gs)]
    theirs = [*theirs, *torch.autograd.grad(theirs, (x, *weights), [g.double() for g in gs])]
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(
            a, b.float(), atol=1e-5 * float(b.detach().abs().max()) + 1e-6, rtol=1e-4
        )


@pytest.mark.parametrize("spikes", [True, False])
def test_convolutions_by_tiles_are_within_one_and_a_half_steps_of_half_precision(
    spikes, monkeypatch
):
    torch.manual_seed(0)
    x = (
        torch.rand(40, 64, 6, 6).lt(0.2).float()
        if spikes
        else torch.randn(40, 64, 6, 6).bfloat16().float()
    )
    x, weights, g = (
        x.requires_grad_(),
        torch.randn(96, 64, 3, 3).requires_grad_(),
        torch.randn(40, 96, 6, 6).bfloat16(),
    )

    def learnt(f, dtype):
        y = f(x.to(dtype), weights)
        return [y, *torch.autograd.grad(y, (x, weights), g.to(y.dtype))]

    monkeypatch.setattr(projection, "PIECE_SIZE", 2**12)  # many pieces, the last one shorter
    tiles, exact = (
        learnt(lambda *a: Winograd.apply(*a)[0], torch.bfloat16),
        learnt(lambda x, k: F.conv2d(x, k.double(), padding=1), torch.float64),
    )
    for a, e in zip(tiles, exact):
        assert (a - e).norm() < 1.5 * 2**-8 * e.norm()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_tiles_and_change_nothing(threads):
    torch.manual_seed(0)
    x, weight, g = (
        torch.randn(5, 16, 41, 30).requires_grad_(),
        torch.randn(24, 16, 3, 3).requires_grad_(),
        torch.randn(5, 24, 41, 30),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        (y,) = Winograd.apply(x, weight)
        ours = [y, *torch.autograd.grad(y, (x, weight), g)]
    finally:
        torch.set_num_threads(before)
    y = F.conv2d(x.double(), weight.double(), padding=1)
    for a, b in zip(ours, [y, *torch.autograd.grad(y, (x, weight), g.double())]):
        torch.testing.assert_close(
            a, b.float(), atol=1e-5 * float(b.detach().abs().max()), rtol=1e-4
        )


@pytest.mark.parametrize(
    "frozen, passes", [("features", ["spread", "to_tiles"]), ("filters", ["spread", "collect"])]
)
def test_what_is_frozen_costs_nothing_backward(frozen, passes, monkeypatch):
    done, sweep = [], projection.run_tile_pass
    x, weight = (
        torch.randn(2, 8, 4, 4, requires_grad=frozen != "features"),
        torch.randn(3, 8, 3, 3, requires_grad=frozen != "filters"),
    )
    (y,) = Winograd.apply(x, weight)
    monkeypatch.setattr(
        projection, "run_tile_pass", lambda name, *a: done.append(name) or sweep(name, *a)
    )
    leaf = weight if frozen == "features" else x
    (g,) = torch.autograd.grad(y.sum(), leaf)
    assert done == passes
    torch.testing.assert_close(
        g, torch.autograd.grad(F.conv2d(x, weight, padding=1).sum(), leaf)[0], atol=1e-4, rtol=1e-4
    )


def test_backward_within_autocast_of_half_modules_and_of_one_result_of_two():
    torch.manual_seed(0)
    x, weights = (
        torch.rand(24, 64, 6, 6).lt(0.2).bfloat16().requires_grad_(),
        [torch.randn(n, 64, 3, 3).bfloat16().requires_grad_() for n in (96, 32)],
    )
    g, y = torch.randn(24, 96, 6, 6).bfloat16(), Winograd.apply(x, *weights)
    outside = torch.autograd.grad(y[0], (x, *weights), g, retain_graph=True, materialize_grads=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y[0], (x, *weights), g, materialize_grads=True)
    for a, b in zip(outside, inside):
        assert a.dtype == torch.bfloat16 and a.equal(b)
    assert not outside[2].any()
    exact = torch.autograd.grad(
        F.conv2d(x.double(), weights[0].double(), padding=1), (x, weights[0]), g.double()
    )
    for a, b in zip(outside, exact):
        assert (a - b).norm() < 2 * 2**-8 * b.norm()


def test_results_may_be_changed_in_place():
    for h, f in (
        (4, lambda x, w: Winograd.apply(x, w)),
        (2, lambda x, w: projection.convolve_small_maps(x, [w])),
    ):
        x, weight = (
            torch.randn(2, 8, h, h, requires_grad=True),
            torch.randn(3, 8, 3, 3, requires_grad=True),
        )
        (g,) = torch.autograd.grad(f(x, weight)[0].relu_().sum(), weight)
        torch.testing.assert_close(
            g,
            torch.autograd.grad(F.conv2d(x, weight, padding=1).relu().sum(), weight)[0],
            atol=1e-4,
            rtol=1e-4,
        )


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 8, 4, 4).double(),
        torch.randn(2, 8, 4, 4).half(),
        torch.randn(0, 8, 4, 4),
        torch.randn(8, 4, 4),
    ],
)
def test_tiles_refuse_what_they_are_not_for(x):
    with pytest.raises(UserError, match=r"images .* in float32 or bfloat16 on a CPU"):
        Winograd.apply(x, torch.randn(3, 8, 3, 3))


def test_parameters_of_a_calibration_have_the_names_and_draws_they_always_had():
    torch.manual_seed(0)
    module = Calibration((3,), (2, 4), 8)
    assert {k for k in module.state_dict() if "weight" in k and "projections" in k} == {
        f"projections.0.{j}.{k}.weight" for j in (0, 1) for k in (0, 1, 3)
    }
    torch.manual_seed(0)
    for _ in range(3):
        nn.Linear(8, 4)
        nn.Linear(4, 2)
    assert module.projections[0][0][0].weight.equal(nn.Conv2d(3, 4, 3, bias=False).weight)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_distances_in_one_pass_are_those_of_torch(T, B, c, h, w, last, half, seed):
    torch.manual_seed(seed)
    order = {"memory_format": torch.channels_last if last else torch.contiguous_format}
    c += -(-MIN_ELEMENTS // (T * B * h * w))
    x = (
        torch.randn(T * B, c, h, w)
        .to(torch.bfloat16 if half else torch.float32)
        .contiguous(**order)
        .requires_grad_()
    )
    f = torch.randn(B, c, h, w)
    slow = (x.float().unflatten(0, (T, B)) - f).square().flatten(2).mean(2)
    assert x.numel() >= MIN_ELEMENTS and distance(x, f).grad_fn.name().startswith("Distance")
    torch.testing.assert_close(distance(x, f), slow, atol=1e-6, rtol=1e-5)
    g = torch.randn(T, B)
    (a,), (b,) = torch.autograd.grad(distance(x, f), x, g), torch.autograd.grad(slow, x, g)
    torch.testing.assert_close(
        a, b, atol=1e-9 if not half else 1e-6, rtol=1e-5 if not half else 1e-2
    )


# the batch


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
def test_mates_who_are_missing_are_zeros_and_large_batches_are_groups(size, B, seed):
    f = torch.rand(2, B, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    rows = similarity(f, size)
    assert rows.shape == (2, B, size)
    for lo in range(0, B, size):
        n = min(size, B - lo)
        group = f[:, lo : lo + n].flatten(2)
        torch.testing.assert_close(rows[:, lo : lo + n, :n], group @ group.mT)
        assert rows[:, lo : lo + n, n:].eq(0).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 8), st.integers(0, 999))
def test_a_batch_in_another_order(B, seed):
    torch.manual_seed(seed)
    turn = torch.randperm(B)
    students, teachers = (
        [torch.rand(2, B, c, 4, 4) for c in (2, 3)],
        [torch.rand(B, c, 4, 4) for c in (3, 4)],
    )
    module = Calibration((2, 3), (3, 4), B)
    turned = [s[:, turn] for s in students], [f[turn] for f in teachers]
    d, eta, loss = (
        module.distances(students, teachers),
        module.attention(students, teachers),
        module(students, teachers),
    )
    torch.testing.assert_close(
        module.distances(*turned), d[:, :, turn], atol=1e-5, rtol=1e-4
    )  # always
    for e in (module.query, module.key):
        for m in e.mlps:
            m[0].weight.data = m[0].weight.data[:, turn]
    torch.testing.assert_close(
        module.attention(*turned), eta[:, :, turn], atol=1e-4, rtol=1e-3
    )  # if the columns of the first weights turn with it
    torch.testing.assert_close(module(*turned), loss, atol=1e-4, rtol=1e-3)
    for e in (module.query, module.key):
        for m in e.mlps:
            m[0].weight.data[:] = m[0].weight.data[:, :1]
    torch.testing.assert_close(
        module.attention(*turned),
        module.attention(students, teachers)[:, :, turn],
        atol=1e-4,
        rtol=1e-3,
    )  # or are all equal


def test_in_another_order_alone_attention_is_another():
    torch.manual_seed(0)
    students, teachers, turn = (
        [torch.rand(1, 8, 2, 4, 4)],
        [torch.rand(8, 3, 4, 4), torch.rand(8, 9, 2, 2)],
        torch.arange(7, -1, -1),
    )
    module = Calibration((2,), (3, 9), 8)
    assert (
        module.attention([students[0][:, turn]], [f[turn] for f in teachers])
        - module.attention(students, teachers)[:, :, turn]
    ).abs().max() > 1e-3


def test_the_loss_is_zero_where_projections_give_the_teacher():
    torch.manual_seed(0)
    module = Calibration((6,), (6,), 4)
    conv, norm, _act, mix = module.projections[0][0].eval()
    for layer in (conv, mix):
        nn.init.zeros_(layer.weight)
    for c in range(6):
        conv.weight.data[c, c, 1, 1], mix.weight.data[c, c, 0, 0] = 1, 1
    norm.running_var.fill_(1 - norm.eps)
    f = torch.rand(4, 6, 5, 5)
    assert (
        module([f.expand(3, -1, -1, -1, -1)], [f])
        < 1e-12
        < module([f.expand(3, -1, -1, -1, -1)], [f + 0.1])
    )


@pytest.mark.parametrize("size", [1, 2, 3])
def test_small_batches_work(size):
    student, teacher = create_small(T=2), create_small()
    d = create_distiller("kd+sastc", student, teacher, batch_size=size)
    for B in (1, size, 2 * size + 1):
        terms, _ = d(*seen(B))
        assert set(terms) == {"ce", "kd", "sastc"} and all(
            torch.isfinite(v) for v in terms.values()
        )
        sum(terms.values()).backward()


# students and teachers

PAIRS = [
    ("vgg11_sastc", 3, 32, "resnet32x4"),
    ("resnet19_tet", 2, 32, "resnet19_sastc"),
    ("resnet20", 1, 8, "resnet32x4"),
    ("vgg11_sastc", 2, 32, "vgg13"),
    ("spikformer", 2, 32, "resnet20"),
]


@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize("name, T, size, name_t", PAIRS)
def test_students_smaller_and_larger_than_the_teacher(name, T, size, name_t, variant):
    torch.manual_seed(0)
    more = {"dim": 24, "heads": 2, "blocks": 1} if name == "spikformer" else {"width": 0.05}
    student, teacher = (
        create_model(name, T=T, image_size=size, **more),
        create_model(name_t, width=0.05, image_size=size),
    )
    method = SASTC(student, teacher, variant, batch_size=4)
    d = Distiller(student, teacher, [(1.0, method)])
    x, y = torch.rand(3, 3, size, size), torch.arange(3)
    sum(d(x, y)[0].values()).backward()
    assert all(p.grad is None for p in teacher.parameters()) and all(
        p.grad is not None for p in method.parameters()
    )
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())
    eta = method.attention(d.run_networks(x, y))
    assert eta.shape == (
        T,
        len(method.student_features),
        3,
        len(method.teacher_features),
    ) and torch.allclose(eta.sum(-1), torch.ones_like(eta[..., 0]))
    assert ("stem" in method.teacher_features) == (
        variant == "paper" and "stem" in teacher.stage_names
    )


def test_layers_by_module_path_of_anybodys_networks():
    teacher = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(45, 10),
    )
    for T in (1, 2):
        student = create_small(T=T)
        d = create_distiller(
            "sastc",
            student,
            teacher,
            batch_size=4,
            layers={"student": ["stage1.0.conv1", "stage2"], "teacher": ["1", "3"]},
        )
        terms, _ = d(*seen())
        terms["sastc"].backward()
        assert d.methods[0].attention(d.run_networks(*seen())).shape == (T, 2, 4, 2) and all(
            p.grad is None for p in teacher.parameters()
        )
    d = create_distiller(
        "sastc", student, Foreign(teacher, ["1", "3"], image_size=8, in_channels=1), batch_size=4
    )
    assert d(*seen())[0]["sastc"] > 0


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.block, self.head = nn.Conv2d(1, 6, 2, 2), nn.Linear(6, 6), nn.Linear(6, 10)
        self.blocks = nn.ModuleList([self.block])
        del self.block

    def forward(self, x):
        return self.head(self.blocks[0](self.patch(x).flatten(2).mT).mean(1))


def test_tokens_are_compared_on_their_grid_or_refused():
    with pytest.raises(UserError, match="tokens='map'"):
        SASTC(create_small(T=2), Tokens(), layers={"teacher": ["blocks.0"]}, input_shape=(1, 8, 8))
    raw = Foreign(Tokens(), ["blocks.0"], image_size=8, in_channels=1, tokens="raw")
    with pytest.raises(UserError, match="puts out"):
        SASTC(create_small(T=2), raw)
    d = create_distiller(
        "sastc",
        create_small(T=2),
        Foreign(Tokens(), ["blocks.0"], image_size=8, in_channels=1),
        batch_size=4,
    )
    assert d(*seen())[0]["sastc"] > 0


@pytest.mark.parametrize(
    "kw, message",
    [
        ({"beta": -1}, "beta = -1"),
        ({"beta": float("nan")}, "not negative"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"batch_size": 2.5}, "whole number"),
        ({"layers": {"student": ["stage7"]}}, "did you mean"),
        ({"teacher_layers": []}, "give a list"),
        ({"pool": "median"}, "unknown pool"),
        ({"layers": {"teacher": ["head"]}}, "SASTC compares maps"),
    ],
)
def test_what_cannot_be_is_an_error_of_one_line(kw, message):
    with pytest.raises(UserError, match=message) as e:
        SASTC(create_small(T=2), create_small(), **kw)
    assert "\n" not in str(e.value)


def test_maps_that_do_not_fit_are_an_error_of_one_line():
    wide, tall = (
        nn.Sequential(nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(s), nn.Flatten(), nn.Linear(16, 10))
        for s in ((2, 4), (4, 2))
    )
    with pytest.raises(UserError, match="2×4 and 4×2 have no common spatial extent"):
        SASTC(wide, tall, layers="1", input_shape=(1, 8, 8))


def test_a_term_counts_once():
    student, teacher = create_small(T=2), create_small()
    x, y = seen()
    assert set(create_distiller("sastc", student, teacher, batch_size=4)(x, y)[0]) == {
        "ce",
        "sastc",
    }
    assert set(create_distiller("sastc+nld", student, teacher, batch_size=4)(x, y)[0]) == {
        "ce",
        "sastc",
        "nld",
    }
    torch.manual_seed(1)
    d = create_distiller("0.5*sastc", student, teacher, batch_size=4, beta=10.0)
    torch.manual_seed(1)
    e = create_distiller("sastc", student, teacher, batch_size=4, beta=5.0)
    torch.testing.assert_close(d(x, y)[0]["sastc"], e(x, y)[0]["sastc"])
    assert create_distiller("sastc", student, teacher, batch_size=4, beta=0)(x, y)[0]["sastc"] == 0


@pytest.mark.parametrize("route, taught", [("all", True), ("embeddings", True), ("none", False)])
def test_what_attention_teaches(route, taught):
    torch.manual_seed(0)
    students, teachers = (
        [torch.rand(2, 8, 2, 4, 4).requires_grad_()],
        [torch.rand(8, 3, 4, 4), torch.rand(8, 4, 2, 2)],
    )
    module = Calibration((2,), (3, 4), 8, route=route)
    w = torch.rand(2, 1, 8, 2)
    if route == "none":
        assert not module.attention(students, teachers).requires_grad and not any(
            p.requires_grad for p in module.query.parameters()
        )
    else:
        (module.attention(students, teachers) * w).sum().backward()
        assert (students[0].grad is not None) == (route == "all") and all(
            p.grad is not None for p in module.query.parameters()
        ) == taught


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_similarities_and_attention_are_in_single_precision_under_autocast(precision):
    torch.manual_seed(0)
    student, teacher = (
        create_model("resnet20", T=2, width=0.5, image_size=32),
        create_model("resnet20", width=0.5, image_size=32),
    )
    d = create_distiller("sastc", student, teacher, batch_size=4)
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    if precision == "bf16":
        with autocast("cpu", precision):
            terms, batch = d(x, y)[0], d.run_networks(x, y)
        sum(terms.values()).backward()
        assert terms["sastc"].dtype == torch.float32 and torch.isfinite(terms["sastc"])
    else:
        batch = d.run_networks(x, y)
    kind = torch.bfloat16 if precision == "bf16" else torch.float16
    batch.feats_s, batch.feats_t = (
        {k: f.to(kind) for k, f in feats.items()} for feats in (batch.feats_s, batch.feats_t)
    )
    with autocast("cpu", precision):
        eta = d.methods[0].attention(batch)
    full = Batch(
        None,
        None,
        None,
        None,
        *({k: f.float() for k, f in feats.items()} for feats in (batch.feats_s, batch.feats_t)),
    )
    assert eta.dtype == torch.float32
    torch.testing.assert_close(eta, d.methods[0].attention(full), atol=1e-5, rtol=1e-4)


# training


def test_embeddings_and_projections_learn_are_kept_and_leave_with_the_teacher(digits, tmp_path):
    from snnkd_nb.spec import OptimSpec
    from snnkd_nb.training.loop import create_optimizer, load_checkpoint

    torch.manual_seed(0)
    student, teacher = (create_small(T=T, depth=0.34) for T in (2, None))
    d = create_distiller("kd+sastc", student, teacher, batch_size=64, beta=10.0)
    method = d.methods[1]
    before = {k: v.clone() for k, v in d.state_dict().items()}
    held = {k: v.clone() for k, v in teacher.state_dict().items()}
    history = fit(
        student,
        digits,
        d,
        epochs=1,
        lr=0.01,
        batch_size=64,
        checkpoint=tmp_path / "x.ckpt",
        on_event=quiet,
        device="cpu",
        weak_teacher="accept",
    )
    moved = [
        k for k, v in d.state_dict().items() if "calibration" in k and not torch.equal(v, before[k])
    ]
    assert (
        any("query" in k for k in moved)
        and any("key" in k for k in moved)
        and any("projections" in k for k in moved)
    )
    assert all(torch.equal(v, held[k]) for k, v in teacher.state_dict().items()) and {
        "kd",
        "sastc",
    } <= set(history[0])
    assert sum(method.count().values()) + sum(p.numel() for p in student.parameters()) == sum(
        p.numel() for p in d.parameters()
    )
    assert set(student.state_dict()) == set(create_small(T=2, depth=0.34).state_dict())
    again = create_distiller("kd+sastc", student, teacher, batch_size=64, beta=10.0)
    assert (
        load_checkpoint(tmp_path / "x.ckpt", again, create_optimizer(again, OptimSpec()))
        is not None
    )
    assert all(torch.equal(v, d.state_dict()[k]) for k, v in again.state_dict().items())


def test_a_picture_of_attention_leaves_no_trace():
    student, teacher = create_small(T=2), create_small()
    d = create_distiller("sastc+nld", student, teacher, batch_size=4).train()
    x, _ = seen(9)
    before, state = {k: v.clone() for k, v in d.state_dict().items()}, torch.get_rng_state()
    picture = mean_attention(d, x)
    assert set(picture) == {(s, t) for s in student.stage_names for t in range(2)} and list(
        picture["stem", 0]
    ) == list(teacher.stage_names)
    assert all(abs(sum(row.values()) - 1) < 1e-5 for row in picture.values())
    assert d.training and student.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in d.state_dict().items()) and all(
        p.grad is None for p in d.parameters()
    )


def test_two_processes_have_one_set_of_calibrated_parameters(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
        import os, sys, torch
        from snnkd_nb.data.images import load
        from snnkd_nb.losses.zoo import create_distiller
        from snnkd_nb.models.zoo import create_model
        from snnkd_nb.training.loop import fit
        torch.manual_seed(int(os.environ["RANK"]))
        student, teacher = (create_model("resnet20", T=T, width=0.125, depth=0.34, in_channels=1, image_size=8) for T in (2, None))
        d = create_distiller("kd+sastc", student, teacher, batch_size=64, beta=10.0)
        fit(student, load("digits"), d, epochs=1, batch_size=128, lr=0.01, on_event=lambda e: None, device="cpu", weak_teacher="accept")
        torch.save({**d.state_dict(), **{"teacher." + k: v for k, v in teacher.state_dict().items()}}, sys.argv[1] + os.environ["RANK"])
    """)
    )
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        script,
        tmp_path / "rank",
    ]
    r = subprocess.run(
        launch, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent
    )
    assert r.returncode == 0, r.stderr[-2000:]
    a, b = (torch.load(tmp_path / f"rank{i}", weights_only=True) for i in range(2))
    calibrated = [k for k in a if "calibration" in k]
    assert any("query" in k for k in calibrated) and any("projections" in k for k in calibrated)
    for k in a:
        assert torch.equal(a[k], b[k]), k


def test_a_batch_that_the_embeddings_were_not_made_for_is_told_once():
    student, teacher = (
        create_model("resnet20", T=2, width=0.1, image_size=8),
        create_model("resnet20", width=0.1, image_size=8),
    )
    x, y = torch.randn(4, 3, 8, 8), torch.randint(0, 10, (4,))
    for size, said in ((8, "50% of every row are zeros"), (3, "images beyond are left out")):
        distiller = create_distiller("sastc", student, teacher, batch_size=size)
        with pytest.warns(UserWarning, match=said):
            distiller(x, y)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            distiller(x, y)
            whole = create_distiller("sastc", student, teacher, batch_size=4)
            whole(x, y)
            whole(x[:2], y[:2])  # a short last batch


def test_what_sastc_cannot_do_is_said():
    student, teacher = (
        create_model("resnet20", T=2, width=0.1, image_size=8),
        create_model("resnet20", width=0.1, image_size=8),
    )
    for options, text in (
        ({"shared": "false"}, "shared = 'false': give True or False"),
        ({"normalise": 1}, "give True or False"),
        ({"norm": ""}, "norm"),
    ):
        with pytest.raises(UserError, match=text):
            SASTC(student, teacher, **options)
    with pytest.raises(UserError, match="the same network"):
        create_distiller("kd", teacher, teacher)
    with pytest.raises(UserError, match="give a tensor"):
        mean_attention(create_distiller("sastc", student, teacher, batch_size=4), [1])
    for bad, text in (
        (lambda: SASTC(student, teacher, "papr"), "paper"),
        (lambda: SASTC(student, None), "give one"),
        (lambda: SASTC(student, teacher, batch_size=True), "whole number"),
    ):
        with pytest.raises(UserError, match=text):
            bad()
    one = create_distiller(
        "none", create_model("vgg11_sastc", T=1, width=0.1, image_size=8), None
    ).train()
    with pytest.raises(UserError, match="two images or more"):
        one(torch.randn(1, 3, 8, 8), torch.zeros(1, dtype=torch.long))
    with pytest.raises(UserError, match="without images"):
        one(torch.randn(0, 3, 8, 8), torch.zeros(0, dtype=torch.long))


# the weight by epochs


def test_a_weight_for_each_part_of_the_epochs(digits, tmp_path):
    student, teacher = create_small(T=2, depth=0.34), create_small(depth=0.34)
    d = create_distiller("kd+sastc", student, teacher, batch_size=64, beta=[0.0, 1.0, 2.0])
    terms = [
        row["sastc"]
        for row in fit(
            student,
            digits,
            d,
            epochs=3,
            lr=1e-9,
            batch_size=64,
            on_event=quiet,
            device="cpu",
            weak_teacher="accept",
        )
    ]
    assert terms[0] == 0 < terms[1] and 1.8 < terms[2] / terms[1] < 2.2
    assert create_distiller("sastc", student, teacher, beta=[3]).methods[0].beta == 3
    for wrong in ([], [1, -1], [1, "2"], "12"):
        with pytest.raises(UserError, match="beta = ") as e:
            SASTC(student, teacher, beta=wrong)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 300])
def test_parts_of_the_epochs_are_equally_long(epochs):
    method = SASTC(create_small(T=2), create_small(), beta=(0.01, 0.1, 1.0))
    seen = [method.begin_epoch(e, epochs) or method.beta for e in range(epochs)]
    assert (
        seen == sorted(seen)
        and seen[0] == 0.01
        and max(map(seen.count, seen)) - min(map(seen.count, seen)) <= 1
    )
    if epochs == 300:
        assert [seen.count(b) for b in method.betas] == [100] * 3 and (
            seen[99],
            seen[100],
            seen[200],
        ) == (0.01, 0.1, 1.0)


def test_a_weight_by_epochs_is_part_of_a_run():
    from snnkd_nb.spec import RunSpec, to_dict

    specs = [
        RunSpec(method="kd+sastc", method_args={"beta": b}, teacher=RunSpec())
        for b in (0.1, [0.1], [0.01, 0.1])
    ]
    assert (
        len({s.id for s in specs}) == 3 and RunSpec.from_dict(to_dict(specs[2])).id == specs[2].id
    )


# a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu(variant, precision):
    student, teacher = create_small(T=2), create_small(width=0.25)
    d, x, y = (
        create_distiller(
            "kd+sastc", student, teacher, variant=variant, batch_size=8, beta=[0.1, 1.0]
        ),
        *seen(8),
    )
    with torch.no_grad():
        here, eta = d.eval()(x, y)[0]["sastc"], d.methods[1].attention(d.run_networks(x, y))
    d, x, y = d.to("cuda"), x.cuda(), y.cuda()
    with autocast("cuda", precision), torch.no_grad():
        there = d(x, y)[0]["sastc"]
    assert there.dtype == torch.float32 and torch.allclose(
        here, there.cpu(), rtol=1e-2 if precision == "fp32" else 0.2
    )
    if precision == "fp32":
        assert torch.allclose(eta, d.methods[1].attention(d.run_networks(x, y)).cpu(), atol=1e-2)
    with autocast("cuda", precision):
        terms, _ = d.train()(x, y)
    sum(terms.values()).backward()
    assert all(torch.isfinite(v) for v in terms.values()) and all(
        p.grad is not None and p.grad.isfinite().all() for p in d.parameters()
    )
    assert all(p.grad is None for p in teacher.parameters())


def test_a_list_of_weights_resumes_in_the_same_process(tmp_path):
    "The weight of an epoch is no option: a training that broke off is the same training."
    torch.manual_seed(0)
    student, teacher = (
        create_model("resnet20", T=T, width=0.125, depth=0.34, in_channels=1, image_size=8)
        for T in (2, None)
    )
    d, seen = (
        create_distiller("kd+sastc", student, teacher, batch_size=64, beta=[1.0, 2.0, 3.0]),
        [],
    )

    def stop(e):
        if e["event"] == "epoch":
            seen.append(e["epoch"])
        if len(seen) == 2:
            raise KeyboardInterrupt

    again = {
        "epochs": 3,
        "batch_size": 64,
        "lr": 0.01,
        "checkpoint": tmp_path / "b.ckpt",
        "device": "cpu",
        "weak_teacher": "accept",
    }
    with pytest.raises(KeyboardInterrupt):
        fit(student, load("digits"), d, on_event=stop, **again)
    assert len(
        fit(student, load("digits"), d, on_event=lambda e: seen.append(e["epoch"]), **again)
    ) == 3 and seen == [1, 2, 3]


def test_only_what_is_trained_is_counted():
    student, teacher = (
        create_model("resnet20", T=2, width=0.1, image_size=8),
        create_model("resnet20", width=0.1, image_size=8),
    )
    assert (
        SASTC(student, teacher, route="none").count()["embeddings"]
        == 0
        < SASTC(student, teacher).count()["embeddings"]
    )
