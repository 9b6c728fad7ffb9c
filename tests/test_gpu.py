"""Triton kernels, on a GPU or through Triton's interpreter: equal to the equations and to the kernels for a CPU."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

from snnkd_nb.core import UserError
from snnkd_nb.kernels import flat, gpu, norm
from snnkd_nb.kernels.lif import lif
from snnkd_nb.kernels.surrogate import ATan, Sigmoid, Triangle
from snnkd_nb.models.zoo import create_model

DEVICE, CL = "cuda" if torch.cuda.is_available() else "cpu", torch.channels_last
NAMES = ("decay", "v_threshold", "v_reset", "decay_input", "detach_reset", "surrogate", "strict")
dynamics = st.tuples(
    st.sampled_from([0.2, 0.5, 1.0]),
    st.sampled_from([1.0, 0.3]),
    st.sampled_from([0.0, None, -0.3]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([Sigmoid(4.0), Triangle(1.0), ATan(2.0)]),
    st.booleans(),
)
quiet = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def graded(f, x, w, **kw):
    z = x.detach().requires_grad_()
    y = f(z, **kw)
    (y.float() * w).sum().backward()
    return y.detach(), z.grad.float()


@quiet
@given(
    T=st.integers(1, 16),
    shape=st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
    d=dynamics,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    last=st.booleans(),
    grid=st.booleans(),
    seed=st.integers(0, 99),
)
def test_neuron_equals_reference(T, shape, d, dtype, last, grid, seed):
    g = torch.Generator().manual_seed(seed)
    x, w = (1.5 * torch.randn(T * shape[0], *shape[1:], generator=g) for _ in range(2))
    if grid:
        x = (x * 4).round() / 4  # exactly on the threshold, often
    x, w, kw = x.to(DEVICE, dtype), w.to(DEVICE), dict(zip(NAMES, d), T=T)
    if last:
        x = x.contiguous(memory_format=CL)
    (a, ga), (b, gb) = (graded(lif, x, w, backend=k, **kw) for k in ("triton", "reference"))
    assert a.equal(b) and a.stride() == x.stride() and a.dtype == dtype
    near = 1e-5 if dtype == torch.float32 else 2e-2
    assert not x.numel() or torch.allclose(
        ga, gb, rtol=near, atol=near * max(1e-1, gb.abs().max().item())
    )


@quiet
@given(
    T=st.integers(1, 6),
    d=dynamics,
    x=st.lists(
        st.sampled_from(
            [1e4, -1e4, float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1.0, 3e38]
        ),
        min_size=1,
        max_size=30,
    ),
)
def test_extreme_numbers(T, d, x):
    x = torch.tensor(x, device=DEVICE).repeat(T, 1)
    (a, ga), (b, gb) = (
        graded(lif, x, torch.ones_like(x), backend=k, **dict(zip(NAMES, d)))
        for k in ("triton", "reference")
    )
    assert a.equal(b) and torch.allclose(ga, gb, rtol=1e-4, atol=1e-5, equal_nan=True)


@quiet
@given(
    T=st.integers(1, 5),
    b=st.integers(1, 3),
    c=st.sampled_from([1, 3, 16, 65, 130]),
    h=st.integers(2, 5),
    d=dynamics,
    add=st.booleans(),
    half=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 99),
)
def test_one_pass_equals_that_of_the_cpu(T, b, c, h, d, add, half, training, seed):
    torch.manual_seed(seed)
    x, r, w = (
        torch.randn(T * b, c, h, h)
        .to(torch.bfloat16 if half else torch.float32)
        .contiguous(memory_format=CL)
        for _ in range(3)
    )
    weight, bias, results, near = torch.rand(c), torch.rand(c), [], 2e-2 if half else 1e-4
    mean, var = norm.moments_of(x)
    for a, e in zip(gpu.moments_of(x.to(DEVICE)), (mean, var)):
        torch.testing.assert_close(a.cpu(), e, rtol=1e-5, atol=1e-6)
    for passes, task, device in (
        (norm.CPU_PASSES, flat.encode_neuron(*d), "cpu"),
        (gpu, gpu.encode_neuron(*d), DEVICE),
    ):
        z, s, *vectors = (v.to(device).detach().requires_grad_() for v in (x, r, weight, bias))
        y = norm.NormFire.apply(
            z,
            s if add else None,
            *vectors,
            mean.to(device),
            var.to(device),
            1e-5,
            T,
            task,
            training,
            passes,
        )
        (y.float() * w.to(device).float()).sum().backward()
        results.append(
            [
                v.detach().float().cpu()
                for v in (y, z.grad, *(v.grad for v in vectors), *([s.grad] if add else []))
            ]
        )
    (ya, *cpu), (yb, *other) = results
    assert ya.equal(yb)
    for p, q in zip(cpu, other):
        assert torch.allclose(p, q, rtol=near, atol=near * max(1, p.abs().max().item()))


def test_running_statistics_move_alike():
    x, bns = (
        (torch.randn(8, 5, 6, 7) * 3 + 4).contiguous(memory_format=CL),
        [torch.nn.BatchNorm2d(5).to(d) for d in ("cpu", DEVICE)],
    )
    d = (0.5, 1.0, 0.0, False, False, Triangle(1.0), True)
    norm.norm_fire(x, bns[0], 2, flat.encode_neuron(*d))
    norm.norm_fire(x.to(DEVICE), bns[1], 2, gpu.encode_neuron(*d), passes=gpu)
    for a, b in zip(*(bn.state_dict().values() for bn in bns)):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-5, atol=1e-5)
    assert bns[1].running_mean.abs().min() > 0.1


@pytest.mark.parametrize("name,T", [("resnet20", 3), ("vgg11_sastc", 2)])
def test_a_network_trains_the_same_with_either_kernels(monkeypatch, name, T):
    monkeypatch.setattr(norm, "MIN_FUSED_SIZE", 0)
    x, got = torch.rand(2, 3, 16, 16), {}
    for backend in ("fused", "triton"):
        torch.manual_seed(0)
        net = create_model(
            name,
            T=T,
            width=0.125,
            image_size=16,
            neuron="rate",
            neuron_args={"backend": backend, "surrogate": Sigmoid(2.0)},
        ).to(DEVICE if backend == "triton" else "cpu")
        y = net(x.to(next(net.parameters()).device))
        y.square().sum().backward()
        got[backend] = [y.detach().cpu(), *(p.grad.cpu() for p in net.parameters())]
    for a, b in zip(*got.values()):
        assert (a - b).norm() <= 1e-2 * b.norm() + 1e-5


def test_same_input_same_gradient():
    d = (0.5, 1.0, 0.0, False, False, Triangle(1.0), True)
    x, g = (torch.randn(8, 48, 9, 9, device=DEVICE).contiguous(memory_format=CL) for _ in range(2))
    scale, offset = torch.rand(48, device=DEVICE), torch.rand(48, device=DEVICE)
    one, two = (
        gpu.neuron_pass(x, None, g, scale, offset, 4, gpu.encode_neuron(*d)) for _ in range(2)
    )
    assert all(p.equal(q) for p, q in zip(one, two))


MACHINE_CODE = """
import re, subprocess, sys, tempfile, triton
from pathlib import Path
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
from snnkd_nb.kernels import gpu
kinds = dict.fromkeys(("x", "y", "g", "gx", "gy", "r"), "*bf16") | dict.fromkeys(("scale", "offset", "sums", "near", "times", "plus"), "*fp32") | dict.fromkeys(("n", "pixels", "C", "rows"), "i32")
for T, C in ((4, 3), (4, 512), (16, 64)):
    for name in ("lif_forward", "lif_backward", "moments", "norm_forward", "norm_neuron", "norm_input"):
        (_, P, W) = gpu.tile_grid(1000, C, gpu.block_size(T, 512) if name == "norm_neuron" else gpu.block_size(T))
        c = dict(T=T, STATIC=False, HARD=True, DETACH=False, KIND=0, BLOCK=gpu.block_size(T), P=P, W=W, ADD=True, LOOP=16)
        kernel = getattr(gpu, name)
        signature = {a: "constexpr" if a in c else kinds.get(a, "fp32") for a in kernel.arg_names}
        made = triton.compile(ASTSource(kernel, signature, {(i,): c[a] for i, a in enumerate(kernel.arg_names) if a in c}), target=GPUTarget("cuda", int(sys.argv[1]), 32), options=gpu.EXACT)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(made.asm["cubin"]), f.flush()
            used = subprocess.run([Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", "--dump-resource-usage", f.name], capture_output=True, text=True).stdout
        print(name, T, C, *(re.search(k + r":(\\d+)", used)[1] for k in ("STACK", "LOCAL")), "fma.rn.f32" in made.asm["ptx"], flush=True)
"""


@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile_to_machine_code(capability, tmp_path):
    "Also where there is no GPU, in the sizes and with the options they are launched with: nothing spills out of registers, no multiply-add in one rounding."
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }
    r = subprocess.run(
        [sys.executable, "-c", MACHINE_CODE, capability], env=env, capture_output=True, text=True
    )
    assert r.returncode == 0, r.stderr[-2000:]
    lines = [line.split() for line in r.stdout.splitlines()]
    assert len(lines) == 18 and [line for line in lines if line[3:] != ["0", "0", "False"]] == []


def test_every_launch_is_exact():
    "Triton fuses multiply-add unless it is told not to; then a spike of the backward pass may not be that of the forward."
    import inspect

    launches = [
        line
        for line in inspect.getsource(gpu).splitlines()
        if "[grid](" in line and ("lif_" in line or "norm_forward" in line or "norm_neuron" in line)
    ]
    assert len(launches) == 4 and all("**EXACT" in line for line in launches)


OFFSETS = """
import triton
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
from snnkd_nb.kernels import gpu
kinds = dict.fromkeys(("x", "y", "g", "gx", "gy", "r"), "*bf16") | dict.fromkeys(("scale", "offset", "sums", "near", "times", "plus"), "*fp32") | dict.fromkeys(("n", "pixels", "C", "rows"), "i32")
c = dict(T=3, STATIC=False, HARD=True, DETACH=False, KIND=0, BLOCK=128, P=4, W=32, ADD=True, LOOP=4)
for name in ("lif_forward", "lif_backward", "norm_forward", "norm_neuron", "norm_input"):
    kernel = getattr(gpu, name)
    signature = {a: "constexpr" if a in c else kinds.get(a, "fp32") for a in kernel.arg_names}
    ttir = triton.compile(ASTSource(kernel, signature, {(i,): c[a] for i, a in enumerate(kernel.arg_names) if a in c}), target=GPUTarget("cuda", 80, 32)).asm["ttir"]
    narrow = [line for line in ttir.splitlines() if "arith.muli" in line and line.rstrip().endswith(": i32") or "arith.muli" in line and ": i32 loc" in line]
    print(name, sum("%pixels" in line or "%n" in line and "get_program" not in line for line in narrow))
"""


def test_offsets_are_wide(tmp_path):
    "An activation may have more than 2^31 numbers: sizes are widened before they are multiplied."
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }
    r = subprocess.run([sys.executable, "-c", OFFSETS], env=env, capture_output=True, text=True)
    assert r.returncode == 0 and [line.split()[1] for line in r.stdout.splitlines()] == ["0"] * 5, (
        r.stdout + r.stderr[-1500:]
    )


def test_many_steps_take_the_reference():
    if DEVICE == "cpu":
        with pytest.raises(UserError, match="T=33"):
            lif(torch.rand(33, 2), backend="triton")
    else:
        with pytest.warns(UserWarning, match="T=33"):
            lif(torch.rand(33, 2, device=DEVICE))


def test_without_gpu_and_interpreter_there_is_a_clear_error(monkeypatch):
    if DEVICE == "cuda":
        pytest.skip("there is a GPU")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UserError, match="TRITON_INTERPRET"):
        lif(torch.rand(2, 3), backend="triton")
