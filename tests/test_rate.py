"""Rate-based backpropagation: kernels, every family of networks, training, and what must not change."""

import copy
import itertools
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import neuron as sj_neuron

import snnkd_nb.neurons.ratelayers as layers_module
from snnkd_nb.core import UserError, root
from snnkd_nb.data.images import load
from snnkd_nb.kernels.lif import lif, lif_reference
from snnkd_nb.kernels.rate import lif_rates
from snnkd_nb.kernels.surrogate import ATan, Sigmoid, Triangle
from snnkd_nb.losses.base import Distiller, observe
from snnkd_nb.losses.zoo import create_distiller, list_distillers
from snnkd_nb.models.blocks import MODELS
from snnkd_nb.models.zoo import create_model
from snnkd_nb.neurons.lif import LIF, FromSpikingJelly
from snnkd_nb.neurons.rate import Rate, mean_of
from snnkd_nb.neurons.ratelayers import rate_of_input
from snnkd_nb.spec import ModelSpec, OptimSpec, RunSpec
from snnkd_nb.training.loop import fit

FAMILIES = {
    "resnet20": {},
    "resnet50": {"depth": 0.1},
    "resnet19_ckd": {"depth": 0.1, "last": "relu"},
    "resnet19_rate": {"depth": 0.1},
    "vgg11_rate": {},
    "vgg13": {},
    "vggsnn": {},
    "wrn16_2": {"depth": 0.1},
    "resnet18_imagenet": {"depth": 0.1},
    "sew_resnet18": {"depth": 0.1},
    "sew_resnet50": {"depth": 0.1},
    "preact_resnet18": {"depth": 0.1},
    "pyramidnet20": {"depth": 0.1},
    "pyramidnet101": {"depth": 0.1},
    "spikformer": {"blocks": 1},
    "spikingformer": {"blocks": 1},
    "dsas": {"genome": "n16 d32"},
    "bottleneck_sastc": {},
}


def network(name, T, size=16, neuron="rate", **kw):
    torch.manual_seed(0)
    net = create_model(
        name, T=T, width=0.1, image_size=size, neuron=neuron, **FAMILIES.get(name, {}), **kw
    ).train()
    for m in net.modules():  # lively neurons
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.weight, 0.8, 1.6)
            torch.nn.init.uniform_(m.bias, 0, 0.4)
    return net


def gradients(net, logits, y):
    return torch.autograd.grad(F.cross_entropy(logits.float().mean(0), y), list(net.parameters()))


def both(net, x, y):
    "(logits, features, gradients, buffers) through time and on rates, from one state."
    out = []
    for mode in ("bptt", "rate"):
        one = copy.deepcopy(net)
        one.gradient = mode
        logits, feats = one(x, features=True)
        out.append((logits, feats, gradients(one, logits, y), list(one.buffers())))
    return out


def test_every_spiking_family_is_tested():
    covered = {MODELS[n]["make"].__module__ for n in FAMILIES}
    assert covered == {e["make"].__module__ for e in MODELS.values() if e["spiking"]}


@pytest.mark.parametrize("name", FAMILIES)
def test_one_step_is_backpropagation_through_time(name):
    net, x, y = network(name, 1), torch.randn(4, 3, 16, 16), torch.arange(4)
    (logits, _, grads, _), (rates, _, found, _) = both(net, x, y)
    assert torch.allclose(logits, rates, atol=1e-5) and any(g.abs().max() > 0 for g in grads)
    scale = max(g.abs().max() for g in grads)
    for g, f in zip(grads, found):
        assert (g - f).abs().max() < 1e-3 * scale


@pytest.mark.parametrize("frames", (False, True))
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_features_and_statistics_are_those_of_the_spikes(name, frames):
    T = 3
    net, x, y = network(name, T), torch.randn(*[T] * frames, 4, 3, 16, 16), torch.arange(4)
    (logits, feats, _, stats), (rates, seen, grads, moved) = both(net, x, y)
    assert rates.shape == (1, 4, 10) and torch.allclose(logits.mean(0), rates[0], atol=1e-5)
    assert list(seen) == list(net.stage_names) and all(g.isfinite().all() for g in grads)
    for n, f in seen.items():
        assert (
            f.requires_grad
            and f.shape == (1, *feats[n].shape[1:])
            and torch.allclose(feats[n].mean(0), f[0], atol=1e-5)
        )
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(stats, moved))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 17),
    st.integers(1, 4),
    st.integers(1, 9),
    st.sampled_from([0.0, -0.3, None]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([Sigmoid(3.0), Triangle(1.0), ATan(2.0)]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_one_layer_is_backpropagation_through_time_summed(
    T, B, n, v_reset, detach, decay_input, strict, surrogate, static, seed
):
    g = torch.Generator().manual_seed(seed)
    x, w = 1.5 * torch.randn(B if static else T * B, n, generator=g), torch.randn(B, n, generator=g)
    kw = {
        "decay": 0.6,
        "v_threshold": 0.9,
        "v_reset": v_reset,
        "detach_reset": detach,
        "decay_input": decay_input,
        "strict": strict,
        "surrogate": surrogate,
    }
    seq = (x.expand(T, B, n) if static else x.unflatten(0, (T, B))).clone().requires_grad_()
    spikes = lif_reference(seq, **kw)
    (spikes.mean(0) * w).sum().backward()
    for backend in ("auto", "reference"):
        s, rate, eligibility = lif_rates(x, T, static, backend=backend, **kw)
        assert s.equal(spikes.detach().flatten(0, 1)) and torch.allclose(
            rate, spikes.mean(0), atol=1e-6
        )
        assert torch.allclose(eligibility * w, seq.grad.sum(0), atol=1e-5, rtol=1e-4)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 11),
    st.integers(1, 3),
    st.sampled_from([(3, 6, 5), (1, 7, 7), (4, 5, 8)]),
    st.sampled_from([(2, 2, 0, 1), (3, 2, 1, 1), (3, 1, 0, 1), (2, 1, 1, 2)]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_max_pooling_is_not_biased(T, B, shape, window, ceil, seed):
    g = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, 2, (T * B, *shape), generator=g).float()
    x, leaf = Rate(mean_of(steps, T).requires_grad_(), steps, T), steps.clone().requires_grad_()
    y, plain = F.max_pool2d(x, *window, ceil_mode=ceil), F.max_pool2d(leaf, *window, ceil_mode=ceil)
    w = torch.randn(y.shape, generator=g)
    (mean_of(plain, T) * w).sum().backward()
    assert torch.allclose(y.rate, mean_of(plain, T), atol=1e-6)
    assert torch.allclose(
        torch.autograd.grad((y.rate * w).sum(), x.rate)[0],
        leaf.grad.unflatten(0, (T, B)).sum(0),
        atol=1e-5,
    )


@pytest.mark.parametrize("T", (1, 2, 4))
def test_published_numbers(T):
    z = {
        k: torch.from_numpy(v)
        for k, v in np.load(root() / "tests" / "golden" / f"rate_net_T{T}.npz").items()
    }
    net = torch.nn.ModuleDict(
        {
            "c1": torch.nn.Conv2d(3, 8, 3, 1, 1, bias=False),
            "b1": torch.nn.BatchNorm2d(8),
            "c2": torch.nn.Conv2d(8, 8, 3, 2, 1, bias=False),
            "b2": torch.nn.BatchNorm2d(8),
            "fc": torch.nn.Linear(8, 10),
        }
    )
    net.load_state_dict({k[6:]: v for k, v in z.items() if k.startswith("param.")}, strict=False)
    act = LIF(T, decay=0.2, v_reset=None, detach_reset=True)
    for x in (rate_of_input(z["x"], T, True), rate_of_input(z["x"].repeat(T, 1, 1, 1), T, False)):
        logits = net["fc"](
            act(net["b2"](net["c2"](act(net["b1"](net["c1"](x)))))).mean((2, 3))
        ).out()[0]
        grads = torch.autograd.grad(F.cross_entropy(logits, z["y"]), list(net.parameters()))
        assert torch.allclose(logits, z["logits"], atol=1e-5)
        for (n, _), g in zip(net.named_parameters(), grads):
            assert torch.allclose(g, z[f"grad.{n}"], atol=1e-5), n


@pytest.mark.parametrize("name", ("resnet20", "sew_resnet18", "spikformer"))
def test_half_precision(name):
    torch.manual_seed(0)
    edge = (
        48 if name == "sew_resnet18" else 16
    )  # in bf16, a convolution of 1×1 maps has now and then no finite gradient on the CPU, at rates or not
    net, x, y = (
        network(name, 10, neuron="tet"),
        torch.randn(4, 3, edge, edge),
        torch.arange(4),
    )  # more than eight steps: two planes of bits
    net.gradient = "rate"
    with torch.autocast("cpu", torch.bfloat16):
        logits, feats = net(x, features=True)
        loss = F.cross_entropy(logits.float()[0], y)
    loss.backward()
    assert loss.isfinite() and all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == torch.float32
        for p in net.parameters()
    )
    assert any(p.grad.abs().max() > 0 for p in net.stem.parameters()) and all(
        f.isfinite().all() for f in feats.values()
    )


@pytest.mark.parametrize("T", (1, 4))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_large_maps_give_the_spikes_of_the_plain_network(dtype, T, monkeypatch):
    "Where BatchNorm, sum and neuron are one pass; steps written out all at once or one at a time."
    torch.manual_seed(0)
    net, x, y = (
        create_model("resnet20", T=T, width=0.5, neuron="rate", depth=0.34).train(),
        torch.randn(64 // T, 3, 32, 32),
        torch.arange(64 // T) % 10,
    )
    used, found = [], {}
    plain_pass = layers_module.rate_pass_for
    monkeypatch.setattr(
        layers_module, "rate_pass_for", lambda engine: used.append(engine) or plain_pass(engine)
    )
    for mode, worth in (("bptt", 0), ("rate", 2**60), ("rate", 2**10)):
        monkeypatch.setattr(layers_module, "MIN_STEPWISE_NEURONS", worth)
        one = copy.deepcopy(net)
        one.gradient = mode
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits, feats = one(x, features=True)
        found[mode, worth] = (
            logits.float().mean(0),
            {n: f.float().mean(0) for n, f in feats.items()},
            gradients(one, logits, y),
            list(one.buffers()),
        )
    logits, feats, grads, stats = found.pop(("bptt", 0))
    assert len(used) >= 4  # the fused pass did run
    for rates, seen, got, moved in found.values():
        assert torch.allclose(rates, logits, atol=1e-5 if dtype == torch.float32 else 5e-3) and all(
            seen[n].equal(f) for n, f in feats.items()
        )
        assert all(torch.allclose(u, v, atol=1e-6) for u, v in zip(stats, moved))
        if T == 1:
            one, other = (torch.cat([g.flatten() for g in gs]) for gs in (got, grads))
            assert (one - other).norm() < (1e-3 if dtype == torch.float32 else 3e-2) * other.norm()


def test_divided_by_T_is_the_published_scale():
    net, x, y, found = network("resnet20", 4), torch.randn(4, 3, 16, 16), torch.arange(4), {}
    for net.gradient in ("rate", "rate-code"):
        logits = net(x)
        found[net.gradient] = logits.detach(), gradients(net, logits, y)
    assert found["rate"][0].equal(found["rate-code"][0])
    for a, b in zip(found["rate"][1], found["rate-code"][1]):
        assert torch.allclose(a, 4 * b, rtol=1e-4, atol=1e-7)


def test_an_exception_leaves_nothing_behind():
    net, x, y = network("resnet20", 3), torch.randn(4, 3, 16, 16), torch.arange(4)
    net.gradient = "rate"
    wanted, keys = gradients(net, net(x), y), [sorted(vars(m)) for m in net.modules()]
    stop = net.stage2[0].bn2.register_forward_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net(x)
    stop.remove()
    assert torch.is_grad_enabled() and [sorted(vars(m)) for m in net.modules()] == keys
    assert all(a.equal(b) for a, b in zip(wanted, gradients(net, net(x), y)))
    with torch.no_grad():
        assert not net(x).requires_grad and not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_nothing_changes_in_normal_mode():
    net, x, y = network("resnet20", 3), torch.randn(4, 3, 16, 16), torch.arange(4)
    other = copy.deepcopy(net)
    before = gradients(net, net(x), y)
    other.gradient = "rate"
    other(x)
    other.gradient = "bptt"
    assert all(a.equal(b) for a, b in zip(before, gradients(other, other(x), y))) and other(
        x
    ).shape == (3, 4, 10)
    other.gradient = "rate"
    other.load_state_dict(net.state_dict())
    assert other.eval()(x).equal(net.eval()(x)) and other(x).shape == (3, 4, 10)
    assert copy.deepcopy(other).gradient == "rate" and "_gradient" not in other.state_dict()


def test_frozen_statistics():
    net, x, y = network("resnet20", 1), torch.randn(4, 3, 16, 16), torch.arange(4)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.eval()
            m.running_var.uniform_(0.5, 2)
    (logits, _, grads, stats), (rates, _, found, moved) = both(net, x, y)
    assert torch.allclose(logits, rates, atol=1e-5) and all(
        a.equal(b) for a, b in zip(stats, moved)
    )
    for g, f in zip(grads, found):
        assert torch.allclose(g, f, atol=1e-5)


def test_what_has_no_rates_is_refused():
    alien = create_model(
        "resnet20", T=2, width=0.1, neuron=lambda T: FromSpikingJelly(sj_neuron.LIFNode(), T)
    )
    with pytest.raises(UserError, match=r"stem.act \(LIFNode\) keeps no eligibility") as e:
        alien.gradient = "rate"
    assert "\n" not in str(e.value) and alien.gradient == "bptt"

    class Mine(torch.nn.Module):
        def forward(self, x):
            return torch.cumsum(x, 0)

    mine = create_model("resnet20", T=2, width=0.1, neuron=lambda T: Mine()).train()
    mine.gradient = "rate"
    with pytest.raises(UserError, match="'cumsum'.*in Mine") as e:
        mine(torch.randn(2, 3, 16, 16))
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="ordinary network has no firing rates"):
        RunSpec(optim=OptimSpec(gradient="rate"))
    with pytest.raises(UserError, match="did you mean 'rate'"):
        OptimSpec(gradient="rates")
    with pytest.raises(UserError, match="has no firing rates"):
        create_model("resnet20", width=0.1).gradient = "rate"
    assert (
        RunSpec(model=ModelSpec(T=2)).id
        == RunSpec(model=ModelSpec(T=2), optim=OptimSpec(gradient="bptt")).id
        != RunSpec(model=ModelSpec(T=2), optim=OptimSpec(gradient="rate")).id
    )


class Straight(torch.autograd.Function):
    "Spikes whose gradient is passed straight through."

    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, g):
        return g


class Kept(torch.nn.Module):
    "One weight a step, and what somebody does with it."

    def __init__(self, T, f):
        super().__init__()
        self.T, self.f, self.w = T, f, torch.nn.Parameter(torch.linspace(0.5, 1.5, T))

    def forward(self, x):
        return self.f(self, x)


def loop(m, x):
    v, out = 0.0, []
    for h in x.view(m.T, -1, *x.shape[1:]):
        v = 0.5 * v + h
        out.append(torch.sigmoid(v))
    return torch.cat(out)


HAND = {
    "eq": lambda m, x: (x == 1).float(),
    "pow": lambda m, x: x**2,
    "rpow": lambda m, x: 2**x,
    "loop": loop,
    "Function": lambda m, x: Straight.apply(x),
    "tensor": lambda m, x: torch.as_tensor(x),
    "float": lambda m, x: x * float(x),
    "data": lambda m, x: x.data,
    "view": lambda m, x: (x.view(m.T, -1, *x.shape[1:]) * m.w.view(-1, 1, 1, 1, 1)).flatten(0, 1),
    "reshape": lambda m, x: (
        x.reshape(m.T, x.shape[0] // m.T, *x.shape[1:]) * m.w.view(-1, 1, 1, 1, 1)
    ).reshape(x.shape),
    "rows": lambda m, x: (x.view(m.T, -1) * m.w[:, None]).view(x.shape),
    "unflatten": lambda m, x: (x.unflatten(0, (m.T, -1)) * m.w.view(-1, 1, 1, 1, 1)).flatten(0, 1),
    "chunk": lambda m, x: torch.cat([h * w for h, w in zip(x.chunk(m.T), m.w)]),
    "index": lambda m, x: torch.cat([x[k :: m.T] for k in range(m.T)]),
    "steps in memory": lambda m, x: x + torch.zeros(99, *x.shape[1:]),
    "int": lambda m, x: (2 * x.relu()).to(torch.int32).to(x.dtype),
    "bool": lambda m, x: x.relu().type(torch.bool).float(),
    "floor": lambda m, x: torch.div(x, 0.5, rounding_mode="floor"),
    "lif": lambda m, x: lif(x, T=m.T),
    "matrix": lambda m, x: (torch.diag(m.w) @ x.view(m.T, -1)).view(x.shape),
}


@pytest.mark.parametrize(
    "T, B, frames", [(2, 4, False), (2, 4, True), (2, 2, False), (2, 2, True), (3, 4, True)]
)
@pytest.mark.parametrize("name", HAND)
def test_hand_written_neurons_are_named(name, T, B, frames):
    net = network("resnet20", T, neuron=lambda T: Kept(T, HAND[name]))
    net.gradient = "rate"
    with pytest.raises(
        UserError,
        match="(?s)does to a firing rate .in Kept, student.stem.act.*train with gradient='bptt'",
    ) as e:
        Distiller(net)(torch.randn(*[T] * frames, B, 3, 16, 16), torch.arange(B))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: torch.cat(x.split(split_size=1, dim=1), dim=1).relu(),
        lambda m, x: (x.flatten(1) + 1).view(x.shape).relu(),
        lambda m, x: x.unflatten(1, (1, -1)).squeeze(1).sigmoid(),
        lambda m, x: torch.relu(x - 0.1) / 2,
    ],
    ids=range(4),
)
def test_hand_written_layers_without_time_are_computed(f):
    for T, B in ((1, 4), (2, 2), (2, 4)):
        net, x = (
            network("resnet20", T, neuron=lambda T: Kept(T, lambda m, x: f(m, x) * m.w.mean())),
            torch.randn(T, B, 3, 16, 16),
        )
        (logits, _, grads, _), (rates, _, found, _) = both(net, x, torch.arange(B))
        assert torch.allclose(logits.mean(0), rates[0], atol=1e-4) and all(
            g.isfinite().all() for g in found
        )
        if T == 1:
            assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(grads, found))


@pytest.mark.parametrize(
    "name, kw, said",
    [
        ("tet", {}, "method = 'tet'"),
        ("0.5*tet+kd", {}, "method = 'tet'"),
        ("none", {"ce": "each"}, "ce = 'each'"),
        ("kd", {"ce": "each"}, "ce = 'each'"),
    ],
)
def test_a_loss_of_single_steps_does_not_train_on_rates(name, kw, said):
    student, teacher = (
        create_model("resnet20", T=T, width=0.1, depth=0.34, in_channels=1, image_size=8)
        for T in (2, None)
    )
    d, data, before = (
        create_distiller(name, student, teacher, **kw),
        load("digits"),
        copy.deepcopy(student.state_dict()),
    )
    for gradient in ("rate", "rate-code"):
        with pytest.raises(UserError) as e:
            fit(student, data, d, epochs=1, gradient=gradient, on_event=lambda e: None)
        assert (
            str(e.value)
            == f"{said} with gradient = {gradient!r}: TET is about single time steps, and rates have none; take gradient='bptt'"
        )
        net, run = ModelSpec("resnet20", T=2), RunSpec() if "kd" in name else None
        with pytest.raises(UserError, match="TET is about single time steps, and rates have none"):
            RunSpec(
                model=net,
                method=name,
                method_args=kw,
                teacher=run,
                optim=OptimSpec(gradient=gradient),
            )
    student.gradient = "rate"  # by hand, which fit leaves as it is
    with pytest.raises(UserError, match="rates have none"):
        fit(student, data, d, epochs=1, on_event=lambda e: None)
    assert all(v.equal(before[k]) for k, v in student.state_dict().items())
    student.gradient = "bptt"
    assert fit(
        student, data, d, epochs=1, batch_size=256, on_event=lambda e: None, weak_teacher="accept"
    )


@pytest.mark.parametrize("method", [m for m in list_distillers() if m != "none"])
def test_every_method_takes_rates(method):
    student, teacher = (
        create_model("resnet20", T=3, width=0.25, depth=0.34, image_size=16),
        create_model("resnet20", width=0.5, depth=0.34, image_size=16),
    )
    student.gradient = "rate"
    d = create_distiller(method, student, teacher).train()
    terms, decision = d(torch.randn(8, 3, 16, 16), torch.arange(8))
    sum(terms.values()).backward()
    assert (
        decision.shape == (8, 10)
        and all(v.isfinite() for v in terms.values())
        and all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    )


def test_a_teacher_takes_the_rates_of_a_stage():
    "What hybrids stand on: features with a graph, fed to the rest of an ANN."
    student, teacher = (
        network("resnet20", 3),
        create_model("resnet20", width=0.1, image_size=16).eval(),
    )
    student.gradient = "rate"
    _, feats = student(torch.randn(4, 3, 16, 16), features=True)
    for n in student.stage_names:
        student.zero_grad()
        teacher.forward_from(n, feats[n][0]).square().sum().backward(retain_graph=True)
        assert student.stem.conv.weight.grad.abs().sum() > 0
    path = observe(student, torch.randn(4, 3, 16, 16), ["stage1.0.act1"])[1]["stage1.0.act1"]
    assert path.shape[:2] == (1, 4) and path.requires_grad


def test_training_on_rates_repeats_and_resumes(tmp_path):
    data, runs = load("digits"), []

    def tiny():
        torch.manual_seed(0)
        return create_model("resnet20", T=2, width=0.25, depth=0.34, in_channels=1, image_size=8)

    def stop(e):
        raise KeyboardInterrupt

    kw = {"epochs": 2, "batch_size": 64, "seed": 0, "gradient": "rate"}
    for checkpoint in (None, tmp_path / "c"):
        net = tiny()
        if checkpoint:
            with pytest.raises(KeyboardInterrupt):
                fit(net, data, on_event=stop, checkpoint=checkpoint, **kw)
            assert net.gradient == "bptt"
        runs.append((fit(net, data, on_event=lambda e: None, checkpoint=checkpoint, **kw), net))
    (a, one), (b, other) = runs
    assert a[-1]["loss"] == b[-1]["loss"] < a[0]["loss"] and all(
        p.equal(q) for p, q in zip(one.parameters(), other.parameters())
    )


def _in_parallel(rank, port, out):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2"
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    net = network("resnet20", 3)
    net.gradient = "rate"
    module = torch.nn.parallel.DistributedDataParallel(Distiller(net))
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 3, 16, 16, generator=g).chunk(2)[rank], torch.arange(8).chunk(2)[rank]
    sum(module(x, y)[0].values()).backward()
    if rank == 0:
        torch.save([p.grad for p in net.parameters()], out)
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_in_parallel, (port, str(tmp_path / "g.pt")), nprocs=2)
    net, g, parts = network("resnet20", 3), torch.Generator().manual_seed(0), []
    x = torch.randn(8, 3, 16, 16, generator=g)
    for part, y in zip(x.chunk(2), torch.arange(8).chunk(2)):
        one = copy.deepcopy(net)
        one.gradient = "rate"
        parts.append(gradients(one, one(part), y))
    for got, a, b in zip(torch.load(tmp_path / "g.pt"), *parts):
        assert torch.allclose(got, (a + b) / 2, atol=1e-5)


def test_the_gpu_kernel_has_the_same_numbers():
    gpu, triton_pass = (
        pytest.importorskip("snnkd_nb.kernels.gpu"),
        pytest.importorskip("snnkd_nb.kernels.gpu").rate_pass,
    )
    if not torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("needs a GPU or Triton's interpreter")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for v_reset, detach, T in itertools.product((0.0, None), (False, True), (1, 5)):
        kw = {
            "decay": 0.7,
            "v_threshold": 0.8,
            "v_reset": v_reset,
            "decay_input": False,
            "detach_reset": detach,
            "surrogate": Sigmoid(3.0),
            "strict": True,
        }
        x = torch.randn(T * 3, 101)
        s, rate, g = triton_pass(x.to(device), None, None, None, T, gpu.encode_neuron(*kw.values()))
        for a, b in zip((s, rate, g), lif_rates(x, T, **kw)):
            assert torch.allclose(a.cpu(), b, atol=1e-6)


def test_the_whole_mode_through_triton():
    if not torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("needs a GPU or Triton's interpreter")
    pytest.importorskip("triton")
    x, y, found = torch.randn(2, 3, 16, 16), torch.arange(2), []
    for backend in ("triton", "auto"):
        net = network("resnet20", 2, neuron_args={"backend": backend})
        net.gradient = "rate"
        found.append(gradients(net, net(x), y))
    for a, b in zip(*found):
        assert torch.allclose(a, b, atol=1e-4)


def test_spikes_of_the_pass_are_those_of_the_plain_neuron():
    x = torch.randn(9 * 2, 3, 20, 20).contiguous(memory_format=torch.channels_last)
    s, rate, g = lif_rates(x, 9, decay=0.3)
    assert s.equal(lif(x, T=9, decay=0.3)) and all(
        t.is_contiguous(memory_format=torch.channels_last) for t in (s, rate, g)
    )
