"""CKDSNN's losses and its baselines beyond their notebooks: published numbers, shapes, precisions, students and teachers of many kinds."""

import numpy as np
import pytest
import torch
from helpers import create_small, load_golden, quiet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from snnkd_nb.core import UserError
from snnkd_nb.data.images import load
from snnkd_nb.losses.base import Batch, Distiller, mean_logits
from snnkd_nb.losses.baselines import bkd_loss, create_adapter, create_generator
from snnkd_nb.losses.ckdsnn import CKDSNN, SAMD, nld_loss, samd_loss
from snnkd_nb.losses.kd import kd_loss
from snnkd_nb.losses.maps import (
    SCALINGS,
    ClassMap,
    cam,
    grad_cam,
    isi_sam,
    rescale_maps,
    sam,
    same_size,
)
from snnkd_nb.losses.zoo import create_distiller
from snnkd_nb.models.foreign import timm
from snnkd_nb.models.taps import Foreign
from snnkd_nb.models.zoo import create_model
from snnkd_nb.training.loop import autocast, fit

METHODS = ("samd", "nld", "ckdsnn", "kdsnn", "bkd", "tet", "e2kd", "catkd")


def untouched(teacher):
    return all(p.grad is None for p in teacher.parameters())


# published numbers


def test_maps_and_samd_are_those_of_the_published_code():
    g = load_golden("ckdsnn_published_code")
    spikes = g["spikes"].clone().requires_grad_()
    a, b = (
        rescale_maps(sam(spikes), "batch"),
        rescale_maps(
            cam(g["teacher_feature"], g["classifier_weight"], g["predicted_class"]), "batch"
        ),
    )
    loss = samd_loss(a, b, squared=False)
    loss.backward()
    for ours, theirs in (
        (a, g["sam"]),
        (b, g["cam"]),
        (loss, g["samd_loss"]),
        (spikes.grad, g["grad_spikes"]),
    ):
        torch.testing.assert_close(ours.detach(), theirs, atol=1e-6, rtol=1e-5)


def test_nld_is_that_of_the_published_code():
    g = load_golden("ckdsnn_published_code")
    z = g["student_logits"].clone().requires_grad_()
    loss = nld_loss(z, g["teacher_logits"], mix="probabilities", draw=g["standard_normal_draw"])
    loss.backward()
    torch.testing.assert_close(loss.detach(), g["nld_loss"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(z.grad, g["grad_student_logits"], atol=1e-6, rtol=1e-5)


def test_the_methods_of_the_code_variant_are_the_published_code(monkeypatch):
    g = load_golden("ckdsnn_published_code")

    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 16, 1), nn.Linear(16, 10, bias=False)
            self.head.weight.data = g["classifier_weight"]

        def forward(self, x):
            return self.head(self.conv(x).mean((2, 3)))

    student, teacher = create_small(T=4), Foreign(Teacher(), {"last": "conv"}, image_size=8)
    both = CKDSNN(student, teacher, "code", layers={"student": "stage1", "teacher": "last"})
    batch = Distiller(student, teacher, [(1.0, both)]).run_networks(
        torch.rand(6, 1, 8, 8), torch.arange(6)
    )
    batch.feats_s["stage1"], batch.feats_t["last"] = (
        g["spikes"].clone().requires_grad_(),
        g["teacher_feature"],
    )
    batch.logits_t = nn.functional.one_hot(g["predicted_class"], 10).float()
    samd = both.terms(batch)["samd"]
    samd.backward()
    torch.testing.assert_close(samd.detach(), g["samd_loss"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(batch.feats_s["stage1"].grad, g["grad_spikes"], atol=1e-6, rtol=1e-5)
    batch.logits_s, batch.logits_t = g["student_logits"], g["teacher_logits"]
    monkeypatch.setattr(torch, "randn_like", lambda z: g["standard_normal_draw"])
    torch.testing.assert_close(
        both.parts[1].terms(batch)["nld"], g["nld_loss"], atol=1e-6, rtol=1e-5
    )


def test_the_blurred_loss_is_that_of_the_published_code():
    g = load_golden("bkd_loss")
    adapt, generate = create_adapter(12, 16), create_generator(16)
    for module, name in ((adapt, "align"), (generate, "generation")):
        module.load_state_dict(
            {k.split(".", 2)[2]: v for k, v in g.items() if k.startswith(f"param.{name}.")}
        )
    leaf = g["student"].clone().requires_grad_()
    loss = bkd_loss(adapt(leaf), g["teacher"], generate, g["mask"])
    loss.backward()
    torch.testing.assert_close(loss.detach(), g["loss"], atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(leaf.grad, g["grad_student"], atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_the_method_is_the_blurred_loss_of_the_published_code_and_its_weighted_logits(
    monkeypatch, variant
):
    g, (s, t) = (
        load_golden("bkd_loss"),
        torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(0)),
    )
    student, teacher = (
        Foreign(
            nn.Sequential(nn.Conv2d(1, 12, 1), nn.Flatten(), nn.Linear(12 * 64, 10)),
            {"last": "0"},
            image_size=8,
            in_channels=1,
        ),
        create_small(width=0.25),
    )
    method = create_distiller(
        "bkd",
        student,
        teacher,
        variant,
        layers={"student": "last", "teacher": "stage3"},
        logits=0.5,
        temp=3.0,
    ).methods[0]
    method.load_state_dict(
        {
            k.removeprefix("param.").replace("align", "adapt").replace("generation", "generate"): v
            for k, v in g.items()
            if k.startswith("param.")
        }
    )
    batch = Batch(
        None,
        torch.tensor([3, 1, 4, 1, 5]),
        s,
        t,
        {"last": g["student"].clone().requires_grad_()},
        {"stage3": g["teacher"]},
    )
    monkeypatch.setattr("snnkd_nb.losses.baselines.blank_channels", lambda f, ratio: g["mask"])
    terms = method.terms(batch)
    terms["bkd"].backward()
    torch.testing.assert_close(terms["bkd"].detach(), g["loss"], atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(batch.feats_s["last"].grad, g["grad_student"], atol=1e-8, rtol=1e-5)
    want = 0.0
    for a, b, y in zip(
        s.double(), t.double(), batch.y
    ):  # image by image, with nothing but exponentials
        p, q = ((z / 3).exp() / (z / 3).exp().sum() for z in (b, a))
        ce_s, ce_t = (-(z.exp() / z.exp().sum())[y].log() for z in (a, b))
        want += 0.5 * 9 * (1 - (-ce_s / ce_t).exp()) * (p * (p / q).log()).sum() / 5
    torch.testing.assert_close(terms["wsld"].double(), want, atol=1e-6, rtol=1e-5)


# shapes

sizes = st.integers(1, 9)
features = st.tuples(
    st.integers(1, 5), st.integers(1, 4), st.integers(1, 7), sizes, sizes, st.integers(0, 9999)
)


@settings(max_examples=40, deadline=None)
@given(features)
def test_sam_counts_every_spike_once_in_every_layout(shape):
    *dims, seed = shape
    spikes = (torch.rand(*dims, generator=torch.Generator().manual_seed(seed)) > 0.6).float()
    folded = (
        spikes.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, dims[:2])
    )
    for s in (spikes, folded, folded.bfloat16()):
        assert sam(s).equal(spikes.sum((0, 2))) and sam(s).dtype == torch.float32
    assert sam(folded).sum() == spikes.sum() and sam(spikes[0]).equal(spikes[0].sum(1))
    maps = isi_sam(spikes, 0.5)
    assert maps.shape == (dims[0], dims[1], *dims[3:]) and not maps[0].any()
    assert (
        maps <= spikes.sum(2) / (np.exp(0.5) - 1) + 1e-5
    ).all()  # a geometric series bounds the trace


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.tuples(sizes, sizes),
    st.tuples(sizes, sizes),
    st.sampled_from(SCALINGS),
    st.integers(0, 9999),
)
def test_samd_of_any_two_resolutions(batch, a, b, scaling, seed):
    g = torch.Generator().manual_seed(seed)
    s, t = (
        torch.rand(batch, *a, generator=g, dtype=torch.float64),
        torch.rand(batch, *b, generator=g, dtype=torch.float64),
    )
    s.requires_grad_()
    loss = samd_loss(s, t, scaling=scaling)
    loss.backward()
    assert loss >= -1e-6 and torch.isfinite(loss) and torch.isfinite(s.grad).all()
    assert abs(samd_loss(s, s, scaling=scaling)) < 1e-6
    small_s, small_t = same_size(s, t)
    assert small_s.shape[1:] == small_t.shape[1:] == tuple(map(min, a, b))
    each = torch.stack(
        [samd_loss(s[i : i + 1], t[i : i + 1], scaling=scaling) for i in range(batch)]
    ).mean()
    torch.testing.assert_close(loss, each, atol=1e-5, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.integers(2, 12), st.floats(0, 3), st.floats(0.5, 9), st.integers(0, 9999)
)
def test_nld_is_finite_and_its_mean_does_not_matter(batch, k, lam, temp, seed):
    g = torch.Generator().manual_seed(seed)
    s, t, xi = (torch.randn(batch, k, generator=g, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(
        nld_loss(s, t, temp, lam, draw=xi), kd_loss(s + lam * s.std(-1, keepdim=True) * xi, t, temp)
    )
    for mix in ("logits", "probabilities"):
        assert nld_loss(s, t, temp, 0.0, mix=mix) == kd_loss(s, t, temp)
        loss = nld_loss(s, t, temp, min(lam, 1.0), mix=mix, draw=xi)
        assert torch.isfinite(loss) and loss >= -1e-9
        torch.testing.assert_close(
            loss, nld_loss(s + 5, t - 2, temp, min(lam, 1.0), mix=mix, draw=xi)
        )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), sizes, sizes, st.integers(2, 7), st.integers(0, 9999))
def test_grad_cam_is_cam_over_positions(batch, c, h, w, k, seed):
    g = torch.Generator().manual_seed(seed)
    f, weight, y = (
        torch.randn(batch, c, h, w, generator=g),
        torch.randn(k, c, generator=g),
        torch.randint(k, (batch,), generator=g),
    )
    leaf = f.clone().requires_grad_()
    (leaf.mean((2, 3)) @ weight.T).gather(1, y[:, None]).sum().backward()
    torch.testing.assert_close(
        grad_cam(f, leaf.grad), cam(f, weight, y) / (h * w), atol=1e-5, rtol=1e-4
    )
    with pytest.raises(UserError, match="out of range"):
        cam(f, weight, y + k)


# methods


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_two_steps_of_every_method(digits, method, precision):
    torch.manual_seed(0)
    student, teacher = create_small(T=2), create_small(width=0.25)
    d = create_distiller(method, student, None if method == "tet" else teacher)
    d.train()
    opt, loader = torch.optim.SGD(d.parameters(), 0.05), iter(digits.loader("train", 16))
    for _ in range(2):
        with autocast("cpu", precision):
            terms, _ = d(*next(loader))
        assert all(torch.isfinite(v) and v.dtype == torch.float32 for v in terms.values())
        opt.zero_grad()
        sum(terms.values()).backward()
        opt.step()
    assert untouched(teacher) and all(
        p.grad is not None and torch.isfinite(p.grad).all() for p in student.parameters()
    )


@pytest.mark.parametrize("variant", ["paper", "scaled", "code"])
@pytest.mark.parametrize(
    "kw",
    [
        {"student_map": "isi"},
        {"student_map": "cam"},
        {"scaling": "l2"},
        {"scaling": "zscore"},
        {"scaling": "none"},
        {"rescale": "sample"},
        {"classes": "predicted"},
        {"layers": "stage1"},
        {"noise": "fixed", "sigma": 2.0},
        {"noise": "none"},
        {"mix": "probabilities"},
    ],
)
def test_every_switch_trains(digits, variant, kw):
    student, teacher = create_small(T=2), create_small(width=0.25)
    terms, _ = create_distiller("ckdsnn", student, teacher, variant, **kw)(
        *next(iter(digits.loader("train", 8)))
    )
    sum(terms.values()).backward()
    assert all(torch.isfinite(v) for v in terms.values()) and untouched(teacher)
    assert all(torch.isfinite(p.grad).all() for p in student.parameters())


SWITCHES = {
    "C1": {"student_map": ("sam", "cam")},
    "C4": {"classes": ("true", "predicted")},
    "C5": {"rescale": ("none", "batch")},
    "C6": {"squared": (True, False)},
    "C8 and C9": {"mix": ("logits", "probabilities")},
}


@pytest.mark.parametrize("divergence", SWITCHES)
def test_every_divergence_in_the_losses_is_a_switch(divergence):
    "The letter of the text and the published code, all else equal, give different numbers."
    torch.manual_seed(0)
    student, teacher, x, y = (
        create_small(T=2, width=0.5),
        create_small(width=0.5),
        torch.randn(6, 1, 8, 8),
        torch.arange(6),
    )
    ((name, values),) = SWITCHES[divergence].items()
    found = []
    for value in values:
        torch.manual_seed(1)
        d = create_distiller("ckdsnn", student, teacher, **{name: value})
        found.append(sum(d.train()(x, y)[0].values()).item())
    assert np.isfinite(found).all() and found[0] != found[1]


def test_every_divergence_in_the_networks_is_an_option_of_the_model():
    torch.manual_seed(0)
    x = 3 * torch.randn(2, 3, 16, 16)

    def make(name="resnet19_ckd", **kw):
        return create_model(name, T=2, width=0.125, image_size=16, **kw)

    def last(m):
        return m.train()(x, features=True)[1]["stage3"]

    assert (
        set(last(make()).unique().tolist()) <= {0, 1} and len(last(make(last="relu")).unique()) > 10
    )  # C2
    assert repr(make(neuron="if").stem) != repr(make(neuron="tet").stem)  # C3
    assert (
        len([m for m in make().head if isinstance(m, nn.Linear)])
        == 2
        == len([m for m in make("resnet20_ckd").head if isinstance(m, nn.Linear)])
    )  # C12
    few, many = (
        sum(p.numel() for p in create_model("resnet20_ckd", width=w).parameters()) for w in (1, 2)
    )
    assert few == pytest.approx(0.28e6, rel=0.1) and many > 3 * few  # C15


@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_changes_nothing_in_the_teacher(digits, method, variant):
    "C11: the published code leaves it in training mode, with a graph; here its statistics stay as they were."
    if method == "tet":
        pytest.skip("has no teacher")
    student, teacher = create_small(T=2), create_small(width=0.25).train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    d = create_distiller(method, student, teacher, variant).train()
    sum(d(*next(iter(digits.loader("train", 16))))[0].values()).backward()
    assert (
        all(v.equal(before[k]) for k, v in teacher.state_dict().items())
        and untouched(teacher)
        and not teacher.training
    )


@pytest.mark.parametrize(
    "student,layers",
    [
        ("resnet19_tet", None),
        ("resnet19_ckd", None),
        ("wrn16_2", None),
        ("vgg11_sastc", {"student": "stage2", "teacher": "stage1"}),
        ("vgg11_sastc", {"student": "stage1", "teacher": "stage3"}),
        ("spikformer", None),
    ],
)
@pytest.mark.parametrize("teacher", ["resnet20", "wrn16_2"])
def test_students_and_teachers_of_other_kinds_and_resolutions(digits, student, layers, teacher):
    student, teacher = create_small(student, T=2), create_small(teacher, width=0.25)
    x, y = next(iter(digits.loader("train", 5)))
    d = create_distiller("ckdsnn+e2kd", student, teacher, layers=layers)
    terms, _ = d(x, y)
    sum(terms.values()).backward()
    assert (
        set(terms) == {"ce", "samd", "nld", "e2kd"}
        and all(torch.isfinite(v) for v in terms.values())
        and untouched(teacher)
    )


def test_an_ordinary_student_is_one_step():
    student, teacher, x = create_small(), create_small(width=0.25), torch.rand(3, 1, 8, 8)
    d = create_distiller("samd", student, teacher)
    batch = d.run_networks(x, torch.arange(3))
    assert d.methods[0].maps(batch)[0].equal(batch.feats_s["stage3"].sum(1))


def test_the_teacher_runs_once_even_where_the_gradient_is_needed():
    student, teacher, calls = create_small(T=2), create_small("wrn16_2", width=0.25), []
    d = create_distiller("ckdsnn+e2kd", student, teacher)
    handles = [
        teacher.register_forward_hook(lambda *a: calls.append("whole")),
        teacher.stem.register_forward_hook(lambda *a: calls.append("front")),
    ]
    d(torch.rand(3, 1, 8, 8), torch.arange(3))
    for h in handles:
        h.remove()
    assert calls == ["front", "whole"] and not d.methods[0].parts[0].teacher_cam.linears


def test_the_gradient_of_the_maps_leaves_nothing_behind():
    teacher = create_small("resnet19_tet", width=0.25)
    state = {k: v.clone() for k, v in teacher.state_dict().items()}
    teacher.train()
    look = ClassMap(teacher, "stage1")
    with torch.no_grad():
        feature = teacher.eval()(torch.rand(2, 1, 8, 8), features=True)[1]["stage1"]
    teacher.train()
    maps = look(feature, torch.tensor([0, 1]))
    assert teacher.training and not maps.requires_grad and untouched(teacher)
    assert all(v.equal(state[k]) for k, v in teacher.state_dict().items())


def test_silent_students_and_teachers_give_finite_gradients():
    student, teacher = create_small(T=2), create_small(width=0.25)
    teacher.head.out.weight.data.zero_()
    d = create_distiller("ckdsnn", student, teacher, rescale="sample")
    batch = d.run_networks(torch.rand(2, 1, 8, 8), torch.arange(2))
    batch.feats_s["stage3"] = torch.zeros_like(batch.feats_s["stage3"]).requires_grad_()
    samd = d.methods[0].terms(batch)["samd"]
    samd.backward()
    assert abs(samd) < 1e-6 and torch.isfinite(batch.feats_s["stage3"].grad).all()


def map_loss_by_hand(spikes, feature, weight, classes, variant):
    "SAMD image by image in double precision: spikes (T, B, C, H, W), feature (B, C, H, W)."
    steps, batch, channels = spikes.shape[:3]
    teacher_channels = feature.shape[1]
    positions = feature.shape[-1] * feature.shape[-2]
    factor = (
        1.0 if variant == "code" else 1 / positions
    )  # CAM, or Grad-CAM under a mean and a linear layer
    student_maps, teacher_maps = [], []
    for i in range(batch):
        count = sum(spikes[t, i, c] for t in range(steps) for c in range(channels))
        evidence = sum(
            factor * weight[classes[i], c] * feature[i, c] for c in range(teacher_channels)
        )
        student_maps.append(count)
        teacher_maps.append(np.maximum(evidence, 0))
    if variant == "scaled":
        student_maps = [(m - m.min()) / (np.ptp(m) or 1) for m in student_maps]
        teacher_maps = [(m - m.min()) / (np.ptp(m) or 1) for m in teacher_maps]
    if variant == "code":
        scaled = []
        for maps in (np.stack(student_maps), np.stack(teacher_maps)):
            scaled.append((maps - maps.min()) / (maps.max() - maps.min() + 1e-3))
        student_maps, teacher_maps = scaled
    total = 0.0
    for s, t in zip(student_maps, teacher_maps, strict=True):
        p_s = np.exp(s / 2) / np.exp(s / 2).sum()
        p_t = np.exp(t / 2) / np.exp(t / 2).sum()
        total += (p_t * np.log(p_t / p_s)).sum() / batch
    return total if variant == "code" else 4 * total


@pytest.mark.parametrize("variant", ["paper", "scaled", "code"])
def test_each_reading_of_samd_is_an_independent_loop(variant):
    torch.manual_seed(0)
    student, teacher = create_small(T=3, width=0.5), create_small(width=0.5)
    distiller = create_distiller("ckdsnn", student, teacher, variant)
    y = torch.tensor([3, 1, 4, 1])
    batch = distiller.run_networks(torch.rand(4, 1, 8, 8), y)
    batch.feats_s["stage3"] = (torch.rand(3, 4, 16, 2, 2) > 0.6).float()
    batch.feats_t["stage3"] = 5 * torch.rand(4, 32, 2, 2)
    classes = batch.logits_t.argmax(1) if variant == "code" else y
    want = map_loss_by_hand(
        batch.feats_s["stage3"].double().numpy(),
        batch.feats_t["stage3"].double().numpy(),
        teacher.head.out.weight.detach().double().numpy(),
        classes.tolist(),
        variant,
    )
    got = distiller.methods[0].terms(batch)["samd"]
    assert float(got) == pytest.approx(want, rel=1e-5)


def test_the_readings_of_samd_are_far_apart():
    "The golden values of one batch: the scaled loss is hundreds of times smaller than equation 4."
    torch.manual_seed(0)
    spikes = (torch.rand(4, 6, 64, 8, 8) > 0.8).float()
    feature, weight = torch.rand(6, 64, 8, 8), 0.1 * torch.randn(10, 64)
    found = {
        v: map_loss_by_hand(spikes.numpy(), feature.numpy(), weight.numpy(), range(6), v)
        for v in ("paper", "scaled", "code")
    }
    assert found["paper"] > 100 * found["scaled"] > 100 * found["code"] > 0


@pytest.mark.parametrize("method", ["kd", "nld", "feature+kd", "bkd"])
def test_scaled_is_a_variant_of_samd_alone(method):
    with pytest.raises(UserError, match="no such reading; it exists for ckdsnn, samd"):
        create_distiller(method, create_small(T=2), create_small(), "scaled")


def test_the_other_methods_of_a_scaled_sum_follow_the_paper():
    distiller = create_distiller("samd+nld+kd", create_small(T=2), create_small(), "scaled")
    assert [m.variant for m in distiller.methods] == ["scaled", "paper", "paper"]
    with pytest.raises(UserError, match="did you mean 'scaled'"):
        create_distiller("samd", create_small(T=2), create_small(), "scaledd")


def test_batch_mates_matter_only_in_the_published_code():
    torch.manual_seed(0)
    student, teacher, x, y = (
        create_small(T=2, width=0.5),
        create_small(width=0.5),
        torch.rand(6, 1, 8, 8),
        torch.arange(6),
    )
    for variant in ("paper", "scaled", "code"):
        d = create_distiller("samd", student, teacher, variant)
        d.eval()
        with torch.no_grad():
            whole, parts = (
                d(x, y)[0]["samd"],
                [d(x[i : i + 1], y[i : i + 1])[0]["samd"] for i in range(6)],
            )
        alone = sum(parts) / 6
        assert (abs(whole - alone) < 1e-6 * max(1, whole)) == (variant != "code")


def test_noise_is_the_same_after_a_break(digits, tmp_path):
    class Stop(Exception):
        pass

    def stop(event):
        raise Stop

    def run(on_event=quiet, seed=0, **kw):
        torch.manual_seed(seed)
        student, teacher = create_small(T=1, depth=0.34), create_small(depth=0.34)
        with torch.no_grad():
            [
                p.copy_(torch.linspace(-0.3, 0.3, p.numel()).view(p.shape))
                for p in teacher.parameters()
            ]
        fit(
            student,
            digits,
            create_distiller("ckdsnn+bkd", student, teacher),
            epochs=2,
            batch_size=256,
            seed=3,
            device="cpu",
            on_event=on_event,
            weak_teacher="accept",
            **kw,
        )
        return student.state_dict()

    whole, file = run(), tmp_path / "run.ckpt"
    with pytest.raises(Stop):
        run(stop, checkpoint=file)
    resumed = run(checkpoint=file)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_terms_of_a_sum_and_terms_twice(digits):
    student, teacher = create_small(T=2), create_small(width=0.25)
    x, y = next(iter(digits.loader("train", 8)))
    torch.manual_seed(0)
    terms, _ = create_distiller("ckdsnn+0.5*kd+2*bkd", student, teacher, beta=3.0)(x, y)
    assert list(terms) == ["ce", "samd", "nld", "kd", "bkd"]
    for twice in ("ckdsnn+samd", "ckdsnn+nld", "kdsnn+kd", "kdsnn+feature"):
        with pytest.raises(UserError, match="leave one of them out"):
            create_distiller(twice, student, teacher)(x, y)
    with pytest.raises(UserError, match="in place of the cross-entropy"):
        create_distiller("tet", student, ce_weight=0.5)
    assert set(create_distiller("tet+kd", student, teacher)(x, y)[0]) == {"ce", "tet", "kd"}


@pytest.mark.parametrize(
    "kw,says",
    [
        ({"lam": -0.1}, "lam = -0.1"),
        ({"temp": 0}, "temp = 0"),
        ({"tau": 0}, "tau = 0"),
        ({"gamma": -1}, "gamma = -1"),
        ({"beta": float("nan")}, "beta = nan"),
        ({"layers": "stage7"}, "did you mean"),
        ({"scaling": "max"}, "saliency scaling"),
        ({"classes": "all"}, "choice of classes"),
        ({"tmep": 2}, "did you mean 'temp'"),
    ],
)
def test_mistakes_are_one_line(kw, says):
    with pytest.raises(UserError, match=says) as e:
        create_distiller("ckdsnn", create_small(T=2), create_small(), **kw)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("method", ["samd", "ckdsnn", "e2kd", "catkd"])
def test_maps_of_one_pixel_are_refused(method):
    flat = {"name": "vgg11_sastc"}
    with pytest.raises(UserError, match="the teacher's stage4 is a map of 1×1"):
        create_distiller(method, create_small(T=2), create_small(**flat))
    with pytest.raises(UserError, match="the student's stage4 is a map of 1×1"):
        create_distiller(method, create_small(**flat, T=2), create_small())


def test_any_module_teaches_maps_by_path(digits):
    teacher = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 16, 10),
    )
    student = create_small(T=2)
    d = create_distiller("ckdsnn", student, teacher, layers={"student": "stage3", "teacher": "3"})
    terms, _ = d(*next(iter(digits.loader("train", 8))))
    sum(terms.values()).backward()
    assert (
        d.methods[0].parts[0].teacher_cam.size == (4, 4)
        and untouched(teacher)
        and torch.isfinite(terms["samd"])
    )


@pytest.mark.parametrize("tokens", ["map", "raw"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_vit_teaches_from_its_patches(digits, tokens, precision):
    try:
        timm()
    except UserError as e:
        pytest.skip(str(e))
    torch.manual_seed(0)
    teacher = create_model(
        "vit_small", width=0.1, blocks=3, patch=2, in_channels=1, image_size=8, tokens=tokens
    )
    student = create_small(T=2)
    d = create_distiller("ckdsnn", student, teacher)
    x, y = next(iter(digits.loader("train", 4)))
    with autocast("cpu", precision):
        terms, _ = d(x, y)
    look = d.methods[0].parts[0].teacher_cam
    assert (
        look.stage == "stage2"
        and look.size == (4, 4)
        and look.linears is None
        and torch.isfinite(terms["samd"])
        and untouched(teacher)
    )
    with pytest.raises(UserError, match="class token alone"):
        create_distiller(
            "samd", student, teacher, layers={"student": "stage3", "teacher": "stage3"}
        )
    if precision == "bf16":
        return
    batch = d.run_networks(x, y)
    got = look(batch.feats_t["stage2"], y)
    hooked, whole = {}, teacher.net
    hook = whole.blocks[1].register_forward_hook(lambda m, i, o: hooked.update(out=o))
    (score,) = (whole(x).gather(1, y[:, None]).sum(),)
    hook.remove()
    grads = torch.autograd.grad(score, hooked["out"])[0][:, 1:]
    by_hand = (grads.mean(1, keepdim=True) * hooked["out"][:, 1:]).sum(-1).relu().view(4, 4, 4)
    torch.testing.assert_close(got, by_hand.detach(), atol=1e-6, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:no fused neurons")
def test_maps_of_a_module_of_another_precision():
    student, teacher = create_small(T=2).double(), create_small(width=0.25).double()
    d = create_distiller("ckdsnn", student, teacher)
    terms, logits = d(torch.rand(3, 1, 8, 8, dtype=torch.float64), torch.arange(3))
    assert all(torch.isfinite(v) for v in terms.values()) and logits.dtype == torch.float64
    assert isinstance(d.methods[0].parts[0], SAMD) and mean_logits(logits).shape == (3, 10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu(method):
    student, teacher = (
        create_small(T=2),
        create_small("wrn16_2" if method == "e2kd" else "resnet20", width=0.25),
    )
    d = create_distiller(method, student, None if method == "tet" else teacher).to("cuda")
    with autocast("cuda", "bf16"):
        terms, _ = d(torch.rand(8, 1, 8, 8, device="cuda"), torch.arange(8, device="cuda"))
    sum(terms.values()).backward()
    assert all(torch.isfinite(v) for v in terms.values()) and untouched(teacher)


# rates, shapes, precisions


def test_maps_of_rates_are_sums_over_the_steps_and_intervals_need_steps():
    torch.manual_seed(0)
    student, teacher, x, y = (
        create_small(T=4, depth=0.34),
        create_small(depth=0.34),
        torch.randn(6, 1, 8, 8),
        torch.arange(6),
    )
    for options in ({}, {"rescale": "sample"}, {"scaling": "none"}):
        d, found = create_distiller("samd", student, teacher, **options).eval(), {}
        for student.gradient in ("bptt", "rate"):
            found[student.gradient] = float(d(x, y)[0]["samd"])
        assert found["rate"] == pytest.approx(found["bptt"], rel=1e-3), options
    student.gradient = "bptt"
    for method in ("samd", "ckdsnn"):
        with pytest.raises(UserError, match="rate"):
            fit(
                student,
                load("digits"),
                create_distiller(method, student, teacher, student_map="isi"),
                epochs=1,
                gradient="rate",
                on_event=quiet,
                weak_teacher="accept",
            )


@pytest.mark.parametrize(
    "call",
    [
        lambda: samd_loss(torch.rand(1, 4, 4), torch.rand(6, 4, 4)),
        lambda: nld_loss(torch.rand(6, 1), torch.rand(6, 10), lam=0.0),
        lambda: nld_loss(torch.rand(6, 1), torch.rand(6, 1)),
        lambda: nld_loss(torch.rand(2, 6, 10), torch.rand(2, 6, 10)),
        lambda: kd_loss(torch.rand(6, 1), torch.rand(6, 10)),
    ],
)
def test_shapes_that_would_broadcast_are_refused(call):
    with pytest.raises(UserError, match="of shapes"):
        call()


def test_a_pooled_linear_head_is_one_in_bfloat16_too():
    teacher = create_small(depth=0.34)
    with autocast("cpu", "bf16"):
        assert ClassMap(teacher).linears
    assert ClassMap(teacher).linears and ClassMap(create_small(depth=0.34).bfloat16()).linears
