"""BatchNorm, sum and neuron in one pass: equal to the three one after the other, whatever the shape and the switches."""

import copy
import threading

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from snnkd_nb.kernels import norm
from snnkd_nb.kernels.flat import encode_neuron
from snnkd_nb.kernels.lif import lif_reference
from snnkd_nb.kernels.surrogate import ATan, Sigmoid, Triangle
from snnkd_nb.models.zoo import create_model
from snnkd_nb.neurons import lif as neurons

CL, NAMES = (
    torch.channels_last,
    ("decay", "v_threshold", "v_reset", "decay_input", "detach_reset", "surrogate", "strict"),
)


def bn_of(c, training, seed=0):
    torch.manual_seed(seed)
    bn = nn.BatchNorm2d(c)
    for p, low, high in (
        (bn.weight, 0.5, 1.5),
        (bn.bias, -0.3, 0.6),
        (bn.running_mean, -0.5, 0.5),
        (bn.running_var, 0.5, 2),
    ):
        nn.init.uniform_(p, low, high)
    return bn.train(training)


@torch.no_grad()
def normalised(x, bn):
    "BatchNorm in the one pass's own order of operations."
    mean, var = norm.moments_of(x) if bn.training else (bn.running_mean, bn.running_var)
    scale = bn.weight * (var + bn.eps).rsqrt()
    return x.float() * scale.view(1, -1, 1, 1) + torch.addcmul(bn.bias, mean, scale, value=-1).view(
        1, -1, 1, 1
    ), scale.max().item()


def fire(current, T, dynamics):
    return lif_reference(current.unflatten(0, (T, -1)), **dict(zip(NAMES, dynamics))).flatten(0, 1)


def one_by_one(x, r, bn, T, dynamics):
    "The three operations on the very numbers the one pass makes, with the gradients of BatchNorm in double precision."
    exact, _ = normalised(x, bn)
    mean, var = bn.running_mean, bn.running_var
    y = F.batch_norm(
        x.double(),
        None if bn.training else mean.double(),
        None if bn.training else var.double(),
        bn.weight.double(),
        bn.bias.double(),
        bn.training,
        0,
        bn.eps,
    )
    if r is not None:
        y, exact = y + r.double(), exact + r.detach().float()
    return fire((y + (exact.double() - y).detach()).float(), T, dynamics)


def gradients(y, w, *wanted):
    got = torch.autograd.grad((y.float() * w.float()).sum(), wanted)
    return [g.float() for g in got]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    T=st.integers(1, 16),
    b=st.integers(1, 3),
    c=st.sampled_from([1, 2, 3, 16, 48, 513, 700]),
    h=st.integers(2, 5),
    w=st.integers(2, 4),
    half=st.booleans(),
    training=st.booleans(),
    add=st.booleans(),
    seed=st.integers(0, 99),
    v_reset=st.sampled_from([0.0, -0.2, None]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    surrogate=st.sampled_from([Sigmoid(4.0), Triangle(1.0), ATan(2.0)]),
    decay=st.sampled_from([0.2, 0.5, 0.9]),
)
def test_one_pass_is_the_three_operations(
    T, b, c, h, w, half, training, add, seed, v_reset, flags, surrogate, decay
):
    dynamics = (decay, 0.9, v_reset, flags[0], flags[1], surrogate, flags[2])
    g, dtype = torch.Generator().manual_seed(seed), torch.bfloat16 if half else torch.float32
    x, r, weights = (
        torch.randn(T * b, c, h, w, generator=g).to(dtype).contiguous(memory_format=CL)
        for _ in range(3)
    )
    x.requires_grad_()
    r.requires_grad_()
    bn = bn_of(c, training)
    wanted, size = (x, bn.weight, bn.bias, *([r] if add else [])), max(1.0, normalised(x, bn)[1])
    expected = one_by_one(x, r if add else None, bn, T, dynamics)
    y = norm.norm_fire(x, bn, T, encode_neuron(*dynamics), r if add else None)
    assert y.float().equal(expected) and y.dtype == dtype and y.is_contiguous(memory_format=CL)
    for a, e in zip(gradients(y, weights, *wanted), gradients(expected, weights, *wanted)):
        near = (
            2e-2 if half else 1e-4
        )  # of the largest number, or of what the differences of few numbers are made of
        assert torch.allclose(a, e, rtol=near, atol=near * max(e.abs().max().item(), size))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_batchnorms(momentum):
    ours, theirs = bn_of(5, True), bn_of(5, True)
    ours.momentum = theirs.momentum = momentum
    for i in range(3):
        x = (torch.randn(8, 5, 6, 7) * (i + 1) + 4).contiguous(memory_format=CL)
        norm.norm_fire(x, ours, 2, encode_neuron(0.5, 1.0, 0.0, False, False, Triangle(1.0), True))
        theirs(x)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_odd_numbers_behave_as_one_by_one():
    x = torch.randn(4, 3, 4, 4)
    x[0, 0, 0, 0], x[1, 1, 0, 0], x[2, 2, 1, 1] = float("nan"), float("inf"), 1e4
    x, bn = x.contiguous(memory_format=CL), bn_of(3, False)
    dynamics = (0.5, 1.0, 0.0, False, False, Triangle(1.0), True)
    y = norm.norm_fire(x, bn, 2, encode_neuron(*dynamics))
    assert y.equal(fire(normalised(x, bn)[0], 2, dynamics)) and y.any()
    bn.train()
    y = norm.norm_fire(
        x, bn, 2, encode_neuron(*dynamics)
    )  # NaN and infinity spoil their channel's statistics, and only theirs
    assert not y[:, :2].any() and y[:, 2].any()


def test_calls_from_several_threads():
    x, bn, task = (
        torch.randn(8, 16, 32, 32).contiguous(memory_format=CL),
        bn_of(16, False),
        encode_neuron(0.5, 1.0, 0.0, False, False, Triangle(1.0), True),
    )
    once, out = norm.norm_fire(x, bn, 4, task), {}

    def work(i):
        out[i] = norm.norm_fire(x, bn, 4, task)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(out) == 6 and all(o.equal(once) for o in out.values())


@pytest.mark.parametrize("threads", [1, 2])
def test_a_network_trains_the_same_either_way(monkeypatch, threads):
    monkeypatch.setattr(norm, "MIN_FUSED_SIZE", 0)
    x, before, grads = torch.rand(4, 3, 32, 32), torch.get_num_threads(), {}
    torch.set_num_threads(threads)
    try:
        for one_pass in (True, False):
            torch.manual_seed(0)
            net = create_model(
                "resnet20", T=3, width=0.5, neuron="rate", neuron_args={"surrogate": Sigmoid(2.0)}
            )
            with monkeypatch.context() as m:
                if not one_pass:
                    m.setattr(neurons, "has_hooks", lambda *a: True)
                y = net(x)
                y.square().sum().backward()
            grads[one_pass] = (
                [p.grad for p in net.parameters()],
                y.detach(),
                list(net.buffers()),
            )
    finally:
        torch.set_num_threads(before)
    (ga, ya, ba), (gb, yb, bb) = grads[True], grads[False]
    torch.testing.assert_close(ya, yb, rtol=1e-3, atol=1e-3)
    for a, b in zip(ga, gb):
        assert (a - b).norm() <= 2e-2 * b.norm() + 1e-6
    for a, b in zip(ba, bb):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_who_watches_sees_every_module(monkeypatch):
    monkeypatch.setattr(norm, "MIN_FUSED_SIZE", 0)
    net, seen = create_model("resnet20", T=2, width=0.25), []
    assert (
        "NormFire"
        in net.stage1[0]
        .act1.after(net.stage1[0].bn1, torch.rand(4, 4, 8, 8).contiguous(memory_format=CL))
        .grad_fn.name()
    )
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm2d, neurons.LIF)):
            m.register_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    net(torch.rand(2, 3, 8, 8))
    assert seen.count("BatchNorm2d") == 21 and seen.count("LIF") == 19


def plain(bn, x, T, residual=None):
    "The three modules one after the other."
    act = neurons.LIF(T, surrogate=Triangle(1.0))
    return act, act(bn(x) if residual is None else bn(x) + residual)


KEPT = {
    "checkpoint": lambda f, x: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False),
    "plain": lambda f, x: f(x),
}


@pytest.mark.parametrize("way", ["checkpoint", "hooks"])
def test_gradients_do_not_depend_on_where_autograd_keeps_things(way):
    grads = []
    for kept in ("plain", way):
        torch.manual_seed(0)
        bn, act = bn_of(32, True), neurons.LIF(4, surrogate=Triangle(1.0))
        x, r = (
            torch.randn(16, 32, 32, 32).contiguous(memory_format=CL).requires_grad_()
            for _ in range(2)
        )

        def f(x):
            return act.after(bn, x, r)

        if kept == "hooks":
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
                y = f(x)
        else:
            y = KEPT[kept](f, x)
        junk = [
            torch.rand(32) for _ in range(200)
        ]  # what was given back is used for something else
        (y * torch.linspace(0, 1, y.numel()).view_as(y)).sum().backward()
        grads.append([x.grad, r.grad, bn.weight.grad, bn.bias.grad])
        assert junk
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def nhwc(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).contiguous(memory_format=CL)


class Own(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


ODD = {  # what the one pass must leave to the three modules: (BatchNorm, input, residual)
    "contiguous input": (nn.BatchNorm2d(16), torch.randn(16, 16, 32, 32), None),
    "residual of another type": (
        nn.BatchNorm2d(16),
        nhwc(16, 16, 32, 32),
        nhwc(16, 16, 32, 32, dtype=torch.float64),
    ),
    "broadcast residual": (nn.BatchNorm2d(16), nhwc(16, 16, 32, 32), torch.randn(16, 1, 1)),
    "no scale": (nn.BatchNorm2d(16, affine=False), nhwc(16, 16, 32, 32), None),
    "a subclass": (Own(16), nhwc(16, 16, 32, 32), None),
    "BatchNorm in half precision": (
        nn.BatchNorm2d(16).bfloat16(),
        nhwc(16, 16, 32, 32, dtype=torch.bfloat16),
        None,
    ),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("training", [False, True])
def test_what_the_kernels_do_not_cover_is_left_to_the_modules(case, training):
    bn, x, r = ODD[case]
    bn = copy.deepcopy(bn).train(training)
    act, expected = plain(copy.deepcopy(bn), x, 4, r)
    assert x.numel() >= norm.MIN_FUSED_SIZE and act.after(bn, x, r).equal(expected)


def test_statistics_of_the_batch_where_none_are_tracked():
    bn, x = nn.BatchNorm2d(16, track_running_stats=False).eval(), nhwc(16, 16, 32, 32)
    act, expected = plain(bn, x, 4)
    assert (act.after(bn, x) != expected).float().mean() < 1e-3 and norm.batch_statistics(bn, x)[2]


@pytest.mark.parametrize(
    "kind",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
        "global",
    ],
)
def test_every_kind_of_hook_is_served(kind):
    bn, act, seen = bn_of(16, True), neurons.LIF(4), []

    def see(m, *a):
        return seen.append(type(m).__name__)

    handle = (
        torch.nn.modules.module.register_module_forward_hook(see)
        if kind == "global"
        else getattr(bn, kind)(see)
    )
    try:
        act.after(bn, nhwc(16, 16, 32, 32).requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert "BatchNorm2d" in seen


def test_infinity_stays_where_it_is_in_eval_mode():
    x = nhwc(4, 64, 33, 33)
    x[0, 0, 0, 0] = float("inf")
    bn, grads = bn_of(64, False), []
    for f in (
        lambda v: neurons.LIF(2, surrogate=Triangle(1.0)).after(bn, v),
        lambda v: plain(bn, v, 2)[1],
    ):
        z = x.detach().requires_grad_()
        f(z).sum().backward()
        grads.append(z.grad)
    assert grads[0].isnan().sum() == grads[1].isnan().sum() <= 4
