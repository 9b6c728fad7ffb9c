"""Gram matrices equal those of flattened rows, whatever the shape, memory order and precision, and so do their gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snnkd_nb.core import UserError
from snnkd_nb.kernels.projection import (
    NORMALIZATIONS,
    flatten_features,
    gram,
    gram_distance,
    is_dense_behind,
    normalize_gram,
)


def arranged(x, kind):
    if kind == "channels_last":
        return (
            x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
        )
    if kind == "slice":
        return torch.cat([x, x], 2)[:, :, : x.shape[2]]
    if kind == "batch first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "expanded":
        return x[:1].expand(x.shape)
    return x


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    T=st.integers(1, 5),
    B=st.integers(0, 6),
    c=st.integers(1, 5),
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["contiguous", "channels_last", "slice", "batch first", "expanded"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_gram_is_that_of_rows(T, B, c, h, w, seed, kind, dtype):
    g = torch.Generator().manual_seed(seed)
    x = arranged(torch.randn(T, B, c, h, w, generator=g).to(dtype), kind)
    weights = torch.randn(T, B, B, generator=g, dtype=torch.promote_types(dtype, torch.float32))
    a, b = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    mine, slow = gram(a), torch.einsum("tin,tjn->tij", b.flatten(2), b.flatten(2))
    near = 1e-2 if dtype == torch.bfloat16 else 1e-4
    assert mine.dtype == weights.dtype and mine.shape == (T, B, B)
    (mine * weights).sum().backward()
    (slow * weights).sum().backward()
    for p, q in ((mine, slow), (a.grad, b.grad)):
        assert not p.numel() or torch.allclose(
            p.double(), q, rtol=near, atol=near * max(1.0, q.abs().max().item())
        )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 6),
    how=st.sampled_from(NORMALIZATIONS),
    scale=st.floats(0.1, 10),
    seed=st.integers(0, 99),
)
def test_scale_of_the_features_does_not_matter(B, how, scale, seed):
    x = torch.rand(2, B, 7, generator=torch.Generator().manual_seed(seed))
    a, b = (normalize_gram(gram(v), how) for v in (x, scale * x))
    if how == "none":
        b = b / scale**2
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-5) and gram_distance(a, a).eq(0).all()


def test_no_copy_of_channels_last_features():
    x = torch.randn(6, 3, 4, 4).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 3))
    assert (
        flatten_features(x).data_ptr() == x.data_ptr()
        and is_dense_behind(x, 2)
        and not is_dense_behind(x[..., :3], 2)
    )


@pytest.mark.parametrize("x", [torch.rand(3), torch.ones(2, 3, 4, dtype=torch.int64)])
def test_one_line_errors(x):
    with pytest.raises(UserError):
        gram(x)


def test_autocast_does_not_coarsen():
    x = torch.randn(2, 8, 500, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside, exact = gram(x), gram(x.detach().bfloat16(), exact=True)
    assert inside.equal(gram(x)) and exact.equal(gram(x.detach().bfloat16().float()))
    with torch.autocast("cpu", torch.bfloat16):
        (a,) = torch.autograd.grad(inside.square().sum(), x)
    assert a.equal(torch.autograd.grad(gram(x).square().sum(), x)[0])


def test_large_numbers_in_float16():
    assert torch.allclose(
        gram(torch.full((1, 2, 100), 40.0, dtype=torch.float16)), torch.tensor(160_000.0)
    )
