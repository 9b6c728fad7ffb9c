"""Convolutions by tiles: equal to the definition in double precision, whatever the shape."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from snnkd_nb.core import UserError
from snnkd_nb.kernels import convolution
from snnkd_nb.kernels.convolution import fast_conv2d, is_worthwhile

CL = torch.channels_last


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def reference(x, weight, padding):
    """Convolve without oneDNN."""
    with torch.backends.mkldnn.flags(enabled=False):
        return F.conv2d(x, weight, padding=padding)


def results(convolve, x, weight, g, padding):
    """Return result, gradient of x and gradient of the weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = convolve(x, weight, padding=padding)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), g.to(y.dtype))]


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def example(images, channels, targets, height, width, padding, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, channels, height, width, generator=generator)
    weight = torch.randn(targets, channels, 3, 3, generator=generator)
    sides = [side + 2 * padding - 2 for side in (height, width)]
    g = torch.randn(images, targets, *sides, generator=generator)
    return x, weight, g


def arranged(x, layout):
    """Return the same numbers in another order in memory."""
    if layout == "channels_last":
        return x.contiguous(memory_format=CL)
    if layout == "slice":
        return F.pad(x, (1, 2, 0, 1))[:, :, : x.shape[2], 1:-2]
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return x


CHANNELS = st.sampled_from([1, 2, 3, 7, 8, 9, 16, 17, 24, 33, 64, 70])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    images=st.integers(1, 9),
    channels=CHANNELS,
    targets=CHANNELS,
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    padding=st.integers(0, 2),
    layouts=st.tuples(*[st.sampled_from(["", "channels_last", "slice", "transposed"])] * 3),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_it_is_the_convolution(
    images, channels, targets, height, width, padding, layouts, threads, seed
):
    height, width = (max(side, 3 - 2 * padding) for side in (height, width))
    tensors = example(images, channels, targets, height, width, padding, seed)
    expected = results(reference, *(t.double() for t in tensors), padding)
    torch.set_num_threads(threads)
    tensors = [arranged(t, layout) for t, layout in zip(tensors, layouts, strict=True)]
    found = results(fast_conv2d, *tensors, padding)
    assert found[0].is_contiguous(memory_format=CL)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and a.shape == b.shape
        assert distance(a, b) < 2e-6


@pytest.mark.parametrize("channels, targets, side", [(512, 300, 4), (130, 2048, 3), (2048, 5, 2)])
def test_many_channels(channels, targets, side):
    tensors = example(4, channels, targets, side, side, 1)
    expected = results(reference, *(t.double() for t in tensors), 1)
    torch.set_num_threads(2)
    for a, b in zip(results(fast_conv2d, *tensors, 1), expected, strict=True):
        assert distance(a, b) < 5e-6


def test_large_images_of_many_blocks_on_threads():
    tensors = example(5, 16, 24, 61, 250, 1)
    expected = results(reference, *(t.double() for t in tensors), 1)
    torch.set_num_threads(4)
    for a, b in zip(results(fast_conv2d, *tensors, 1), expected, strict=True):
        assert distance(a, b) < 2e-6


def neighbours(values):
    """Return the bfloat16 numbers below and above."""
    bits = values.view(torch.int16).int()
    return (bits - 1).short().view(torch.bfloat16), (bits + 1).short().view(torch.bfloat16)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    images=st.integers(1, 5),
    channels=CHANNELS,
    targets=CHANNELS,
    side=st.integers(1, 9),
    padding=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_bfloat16_rounds_operands_and_result_only(images, channels, targets, side, padding, seed):
    x, weight, g = example(images, channels, targets, side, side + 2, padding, seed)
    x, g = x.bfloat16(), g.bfloat16()
    rounded = weight.bfloat16()
    expected = results(reference, x.double(), rounded.double(), g.double(), padding)
    y, gx, gw = results(fast_conv2d, x, weight, g, padding)
    assert y.dtype == gx.dtype == torch.bfloat16 and gw.dtype == torch.float32
    assert torch.equal(gw, gw.bfloat16().float())
    for a, b in zip((y, gx, gw), expected, strict=True):
        a, nearest = a.bfloat16(), b.bfloat16()
        below, above = neighbours(nearest)
        near_zero = b.abs() < 1e-3 * b.abs().max()  # cancellation: errors of the float32 sum show
        assert ((a == nearest) | (a == below) | (a == above) | near_zero).all()
        assert (a.double() - b).abs().max() <= 2**-8 * b.abs().max()
        differing = ((a != nearest) & ~near_zero).sum()
        assert differing <= 3 + 0.02 * a.numel()


def test_small_integers_are_exact():
    generator = torch.Generator().manual_seed(0)
    spikes = torch.randint(0, 2, (4, 32, 9, 8), generator=generator).float()
    weight = 4.0 * torch.randint(-8, 9, (24, 32, 3, 3), generator=generator)
    g = torch.randint(-4, 5, (4, 24, 9, 8), generator=generator).float()
    found = results(fast_conv2d, spikes, weight, g, 1)
    for a, b in zip(found[:2], results(reference, spikes, weight, g, 1)[:2], strict=True):
        assert torch.equal(a, b)


def test_empty_batch():
    x, weight, _ = example(0, 16, 24, 8, 8, 1)
    y, gx, gw = results(fast_conv2d, x, weight, torch.empty(0, 24, 8, 8), 1)
    assert y.shape == (0, 24, 8, 8) and gx.shape == x.shape
    assert torch.equal(gw, torch.zeros_like(weight))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_where_it_should_be_and_not_in_other_images(value):
    x, weight, _ = example(3, 16, 16, 8, 8, 1)
    x[1, 3, 4, 5] = value
    finite = fast_conv2d(x, weight, padding=1).isfinite()
    expected = reference(x, weight, 1).isfinite()
    assert not (finite & ~expected).any()
    assert finite[0].all() and finite[2].all() and finite[1, :, :2].all()
    weight[2, 0, 1, 1] = value
    finite = fast_conv2d(x.nan_to_num(0, 0), weight, padding=1).isfinite()
    assert not finite[:, 2].any() and finite[:, :2].all() and finite[:, 3:].all()


def test_only_gradients_that_are_needed(monkeypatch):
    x, weight, g = example(2, 16, 16, 8, 8, 1)
    _, gx, gw = results(fast_conv2d, x, weight, g, 1)
    called = []
    for name in ("convolution_pass", "weight_pass"):
        function = getattr(convolution, name)
        monkeypatch.setattr(
            convolution, name, lambda *a, f=function, n=name: called.append(n) or f(*a)
        )
    frozen = weight.clone().requires_grad_()
    fast_conv2d(x, frozen, padding=1).backward(g)
    assert called == ["convolution_pass", "weight_pass"] and torch.equal(frozen.grad, gw)
    called.clear()
    source = x.clone().requires_grad_()
    fast_conv2d(source, weight, padding=1).backward(g)
    assert called == ["convolution_pass"] * 2 and torch.equal(source.grad, gx)
    assert not fast_conv2d(x, weight, padding=1).requires_grad


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_call_gives_the_same_bits(threads):
    torch.set_num_threads(threads)
    tensors = example(24, 32, 40, 17, 16, 1)
    first = results(fast_conv2d, *tensors, 1)
    for _ in range(5):
        for a, b in zip(results(fast_conv2d, *tensors, 1), first, strict=True):
            assert torch.equal(a, b)


def test_result_and_gradient_of_the_source_do_not_depend_on_threads():
    tensors = example(24, 32, 40, 17, 16, 1)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(results(fast_conv2d, *tensors, 1)[:2])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_without_the_openmp_of_pytorch(monkeypatch):
    tensors = example(24, 32, 40, 17, 16, 1)
    torch.set_num_threads(2)
    expected = results(fast_conv2d, *tensors, 1)
    monkeypatch.setattr("snnkd_nb.kernels.flat.find_openmp", lambda: None)
    for a, b in zip(results(fast_conv2d, *tensors, 1), expected, strict=True):
        assert torch.equal(a, b)


def test_autocast_changes_nothing():
    tensors = example(2, 16, 16, 8, 8, 1)
    expected = results(fast_conv2d, *tensors, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(fast_conv2d, *tensors, 1)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_gradients_cannot_be_differentiated_again():
    x, weight, _ = example(1, 16, 16, 4, 4, 1)
    x.requires_grad_()
    y = fast_conv2d(x, weight, padding=1)
    (gx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gx.sum().backward()


def test_what_is_covered():
    x, weight = torch.empty(64, 32, 16, 16), torch.empty(48, 32, 3, 3)
    for padding in (0, 1, 2, (1, 1)):
        assert is_worthwhile(x, weight, 1, padding, 1, 1)
    assert is_worthwhile(x.bfloat16(), weight, (1, 1), (1, 1), (1, 1), 1)
    assert is_worthwhile(torch.empty(64, 64, 7, 7), torch.empty(64, 64, 3, 3), padding=1)
    other_padding = [(x, weight, 1, padding) for padding in (3, "same", (1, 0))]
    assert not any(is_worthwhile(*arguments) for arguments in other_padding)
    assert not is_worthwhile(x, weight, 2, 1)
    assert not is_worthwhile(x, weight, 1, 1, 2)
    assert not is_worthwhile(x, torch.empty(48, 16, 3, 3), 1, 1, 1, 2)
    assert not is_worthwhile(x, torch.empty(48, 32, 1, 1))
    assert not is_worthwhile(x, torch.empty(48, 32, 5, 5), padding=2)
    assert not is_worthwhile(x[0], weight, padding=1)
    assert not is_worthwhile(x[:0], weight, padding=1)
    assert not is_worthwhile(x.double(), weight.double(), padding=1)
    assert not is_worthwhile(x.to("meta"), weight.to("meta"), padding=1)
    assert not is_worthwhile(x[:, :3], weight[:, :3], padding=1)  # few channels
    assert not is_worthwhile(x[:1, :, :8, :8], weight, padding=1)  # little work
    assert not is_worthwhile(
        torch.empty(512, 64, 3, 3), torch.empty(64, 64, 3, 3), padding=1
    )  # borders


def test_what_cannot_be_computed_is_refused():
    x, weight = torch.empty(2, 8, 6, 6), torch.empty(8, 8, 3, 3)
    fast_conv2d(x, weight)
    with pytest.raises(UserError, match=r"stride 2"):
        fast_conv2d(x, weight, stride=2)
    with pytest.raises(UserError, match=r"weight \(8, 8, 1, 1\)"):
        fast_conv2d(x, weight[..., :1, :1])
    with pytest.raises(UserError, match=r"x \(2, 8, 2, 6\)"):
        fast_conv2d(x[:, :, :2], weight)
    with pytest.raises(UserError, match=r"weight \(0, 8, 3, 3\)"):
        fast_conv2d(x, weight[:0])


OTHER_WIDTH = """
import torch
from test_convolution import distance, example, fast_conv2d, reference, results

for shape in ((2, 5, 3, 7, 6, 1), (3, 40, 24, 5, 4, 0), (1, 33, 70, 6, 9, 2)):
    tensors = example(*shape)
    expected = results(reference, *(t.double() for t in tensors), shape[-1])
    for a, b in zip(results(fast_conv2d, *tensors, shape[-1]), expected):
        assert distance(a, b) < 2e-6
"""


@pytest.mark.parametrize("width", ["4", "8", "16"])
def test_vectors_of_another_width(width):
    environment = dict(os.environ, SNNKD_VECTOR_WIDTH=width)
    subprocess.run(
        [sys.executable, "-c", OTHER_WIDTH],
        cwd=os.path.dirname(__file__),
        env=environment,
        check=True,
    )


def test_a_width_that_no_vector_has():
    environment = dict(os.environ, SNNKD_VECTOR_WIDTH="5")
    command = [sys.executable, "-c", "import snnkd_nb.kernels.convolution"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode and "must be 4, 8 or 16, got 5" in process.stderr
