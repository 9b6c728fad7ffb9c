"""Convolutions have right gradients on every CPU, and bfloat16 rounds alike on all of them."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from snnkd_nb.core import UserError
from snnkd_nb.data.images import load
from snnkd_nb.kernels import precision as module
from snnkd_nb.kernels.precision import (
    autocast,
    bf16_route,
    conv2d,
    convolution_gradients,
    cpu_class,
    current_mode,
    emulate,
    emulates_bf16,
    protected,
    resolve_precision,
)
from snnkd_nb.models.taps import Foreign
from snnkd_nb.models.zoo import create_model
from snnkd_nb.spec import OptimSpec, RunSpec
from snnkd_nb.training.job import run_train
from snnkd_nb.training.loop import fit

CHANNELS_LAST = torch.channels_last


def exact_gradients(function, x, weight, **options):
    """Value and gradients in double precision, without oneDNN."""
    x = x.detach().double().requires_grad_()
    weight = weight.detach().double().requires_grad_()
    with torch.backends.mkldnn.flags(enabled=False):
        y = function(x, weight, None, **options)
        found = torch.autograd.grad(y.square().sum(), [x, weight])
    return y.detach(), *found


def relative_error(found, exact):
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


SWEEP = """
import json, sys, torch
from torch.nn import functional as F
from snnkd_nb.kernels.precision import conv2d, protected
torch.set_num_threads(int(sys.argv[1]))
worst = 0.0
for c_in in (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17):
    for c_out in (1, 4, 8, 17):
        for size in (1, 3, 8, 17):
            torch.manual_seed(0)
            x = torch.randn(3, c_in, size, size).contiguous(memory_format=torch.channels_last)
            w = torch.randn(c_out, c_in, 1, 1)
            with torch.backends.mkldnn.flags(enabled=False):
                a, b = x.double().requires_grad_(), w.double().requires_grad_()
                exact = torch.autograd.grad(F.conv2d(a, b, None, 2).square().sum(), [a, b])
            for _ in range(3):
                x_, w_ = x.detach().requires_grad_(), w.detach().requires_grad_()
                with protected():
                    y = F.conv2d(x_, w_, None, 2)
                for got, want in zip(torch.autograd.grad(y.square().sum(), [x_, w_]), exact):
                    worst = max(worst, float((got - want).norm() / want.norm()))
print(json.dumps(worst))
"""


@pytest.mark.parametrize("isa", ["DEFAULT", "AVX2", "SSE41"])
@pytest.mark.parametrize("threads", [1, 2])
def test_strided_pointwise_convolutions_of_all_widths(isa, threads):
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-c", SWEEP, str(threads)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"the process ended with {done.returncode}: {done.stderr[-500:]}"
    assert json.loads(done.stdout) < 1e-5


@pytest.mark.parametrize("padding", [0, 1, (2, 1), "valid"])
@pytest.mark.parametrize("groups", [1, 2])
def test_paddings_and_groups_of_a_strided_pointwise_convolution(padding, groups):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 7, 6).contiguous(memory_format=CHANNELS_LAST)
    weight = torch.randn(6, 4 // groups, 1, 1)
    options = {"stride": (2, 3), "padding": padding, "groups": groups}
    exact = exact_gradients(F.conv2d, x, weight, **options)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = conv2d(x, weight, None, **options)
    found = y.detach(), *torch.autograd.grad(y.square().sum(), [x, weight])
    for ours, wanted in zip(found, exact, strict=True):
        assert ours.shape == wanted.shape
        assert relative_error(ours, wanted) < 1e-5


@pytest.mark.parametrize("kernel, stride, padding", [(1, 2, 0), (1, 3, 1), (3, 2, 1), (3, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_are_asked_for_directly(kernel, stride, padding, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 7, 7).to(dtype).contiguous(memory_format=CHANNELS_LAST)
    weight = torch.randn(5, 4, kernel, kernel).to(dtype)
    geometry = {"stride": stride, "padding": padding}
    with torch.backends.mkldnn.flags(enabled=False):
        a, b = x.double().requires_grad_(), weight.double().requires_grad_()
        y = F.conv2d(a, b, None, **geometry)
        grad = torch.randn_like(y).to(dtype)
        exact = torch.autograd.grad(y, [a, b], grad.double())
    lists = [stride, stride], [padding, padding], [1, 1]
    found = convolution_gradients(grad, x, weight, [5], *lists, 1, [True, True, True])
    bound = 1e-5 if dtype == torch.float32 else 2**-8
    for ours, wanted in zip(found, [*exact, grad.double().sum((0, 2, 3))], strict=True):
        assert relative_error(ours, wanted) < bound
    assert convolution_gradients(grad, x, weight, None, *lists, 1, [False, True, False])[0] is None


class Strided(nn.Module):
    """A user's network with the shape that oneDNN gets wrong: four channels into a strided 1×1 convolution."""

    T = None

    def __init__(self, channels=1):
        super().__init__()
        self.wide = nn.Conv2d(channels, 4, 3, padding=1)
        self.short = nn.Conv2d(4, 8, 1, stride=2)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        hidden = self.wide(x.contiguous(memory_format=CHANNELS_LAST)).relu()
        return self.head(self.short(hidden).relu().mean((2, 3)))


def test_a_users_network_trains_and_its_gradients_are_right():
    torch.manual_seed(0)
    net, twin = Strided(), Strided().double()
    twin.load_state_dict(net.state_dict())
    x = torch.rand(3, 1, 8, 8)
    with torch.backends.mkldnn.flags(enabled=False):
        twin(x.double()).square().sum().backward()
    for network in (net, Foreign(net, stages=["wide"], image_size=8)):
        net.zero_grad()
        with protected():
            y = network(x)
        y.square().sum().backward()
        for ours, wanted in zip(net.parameters(), twin.parameters(), strict=True):
            assert relative_error(ours.grad, wanted.grad) < 1e-4
    history = fit(
        net,
        load("digits"),
        epochs=2,
        batch_size=64,
        lr=0.1,
        device="cpu",
        on_event=lambda event: None,
    )
    assert history[-1]["loss"] < history[0]["loss"]


def test_a_subclass_of_tensor_and_keyword_arguments_pass():
    class Tagged(torch.Tensor):
        pass

    x, weight = torch.randn(1, 4, 4, 4), torch.randn(2, 4, 1, 1)
    wanted = F.conv2d(x, weight, stride=2)
    with protected():
        assert torch.conv2d(input=x, weight=weight, stride=2).equal(wanted)
        tagged = F.conv2d(x.as_subclass(Tagged), weight, stride=2)
    assert isinstance(tagged, Tagged)
    assert current_mode() is None


@pytest.mark.parametrize("operation", ["conv", "linear", "matmul", "attention"])
def test_emulated_bfloat16_is_rounding_around_exact_sums(operation):
    """The oracle rounds the operands, computes in double precision and rounds the result."""
    torch.manual_seed(0)
    a, b = torch.randn(6, 16, 8, 8), torch.randn(24, 16, 3, 3)
    c, d = torch.randn(6, 5, 16), torch.randn(7, 16)
    call = {
        "conv": lambda a, b: F.conv2d(a, b, None, 1, 1),
        "linear": F.linear,
        "matmul": lambda c, d: c @ d.T,
        "attention": lambda c, d: F.scaled_dot_product_attention(c, c, c),
    }[operation]
    operands = (a, b) if operation == "conv" else (c, d)
    exact = call(*(x.bfloat16().double() for x in operands))
    found = emulate(call, *operands)
    assert found.dtype == torch.bfloat16
    error = (found.double() - exact).abs()
    assert bool(
        (error <= exact.abs() * 2**-8 * 1.001 + 1e-6).all()
    )  # half a unit in the last place
    assert float((found == exact.bfloat16()).double().mean()) > 0.99


def test_rounding_reaches_the_gradients():
    x = torch.tensor([[1.0 + 2**-12]], requires_grad=True)
    weight = torch.tensor([[3.0 + 2**-10]], requires_grad=True)
    emulate(F.linear, x, weight).backward(torch.tensor([[1.0]], dtype=torch.bfloat16))
    assert weight.grad.item() == 1.0  # the rounded x
    assert x.grad.item() == 3.0  # the rounded weight


def test_operands_in_a_list_are_emulated_too(monkeypatch):
    monkeypatch.setenv("SNNKD_BF16", "emulated")
    torch.manual_seed(0)
    a, b = torch.randn(5, 40), torch.randn(40, 7)
    with autocast("cpu", "bf16"):
        assert emulates_bf16("ij,jk->ik", [a, b])
        product = torch.einsum("ij,jk->ik", [a, b])
    assert torch.equal(product, emulate(torch.matmul, a, b))


@pytest.mark.parametrize("name, width", [("resnet20", 0.5), ("vgg11_rate", 0.125)])
def test_both_routes_of_bfloat16_agree(name, width, monkeypatch):
    """Native autocast is right on every CPU, only slow where the instructions are missing."""
    x, y = torch.randn(4, 3, 16, 16), torch.randint(0, 10, (4,))
    found = {}
    for route in ("native", "emulated"):
        monkeypatch.setenv("SNNKD_BF16", route)
        torch.manual_seed(0)
        net = create_model(name, width=width, image_size=16)
        with autocast("cpu", "bf16"):
            logits = net(x)
        F.cross_entropy(logits.float(), y).backward()
        found[route] = (
            logits.detach().float(),
            torch.cat([p.grad.flatten() for p in net.parameters()]),
        )
    (logits_a, grad_a), (logits_b, grad_b) = found.values()
    assert relative_error(logits_a, logits_b.double()) < 0.03
    assert float(F.cosine_similarity(grad_a, grad_b, dim=0)) > 0.99


def test_precision_auto_names_what_is_fast(monkeypatch):
    monkeypatch.setenv("SNNKD_BF16", "emulated")
    assert resolve_precision("auto") == "fp32"
    monkeypatch.setenv("SNNKD_BF16", "native")
    assert resolve_precision("auto") == "bf16"
    assert resolve_precision("bf16") == "bf16"
    monkeypatch.setenv("SNNKD_BF16", "fast")
    with pytest.raises(UserError, match="SNNKD_BF16.*emulated"):
        bf16_route()
    with pytest.raises(UserError, match="precision must be fp32, bf16 or fp16 in a stored run"):
        run_train(RunSpec(optim=OptimSpec(precision="auto")))


def test_precision_auto_trains():
    student = create_model("resnet20", T=2, width=0.25, depth=0.34, in_channels=1, image_size=8)
    history = fit(
        student,
        load("digits"),
        epochs=1,
        batch_size=128,
        precision="auto",
        device="cpu",
        on_event=lambda event: None,
    )
    assert history[-1]["loss"] > 0


@pytest.mark.parametrize("isa, expected", [("SSE41", "sse41"), ("AVX2", "avx2")])
def test_the_class_of_a_restricted_cpu(isa, expected):
    code = "from snnkd_nb.kernels.precision import cpu_class, has_native_bf16; print(cpu_class(), has_native_bf16())"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    flags = module.cpu_flags()
    if expected == "avx2" and "avx2" not in flags:
        pytest.skip("this CPU has no AVX2")
    assert said.stdout.split() == [expected, "False"], said.stderr


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({"sse4_1", "avx2", "avx512f", "avx512_bf16"}, "bf16"),
        ({"sse4_1", "avx2", "avx512f"}, "avx512"),
        ({"sse4_1", "avx2"}, "avx2"),
        ({"asimd", "bf16"}, "bf16"),
        ({"asimd"}, "other"),
    ],
)
def test_classes_of_cpus(flags, expected, monkeypatch):
    monkeypatch.setattr(module, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(module, "onednn_limit", lambda: "")
    assert cpu_class() == expected


def test_the_unguarded_operation_is_really_the_fault():
    """Where PyTorch has the fault on this CPU, the guard is needed; where it is mended, this test says so."""
    code = """
    import torch
    from torch.nn import functional as F
    x = torch.randn(3, 4, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(8, 4, 1, 1, requires_grad=True)
    for _ in range(300):
        torch.autograd.grad(F.conv2d(x, w, None, 2).square().sum(), [x, w])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, timeout=120
    )
    if done.returncode == 0:
        pytest.skip("this PyTorch and CPU compute the unguarded operation without a crash")
    assert done.returncode < 0
