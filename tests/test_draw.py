"Pictures of networks show every layer once, no box covers another, and tracing changes nothing."

import itertools
import re
import sys

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

matplotlib.use("Agg")

from snnkd_nb.core import UserError, torchvision
from snnkd_nb.models.blocks import MODELS, BasicBlock, Bottleneck, activation
from snnkd_nb.models.genome import dsas
from snnkd_nb.models.zoo import create_model, list_models
from snnkd_nb.neurons.lif import FromSpikingJelly
from snnkd_nb.reports import figure as figure_module
from snnkd_nb.reports.figure import explore
from snnkd_nb.reports.graph import (
    box_height,
    draw_graph,
    find_trunk,
    graph_table,
    layer_label,
    layout_nodes,
    to_dot,
    trace,
)


def texts_of(fig):
    return [text.get_text() for ax in fig.axes for text in ax.texts]


def overlapping_boxes(nodes):
    "Return the labels of all pairs of boxes that cover each other."
    place = layout_nodes(nodes)
    found = []
    for a, b in itertools.combinations(nodes, 2):
        (ax, ay), (bx, by) = place.at[a.id], place.at[b.id]
        overlaps_in_x = abs(ax - bx) < place.half(a) + place.half(b)
        overlaps_in_y = abs(ay - by) < (box_height(a) + box_height(b)) / 2
        if overlaps_in_x and overlaps_in_y:
            found.append((a.label, b.label))
    return found


@pytest.mark.parametrize("name", [n for n in list_models() if MODELS[n]["spiking"]])
@pytest.mark.parametrize("T", [None, 2])
def test_every_layer_of_every_network_is_drawn_once(name, T):
    net = create_model(name, T=T, width=0.05, image_size=32)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    nodes = trace(net, "layers")
    named = [n for n in nodes if n.name]
    for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Linear):
        drawn = sorted(n.name for n in named if isinstance(net.get_submodule(n.name), kind))
        assert drawn == sorted(k for k, m in net.named_modules() if isinstance(m, kind))
    assert all(n.label == layer_label(net.get_submodule(n.name)) for n in named)
    assert all(n.inputs and max(n.inputs) < n.id for n in nodes[1:])
    assert nodes[-1].shape == (10,)
    assert not overlapping_boxes(nodes)
    assert not overlapping_boxes(trace(net))
    assert all(v.equal(state[k]) for k, v in net.state_dict().items())
    assert net.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@given(kinds=st.lists(st.sampled_from("nd"), min_size=1, max_size=6), T=st.sampled_from([None, 2]))
@settings(max_examples=10, deadline=None)
def test_a_genome_is_drawn_block_by_block(kinds, T):
    nodes = trace(dsas([(k, 4) for k in kinds], T=T, in_channels=4, image_size=64))
    blocks = nodes[1:-2]
    assert [n.kind for n in blocks] == ["down" if k == "d" else "block" for k in kinds]
    assert [n.label.endswith("/2") for n in blocks] == [k == "d" for k in kinds]


@pytest.mark.parametrize(
    "block",
    [
        BasicBlock(8, 8, 1, nn.ReLU),
        BasicBlock(8, 16, 1, nn.ReLU),
        Bottleneck(8, 4, 2, activation(3), "pool"),
    ],
)
def test_dot_and_table_are_the_same_graph(block):
    nodes = trace(block)
    text = to_dot(block)
    rows = graph_table(block)
    expected = {(source, node.id) for node in nodes for source in node.inputs}
    edges_of_dot = {(int(a), int(b)) for a, b in re.findall(r"n(\d+) -> n(\d+)", text)}
    edges_of_table = {
        (int(source), row["id"]) for _, row in rows.iterrows() for source in row["inputs"].split()
    }
    assert edges_of_dot == expected
    assert edges_of_table == expected
    assert text.count("{") == text.count("}") == 1
    assert text.count('"') % 2 == 0
    assert len(rows) == len(nodes)


def test_networks_of_others():
    resnet = trace(torchvision("models").resnet18(), "blocks", (3, 64, 64))
    assert [n.label for n in resnet].count("BasicBlock, 64 → 64") == 2
    assert sum(n.kind == "down" for n in resnet) == 3
    cell = torchvision("models.googlenet").Inception(8, 4, 4, 4, 4, 4, 4)
    nodes = trace(cell, x=(8, 8, 8))
    assert nodes[-1].label == "concat"
    assert len(nodes[-1].inputs) == 4
    assert not overlapping_boxes(nodes)
    assert {n.label for n in nodes} <= set(texts_of(draw_graph(cell, x=(8, 8, 8))))


def test_attention_between_arms():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            weights = (self.q(x) @ self.k(x).transpose(-2, -1)).softmax(-1)
            return x + self.out(weights @ self.v(x))

    nodes = trace(Attention(), x=torch.zeros(2, 5, 8))
    assert [n.label for n in nodes if not n.name] == ["input", "@", "softmax", "@", "+"]
    assert not overlapping_boxes(nodes)
    assert nodes[-1].inputs == (0, nodes[-2].id)
    draw_graph(nodes)


def test_spikingjelly_neurons_are_one_box():
    sj = pytest.importorskip("spikingjelly.activation_based.neuron")
    block = BasicBlock(4, 4, 1, activation(2, lambda T: FromSpikingJelly(sj.IFNode(), T)))
    neurons = [n for n in trace(block) if n.kind == "neuron"]
    assert len(neurons) == 2


def test_hooks_are_gone_after_an_error():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(x).no_such_thing

    net = Broken()
    with pytest.raises(AttributeError):
        trace(net)
    assert not net.conv._forward_hooks
    assert not net.conv._forward_pre_hooks
    assert net.training
    assert torch.is_grad_enabled()


class Odd(nn.Module):
    "Keyword arguments, a block that returns a tuple, a layer fed by a buffer, an unread last branch."

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 3, 1)
        self.b = nn.Conv2d(3, 3, 1)
        self.dead = nn.Conv2d(6, 9, 1)
        self.linear = nn.Linear(2, 6)
        self.twice = ReturnsTwo()
        self.register_buffer("seed", torch.ones(1, 2))

    def forward(self, x):
        both = torch.cat(tensors=[self.a(input=x), self.b(x)], dim=1)
        y = both + self.linear(self.seed)[..., None, None]
        y, aux = self.twice(y)
        return y, self.dead(aux)


class ReturnsTwo(nn.Module):
    "A block that returns its output and its input."

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 1)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.conv(x)), x


@pytest.mark.parametrize("level", ["layers", "blocks"])
def test_unusual_calls(level):
    nodes = trace(Odd(), level)
    by_label = {n.label: n for n in nodes}
    sources = [nodes[i].label for i in by_label["concat"].inputs]
    assert sources == ["1×1 conv, 3 → 3"] * 2, "a keyword argument feeds as well"
    assert nodes[by_label["linear, 2 → 6"].inputs[0]].label == "constant"
    last = "ReLU" if level == "layers" else "ReturnsTwo, 6 → 6"
    assert [n.label for n in nodes if n.out] == [last]
    assert nodes[-1].label == "1×1 conv, 6 → 9"
    assert find_trunk(nodes)[-1] == next(n.id for n in nodes if n.out)
    assert not overlapping_boxes(nodes)
    assert {n.label for n in nodes} <= set(texts_of(draw_graph(nodes)))


def test_a_long_dead_branch_at_the_end_does_not_pile_up():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 3, 1)
            self.more = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(5)])

        def forward(self, x):
            y = self.a(x)
            self.more(y)
            return y

    nodes = trace(Dead())
    assert find_trunk(nodes) == [0, 1]
    assert len(nodes) == 7
    assert not overlapping_boxes(nodes)


def test_a_foreign_network_is_more_than_one_box():
    with torch.device("meta"):
        resnet = create_model("torchvision:resnet18", image_size=64)
        vit = create_model("torchvision:vit_b_16", image_size=32, input_size=224)
    labels = [n.label for n in trace(resnet)]
    assert labels.count("BasicBlock, 64 → 64") == 2
    assert labels[-1] == "linear, 512 → 10"
    assert not overlapping_boxes(trace(resnet))
    assert [n.label for n in trace(vit)].count("EncoderBlock, 768 → 768") == 12


def test_every_stage_lists_its_chain_alike():
    with torch.device("meta"):
        net = create_model("vggsnn", T=4, in_channels=2, image_size=48)
    stages = [n.label for n in trace(net) if n.name.startswith("stage")]
    for word in ("BatchNorm", "LIF, T = 4", "3×3 conv"):
        assert all(word in stage for stage in stages), stages


def test_a_name_is_not_a_network():
    for function in (draw_graph, to_dot, graph_table):
        with pytest.raises(UserError, match=r"create_model\('resnet20'\)"):
            function("resnet20")


def test_old_names_still_work():
    import snnkd_nb.reports.graph as graph

    with pytest.warns(DeprecationWarning, match="draw_graph"):
        assert graph.draw is draw_graph


def draw_line(slope=2, name="a"):
    figure, ax = plt.subplots()
    ax.plot([0, 1], [0, slope])
    ax.set_title(name)
    return figure


def test_a_picture_to_explore_is_static_without_a_person(monkeypatch):
    monkeypatch.delenv("SNNKD_STATIC", raising=False)
    title = explore(draw_line, slope=(1, 5)).axes[0].get_title()
    assert title == "a"
    monkeypatch.setattr(figure_module, "in_notebook", lambda: True)
    monkeypatch.setenv("SNNKD_STATIC", "1")
    assert explore(draw_line, slope=(1, 5)).axes[0].get_title() == "a"
    monkeypatch.delenv("SNNKD_STATIC")
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # it cannot be imported
    assert explore(draw_line, slope=(1, 5)).axes[0].get_title() == "a"
    with pytest.raises(UserError, match="did you mean 'slope'"):
        explore(draw_line, slop=(1, 5))


def test_a_person_at_a_notebook_gets_sliders_with_the_defaults(monkeypatch):
    pytest.importorskip("ipywidgets")
    monkeypatch.delenv("SNNKD_STATIC", raising=False)
    monkeypatch.setattr(figure_module, "in_notebook", lambda: True)
    shown = explore(draw_line, slope=(1, 5), name=["b", "a"])
    slider, menu, _ = shown.widget.children
    assert (slider.min, slider.value, slider.max) == (1, 2, 5)
    assert (menu.options, menu.value) == (("b", "a"), "a")
