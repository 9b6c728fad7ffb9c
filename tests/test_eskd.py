"""ESKD: hybrid models of every family, their loss, what must stay frozen, training and probes."""

import copy
import itertools
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import quiet
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import neuron as sj_neuron
from torch import nn

import snnkd_nb.metrics.likeness  # noqa: F401 its probes are registered
from snnkd_nb.core import UserError
from snnkd_nb.data.images import load
from snnkd_nb.losses.base import Distiller, mean_logits, observe
from snnkd_nb.losses.eskd import (
    ESKD,
    HybridNet,
    alpha_at,
    compute_betas,
    create_hybrids,
    mean_rates,
)
from snnkd_nb.losses.kd import kd_loss
from snnkd_nb.losses.zoo import create_distiller
from snnkd_nb.metrics.activity import check_probes, list_probes
from snnkd_nb.metrics.likeness import cosine, hybrid_accuracies, hybrid_cosines, hybrids
from snnkd_nb.models.blocks import eval_mode
from snnkd_nb.models.foreign import vit_small
from snnkd_nb.models.hybrid import (
    ADAPTERS,
    Adapter,
    Branch,
    Hybrids,
    frozen,
    pair_by_depth,
    stage_pairs,
)
from snnkd_nb.models.taps import Foreign
from snnkd_nb.models.zoo import create_model
from snnkd_nb.neurons.lif import FromSpikingJelly
from snnkd_nb.neurons.rate import Rate
from snnkd_nb.spec import DataSpec, ModelSpec, OptimSpec, RunSpec
from snnkd_nb.store import Store
from snnkd_nb.training.job import run_train
from snnkd_nb.training.loop import create_optimizer, evaluate, fit

SMALL = {"width": 0.25, "depth": 0.34, "image_size": 8}


def pair(T=2, seed=0, **kw):
    torch.manual_seed(seed)
    student, teacher = (
        create_model("resnet20", T=T, neuron="rate", **SMALL),
        create_model("resnet20", **{**SMALL, "width": 0.5}),
    )
    for net in (student, teacher):
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, 0.8, 1.6)
                nn.init.uniform_(m.bias, 0, 0.4)
                nn.init.uniform_(m.running_var, 0.5, 1.5)
    return student, teacher, create_distiller("eskd", student, teacher, **kw).train()


def batch(n=6, size=8):
    return torch.randn(n, 3, size, size), torch.arange(n) % 10


# the frozen tail

FAMILIES = {
    "resnet18": {"depth": 0.1},
    "resnet50": {"depth": 0.1},
    "resnet19_rate": {"depth": 0.1},
    "vgg13": {},
    "vggsnn": {},
    "wrn16_2": {"depth": 0.1},
    "resnet34_imagenet": {"depth": 0.1},
    "pyramidnet20": {"depth": 0.1},
    "preact_resnet18": {"depth": 0.1},
    "vit_small": {"blocks": 2, "patch": 4},
    "torchvision:resnet18": {},
    "torchvision:squeezenet1_1": {},
    "timm:resnet18": {},
    "timm:convnext_atto": {},
}


def teacher_of(name, size=32):
    torch.manual_seed(0)
    kw = {} if ":" in name else {"width": 0.1}
    return create_model(name, image_size=size, **kw, **FAMILIES[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_frozen_tail_says_of_its_own_features_what_the_teacher_says(name):
    net, x = teacher_of(name).train(), torch.randn(2, 3, 32, 32)
    shapes = net.feature_shapes()
    with frozen(net):
        logits, feats = net(x, features=True)
    made = Hybrids([Branch(n, n, n) for n in shapes], shapes, net, shapes, "identity")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for n in shapes:
        leaf = feats[n].detach().requires_grad_()
        token = (
            feats[n].prefix.detach().requires_grad_() if hasattr(feats[n], "prefix") else leaf
        )  # all that a ViT's classifier reads of its last block
        if token is not leaf:
            leaf.prefix = token
        out = made.tail(n, leaf)
        assert torch.allclose(out, logits, atol=1e-5)
        assert torch.autograd.grad(out.square().sum(), token)[0].abs().sum() > 0
    assert (
        net.training
        and all(p.requires_grad and p.grad is None for p in net.parameters())
        and all(v.equal(before[k]) for k, v in net.state_dict().items())
    )


@pytest.mark.parametrize(
    "name, student",
    [
        ("resnet18", "resnet18"),
        ("resnet34_imagenet", "sew_resnet18"),
        ("torchvision:resnet18", "preact_resnet18"),
        ("timm:resnet18", "sew_resnet18"),
        ("vit_small", "spikingformer"),
        ("vit_small", "spikformer"),
        ("vgg13", "vgg13"),
        ("timm:convnext_atto", "resnet18"),
    ],
)
def test_any_teacher_with_any_student(name, student):
    teacher = teacher_of(name)
    extra = (
        {"blocks": 2}
        if student.endswith("former")
        else {}
        if student == "vgg13"
        else {"depth": 0.1}
    )
    net = create_model(
        student,
        T=2,
        width=0.1,
        image_size=32,
        neuron="rate",
        neuron_args={"v_threshold": 0.3},
        **extra,
    )
    d = create_distiller("eskd", net, teacher, positions="all").train()
    net.gradient = "rate"
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    terms, decision = d(torch.randn(4, 3, 32, 32), torch.arange(4))
    assert (
        {"ce", "kd"} < set(terms)
        and all(v.isfinite() for v in terms.values())
        and decision.shape == (4, 10)
    )
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in d.methods.parameters())
    assert all(p.grad is None for p in teacher.parameters()) and all(
        v.equal(before[k]) for k, v in teacher.state_dict().items()
    )
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.stem.parameters())


# pairs and positions


def test_adapters_of_resnet18_and_34_have_as_many_parameters_as_printed():
    with torch.device("meta"):
        nets = [
            create_model(n, T=T)
            for n, T in (
                ("resnet18", 4),
                ("resnet18", None),
                ("resnet34", None),
                ("resnet19_rate", 4),
            )
        ]
    for teacher in nets[1:3]:
        made = create_hybrids(nets[0], teacher)
        assert sum(p.numel() for p in made.parameters()) == 173_824 and made.names == (
            "M0",
            "M1",
            "M2",
        )
    wide = create_hybrids(nets[3], nets[2])
    assert [(b.name, b.student, b.teacher) for b in wide.branches] == [
        (f"M{k}", f"stage{k + 1}", f"stage{k + 1}") for k in range(3)
    ]
    assert create_hybrids(nets[0], nets[1], "all").names == ("MH", "M0", "M1", "M2", "Mfc")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=7),
    st.lists(st.integers(1, 4), min_size=1, max_size=7),
    st.booleans(),
    st.booleans(),
)
def test_pairs_have_one_resolution_and_keep_the_order(s, t, stem_s, stem_t):
    def shapes(sizes, stem):
        sizes = sorted(sizes, reverse=True)
        return {
            **({"stem": (3, sizes[0], sizes[0])} if stem else {}),
            **{f"stage{i + 1}": (3, n, n) for i, n in enumerate(sizes)},
        }

    mine, theirs = shapes(s, stem_s), shapes(t, stem_t)
    pairs, names = stage_pairs(mine, theirs), (list(mine), list(theirs))
    alone = len(set(s)) == len(set(t)) == 1
    for i in (0, 1):
        at = [names[i].index(p[i]) for p in pairs]
        assert at == sorted(set(at))
    for a, b in pairs:
        assert (alone or mine[a][-2:] == theirs[b][-2:]) and (a == "stem") == (b == "stem")
    for size in set(s) & set(t):
        assert (
            sum(mine[a][-1] == size for a, _ in pairs if a != "stem")
            == min(s.count(size), t.count(size))
            or alone
        )
    if alone:
        assert pairs[-1] == (names[0][-1], names[1][-1])


@given(st.integers(1, 12), st.integers(1, 12))
def test_depths_agree(a, b):
    pairs = pair_by_depth(range(a), range(b))
    assert (
        len(pairs) == min(a, b)
        and pairs[-1] == (a - 1, b - 1)
        and all(abs((i + 1) / a - (j + 1) / b) < 1 / min(a, b) for i, j in pairs)
    )


@pytest.mark.parametrize(
    "kw, text",
    [
        (
            {"positions": [0, 5]},
            "position 5: the hybrid models of these networks are MH, M0, M1, Mfc",
        ),
        ({"positions": -1}, "position -1"),
        ({"positions": ["Mh"]}, "position 'Mh'"),
        ({"pairs": [("stage1", "stage7")]}, "did you mean 'stage"),
        ({"pairs": [("stage7", "stage1")]}, "did you mean 'stage"),
        ({"pairs": ["stage1"]}, "pairs ="),
        ({"pairs": [("stage1", "stage1"), ("stage1", "stage2")]}, "give every stage once"),
        ({"alpha": 2}, "alpha = 2"),
        ({"alpha": "up"}, "course of alpha"),
        ({"beta": [1]}, "a list of 2"),
        ({"beta": "even"}, "rule for beta"),
        ({"adapter": "5x5"}, "unknown adapter"),
        ({"adapter": "identity"}, "4 channels and the teacher's 8"),
        ({"prefix": "cls"}, "unknown prefix"),
        ({"pairs": [("head", "stage1")]}, "'head' of the student puts out no map.*stage1, stage2"),
        ({"pairs": [("pool", "stage1")]}, "'pool' of the student puts out no map"),
        ({"pairs": [("stage1", "head")]}, "unknown stage of the teacher 'head'"),
        ({"pairs": 5}, "pairs = 5: give"),
        ({"pairs": [(1, 2)]}, "pairs ="),
        ({"positions": 1.5}, "position 1.5: .*give H, 0, 1, fc"),
        ({"positions": [True]}, "position True"),
        ({"positions": {}}, "position {}"),
        ({"adapter": ["1x1"]}, "adapter = .'1x1'.: give a text"),
        ({"prefix": ["mean"]}, "prefix = .'mean'.: give a text"),
        ({"relu": "no"}, "relu = 'no': give True"),
        ({"beta": float("inf")}, "beta = inf: .*finite"),
        ({"beta": [1, float("nan")]}, "beta = "),
        ({"temp": float("inf")}, "temp = inf"),
        ({"temp": 0}, "temp = 0"),
        ({"tmp": 1}, "did you mean 'eskd.temp'|did you mean 'temp'"),
    ],
)
def test_mistakes_are_one_line(kw, text):
    with pytest.raises(UserError, match=text) as e:
        pair(**kw)
    assert "\n" not in str(e.value)


def test_numpy_numbers_are_positions_and_weights():
    assert pair(positions=np.int64(1), beta=np.float32(0.5))[2].methods[0].hybrids.names == (
        "M1",
    ) and pair(positions=np.array([1, 0]))[2].methods[0].hybrids.names == ("M0", "M1")


def test_hybrids_name_what_is_missing():
    student, _teacher, d = pair()
    made, x = d.methods[0].hybrids, torch.rand(2, 4, 8, 8)
    for wrong, text in (
        (lambda: made.tail("M9", x), "unknown hybrid model 'M9': .*valid: M0, M1"),
        (lambda: made.logits("M9", {}), "unknown hybrid model 'M9'"),
        (lambda: HybridNet(student, made, ["M0"]), "unknown hybrid model"),
        (
            lambda: made({}),
            "M0 begins with the student's 'stage1', and rates are given of nothing: give those of stage1, stage2",
        ),
        (lambda: made.adapted({"stage1": x}), "M1 begins .* of stage1: give"),
    ):
        with pytest.raises(UserError, match=text) as e:
            wrong()
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "kw",
    [
        {"positions": [1, 0]},
        {"positions": ["stage2", "M0"]},
        {"pairs": [("stage2", "stage2"), ("stage1", "stage1")]},
        {"pairs": [("stage2", "stage2"), ("stage1", "stage1")], "positions": [1, 0]},
    ],
)
def test_a_list_of_weights_follows_the_order_that_is_asked_for(kw):
    method = pair(beta=[0.8, 0.2], **kw)[2].methods[0]
    assert method.hybrids.names == ("M0", "M1") and dict(
        zip(method.hybrids.names, method.betas)
    ) == {"M1": 0.8, "M0": 0.2}
    assert pair(beta="decay", **kw)[2].methods[0].betas == [
        0.25,
        0.5,
    ]  # rules count along the student's stages
    _, _, plain = pair(beta=[0.2, 0.8])
    x, y = batch()
    d = pair(beta=[0.8, 0.2], **kw)[2]
    for a, b in zip(d.state_dict().values(), plain.state_dict().values()):
        a.copy_(b)
    assert all(torch.allclose(v, plain(x, y)[0][n]) for n, v in d(x, y)[0].items())


def test_modules_come_before_the_stage_they_are_in():
    made = pair(
        pairs=[("stage2", "stage2"), ("stage2.0.act1", "stem"), ("stage1", "stage1")],
        beta=[3, 2, 1],
    )[2].methods[0]
    assert made.hybrids.names == ("M0", "Mstage2.0.act1", "M1") and made.betas == [1, 2, 3]


def test_stages_that_do_not_pair():
    student = create_model("resnet20", T=2, width=0.1, depth=0.1, image_size=32)
    odd = Foreign(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, 3),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, 2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 10),
        ),
        image_size=32,
    )
    with pytest.raises(
        UserError,
        match="no stages pair by resolution: the student has stem 32×32.*the teacher stage1 10×10, stage2 4×4; give layers=",
    ) as e:
        create_distiller("eskd", student, odd)
    assert "\n" not in str(e.value)
    d = create_distiller("eskd", student, odd, layers={"student": "stage2", "teacher": "stage1"})
    assert d.methods[0].hybrids.names == ("M1",) and d(*batch(4, 32))[0]["M1"].isfinite()
    top = Foreign(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, 4, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 10),
        ),
        image_size=32,
    )
    with pytest.raises(UserError, match="leave no hybrid model between stem and classifier"):
        create_distiller("eskd", student, top)
    assert create_distiller("eskd", student, top, positions=["fc"]).methods[0].hybrids.names == (
        "Mfc",
    )
    for bad, text in (
        (nn.Linear(3, 3), "no forward_from"),
        (create_model("resnet20", T=2, width=0.1), "runs T=2"),
        (vit_small(width=0.1, blocks=1, image_size=32, tokens="raw"), "raw tokens"),
    ):
        with pytest.raises(UserError, match=text) as e:
            create_distiller("eskd", student, bad)
        assert "\n" not in str(e.value)
    with pytest.warns(UserWarning), pytest.raises(UserError, match="no named stages"):
        create_distiller(
            "eskd",
            student,
            Foreign(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)), image_size=32),
        )


def test_a_layer_without_statistics():
    grey = {**SMALL, "in_channels": 1}
    alien = create_model(
        "resnet20", neuron=lambda T: FromSpikingJelly(sj_neuron.LIFNode(), T), T=2, **grey
    )
    d = create_distiller("eskd", alien, create_model("resnet20", **grey))
    with pytest.raises(UserError, match=r"stem.act \(LIFNode\) keeps no eligibility") as e:
        fit(
            alien,
            load("digits"),
            d,
            epochs=1,
            gradient="rate",
            on_event=quiet,
            weak_teacher="accept",
        )
    assert "\n" not in str(e.value)
    images, labels = batch()
    sum(d(images[:, :1], labels)[0].values()).backward()  # through time it learns
    assert alien.stem.conv.weight.grad.abs().sum() > 0

    class Mine(nn.Module):
        def forward(self, x):
            return torch.ge(x, 1.0).float()

    mine = create_model("resnet20", neuron=lambda T: Mine(), T=2, **SMALL).train()
    d = create_distiller("eskd", mine, pair()[1])
    mine.gradient = "rate"
    with pytest.raises(UserError, match="'ge'.*in Mine") as e:
        d(*batch())
    assert "\n" not in str(e.value)


# the loss


def by_hand(d, x, y, alpha, beta, temp=1.0):
    "Equations 2, 3, 4 and 7 in loops, the tails put together module by module."
    student, teacher, (method,) = d.student, d.teacher, d.methods
    with torch.no_grad():
        y_a = teacher(x)
    logits, feats = student(x, features=True)

    def loss(z):
        total = 0
        for i, label in enumerate(y):
            p, q = (y_a[i] / temp).softmax(0), (z[i] / temp).softmax(0)
            total = (
                total
                - (1 - alpha) * z[i].log_softmax(0)[label]
                + alpha * temp**2 * sum(p[j] * (p[j] / q[j]).log() for j in range(len(p)))
            )
        return total / len(y)

    total = loss(mean_logits(logits))
    for b, adapter, w in zip(method.hybrids.branches, method.hybrids.adapters, beta):
        h = adapter(sum(feats[b.student]) / len(feats[b.student]))
        for n in teacher.stage_names[teacher.stage_names.index(b.teacher) + 1 :]:
            h = getattr(teacher, n)(h)
        total = total + w * loss(teacher.head(teacher.pool(h)))
    return total


@pytest.mark.parametrize("mode", ("bptt", "rate"))
@pytest.mark.parametrize(
    "kw, beta",
    [
        ({}, [1 / 2] * 2),
        (
            {"alpha": 0.2, "positions": "all", "beta": "decay", "temp": 3.0},
            [1 / 16, 1 / 8, 1 / 4, 1 / 2],
        ),
        ({"positions": [1], "beta": 0.7, "adapter": "3x3", "relu": True}, [0.7]),
        ({"positions": []}, []),
    ],
)
def test_the_loss_and_its_gradients_are_those_of_slow_loops(mode, kw, beta):
    student, teacher, d = pair(T=3, **kw)
    x, y = batch()
    student.gradient = mode
    with frozen(teacher):
        found, wanted = [], []
        for out, f in (
            (found, lambda: sum(d(x, y)[0].values())),
            (wanted, lambda: by_hand(d, x, y, kw.get("alpha", 0.5), beta, kw.get("temp", 1.0))),
        ):
            value = f()
            out += [value, *torch.autograd.grad(value, list(d.parameters()))]
    for a, b in zip(found, wanted):
        assert torch.allclose(a, b, atol=2e-5, rtol=1e-3)
    assert list(d(x, y)[0]) == ["ce", "kd", *d.methods[0].hybrids.names]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5), st.integers(2, 7), st.floats(0, 1), st.floats(0.5, 5), st.integers(0, 999)
)
def test_blocks_without_hybrids_are_logit_distillation(B, K, alpha, temp, seed):
    g = torch.Generator().manual_seed(seed)
    s, t, y = (
        torch.randn(B, K, generator=g),
        torch.randn(B, K, generator=g),
        torch.randint(0, K, (B,), generator=g),
    )
    net = type("Given", (nn.Module,), {"forward": lambda self, x: s[None], "stage_names": ()})()
    d = Distiller(
        net,
        type(
            "Teacher",
            (nn.Module,),
            {"forward": lambda self, x: t, "forward_from": None, "stage_names": ()},
        )(),
        [],
    )
    d.methods.append(ESKD(net, d.teacher, alpha=alpha, temp=temp, positions=[]))
    d.weights, d.replaced = [1.0], ["ESKD"]
    terms, _ = d(torch.zeros(B, 1, 2, 2), y)
    assert torch.allclose(
        sum(terms.values()),
        (1 - alpha) * F.cross_entropy(s, y) + alpha * kd_loss(s, t, temp),
        atol=1e-5,
    )


def test_finite_differences():
    torch.manual_seed(0)
    student, teacher = (
        create_model("resnet20", width=w, depth=0.34, image_size=8).double() for w in (0.15, 0.2)
    )  # spikes have no derivative to compare with
    d = Distiller(
        student,
        teacher,
        [(1.0, ESKD(student, teacher, alpha=0.3, positions="all", beta="decay").double())],
    )
    x, y = torch.randn(6, 3, 8, 8).double(), torch.arange(6)

    def total():
        return sum(d(x, y)[0].values())

    for n, p in d.named_parameters():
        v, start, values = torch.randn_like(p), p.detach().clone(), []
        along = (torch.autograd.grad(total(), p)[0] * v).sum().item()
        with torch.no_grad():
            for sign in (1, -1):
                p.copy_(start + sign * 1e-7 * v)
                values.append(total().item())
            p.copy_(start)
        assert abs((values[0] - values[1]) / 2e-7 - along) < 1e-4 * (abs(along) + 1e-2), n


@pytest.mark.parametrize("T", (1, 2, 4))
def test_hybrids_on_rates_answer_what_they_answer_on_mean_spikes(T):
    _student, _teacher, d = pair(T=T, positions="all")
    x, y = batch()
    out = {}
    for mode in ("bptt", "rate", "rate-code"):
        one = copy.deepcopy(d)
        one.student.gradient = mode
        terms = one(x, y)[0]
        out[mode] = (
            one.methods[0].logits(one.run_networks(x, y)),
            terms,
            torch.autograd.grad(sum(terms.values()), list(one.parameters())),
        )
    for mode in ("rate", "rate-code"):
        for n, z in out["bptt"][0].items():
            assert torch.allclose(z, out[mode][0][n], atol=1e-4)
        for n, v in out["bptt"][1].items():
            assert torch.allclose(v, out[mode][1][n], atol=1e-5)
    for a, b in zip(out["rate"][2], out["rate-code"][2]):
        assert torch.allclose(a, T * b, atol=1e-6, rtol=1e-3)  # adapters too
    if T == 1:
        scale = max(g.abs().max() for g in out["bptt"][2])
        for a, b in zip(out["bptt"][2], out["rate"][2]):
            assert (a - b).abs().max() < 1e-3 * scale


def test_schedules():
    assert [alpha_at("increase", e, 5) for e in range(5)] == [0, 0.25, 0.5, 0.75, 1] and [
        alpha_at("decrease", e, 5) for e in range(5)
    ] == [1, 0.75, 0.5, 0.25, 0]
    assert (
        compute_betas("uniform", 3) == [1 / 3] * 3
        and compute_betas("decay", 3) == [1 / 8, 1 / 4, 1 / 2]
        and compute_betas([0, 1, 2], 3) == [0, 1, 2]
        and compute_betas(2, 2) == [2, 2]
    )
    x, y = batch()
    _, _, d = pair(alpha="increase", beta="decay")
    with pytest.raises(UserError, match="begin_epoch"):
        d(x, y)
    _, _, fixed = pair(alpha=0.25, beta=[0.25, 0.5])
    d.begin_epoch(1, 5)
    for (n, a), b in zip(d(x, y)[0].items(), fixed(x, y)[0].values()):
        assert torch.allclose(a, b, atol=1e-6), n
    d.begin_epoch(0, 5)
    assert d(x, y)[0]["kd"] == 0
    d.begin_epoch(4, 5)
    assert d(x, y)[0]["ce"] == 0


# frozen, once, and gone


def test_the_teacher_stays_as_it_is_whatever_mode_it_is_put_in():
    student, teacher, d = pair(positions="all")
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student.gradient = "rate"
    for _ in range(3):
        d.train()
        assert not teacher.training
        teacher.train()  # somebody else
        sum(d(*batch())[0].values()).backward()
    assert all(v.equal(before[k]) for k, v in teacher.state_dict().items()) and all(
        p.grad is None and p.requires_grad for p in teacher.parameters()
    )
    assert (
        not any("teacher" in k for k in (*d.state_dict(), *dict(d.named_parameters())))
        and not teacher.training
    )
    moved = [
        b for a in d.methods[0].hybrids.adapters for b in a.buffers() if b.dtype == torch.int64
    ]
    assert moved and all(
        b == 3 for b in moved
    )  # an adapter's BatchNorm sees a batch once, whatever T


def test_the_teacher_goes_where_the_hybrids_go():
    for whole in (False, True):
        student, teacher, d = pair(positions="all")
        made = d.methods[0].hybrids
        net = HybridNet(student, made, "M0") if whole else made
        net.double()
        assert {p.dtype for p in (*teacher.parameters(), *made.parameters())} == {
            torch.float64
        } and next(student.parameters()).dtype == (torch.float64 if whole else torch.float32)
        assert (
            net(torch.randn(2, 3, 8, 8).double())
            if whole
            else made(
                {
                    b.student: torch.rand(2, *teacher.feature_shapes()[b.student]).double()[
                        :, : s.shape[1]
                    ]
                    for b, s in zip(made.branches, (a.body[0].weight for a in made.adapters))
                }
            )["M0"]
        ).dtype == torch.float64
        assert (
            not any("teacher" in k for k in net.state_dict())
            and next(net.to("cpu").parameters()).device == next(teacher.parameters()).device
        )


def test_one_pass_of_the_student_and_one_of_the_teacher():
    student, teacher, d = pair(positions="all")
    d(*batch())  # its first tail looks once how wide the stages are
    calls, hooks = (
        [],
        [
            m.register_forward_hook(lambda *a, n=n: calls.append(n))
            for n, m in (
                ("student", student),
                ("teacher", teacher),
                ("adapter", d.methods[0].hybrids.adapters[0]),
            )
        ],
    )
    seen = []
    hooks.append(
        teacher.stage3.register_forward_hook(lambda *a: seen.append(torch.is_grad_enabled()))
    )
    for student.gradient in ("bptt", "rate"):
        d(*batch())
    assert calls == ["teacher", "student", "adapter"] * 2
    assert (
        seen == [False, True, True, True] * 2
    )  # the teacher itself, then the tails of MH, M0 and M1
    for h in hooks:
        h.remove()


def test_neither_teacher_nor_adapter_sees_a_rate():
    student, teacher, d = pair(T=3, positions="all")
    student.gradient, types = "rate", {}
    hooks = [
        m.register_forward_hook(lambda m, i, o, n=n: types.setdefault(n, set()).add(type(i[0])))
        for n, net in (("student", student), ("teacher", teacher), ("adapters", d.methods[0]))
        for m in net.modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    d(*batch())
    for h in hooks:
        h.remove()
    assert types == {"student": {Rate}, "teacher": {torch.Tensor}, "adapters": {torch.Tensor}}


def test_nothing_of_it_stays_with_the_student():
    student, teacher, d = pair()
    keys = list(student.state_dict())
    trained = {id(p) for g in create_optimizer(d, OptimSpec()).param_groups for p in g["params"]}
    assert all(
        id(p) in trained for p in (*student.parameters(), *d.methods.parameters())
    ) and not any(id(p) in trained for p in teacher.parameters())
    assert (
        sum(p.numel() for p in d.parameters()) - sum(p.numel() for p in student.parameters())
        == sum(p.numel() for p in d.methods[0].hybrids.parameters())
        > 0
    )
    sum(d(*batch())[0].values()).backward()
    assert list(student.state_dict()) == keys and not any(
        m._forward_hooks for m in student.modules()
    )


def test_half_precision():
    for mode, kw in itertools.product(("bptt", "rate"), ({}, {"positions": "all"})):
        student, _teacher, d = pair(**kw)
        student.gradient = mode
        with torch.autocast("cpu", torch.bfloat16):
            terms, _ = d(*batch())
        sum(terms.values()).backward()
        assert all(v.dtype == torch.float32 and v.isfinite() for v in terms.values()) and all(
            p.grad is not None and p.grad.isfinite().all() for p in d.parameters()
        )


def test_frames():
    student, teacher, d = pair(T=3, positions="all")
    x, y = torch.randn(3, 5, 3, 8, 8), torch.arange(5)
    for student.gradient in ("bptt", "rate"):
        b = d.run_networks(x, y)
        assert torch.allclose(b.logits_t, teacher(x.mean(0)), atol=1e-6)
        assert all(z.shape == (5, 10) for z in d.methods[0].logits(b).values())
        sum(d(x, y)[0].values()).backward()
    assert set(hybrid_cosines(d, x)) == {"MH", "M0", "M1", "Mfc"}


def test_an_ordinary_network_and_module_paths():
    student, teacher, _ = pair()
    ann = create_model("resnet20", **SMALL)
    assert set(create_distiller("eskd", ann, teacher)(*batch())[0]) == {"ce", "kd", "M0", "M1"}
    d = create_distiller(
        "eskd",
        student,
        teacher,
        layers={"student": ["stage1.0.act1", "stage2"], "teacher": ["stage1", "stage2"]},
    ).train()
    for student.gradient in ("bptt", "rate"):
        terms = d(*batch())[0]
        assert set(terms) == {"ce", "kd", "Mstage1.0.act1", "M1"}
    with eval_mode(d):
        assert mean_rates(observe(student, batch()[0], ["stage1.0.act1"])[1])[
            "stage1.0.act1"
        ].shape == (6, 4, 8, 8)
    with pytest.raises(UserError, match="leave one of them out"):
        create_distiller("eskd+kd", student, teacher)(*batch())
    assert set(create_distiller("eskd+0.5*feature", student, teacher)(*batch())[0]) == {
        "ce",
        "kd",
        "M0",
        "M1",
        "feature",
    }
    with pytest.raises(UserError, match="leave ce and ce_weight out"):
        create_distiller("eskd", student, teacher, ce="each")


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([k for k in ADAPTERS if k != "identity"]),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(2, 5),
    st.integers(2, 5),
    st.booleans(),
    st.integers(0, 2),
    st.sampled_from(["learned", "mean"]),
)
def test_adapters_put_out_what_the_teacher_takes(kind, c_s, c_t, h, w, relu, tokens, prefix):
    x = torch.rand(3, c_s, h, h, requires_grad=True)
    a = Adapter((c_s, h, h), (c_t, w, w), kind, relu, tokens, prefix)
    y = a(x)
    assert (
        y.shape == (3, c_t, w, w)
        and (not relu or y.min() >= 0)
        and hasattr(y, "prefix") == bool(tokens)
    )
    if tokens:
        assert y.prefix.shape == (3, tokens, c_t)
    (y.sum() + (y.prefix.sum() if tokens else 0)).backward()
    assert all(p.grad is not None for p in a.parameters())


def test_a_class_token_comes_from_the_student():
    torch.manual_seed(0)
    teacher, student = (
        vit_small(width=0.1, blocks=4, patch=4, image_size=16),
        create_model("spikingformer", T=2, blocks=4, width=0.1, image_size=32),
    )
    student.image_size = 16
    for prefix in ("learned", "mean"):
        made = create_hybrids(student, teacher, prefix=prefix)
        assert made.names == ("M0", "M1", "M2") and [b.teacher for b in made.branches] == [
            "stage1",
            "stage2",
            "stage3",
        ]
        rates = {
            b.student: torch.rand(3, *s)
            for b, s in zip(
                made.branches, [student.feature_shapes()[b.student] for b in made.branches]
            )
        }
        z, same = made(rates), made({n: r.flip(0) for n, r in rates.items()})
        assert all(
            torch.allclose(z[n], same[n].flip(0), atol=1e-5) for n in z
        )  # an image's answer is its own
        assert sum(p.numel() for p in made.parameters()) > 0


# training and probes


def tiny(T=2):
    torch.manual_seed(0)
    return create_model(
        "resnet20", T=T, width=0.25, depth=0.34, in_channels=1, image_size=8, neuron="rate"
    )


@pytest.fixture(scope="module")
def taught():
    data, teacher = load("digits"), tiny(None)
    fit(teacher, data, epochs=2, batch_size=64, on_event=quiet)
    return data, teacher


@pytest.mark.parametrize("gradient", ("rate", "bptt"))
def test_it_learns_on_digits(taught, gradient):
    data, teacher = taught
    student = tiny()
    d = create_distiller("eskd", student, teacher, positions="all")
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    keys, start = list(student.state_dict()), hybrid_accuracies(d, data, untrained=True)
    history = fit(
        student,
        data,
        d,
        epochs=3,
        batch_size=64,
        gradient=gradient,
        on_event=quiet,
        probes={
            "hybrids": hybrids(student, None, data, d),
            "cosine": cosine(student, None, data, d),
        },
    )
    assert (
        all(a["loss"] > b["loss"] for a, b in itertools.pairwise(history))
        and history[-1]["M0"] < history[0]["M0"]
    )
    assert (
        history[-1]["hybrids_S"] == history[-1]["test_acc"] == evaluate(student, data)
        and history[-1]["hybrids_M0"] > start["M0"] + 10
    )
    assert history[-1]["hybrids_M1"] == evaluate(
        HybridNet(student, d.methods[0].hybrids, "M1"), data
    )
    assert set(history[0]) >= {
        f"{p}_{m}" for p in ("hybrids", "cosine") for m in ("MH", "M0", "M1", "Mfc")
    }
    assert all(v.equal(before[k]) for k, v in teacher.state_dict().items()) and all(
        p.grad is None for p in teacher.parameters()
    )
    assert (
        list(student.state_dict()) == keys
        and student.gradient == "bptt"
        and not any(m._forward_hooks for m in student.modules())
    )


def test_a_run_that_was_stopped_goes_on_with_its_adapters(taught, tmp_path):
    data, teacher = taught

    def stop(e):
        raise KeyboardInterrupt

    runs = []
    for checkpoint in (None, tmp_path / "c"):
        student = tiny()
        d, kw = (
            create_distiller("eskd", student, teacher),
            {"epochs": 2, "batch_size": 64, "gradient": "rate", "checkpoint": checkpoint},
        )
        if checkpoint:
            with pytest.raises(KeyboardInterrupt):
                fit(student, data, d, on_event=stop, **kw)
            student, d = (s := tiny()), create_distiller("eskd", s, teacher)
        fit(student, data, d, on_event=quiet, **kw)
        runs.append(d.state_dict())
    assert (
        runs[0].keys() == runs[1].keys()
        and all(v.equal(runs[1][k]) for k, v in runs[0].items())
        and any("adapters" in k for k in runs[0])
    )


def test_the_same_distiller_goes_on_where_it_was_stopped(taught, tmp_path):
    data, teacher = taught

    def stop(e):
        raise KeyboardInterrupt

    student = tiny()
    d, kw = (
        create_distiller("eskd", student, teacher, alpha="increase"),
        {"epochs": 2, "batch_size": 64, "checkpoint": tmp_path / "c"},
    )
    with pytest.raises(KeyboardInterrupt):
        fit(student, data, d, on_event=stop, **kw)
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(fit(student, data, d, on_event=seen.append, **kw)) == 2
    assert [e["epoch"] for e in seen] == [2]


@pytest.mark.parametrize(
    "name, one, other",
    [
        ("kd", {"temp": 2.0}, {"temp": 3.0}),
        ("sastc", {"beta": 1.0}, {"beta": 2.0}),
        ("eskd", {"positions": [0]}, {"positions": [1]}),
        ("eskd", {"alpha": 0.5}, {"alpha": 0.2}),
        ("eskd", {"beta": [1, 2]}, {"beta": [2, 1]}),
    ],
)
def test_other_options_of_a_method_start_anew(name, one, other, taught, tmp_path):
    data, teacher = taught
    kw = {"epochs": 1, "batch_size": 256, "on_event": quiet, "checkpoint": tmp_path / "c"}

    def run(student, args):
        return fit(student, data, create_distiller(name, student, teacher, **args), **kw)

    first = run(tiny(), one)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            run(tiny(), one)[0]["train_seconds"] == first[0]["train_seconds"]
        )  # nothing was trained
    with pytest.warns(UserWarning, match="belongs to another training"):
        assert run(tiny(), other)[0]["train_seconds"] != first[0]["train_seconds"]
    wider = create_model(
        "resnet20", T=2, width=0.5, depth=0.34, in_channels=1, image_size=8, neuron="rate"
    )
    with pytest.warns(UserWarning, match="belongs to another training"):
        run(wider, other)


def test_the_loop_tells_the_epoch(taught):
    data, teacher = taught
    student = tiny()
    d = create_distiller("eskd", student, teacher, alpha="decrease", positions=[0])
    history = fit(student, data, d, epochs=3, batch_size=256, on_event=quiet)
    assert (
        history[0]["ce"] == 0 < history[0]["kd"]
        and history[1]["ce"] > 0 < history[1]["kd"]
        and history[2]["kd"] == 0 < history[2]["ce"]
    )


def test_probes_before_training_and_without_eskd(taught):
    data, teacher = taught
    student = tiny()
    d = create_distiller("eskd", student, teacher, positions="all").train()
    state = {k: v.clone() for k, v in d.state_dict().items()}
    torch.manual_seed(3)
    rng = torch.random.get_rng_state()
    student.gradient = "rate"
    x = next(iter(data.loader("test", 32)))[0]
    for early in (
        lambda: hybrid_accuracies(d, data),
        lambda: hybrid_cosines(d, x),
        lambda: evaluate(HybridNet(student, d.methods[0].hybrids, "M0"), data),
    ):
        with pytest.raises(UserError, match="adapter saw no batch yet: .*give untrained=True") as e:
            early()
        assert "\n" not in str(e.value) and student.training and d.training
    assert (
        0 <= evaluate(HybridNet(student, d.methods[0].hybrids, "M0", untrained=True), data) <= 100
    )
    found = hybrid_accuracies(d, data, untrained=True), hybrid_cosines(d, x, untrained=True)
    assert (
        all(0 <= v <= 100 for v in found[0].values())
        and all(-1 <= v <= 1 for v in found[1].values())
        and student.training
        and d.training
    )
    assert (
        all(v.equal(state[k]) for k, v in d.state_dict().items())
        and torch.random.get_rng_state().equal(rng)
        and not any(p.grad is not None for p in d.parameters())
    )
    for make in (hybrids, cosine):
        with pytest.raises(UserError, match="method with eskd"):
            make(student, None, data, Distiller(student))
        with pytest.raises(UserError, match="positions="):
            make(student, None, data, create_distiller("eskd", student, teacher, positions=[]))
    assert {"hybrids", "cosine"} <= set(list_probes())
    with pytest.raises(UserError, match="did you mean 'split'"):
        check_probes({"hybrids": {"spilt": "val"}}, True)


@pytest.mark.parametrize("kind", ("linear", "identity"))
def test_adapters_without_statistics_can_be_asked_at_once(taught, kind):
    data, teacher = taught
    student = create_model(
        "resnet20", T=2, width=0.25, depth=0.34, in_channels=1, image_size=8, neuron="rate"
    )
    assert set(
        hybrid_accuracies(create_distiller("eskd", student, teacher, adapter=kind), data)
    ) == {
        "S",
        "M0",
        "M1",
    }


def test_after_a_step_hybrids_can_be_asked():
    student, _teacher, d = pair(positions="all")
    d(*batch())
    assert len(hybrid_cosines(d, batch()[0])) == 4 and all(
        z.shape == (6, 10)
        for z in (
            HybridNet(student, d.methods[0].hybrids, n).eval()(batch()[0])
            for n in d.methods[0].hybrids.names
        )
    )


def test_a_stored_run(tmp_path, monkeypatch):
    monkeypatch.setenv("SNNKD_CACHE", str(tmp_path / "cache"))
    net, short = {"width": 0.25, "args": {"depth": 0.34}}, {"epochs": 2, "batch_size": 64}
    teacher = RunSpec(DataSpec("digits"), ModelSpec("resnet20", **net), OptimSpec(**short))
    run = RunSpec(
        DataSpec("digits"),
        ModelSpec("resnet20", T=2, neuron="rate", **net),
        OptimSpec(**short, gradient="rate"),
        "eskd",
        method_args={"positions": ["H", 0, 1], "beta": [0.2, 0.4, 0.4]},
        teacher=teacher,
        probes={"hybrids": {}, "cosine": {"images": 64}},
    )
    record = run_train(run, Store(tmp_path / "runs"))
    h = record.history
    assert {
        "ce",
        "kd",
        "MH",
        "M0",
        "M1",
        "hybrids_S",
        "hybrids_MH",
        "hybrids_M0",
        "hybrids_M1",
        "cosine_MH",
        "cosine_M0",
        "cosine_M1",
    } <= set(h) and all(len(v) == 2 for v in h.values())
    assert (
        h["loss"][1] < h["loss"][0]
        and h["hybrids_S"] == h["val_acc"]
        and record.metrics["params"]
        == sum(
            p.numel()
            for p in create_model("resnet20", width=0.25, depth=0.34, in_channels=1).parameters()
        )
    )
    with pytest.raises(UserError, match="position 7"):
        run_train(run.replace(method_args={"positions": [7]}), Store(tmp_path / "runs"))
