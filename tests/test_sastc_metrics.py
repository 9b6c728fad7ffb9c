"""STM score, temporal Fisher information, and the pictures of both."""

import math
from io import BytesIO
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from snnkd_nb.core import UserError
from snnkd_nb.data.images import load
from snnkd_nb.losses.base import Distiller
from snnkd_nb.metrics import likeness as F_
from snnkd_nb.metrics.activity import create_probes, list_probes
from snnkd_nb.metrics.likeness import NORMALISE, fixed_batch, mean_of_last_epochs, stm_score
from snnkd_nb.models.blocks import eval_mode
from snnkd_nb.models.zoo import create_model
from snnkd_nb.neurons.lif import LIF
from snnkd_nb.reports import diagrams, figure, maps, snapshots
from snnkd_nb.training.loop import History

SMALL = {"in_channels": 1, "image_size": 8, "width": 0.25, "depth": 0.34}
FIRES = {"v_threshold": 0.5}


@pytest.fixture(scope="module")
def data():
    return load("digits")


def pair(T=3, seed=0):
    torch.manual_seed(seed)
    return create_model("resnet20", T=T, neuron_args=FIRES, **SMALL), create_model(
        "resnet20", **SMALL
    )


class Given(nn.Module):
    "Puts out its features, whatever it sees."

    def __init__(self, feats, T=None):
        super().__init__()
        self.__dict__.update(feats=feats, T=T, stage_names=tuple(feats))

    def forward(self, x, features=False):
        return torch.zeros(*([self.T] if self.T else []), len(x), 2), self.feats


shapes = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3
)


@st.composite
def two(draw):
    "Student and teacher of any shapes, and the batch they were made for."
    T, B, g = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 6)),
        torch.Generator().manual_seed(draw(st.integers(0, 2**31))),
    )
    student = {f"s{i}": torch.randn(T, B, *c, generator=g) for i, c in enumerate(draw(shapes))}
    teacher = {f"a{i}": torch.randn(B, *c, generator=g) for i, c in enumerate(draw(shapes))}
    return student, teacher, T, torch.zeros(B, 1)


def by_loops(student, teacher, T, B, normalise):
    rows = []
    for t, (_s, f), (_a, h) in product(range(T), student.items(), teacher.items()):
        A, G = (
            np.array([[float((p * q).sum()) for q in v] for p in v])
            for v in (f[t].double(), h.double())
        )
        if normalise == "frobenius":
            A, G = A / np.linalg.norm(A), G / np.linalg.norm(G)
        if normalise == "row":
            A, G = A / np.linalg.norm(A, axis=1)[:, None], G / np.linalg.norm(G, axis=1)[:, None]
        if normalise == "cosine":
            A, G = (M / np.sqrt(np.outer(np.diag(M), np.diag(M))) for M in (A, G))
        rows.append(((A - G) ** 2).sum() / B**2)
    return np.mean(rows)


@settings(max_examples=40, deadline=None)
@given(two(), st.sampled_from(sorted(NORMALISE)))
def test_stm_is_the_loop_over_steps_and_pairs(nets, normalise):
    student, teacher, T, x = nets
    score, table = stm_score(Given(student, T), Given(teacher), x, normalise, log="none")
    assert math.isclose(
        score, by_loops(student, teacher, T, len(x), normalise), rel_tol=1e-4, abs_tol=1e-9
    )
    assert [
        (r["t"], r["student"], r["teacher"])
        for r in sorted(table, key=lambda r: (r["t"], r["student"], r["teacher"]))
    ] == list(product(range(1, T + 1), student, teacher))
    assert math.isclose(np.mean([r["mse"] for r in table]), score, rel_tol=1e-9)


@settings(max_examples=40, deadline=None)
@given(two(), st.randoms(), st.floats(0.1, 10), st.sampled_from(sorted(NORMALISE)))
def test_stm_ignores_the_order_of_images_and_scales_as_it_says(nets, random, a, normalise):
    student, teacher, T, x = nets
    turn = list(range(len(x)))
    random.shuffle(turn)
    plain = stm_score(Given(student, T), Given(teacher), x, normalise, log="none")[0]
    turned = stm_score(
        Given({k: v[:, turn] for k, v in student.items()}, T),
        Given({k: v[turn] for k, v in teacher.items()}),
        x,
        normalise,
        log="none",
    )[0]
    scaled = stm_score(
        Given({k: a * v for k, v in student.items()}, T),
        Given({k: a * v for k, v in teacher.items()}),
        x,
        normalise,
        log="none",
    )[0]
    assert math.isclose(turned, plain, rel_tol=1e-4, abs_tol=1e-8)
    assert math.isclose(
        scaled, plain * (a**4 if normalise == "raw" else 1), rel_tol=1e-3, abs_tol=1e-7
    )


@settings(max_examples=25, deadline=None)
@given(two())
def test_stm_of_a_network_with_itself_is_minimal(nets):
    student, teacher, T, x = nets
    for feats, steps in ((student, T), (teacher, None)):
        net, other = (
            Given(feats, steps),
            Given({k: v + torch.rand_like(v) for k, v in feats.items()}, steps),
        )
        assert (
            stm_score(net, net, x, pairs="equal", log="none")[0]
            == 0
            <= stm_score(net, other, x, pairs="equal", log="none")[0]
        )
        assert stm_score(net, net, x, pairs="equal")[0] == -math.inf


def test_stm_of_networks_leaves_no_trace_and_takes_stages_paths_and_frames(data):
    student, teacher = pair()
    x, _ = fixed_batch(data, 16)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    score, table = stm_score(student, teacher, x)
    assert (
        student.training
        and all(v.equal(before[k]) for k, v in student.state_dict().items())
        and len(table) == 3 * 4 * 4
    )
    assert math.isclose(
        stm_score(student, teacher, x.expand(3, *x.shape))[0], score, rel_tol=1e-6
    )  # one image is three equal frames
    paths = {
        "student_layers": ["stage1.0.act2", "stage3.0.act2"],
        "teacher_layers": ["stage2.0.act2"],
    }
    named = {
        (r["t"], r["student"][:6]): r["mse"] for r in stm_score(student, teacher, x, **paths)[1]
    }
    assert named == {
        (r["t"], r["student"]): r["mse"]
        for r in table
        if r["student"] in ("stage1", "stage3") and r["teacher"] == "stage2"
    }


def test_stm_of_other_sizes_and_of_foreign_networks(data):
    x, _ = fixed_batch(data, 8)
    foreign = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)
    )
    foreign(x)
    for name in ("vgg11_sastc", "wrn16_2"):
        student = create_model(name, T=1, in_channels=1, image_size=8, width=0.1, neuron_args=FIRES)
        score, table = stm_score(student, foreign, x, teacher_layers=["1", "3"])
        assert math.isfinite(score) and len(table) == 2 * len(student.stage_names)
    with pytest.raises(UserError, match="module paths"):
        stm_score(student, foreign, x)
    with pytest.raises(UserError, match="did you mean"):
        stm_score(student, foreign, x, teacher_layers=["11"])
    with pytest.raises(UserError, match="did you mean"):
        stm_score(student, student, x, pairs=[("stem", "stage11")])
    with pytest.raises(UserError, match="two layers"):
        stm_score(student, student, x, pairs=[("stem",)])
    with pytest.raises(UserError, match="as many as the student"):
        stm_score(pair(2)[0], pair(3)[0], x)


def test_a_batch_of_one_image_and_larger_batches(data):
    student, teacher = pair()
    scores = [stm_score(student, teacher, fixed_batch(data, b)[0])[0] for b in (1, 8, 64)]
    assert (
        all(map(math.isfinite, scores)) and scores[0] > scores[1] > scores[2]
    )  # the diagonal is a 1/B of the entries


def test_probes_measure_what_the_functions_do_and_leave_no_trace(data):
    student, teacher = pair()
    assert {"stm", "fisher"} <= set(list_probes())
    looks = create_probes(
        {"stm": {"images": 16, "pairs": "equal"}, "fisher": {"images": 4, "split": "test"}},
        student,
        teacher,
        data,
        Distiller(student),
    )
    student.train()
    torch.manual_seed(5)
    before, state = {k: v.clone() for k, v in student.state_dict().items()}, torch.get_rng_state()
    with torch.no_grad():
        first, again = ({k: f() for k, f in looks.items()} for _ in range(2))
    assert (
        first == again
        and torch.get_rng_state().equal(state)
        and student.training
        and all(p.grad is None for p in student.parameters())
    )
    assert all(v.equal(before[k]) for k, v in student.state_dict().items())
    assert first["stm"] == stm_score(student, teacher, fixed_batch(data, 16)[0], pairs="equal")[0]
    assert list(first["fisher"]) == ["1", "2", "3"] and np.allclose(
        list(first["fisher"].values()),
        F_.temporal_fisher(student, *fixed_batch(data, 4), how="loop"),
        rtol=1e-4,
    )
    with torch.no_grad():
        student.stage3[0].conv2.weight.mul_(2)
    moved = {k: f() for k, f in looks.items()}
    assert moved["stm"] != first["stm"] and moved["fisher"] != first["fisher"]
    for bad in (
        {"stm": {"log": "log"}},
        {"stm": {"pairs": "none"}},
        {"stm": {"normalise": "rows"}},
    ):
        with pytest.raises(UserError):
            create_probes(bad, student, teacher, data, None)


def test_the_mean_of_the_last_epochs():
    history = {"stm": [float(v) for v in range(20)], "gap": [1.0, None, 3.0], "none": [None]}
    assert (
        mean_of_last_epochs(history) == np.mean(range(10, 20))
        and mean_of_last_epochs(history, n=3) == 18
        and mean_of_last_epochs(history, "gap") == 2
        and math.isnan(mean_of_last_epochs(history, "none"))
    )
    with pytest.raises(UserError, match="did you mean 'stm'"):
        mean_of_last_epochs(history, "stn")


def test_the_last_epochs_are_the_last_where_a_history_was_thinned():
    full = History(
        {
            "epoch": e,
            "loss": 1.0,
            "test_acc": 0.0,
            "val_acc": 0.0,
            "stm": float(e),
            **{f"attention_{k}": 0.0 for k in range(110)},
        }
        for e in range(1, 91)
    )
    thin = full.columns()
    assert (
        len(thin["epoch"]) < 15
        and thin["epoch"][0] == 1
        and all(e > 80 for e in thin["epoch"][-4:])
    )
    assert 80 < mean_of_last_epochs(thin) <= 90 and mean_of_last_epochs(thin, n=1) == 90


def test_a_spiking_network_whose_logits_have_no_time_is_refused():
    class Mean(nn.Module):
        stage_names = ("net",)

        def __init__(self):
            super().__init__()
            self.net = nn.Conv2d(3, 4, 3)

        def forward(self, x, features=False):
            f = self.net(x.repeat(2, 1, 1, 1))
            logits = f.mean((2, 3)).view(2, -1, 4).mean(0)
            return (logits, {"net": f}) if features else logits

    for B in (1, 6):
        with pytest.raises(UserError, match="so are the logits"):
            stm_score(
                Mean(), create_model("resnet20", width=0.1, image_size=8), torch.randn(B, 3, 8, 8)
            )


def test_fisher_ignores_autocast_and_names_wrong_labels():
    net, x, y = (
        create_model("resnet20", T=2, width=0.1, image_size=8),
        torch.randn(3, 3, 8, 8),
        torch.tensor([1, 2, 3]),
    )
    plain = F_.temporal_fisher(net, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert F_.temporal_fisher(net, x, y).equal(plain)
    for bad in (y[:2], torch.tensor([0, 1, 10]), torch.tensor([-1, 0, 1])):
        with pytest.raises(UserError, match="3 images of 10 classes"):
            F_.temporal_fisher(net, x, bad)


FAMILIES = (
    "vgg11_sastc",
    "resnet19_tet",
    "bottleneck_sastc",
    "sew_resnet18",
    "wrn16_2",
    "pyramidnet20",
    "resnet20_ckd",
    "spikformer",
    "spikingformer",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_fisher_at_once_is_fisher_one_by_one(name):
    torch.manual_seed(0)
    model = create_model(
        name,
        T=2,
        image_size=16,
        width=0.05 if "former" not in name else 0.125,
        neuron_args=FIRES if "former" not in name else None,
    )
    x, y = torch.randn(3, 3, 16, 16), torch.arange(3)
    model(torch.randn(8, 3, 16, 16))
    hot = F_.one_hot_targets(model, x, y)
    fast, slow = F_.squared_norms(model, x, hot), F_.squared_norms_loop(model, x, hot)
    assert fast.shape == (3, 2) and (slow > 0).all() and torch.allclose(fast, slow, rtol=1e-3)


def test_fisher_of_frames_ends_at_the_whole_network_and_each_step_is_a_shorter_one():
    def make(T):
        return create_model(
            "vggsnn", T=T, in_channels=2, image_size=16, width=0.05, neuron_args=FIRES
        )

    torch.manual_seed(0)
    model, x, y = make(4), torch.rand(4, 3, 2, 16, 16), torch.arange(3)
    for _ in range(10):
        model(x)
    full = F_.temporal_fisher(model, x, y, how="func")
    model.eval()
    whole = []
    for i in range(3):
        model.zero_grad()
        F.cross_entropy(model(x[:, i : i + 1]).mean(0), y[i : i + 1]).backward()
        whole.append(sum(p.grad.square().sum().item() for p in model.parameters()))
    assert math.isclose(np.mean(whole), full[-1], rel_tol=1e-4)
    for t in (1, 2, 3):
        short = make(t)
        short.load_state_dict(model.state_dict())
        assert torch.allclose(F_.temporal_fisher(short, x[:t], y), full[:t], rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(2, 6), st.integers(1, 8), st.integers(0, 2**31))
def test_fisher_of_logistic_regression_in_closed_form(B, K, n, seed):
    torch.manual_seed(seed)
    net, x, y = (
        nn.Sequential(nn.Flatten(), nn.Linear(n, K)),
        torch.randn(B, n, 1, 1),
        torch.randint(K, (B,)),
    )
    hot = F.one_hot(y, K) - net(x).softmax(-1)
    by_hand = (hot.square().sum(1) * (x.square().flatten(1).sum(1) + 1)).mean()
    for how in ("func", "loop"):
        assert torch.allclose(F_.temporal_fisher(net, x, y, how=how), by_hand[None], rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4),
    st.sampled_from([0.0, -0.3, None]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_composable_neurons_are_the_fused_ones(T, v_reset, decay_input, detach_reset, strict, seed):
    torch.manual_seed(seed)
    x, w = torch.randn(T * 2, 3, 4, 4, requires_grad=True), torch.randn(T * 2, 3, 4, 4)
    fused = LIF(
        T,
        decay=0.6,
        v_threshold=0.4,
        v_reset=v_reset,
        decay_input=decay_input,
        detach_reset=detach_reset,
        strict=strict,
    )
    a, b = fused(x), F_.make_composable(fused)(x)
    assert a.equal(b) and torch.allclose(
        *(torch.autograd.grad((v * w).sum(), x)[0] for v in (a, b)), rtol=1e-4, atol=1e-5
    )


def test_labels_of_fisher(data):
    student, _ = pair()
    x, y = fixed_batch(data, 6)
    with eval_mode(student):
        z = F_.decisions_over_time(student(x))
    predicted = F_.one_hot_targets(student, x, y, "predicted")
    assert predicted.argmax(-1).equal(z.argmax(-1)) and F_.one_hot_targets(student, x, y).argmax(
        -1
    ).equal(y.expand(3, -1))
    last = F_.temporal_fisher(student, x, y, "predicted")[-1]
    assert torch.allclose(last, F_.temporal_fisher(student, x, z[-1].argmax(-1))[-1], rtol=1e-4)
    assert F_.temporal_fisher(student, x, y, "sampled").equal(
        F_.temporal_fisher(student, x, y, "sampled")
    )
    assert not F_.one_hot_targets(student, x, y, "sampled", seed=1).equal(
        F_.one_hot_targets(student, x, y, "sampled")
    )


def test_fisher_falls_back_to_a_loop_and_says_so(data):
    student, _ = pair(2)
    x, y = fixed_batch(data, 3)

    class Own(LIF):
        def forward(self, x, static=False):
            return super().forward(x, static)

    plain = F_.temporal_fisher(student, x, y)
    for m in student.modules():
        if isinstance(m, LIF):
            m.__class__ = Own
    with pytest.warns(UserWarning, match="image by image"):
        theirs = F_.temporal_fisher(student, x, y)
    assert torch.allclose(theirs, plain, rtol=1e-4)
    with pytest.raises(RuntimeError):
        F_.temporal_fisher(student, x, y, how="func")
    for p in student.parameters():
        p.requires_grad_(False)
    with pytest.raises(UserError, match="requires_grad"):
        F_.temporal_fisher(student, x, y)


def test_frozen_weights_do_not_count(data):
    student, _ = pair(2)
    x, y = fixed_batch(data, 3)
    whole = F_.temporal_fisher(student, x, y)
    for p in student.head.parameters():
        p.requires_grad_(False)
    body = F_.temporal_fisher(student, x, y)
    assert (body < whole).all() and torch.allclose(
        body, F_.temporal_fisher(student, x, y, how="loop"), rtol=1e-4
    )


def frame(methods=("Baseline", "SASTC"), epochs=5, parts=("",), seeds=(0, 1)):
    g = np.random.default_rng(0)
    return pd.DataFrame(
        [
            {
                "method": m,
                "seed": s,
                "epoch": e + 1,
                "part": p,
                "value": 1 + g.random(),
                "run": f"{m}{s}",
            }
            for m in methods
            for s in seeds
            for e in range(epochs)
            for p in parts
        ]
    )


def png(fig):
    out = BytesIO()
    fig.savefig(out, dpi=40, metadata={"Software": None})
    return out.getvalue()


def test_pictures_give_back_what_they_draw_and_are_the_same_bytes_twice():
    by_step, scores = frame(parts=("1", "2", "3")), frame()
    eta = maps.tabulate_attention(
        torch.rand(3, 2, 4, 5).softmax(-1), ["a", "b"], list("vwxyz"), epoch=1
    )
    for draw, f, rows in (
        (figure.draw_by_epoch, scores, 10),
        (figure.draw_fisher, by_step, 30),
        (maps.draw_attention, eta, 30),
    ):
        (fig, drawn), (again, _) = draw(f), draw(f)
        assert len(drawn) == rows and png(fig) == png(again)
    drawn = figure.draw_fisher(by_step)[1]
    one = by_step[(by_step.method == "SASTC") & (by_step.part == "2") & (by_step.epoch == 4)].value
    row = drawn[(drawn.method == "SASTC") & (drawn.t == 2) & (drawn.epoch == 4)].iloc[0]
    assert (
        np.isclose(row["mean"], one.mean()) and np.isclose(row["std"], one.std()) and row["n"] == 2
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_attention_rows_keep_their_place_and_sum_to_one(T, S, B, L):
    eta = torch.rand(T, S, B, L).softmax(-1)
    names = [f"s_{i}" for i in range(S)], [f"a.{j}" for j in range(L)]
    rows = maps.tabulate_attention(eta, *names)
    assert np.allclose(
        rows.weight.to_numpy().reshape(T, S, L), eta.mean(2), atol=1e-6
    ) and np.allclose(rows.groupby(["student", "t"]).weight.sum(), 1, atol=1e-5)
    flat = pd.DataFrame(
        [
            {"epoch": 1, "seed": 0, "part": f"{r.student}_{r.t}_{r.teacher}", "value": r.weight}
            for r in rows.itertuples()
        ]
    )
    assert maps.attention_history(flat).drop(columns="epoch").equals(rows)
    with pytest.raises(UserError, match="layers"):
        maps.tabulate_attention(eta, [*names[0], "more"], names[1])


def test_attention_maps_choose_panels_evenly():
    many = pd.concat(
        [
            maps.tabulate_attention(torch.rand(1, 2, 3, 2), ["a", "b"], ["c", "d"], epoch=e)
            for e in range(1, 12)
        ]
    )
    fig, drawn = maps.draw_attention(many, panels=3)
    assert drawn.epoch.unique().tolist() == [1, 6, 11] and [
        ax.get_title() for ax in fig.axes[:3]
    ] == ["epoch 1", "epoch 6", "epoch 11"]
    with pytest.raises(UserError, match="did you mean 'epoch'"):
        maps.draw_attention(many, by="epok")


def test_the_overview_is_drawn_from_what_the_modules_put_out(data):
    torch.manual_seed(0)
    student, teacher = (
        create_model(
            "vgg11_sastc", T=2, in_channels=1, image_size=8, width=0.05, neuron_args=FIRES
        ),
        create_model("vgg13", in_channels=1, image_size=8, width=0.05),
    )
    module, losses = snapshots.fit_calibration(student, teacher, data, 8, steps=2)
    assert (
        len(losses) == 2
        and snapshots.fit_calibration(student, teacher, data, 8, steps=2)[1] == losses
    )
    x, y = fixed_batch(data, 8)
    seen = snapshots.record_calibration(module, student, teacher, x, y, beta=10.0)
    assert torch.allclose(seen.mean_attention.sum(-1), torch.ones(2, 5)) and math.isclose(
        seen.total, seen.terms["ce"] + seen.terms["kd"] + 10 * seen.terms["sastc"]
    )

    def draw():
        return diagrams.draw_sastc_overview(module, student, teacher, x, y, x[0, 0].numpy(), 10.0)

    (fig, numbers), (again, _) = draw(), draw()
    assert png(fig) == png(again)
    weights = (
        numbers[numbers.row == "attention"]["puts out"].astype(float).to_numpy().reshape(2, 5, 6)
    )
    assert np.allclose(weights, seen.mean_attention, atol=1e-5) and float(
        numbers["puts out"].iloc[-1]
    ) == pytest.approx(seen.total, rel=1e-5)
    words = [t for ax in fig.axes for t in ax.texts if t.get_text()]
    inside = [t.get_window_extent() for t in words]
    assert (
        min(b.x0 for b in inside) >= 0
        and max(b.x1 for b in inside) <= fig.bbox.width
        and min(b.y0 for b in inside) >= 0
        and max(b.y1 for b in inside) <= fig.bbox.height
    )
