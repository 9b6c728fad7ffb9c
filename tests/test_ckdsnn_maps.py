"""Maps and how alike they are, energies, overhead, and the pages of CKDSNN that look inside networks."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from snnkd_nb.core import UserError
from snnkd_nb.losses.maps import cam
from snnkd_nb.metrics.activity import NAMES, energies, layer_table, spikingjelly_counts
from snnkd_nb.metrics.likeness import brightest, compare_maps, iou, pearson
from snnkd_nb.models.blocks import eval_mode
from snnkd_nb.models.spikformer import Products
from snnkd_nb.models.zoo import create_model
from snnkd_nb.papers.experiments import SCALES, build_grid
from snnkd_nb.papers.published import published
from snnkd_nb.reports import diagrams, efficiency, maps, snapshots
from snnkd_nb.reports.maps import compute_class_map, compute_maps, compute_spike_map
from snnkd_nb.runner import timing

ROOT = Path(__file__).resolve().parents[1]
VIEWS = ("table05", "figure01", "figure02", "figure03", "figure06", "figure07")

shapes = st.tuples(st.integers(1, 3), st.integers(2, 7), st.integers(2, 7))
stack = shapes.flatmap(lambda s: hnp.arrays(np.float64, s, elements=st.floats(-100, 100, width=32)))
pair = shapes.flatmap(
    lambda s: st.tuples(*[hnp.arrays(np.float64, s, elements=st.integers(0, 9).map(float))] * 2)
)


@settings(max_examples=60, deadline=None)
@given(pair)
def test_likeness_is_symmetric_bounded_and_blind_to_order_of_pixels(two):
    a, b = map(torch.from_numpy, two)
    for f, low in ((pearson, -1), (iou, 0)):
        v = f(a, b)
        assert (
            v.shape == (len(a),)
            and (v >= low).all()
            and (v <= 1).all()
            and torch.allclose(v, f(b, a))
        )
        order = torch.randperm(a[0].numel(), generator=torch.Generator().manual_seed(0))
        mixed = [m.flatten(1)[:, order].reshape(m.shape) for m in (a, b)]
        assert torch.allclose(f(*mixed), v, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(stack, st.floats(0.1, 50), st.floats(-50, 50))
def test_a_map_is_like_itself_scaled_and_shifted(m, factor, shift):
    a = torch.from_numpy(m)
    flat = a.flatten(1).std(1) < 1e-4 * (1 + a.abs().amax((1, 2)) + abs(shift))
    assert torch.allclose(
        pearson(a, factor * a + shift)[~flat], torch.ones(len(a)).double()[~flat], atol=1e-6
    )
    assert (iou(a, a) == 1).all() and (pearson(a, torch.full_like(a, shift)) == 0).all()


@settings(max_examples=60, deadline=None)
@given(stack, st.floats(0.05, 1))
def test_the_brightest_are_at_least_their_share_and_never_below_the_rest(m, share):
    a = torch.from_numpy(m)
    mask, flat = brightest(a, share), a.flatten(1)
    assert (mask.sum(1) >= math.ceil(round(share * flat.shape[1], 9))).all()
    for row, chosen in zip(flat, mask):
        assert chosen.all() or row[chosen].min() > row[~chosen].max()


def test_wrong_maps_are_refused():
    with pytest.raises(UserError, match="one size"):
        pearson(torch.rand(2, 4, 4), torch.rand(2, 4, 5))
    with pytest.raises(UserError, match="one size"):
        iou(torch.rand(4, 4), torch.rand(4, 4))
    with pytest.raises(UserError, match="share"):
        brightest(torch.rand(1, 4, 4), 1.5)


class Spiking(nn.Module):
    "Two layers whose input is written down: an image, then two spikes in four steps."

    T = 4

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.out = (
            nn.Conv2d(1, 2, 3, padding=1, bias=False),
            nn.Identity(),
            nn.Linear(2 * 9, 5, bias=False),
        )
        self.act.v_threshold = 1.0
        self.spikes = torch.zeros(4, 18)
        self.spikes[0, 4] = self.spikes[3, 17] = 1

    def forward(self, x):
        return self.out(self.act(self.spikes.repeat_interleave(len(x), 0) + 0 * self.conv(x).sum()))


def test_energy_by_hand():
    table = layer_table(Spiking(), torch.rand(1, 1, 3, 3))
    first, last = 9 * 2 * 9, 18 * 5
    assert table.macs.tolist() == [first, last] and table.steps.tolist() == [1, 4]
    assert (
        table.acs.tolist() == [0, 2 * 5]
        and np.allclose(table.sops, [0, 10])
        and np.allclose(table.rate[1], 2 / 72)
        and table.nonzero[1] == 2 / 72
    )
    joules = energies(table).set_index("convention").microjoule * 1e6
    want = {
        "45nm": 0.9 * 10 + 4.6 * first,
        "45nm-first-xT": 0.9 * 10 + 4.6 * first * 4,
        "77fJ": 0.77 + 4.6 * first,
        "spikingjelly": 9 + 4.6 * first,
        "all-mac": 4.6 * (first + 4 * last),
    }
    assert tuple(joules.index) == NAMES and all(
        math.isclose(joules[k], v, rel_tol=1e-5) for k, v in want.items()
    )


class Attending(nn.Module):
    "One head over spikes that are written down, in both orders: as many tokens as there are, of so many features."

    def __init__(self, T, tokens, features):
        super().__init__()
        self.T, self.ssa = T, Products()
        self.qkv = (
            torch.rand(3, T, 1, tokens, features, generator=torch.Generator().manual_seed(tokens))
            > 0.6
        ).float()

    def forward(self, x):
        return self.ssa(*(part.repeat_interleave(len(x), 0) for part in self.qkv))


@pytest.mark.parametrize("tokens, features", [(5, 3), (3, 5)])
def test_attention_by_hand(tokens, features):
    T = 2
    net = Attending(T, tokens, features)
    table = layer_table(net, torch.rand(3, 1, 2, 2)).set_index("layer")
    q, k, v = (part[:, 0] for part in net.qkv)
    inner = (
        features if tokens > features else tokens
    )  # the edge of what stands between the two products
    assert (
        table.macs.tolist() == [tokens * features * inner] * 2
        and table.steps.tolist() == [T, T]
        and set(table.kind) == {"product"}
    )
    first, second = ((k, v), (q, None)) if tokens > features else ((q, k), (v, None))
    assert list(table.index) == (
        ["ssa.kᵀv", "ssa.q(kᵀv)"] if tokens > features else ["ssa.qkᵀ", "ssa.(qkᵀ)v"]
    )
    for name, driver in zip(table.index, (first[0], second[0])):
        assert table.input[name] == "spikes" and table.sops[name] == pytest.approx(
            float(driver.sum()) * inner, rel=1e-6
        )
    if tokens > features:
        both = sum(
            float(k[t, n, i] * v[t, n, j])
            for t in range(T)
            for n in range(tokens)
            for i in range(features)
            for j in range(features)
        )
    else:
        both = sum(
            float(q[t, a, i] * k[t, b, i])
            for t in range(T)
            for a in range(tokens)
            for b in range(tokens)
            for i in range(features)
        )
    assert (
        table.acs.tolist() == [both, float(second[0].sum()) * inner] and table.mac_ops.eq(0).all()
    )
    assert energies(table.reset_index()).set_index("convention").additions["45nm"] == pytest.approx(
        table.sops.sum()
    )


def test_attention_of_an_ordinary_transformer_is_multiplied():
    table = layer_table(
        create_model("spikformer", width=0.0625, blocks=1, image_size=16), torch.rand(2, 3, 16, 16)
    )
    products = table[table.kind == "product"]
    assert (
        len(products) == 2
        and products.mac_ops.eq(products.macs).all()
        and products.sops.eq(0).all()
        and set(products.input) == {"analogue"}
    )


@pytest.mark.parametrize(
    "name, kw",
    [
        ("vgg11_rate", {}),
        ("sew_resnet18", {}),
        ("resnet19_ckd", {}),
        *((n, {"blocks": 2, "heads": h}) for n in ("spikformer", "spikingformer") for h in (4, 1)),
    ],
)
def test_counts_are_spikingjellys(name, kw):
    torch.manual_seed(0)
    net, x = (
        create_model(name, T=2, width=0.0625, image_size=16, **kw),
        3 * torch.randn(2, 3, 16, 16),
    )
    if kw:  # 16 tokens: fewer than the features of one head, more than those of one of four
        for m in net.modules():
            m.momentum = 1.0
        with torch.no_grad():
            [net.train()(x) for _ in range(8)]  # running statistics that let spikes through
        assert layer_table(net, x).query("kind == 'product'").acs.gt(0).all(), (
            "attention that is silent shows nothing"
        )
    table, theirs = layer_table(net, x), spikingjelly_counts(net, x)
    assert (
        math.isclose(table.acs.sum(), theirs["synops"], rel_tol=1e-6)
        and float((table.macs * table.steps)[~table.binary].sum()) == theirs["macs"]
    )


def test_a_table_changes_nothing_in_the_network():
    net = create_model("resnet20", T=2, width=0.25, image_size=8).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    layer_table(net, torch.rand(2, 3, 8, 8))
    assert net.training and all(v.equal(before[k]) for k, v in net.state_dict().items())


@pytest.fixture(scope="module")
def nets():
    torch.manual_seed(0)

    def make(**kw):
        return create_model("resnet20", in_channels=1, image_size=16, width=0.5, **kw)

    snn = {"T": 2, "neuron_args": {"v_threshold": 0.25}}
    return {"Teacher": make(), "Baseline": make(**snn), "CKDSNN": make(**snn)}


X, Y = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(6)


def test_maps_of_an_image_do_not_depend_on_its_batch(nets):
    whole = maps.compute_maps(nets, X, Y)
    for n, m in maps.compute_maps(nets, X[2:4], Y[2:4]).items():
        assert torch.allclose(m, whole[n][2:4], atol=1e-5)
    with pytest.raises(UserError, match="teacher has not been run"):
        maps.compute_maps({"CKDSNN": nets["CKDSNN"]}, X, Y)


def test_saved_maps_are_the_maps(nets):
    found = maps.compute_maps(nets, X, Y)
    frame = maps.tabulate_maps(found, "teacher CAM", range(6), list("abcdef"))
    assert len(frame) == 18 and set(frame["size"]) == {"4×4"}
    for _, r in frame.iterrows():
        values = torch.tensor([float(v) for v in r["values"].split()]).view(4, 4)
        assert torch.allclose(values, found[r["map"]][r["image"]], rtol=2e-3, atol=1e-6)
    again = compare_maps(found["SAM, CKDSNN"], found["teacher CAM"])
    assert np.allclose(frame[frame["map"] == "SAM, CKDSNN"].pearson, [r["pearson"] for r in again])


def test_the_gradient_is_exact_where_nothing_spikes_behind(nets):
    for net in nets.values():
        assert torch.allclose(*maps.channel_effects(net, "stage3", X, Y), atol=1e-5)
    assert (maps.gradient_accuracy(nets["CKDSNN"], "stage1", X, Y) < 0.999).all()


def test_chance_is_the_likeness_to_another_image(nets):
    same = maps.mean_likeness(
        {
            "a": torch.eye(4).view(2, 2, 4)[[0, 1, 0, 1]],
            "b": torch.eye(4).view(2, 2, 4)[[0, 1, 0, 1]],
        },
        "a",
    )
    assert same.pearson[0] == pytest.approx(1) and same["pearson, another image"][
        0
    ] == pytest.approx(1)  # half the list away is the same map
    other = torch.eye(4).view(2, 2, 4)
    assert maps.mean_likeness({"a": other, "b": other}, "a")["pearson, another image"][0] < 0.5


def test_features_keep_no_trace_of_order_or_batch(nets):
    for net in nets.values():
        assert torch.allclose(
            maps.pooled_features(net, X.flip(0), size=2).flip(0),
            maps.pooled_features(net, X),
            atol=1e-5,
        )


def test_overview_adds_up(nets):
    _fig, numbers = diagrams.draw_ckdsnn_overview(
        nets["CKDSNN"], nets["Teacher"], X, Y, X[0, 0].numpy()
    )
    said = {r["module"]: float(r["puts out"]) for _, r in numbers[numbers.row == "loss"].iterrows()}
    with eval_mode(nets["CKDSNN"]):
        logits = nets["CKDSNN"](X).mean(0)
    assert said["ce"] == pytest.approx(
        float(nn.functional.cross_entropy(logits, Y)), rel=1e-4
    ) and set(said) == {"ce", "samd", "nld"}
    frame = snapshots.tabulate_distributions(snapshots.record_outputs(nets, X, Y))
    assert np.allclose(frame.groupby(["panel", "network"]).share.sum(), 1, atol=1e-4)


def test_overhead_of_the_smallest_nets():
    rows = timing.measure_methods(["kd"], timing.TINY, 2, memory=True)
    assert (
        [r["method"] for r in rows] == ["none", "kd"]
        and rows[0]["time"] == 1
        and rows[1]["time"] > 0
        and rows[1]["mib"] >= 0
    )
    assert set(timing.overhead_frame({"rows": rows})) >= {
        "method",
        "time",
        "low",
        "high",
        "memory",
    }


def test_a_missing_measurement_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SNNKD_ROOT", str(tmp_path))
    with pytest.raises(UserError, match="measure"):
        timing.load_overhead("cpu")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", VIEWS)
def test_every_run_can_be_built(name, scale):
    from snnkd_nb.losses.zoo import parse_methods

    specs = build_grid(f"ckdsnn/{name}", scale).specs
    for model in {s.model for s in specs}:
        if ":" in model.name:
            continue
        with torch.device("meta"):
            create_model(
                model.name, 10, T=model.T, neuron=model.neuron, width=model.width, **model.args
            )
    assert all(s.method == "none" or parse_methods(s.method) for s in specs)


class Stored:
    def __init__(self, acc):
        self.metrics = {"acc_last": acc, "firing_rate": 0.2}


def test_table_5_meets_its_published_rows():
    grid = build_grid("ckdsnn/table05", "smoke")
    own, runs = (
        {r["method"] for r in published("ckdsnn/table05").records},
        {s: Stored(50.0 + i) for i, s in enumerate(grid.specs)},
    )
    assert {c.index["method"] for c in grid.cells} == own
    net = create_model("resnet20", T=2, width=0.5, in_channels=1, image_size=16, depth=0.34)
    frame = efficiency.measure_efficiency(grid, runs, dict.fromkeys(grid.specs, net))
    assert len(frame) == 4 and frame["fire rate"].eq(20).all() and frame.sops.nunique() == 1
    verdicts = efficiency.judge_efficiency(grid, frame)
    assert verdicts.iloc[0, 2] == "3 of 6 comparisons run: undecided (one seed)"
    assert verdicts.iloc[1, 2] == "9 of 18 comparisons run: undecided (one seed)"
    assert verdicts.iloc[1, 3] == "+0; 0 of 9 are positive", "equal costs are not lower ones"
    assert set(efficiency.judge_efficiency(grid, frame[:0]).iloc[:, 2]) == {"not run"}


@pytest.mark.parametrize("name", VIEWS)
def test_pages_are_short_and_state_what_differs(name):
    nb = json.loads((ROOT / "nbs/papers/ckdsnn" / f"{name}.ipynb").read_text())
    code = ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"]
    assert len(nb["cells"]) <= 13 and any("deviations" in s for s in code)
    assert not any(re.search(r"^\s*(while|class)\s", s, re.M) for s in code)


def sj_net(step_mode):
    "A network as SpikingJelly's users write it: neurons that keep their state, called step by step or on all steps at once."
    from spikingjelly.activation_based import layer, neuron

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.c1, self.n1, self.c2, self.n2 = (
                layer.Conv2d(1, 4, 3, padding=1, step_mode=step_mode),
                neuron.IFNode(step_mode=step_mode),
                layer.Conv2d(4, 4, 3, padding=1, step_mode=step_mode),
                neuron.IFNode(step_mode=step_mode),
            )
            self.fc = layer.Linear(4, 3, step_mode=step_mode)

        def once(self, x):
            return self.fc(self.n2(self.c2(self.n1(self.c1(x)))).mean((-2, -1)))

        def forward(self, x):
            return (
                torch.stack([self.once(x) for _ in range(4)])
                if step_mode == "s"
                else self.once(x.expand(4, *x.shape))
            )

    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_a_network_of_spikingjelly_is_counted_from_rest_and_like_its_own_counters(step_mode):
    from spikingjelly.activation_based import functional

    model, x = sj_net(step_mode), 3 * torch.rand(4, 1, 8, 8)
    first, again = layer_table(model, x), layer_table(model, x)
    pd.testing.assert_frame_equal(first, again)
    assert (
        float(first.acs.sum()) == spikingjelly_counts(model, x)["synops"] > 0
        and len(first) == {"m": 3, "s": 12}[step_mode]
    )  # a row a call
    other = layer_table(sj_net("m" if step_mode == "s" else "s"), x)
    assert (
        first.groupby("layer")[["sops", "acs"]]
        .sum()
        .round(3)
        .equals(other.groupby("layer")[["sops", "acs"]].sum().round(3))
    )
    functional.reset_net(model)
    before = model(x)
    functional.reset_net(model)
    assert torch.equal(before, model(x)) and not torch.equal(before, model(x)), (
        "it keeps a state, which the counts did not disturb"
    )


def test_what_nobody_counts_is_said():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.attend, self.fc = (
                nn.ConvTranspose2d(1, 4, 2),
                nn.MultiheadAttention(4, 1, batch_first=True),
                nn.Linear(4, 3),
            )

        def forward(self, x):
            return self.fc(self.attend(*[self.up(x).flatten(2).mT] * 3)[0].mean(1))

    with pytest.warns(UserWarning, match="up, attend, attend.out_proj"):
        table = layer_table(Odd(), torch.randn(2, 1, 4, 4))
    assert list(table.layer) == ["fc"]


def test_maps_of_networks_of_your_own_and_of_frames():
    own = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    x, y = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    assert torch.allclose(
        compute_class_map(own, x, y, "1"), cam(own[:2](x), own[4].weight, y) / 64, atol=1e-6
    )
    model = sj_net("m")
    assert compute_spike_map(model, x, "n2").shape == (2, 8, 8)
    with pytest.raises(UserError, match="no named stages"):
        compute_spike_map(model, x)
    events = create_model("resnet20", T=4, width=0.125, in_channels=1, image_size=8, depth=0.34)
    assert compute_class_map(events, torch.randn(4, 2, 1, 8, 8), y, "stage2").shape == (2, 4, 4)
    assert {
        n: m.shape
        for n, m in compute_maps(
            {"Teacher": events, "SNN": events},
            torch.randn(4, 6, 1, 8, 8),
            torch.zeros(6).long(),
            size=4,
        ).items()
    }.keys() == {"teacher CAM", "SAM, SNN"}
    with pytest.raises(UserError, match="not finite"):
        compare_maps(torch.full((1, 2, 2), torch.nan), torch.rand(1, 2, 2))
