"""What must hold for every neuron: fused equals the equations, the equations equal the papers' code, memory is respected."""

import os
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import functional, layer
from spikingjelly.activation_based import neuron as sj_neuron
from spikingjelly.activation_based import surrogate as sj

from snnkd_nb.core import UserError
from snnkd_nb.kernels import flat
from snnkd_nb.kernels.lif import is_dense, lif, lif_reference
from snnkd_nb.kernels.surrogate import ATan, PiecewiseQuadratic, Sigmoid, Surrogate, Triangle
from snnkd_nb.models.zoo import create_model
from snnkd_nb.neurons.lif import (
    IF,
    LIF,
    FromSpikingJelly,
    ToSpikingJelly,
    create_neuron,
    list_neurons,
)

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = sorted((ROOT / "tests/golden").glob("lif_*.npz"))
SURROGATES = (
    Sigmoid(4.0),
    Sigmoid(torch.tensor(1.5)),
    Triangle(1.0),
    Triangle(0.3),
    ATan(2.0),
    PiecewiseQuadratic(0.7),
)
CL = torch.channels_last


def run(f, x, w, **kw):
    "Spikes and the gradient of (spikes · w).sum()."
    z = x.detach().requires_grad_()
    y = f(z, **kw)
    (y.float() * w).sum().backward()
    return y.detach(), z.grad


def near(a, b, rel):
    return not b.numel() or torch.allclose(
        a.float(), b.float(), rtol=rel, atol=1e-6 + rel * b.float().abs().max().item()
    )


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden(path, backend):
    z = np.load(path)
    x, w = torch.from_numpy(z["x"]), torch.from_numpy(z["w"])
    if "gamma" in z:
        kw = {"decay": z["decay"].item(), "surrogate": Triangle(z["gamma"].item()), "strict": True}
    else:
        kw = {
            "decay": 1 - 1 / z["tau"].item(),
            "v_reset": None if z["soft"] else 0.0,
            "decay_input": bool(z["decay_input"]),
            "detach_reset": bool(z["detach"]),
            "surrogate": Sigmoid(z["alpha"].item()),
        }
    y, grad = run(lif, x, w, backend=backend, **kw)
    assert y.equal(torch.from_numpy(z["spikes"])) and torch.allclose(
        grad, torch.from_numpy(z["grad_x"]), rtol=1e-5, atol=1e-5
    )


def test_all_golden_files_are_here():
    assert len(GOLDEN) == 30


def layout(x, kind):
    "The same numbers in another order of memory; x is (T, B, C, H, W)."
    if kind == "channels_last":
        return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    if kind == "time inside":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if kind == "slice":
        return torch.stack([x, -x], -1)[..., 0]
    if kind == "offset":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if kind == "expanded":
        return x[:, :1].expand(x.shape) if x.shape[1] else x
    return x.contiguous()


numbers = st.floats(-3, 3, width=32)
switches = st.fixed_dictionaries(
    {
        "decay": st.sampled_from([0.2, 0.5, 0.75, 1.0, 1e-3]),
        "v_threshold": st.sampled_from([1.0, 0.5, 0.1]),
        "v_reset": st.sampled_from([0.0, None, -0.3, 0.2]),
        "decay_input": st.booleans(),
        "detach_reset": st.booleans(),
        "strict": st.booleans(),
        "surrogate": st.sampled_from(SURROGATES),
    }
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(
    T=st.integers(1, 16),
    shape=st.tuples(*[st.integers(0, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)]),
    kw=switches,
    kind=st.sampled_from(
        ["contiguous", "channels_last", "time inside", "slice", "offset", "expanded"]
    ),
    half=st.booleans(),
    seed=st.integers(0, 2**31),
    grid=st.booleans(),
)
def test_fused_equals_reference(T, shape, kw, kind, half, seed, grid):
    g = torch.Generator().manual_seed(seed)
    x, w = 1.5 * torch.randn(T, *shape, generator=g), torch.randn(T, *shape, generator=g)
    if grid:
        x = (x * 4).round() / 4  # exactly on the threshold, often
    x = layout(x.to(torch.bfloat16 if half else torch.float32), kind)
    (a, ga), (b, gb) = (run(lif, x, w, backend=k, **kw) for k in ("fused", "reference"))
    assert a.equal(b) and a.dtype == x.dtype and near(ga, gb, 2e-2 if half else 1e-5)
    if is_dense(x):
        assert a.stride() == x.stride() and ga.stride() == x.stride()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    T=st.integers(1, 8),
    b=st.integers(0, 3),
    kw=switches,
    half=st.booleans(),
    last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_static_equals_repeated(T, b, kw, half, last, seed):
    g = torch.Generator().manual_seed(seed)
    x, w = (
        torch.randn(b, 3, 4, 5, generator=g).to(torch.bfloat16 if half else torch.float32),
        torch.randn(T, b, 3, 4, 5, generator=g),
    )
    x = x.contiguous(memory_format=CL) if last else x
    a, ga = run(lif, x, w, T=T, static=True, **kw)
    b_, gb = run(
        lambda z, **k: lif(z.repeat(T, 1, 1, 1), T=T, backend="reference", **k),
        x,
        w.flatten(0, 1),
        **kw,
    )
    assert (
        a.flatten(0, 1).equal(b_)
        and near(ga, gb, 3e-2 if half else 1e-5)
        and ga.stride() == x.stride()
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kw=switches,
    x=st.lists(
        st.sampled_from(
            [1e4, -1e4, float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1.0, 1e-42, 3e38]
        ),
        min_size=1,
        max_size=40,
    ),
)
def test_extreme_numbers(kw, x):
    x = torch.tensor(x).repeat(3, 1)
    (a, ga), (b, gb) = (
        run(lif, x, torch.ones_like(x), backend=k, **kw) for k in ("fused", "reference")
    )
    assert a.equal(b) and torch.allclose(ga, gb, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert not a[:, x[0].isnan()].any()


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("v_reset", [0.0, -0.4, None])
@pytest.mark.parametrize("surrogate", [Sigmoid(3.0), ATan(2.0)], ids=str)
def test_gradient_of_the_smooth_neuron(surrogate, v_reset, detach):
    "With the primitive in place of the step, the gradient that treats the reset as constant or not is that of finite differences."
    x = torch.randn(
        1 if detach else 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    kw = {
        "decay": 0.7,
        "decay_input": True,
        "v_reset": v_reset,
        "surrogate": surrogate,
        "detach_reset": detach,
        "smooth": True,
    }
    assert torch.autograd.gradcheck(lambda z: lif_reference(z, **kw), x)


@pytest.mark.parametrize("surrogate", [Triangle(1.0), PiecewiseQuadratic(1.5)], ids=str)
def test_gradient_of_the_smooth_neuron_away_from_kinks(surrogate):
    x = torch.tensor(
        [[0.4, 0.7, 1.2, 1.35], [0.45, 0.31, 0.1, 0.8]], dtype=torch.float64, requires_grad=True
    )
    assert torch.autograd.gradcheck(
        lambda z: lif_reference(z, decay=0.5, surrogate=surrogate, smooth=True), x
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    soft=st.booleans(),
    detach=st.booleans(),
    decay_input=st.booleans(),
    tau=st.sampled_from([1.25, 2.0, 4.0]),
    pick=st.integers(0, 2),
    T=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
def test_equals_spikingjelly(soft, detach, decay_input, tau, pick, T, seed):
    ours, theirs = (
        (Sigmoid(4.0), sj.Sigmoid(4.0)),
        (ATan(2.0), sj.ATan(2.0)),
        (PiecewiseQuadratic(1.0), sj.PiecewiseQuadratic(1.0)),
    )[pick]
    v_reset = None if soft else 0.0
    node = sj_neuron.LIFNode(
        tau=tau,
        decay_input=decay_input,
        v_reset=v_reset,
        detach_reset=detach,
        surrogate_function=theirs,
        step_mode="m",
    )
    g = torch.Generator().manual_seed(seed)
    x, w = 1.5 * torch.randn(T, 3, 40, generator=g), torch.randn(T, 3, 40, generator=g)
    kw = {
        "decay": 1 - 1 / tau,
        "decay_input": decay_input,
        "v_reset": v_reset,
        "detach_reset": detach,
        "surrogate": ours,
    }
    (a, ga), (b, gb) = run(lif, x, w, **kw), run(node, x, w)
    assert a.equal(b) and torch.allclose(ga, gb, rtol=1e-4, atol=1e-5)


def test_gradients_in_another_memory_format():
    x = torch.randn(4, 3, 5, 6).contiguous(memory_format=CL)
    w = torch.randn(4, 3, 5, 6)
    grads = []
    for g in (w, w.contiguous(memory_format=CL), w.transpose(2, 3).contiguous().transpose(2, 3)):
        z = x.clone().requires_grad_()
        lif(z, T=2).backward(g)
        grads.append(z.grad)
    assert all(g.equal(grads[0]) and g.is_contiguous(memory_format=CL) for g in grads)
    z = x.clone().requires_grad_()
    lif(z, T=2).sum().backward()  # an expanded gradient
    assert z.grad.abs().sum() > 0


@pytest.mark.parametrize("size", [(0, 3), (4, 0, 2)])
def test_nothing_in_nothing_out(size):
    x = torch.zeros(size, requires_grad=True)
    y = lif(x, T=4)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape


def test_keeps_nothing_but_its_input():
    x = torch.randn(4, 1000, requires_grad=True)
    y = lif(x)
    assert [t.data_ptr() for t in y.grad_fn.saved_tensors] == [x.data_ptr()]
    with torch.no_grad():
        assert lif(x).grad_fn is None


def test_input_changed_in_place_is_noticed():
    x = torch.randn(4, 10, requires_grad=True)
    z = x * 1
    y = lif(z)
    z.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def test_autocast_keeps_half_precision_outside_and_single_inside():
    layer_, act = torch.nn.Linear(8, 16), create_neuron("tet", 4)
    with torch.autocast("cpu", torch.bfloat16):
        z = layer_(torch.randn(8, 8))
        y = act(z)
    assert z.dtype == y.dtype == torch.bfloat16 and y.equal(act(z.float()).bfloat16())
    y.float().sum().backward()
    assert layer_.weight.grad.dtype == torch.float32


def test_python_threads():
    "Large enough for several workers each; forward and backward from eight Python threads at once."
    x, w = torch.randn(4, 40_000), torch.randn(4, 40_000)
    expected, got = run(lif, x, w), [None] * 8

    def work(i):
        for _ in range(5):
            got[i] = run(lif, x, w)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        torch.set_num_threads(before)
    assert all(a.equal(expected[0]) and g.equal(expected[1]) for a, g in got)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same(threads, monkeypatch):
    x, w, before = torch.randn(3, 100_001), torch.randn(3, 100_001), torch.get_num_threads()
    expected = run(lif, x, w)
    torch.set_num_threads(threads)
    try:
        with_openmp = run(lif, x, w)
        monkeypatch.setattr(
            flat, "find_openmp", lambda: None
        )  # as where PyTorch has no OpenMP library
        without = run(lif, x, w)
    finally:
        torch.set_num_threads(before)
    assert all(a.equal(b) for got in (with_openmp, without) for a, b in zip(got, expected))


def test_openmp_of_pytorch_is_found():
    assert flat.find_openmp() is not None or sys.platform != "linux"


def in_fresh_process(code, **env):
    r = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        timeout=120,
    )
    assert r.returncode == 0, r.stderr[-2000:]
    return r.stdout


def test_without_numba_there_is_one_notice():
    code = (
        "import sys, warnings; sys.modules['numba'] = None\nimport torch\nfrom snnkd_nb.kernels.lif import lif\n"
        "with warnings.catch_warnings(record=True) as w:\n    warnings.simplefilter('always')\n    ys = [lif(torch.ones(2, 3)) for _ in range(3)]\n"
        "print(len(w), 'numba' in str(w[0].message), ys[0].sum().item())"
    )
    assert in_fresh_process(code).split() == ["1", "True", "6.0"]


def test_where_nothing_can_be_cached_it_is_compiled():
    code = (
        "import numba.core.caching as c\ndef full(*a, **k): raise OSError(28, 'No space left on device')\nc.IndexDataCacheFile.save = full\n"
        "import torch\nfrom snnkd_nb.kernels.lif import lif\nprint(lif(torch.ones(2, 3), backend='fused').sum().item())"
    )
    assert in_fresh_process(
        code, NUMBA_CACHE_DIR="/proc/none" if sys.platform == "linux" else ""
    ).split() == ["6.0"]


def test_import_is_lazy():
    assert in_fresh_process(
        "import sys, snnkd_nb.neurons.lif; print('numba' in sys.modules, 'spikingjelly' in sys.modules)"
    ).split() == ["False", "False"]


def test_a_cpu_never_loads_triton():
    code = (
        "import sys, torch\nfrom snnkd_nb.models.zoo import create_model\nnet = create_model('resnet20', T=2)\n"
        "net(torch.rand(8, 3, 32, 32)).sum().backward()\nprint('triton' in sys.modules, 'snnkd_nb.kernels.gpu' in sys.modules)"
    )
    assert in_fresh_process(code).split() == ["False", "False"]


def test_a_type_without_kernel_is_said_once():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            lif(torch.ones(2, 3, dtype=torch.float16))
    assert len(said) == 1 and "float16" in str(said[0].message)
    with pytest.raises(UserError, match="float16"):
        lif(torch.ones(2, 3, dtype=torch.float16), backend="fused")


@pytest.mark.parametrize(
    "surrogate", [Sigmoid(), Triangle(), PiecewiseQuadratic(), ATan()], ids=str
)
def test_surrogates_of_special_numbers_and_of_tensor_slopes(surrogate):
    far, missing, low = surrogate(torch.tensor([float("inf"), float("nan"), -1e4]))
    assert far == 0 and missing.isnan() and 0 <= low < 1e-6
    u = torch.linspace(-2, 2, 41)
    with_tensor = type(surrogate)(torch.tensor(surrogate.param))
    assert torch.allclose(with_tensor(u), surrogate(u))
    assert surrogate == type(surrogate)(surrogate.param)


def test_the_name_in_the_cache_changes_with_every_module_of_kernels(tmp_path, monkeypatch):
    for name in ("vector.py", "flat.py"):
        (tmp_path / name).write_text("WIDTH = 16")
    monkeypatch.setattr(flat.kernels_package, "__path__", [str(tmp_path)])
    compute_hash = flat.hash_kernel_sources.__wrapped__
    before = compute_hash()
    assert compute_hash() == before
    (tmp_path / "vector.py").write_text("WIDTH = 8")
    assert compute_hash() != before


def test_old_names_still_work():
    with pytest.warns(DeprecationWarning, match="encode_neuron"):
        assert getattr(flat, "neuron") is flat.encode_neuron  # noqa: B009
    with pytest.warns(DeprecationWarning, match="sigmoid_grad"):
        assert getattr(flat, "bell") is flat.sigmoid_grad  # noqa: B009


def test_a_surrogate_of_the_user():
    class Flat(Surrogate):
        alpha = param = 1.0

        def __call__(self, u):
            return torch.ones_like(u)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run(lif, torch.randn(1, 5), torch.ones(1, 5), surrogate=Flat())[1].equal(
            torch.ones(1, 5)
        )


def test_a_slope_that_changes_is_read_anew():
    alpha = torch.tensor(2.0)
    neuron, x, w = LIF(2, surrogate=Sigmoid(alpha)), torch.randn(4, 6), torch.ones(4, 6)
    first = run(neuron, x, w)[1]
    alpha.fill_(5.0)
    assert not run(neuron, x, w)[1].equal(first) and run(neuron, x, w)[1].equal(
        run(LIF(2, surrogate=Sigmoid(5.0)), x, w)[1]
    )


@pytest.mark.parametrize("name", list_neurons())
def test_presets(name):
    neuron, x = create_neuron(name, 4), torch.randn(8, 3, 4, 4).contiguous(memory_format=CL)
    y = neuron(x)
    assert y.is_contiguous(memory_format=CL) and y.equal(neuron(x)) and y.any()
    assert not list(neuron.parameters()) and pickle.loads(pickle.dumps(neuron))(x).equal(y)
    assert create_neuron(name, 4, backend="reference")(x).equal(y)


def test_if_is_a_lif_without_leak():
    x = torch.randn(6, 5)
    assert IF(3, v_reset=None)(x).equal(LIF(3, decay=1.0, v_reset=None)(x))


@pytest.mark.parametrize(
    "call",
    [
        lambda: create_neuron("tett", 2),
        lambda: create_neuron("tet", 0),
        lambda: create_neuron("tet", 2.5),
        lambda: create_neuron("tet", 2, taau=2.0),
        lambda: create_neuron("tet", 2, gamma=-1.0),
        lambda: LIF(2, tau=0.5),
        lambda: LIF(2, tau=2.0, decay=0.5),
        lambda: LIF(3)(torch.ones(4, 2)),
        lambda: lif(torch.ones(2, 2), decay=1.5),
        lambda: lif(torch.ones(2, 2), decay=0),
        lambda: lif(torch.ones(2, 2), v_threshold=float("nan")),
        lambda: lif(torch.ones(2, 2), v_reset=float("inf")),
        lambda: lif(torch.ones(2, 2), T=0),
        lambda: lif(torch.ones(2, 2), T=2.0),
        lambda: lif(torch.ones(2, 2), static=True),
        lambda: lif(torch.ones(6, 2), T=4),
        lambda: lif([1.0, 2.0]),
        lambda: lif(torch.ones(2, 2), backend="fusd"),
        lambda: Sigmoid(0.0),
        lambda: Triangle(float("nan")),
        lambda: lif(torch.ones(2, 2), backend="cuda"),
        lambda: lif(torch.ones(0, 2)),
    ],
)
def test_one_line_errors(call):
    with pytest.raises(UserError) as e:
        call()
    assert "\n" not in str(e.value)


def test_bridge_to_spikingjelly_and_back():
    x = torch.randn(4, 2, 3, 6, 6)
    assert ToSpikingJelly("dsas")(x).equal(sj_neuron.LIFNode(step_mode="m")(x))
    conv = torch.nn.Sequential(layer.Conv2d(3, 4, 3, step_mode="m"), ToSpikingJelly("sew"))
    y = conv(x)
    functional.reset_net(conv)
    assert conv(x).equal(y)
    functional.set_step_mode(conv, "s")
    with pytest.raises(UserError, match="step_mode"):
        conv[1](x[0])
    node = FromSpikingJelly(sj_neuron.LIFNode(), 4)
    flat_x = x.flatten(0, 1).contiguous(memory_format=CL).requires_grad_()
    assert node(flat_x).equal(create_neuron("dsas", 4)(flat_x)) and node(flat_x).is_contiguous(
        memory_format=CL
    )
    node(flat_x).sum().backward()
    assert flat_x.grad.abs().sum() > 0 and node.node.v == 0.0
    with pytest.raises(UserError):
        FromSpikingJelly(sj_neuron.LIFNode(), 0)


@pytest.mark.parametrize("static", [False, True])
def test_compiled_neuron_is_one_operation(static):
    def f(x):
        return lif(x + 0.1, T=3, static=static, v_reset=None, surrogate=ATan(2.0))

    x, w = (
        torch.randn(6, 2, 4, 4).contiguous(memory_format=CL),
        torch.randn((3, 6, 2, 4, 4) if static else (6, 2, 4, 4)),
    )
    torch._dynamo.reset()
    (a, ga), (b, gb) = (
        run(g, x, w) for g in (f, torch.compile(f, backend="aot_eager", fullgraph=True))
    )
    assert a.equal(b) and ga.equal(gb) and a.stride() == b.stride() and ga.abs().max() > 0


def test_compiled_network_is_the_network():
    net, x = create_model("resnet20", T=2, width=0.25), torch.randn(4, 3, 16, 16)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    a, b = (
        torch.autograd.grad(f(x).square().sum(), list(net.parameters()))
        for f in (net.eval(), compiled)
    )
    for p, q in zip(a, b):
        torch.testing.assert_close(p, q)


def test_compiled_falls_back_as_it_does_uncompiled():
    code = (
        "import sys, warnings; sys.modules['numba'] = None\nimport torch\nfrom snnkd_nb.kernels.lif import lif\n"
        "f = torch.compile(lambda x: lif(x), backend='aot_eager')\n"
        "with warnings.catch_warnings(record=True) as w:\n    warnings.simplefilter('always')\n    y = f(torch.ones(2, 3))\n"
        "print(sum('numba' in str(v.message) for v in w), y.sum().item())"
    )
    assert in_fresh_process(code).split() == ["1", "6.0"]
    torch._dynamo.reset()
    with pytest.raises(Exception, match="float64"):
        torch.compile(lambda x: lif(x, backend="fused"), backend="aot_eager")(
            torch.ones(2, 3, dtype=torch.float64)
        )


def test_operation_keeps_torchs_rules():
    x = torch.randn(6, 2, requires_grad=True)
    from snnkd_nb.kernels.lif import lif_op

    torch.library.opcheck(
        lif_op, (x, 3, False, "auto", 0.5, 1.0, 0.0, False, False, 1, 1.0, 1.0, True)
    )
