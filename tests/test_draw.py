"Pictures say what the modules do: nothing is missing, nothing overlaps, nothing is changed by looking."

import re

import matplotlib
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

matplotlib.use("Agg")

from snnkd_nb.core import UserError
from snnkd_nb.models.blocks import MODELS, BasicBlock, Bottleneck, activation
from snnkd_nb.models.genome import dsas
from snnkd_nb.models.zoo import create_model, list_models
from snnkd_nb.neurons.lif import FromSpikingJelly
from snnkd_nb.reports.draw import dot, draw, layout, tall, trunk
from snnkd_nb.reports.graph import label_of, table, trace
from snnkd_nb.vision import torchvision


def texts(fig):
    return [t.get_text() for ax in fig.axes for t in ax.texts]


def overlaps(nodes):
    place = layout(nodes)
    at = [(*place.at[n.id], 2 * place.half(n), tall(n), n.label) for n in nodes]
    return [
        (a[4], b[4])
        for i, a in enumerate(at)
        for b in at[:i]
        if abs(a[0] - b[0]) < (a[2] + b[2]) / 2 and abs(a[1] - b[1]) < (a[3] + b[3]) / 2
    ]


@pytest.mark.parametrize("name", [n for n in list_models() if MODELS[n]["spiking"]])
@pytest.mark.parametrize("T", [None, 2])
def test_every_layer_of_every_network_is_drawn_once(name, T):
    net = create_model(name, T=T, width=0.05, image_size=32)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    nodes = trace(net, "layers")
    for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Linear):
        drawn = sorted(
            n.name for n in nodes if n.name and isinstance(net.get_submodule(n.name), kind)
        )
        assert drawn == sorted(k for k, m in net.named_modules() if isinstance(m, kind))
    assert all(n.label == label_of(net.get_submodule(n.name)) for n in nodes if n.name)
    assert all(n.inputs and max(n.inputs) < n.id for n in nodes[1:]) and nodes[-1].shape == (10,)
    assert not overlaps(nodes) and not overlaps(trace(net))
    assert all(v.equal(state[k]) for k, v in net.state_dict().items()) and net.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@given(kinds=st.lists(st.sampled_from("nd"), min_size=1, max_size=6), T=st.sampled_from([None, 2]))
@settings(max_examples=10, deadline=None)
def test_a_genome_is_drawn_block_by_block(kinds, T):
    nodes = trace(dsas([(k, 4) for k in kinds], T=T, in_channels=4, image_size=64))
    assert [n.kind for n in nodes[1:-2]] == ["down" if k == "d" else "block" for k in kinds]
    assert [n.label.endswith("/2") for n in nodes[1:-2]] == [k == "d" for k in kinds]


@pytest.mark.parametrize(
    "block",
    [
        BasicBlock(8, 8, 1, nn.ReLU),
        BasicBlock(8, 16, 1, nn.ReLU),
        Bottleneck(8, 4, 2, activation(3), "pool"),
    ],
)
def test_dot_and_table_are_the_same_graph(block):
    nodes, text, rows = trace(block), dot(block), table(block)
    edges = {(int(a), int(b)) for a, b in re.findall(r"n(\d+) -> n(\d+)", text)}
    assert (
        edges
        == {(a, n.id) for n in nodes for a in n.inputs}
        == {(int(a), r["id"]) for _, r in rows.iterrows() for a in r["inputs"].split()}
    )
    assert (
        text.count("{") == text.count("}") == 1
        and text.count('"') % 2 == 0
        and len(rows) == len(nodes)
    )


def test_networks_of_others():
    resnet = trace(torchvision("models").resnet18(), "blocks", (3, 64, 64))
    assert [n.label for n in resnet].count("BasicBlock, 64 → 64") == 2 and sum(
        n.kind == "down" for n in resnet
    ) == 3
    cell = torchvision("models.googlenet").Inception(8, 4, 4, 4, 4, 4, 4)
    nodes = trace(cell, x=(8, 8, 8))
    assert nodes[-1].label == "concat" and len(nodes[-1].inputs) == 4 and not overlaps(nodes)
    assert {n.label for n in nodes} <= set(texts(draw(cell, x=(8, 8, 8))))


def test_attention_between_arms():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            return x + self.out((self.q(x) @ self.k(x).transpose(-2, -1)).softmax(-1) @ self.v(x))

    nodes = trace(Attention(), x=torch.zeros(2, 5, 8))
    assert [n.label for n in nodes if not n.name] == [
        "input",
        "@",
        "softmax",
        "@",
        "+",
    ] and not overlaps(nodes)
    assert nodes[-1].inputs == (0, nodes[-2].id)
    draw(nodes)


def test_spikingjelly_neurons_are_one_box():
    sj = pytest.importorskip("spikingjelly.activation_based.neuron")
    block = BasicBlock(4, 4, 1, activation(2, lambda T: FromSpikingJelly(sj.IFNode(), T)))
    assert [n.label for n in trace(block) if n.kind == "neuron"] == ["IFNode, T = 2"] * 2 or [
        n.kind for n in trace(block)
    ].count("neuron") == 2


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
    assert not net.conv._forward_hooks and not net.conv._forward_pre_hooks and net.training
    assert torch.is_grad_enabled()


class Odd(nn.Module):
    "Keywords, a block that answers with a tuple, a layer fed by a buffer, and a branch that nobody reads, last."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.dead, self.linear, self.twice = (
            nn.Conv2d(3, 3, 1),
            nn.Conv2d(3, 3, 1),
            nn.Conv2d(6, 9, 1),
            nn.Linear(2, 6),
            Two(),
        )
        self.register_buffer("seed", torch.ones(1, 2))

    def forward(self, x):
        both = torch.cat(tensors=[self.a(input=x), self.b(x)], dim=1)
        y = both + self.linear(self.seed)[..., None, None]
        y, aux = self.twice(y)
        return y, self.dead(aux)


class Two(nn.Module):
    "Two answers."

    def __init__(self):
        super().__init__()
        setattr(self, "conv", nn.Conv2d(6, 6, 1))
        setattr(self, "act", nn.ReLU())

    def forward(self, x):
        return self.act(self.conv(x)), x


@pytest.mark.parametrize("level", ["layers", "blocks"])
def test_calls_that_are_out_of_the_ordinary(level):
    nodes = trace(Odd(), level)
    by = {n.label: n for n in nodes}
    assert [nodes[i].label for i in by["concat"].inputs] == ["1×1 conv, 3 → 3"] * 2, (
        "a keyword argument feeds as well"
    )
    assert nodes[by["linear, 2 → 6"].inputs[0]].label == "constant"
    assert [n.label for n in nodes if n.out] == (["ReLU"] if level == "layers" else ["Two, 6 → 6"])
    assert nodes[-1].label == "1×1 conv, 6 → 9" and trunk(nodes)[-1] == next(
        n.id for n in nodes if n.out
    )
    assert not overlaps(nodes) and {n.label for n in nodes} <= set(texts(draw(nodes)))


def test_a_long_dead_branch_at_the_end_does_not_pile_up():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            setattr(self, "a", nn.Conv2d(3, 3, 1))
            setattr(self, "more", nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(5)]))

        def forward(self, x):
            return (y := self.a(x), self.more(y))[0]

    nodes = trace(Dead())
    assert trunk(nodes) == [0, 1] and len(nodes) == 7 and not overlaps(nodes)


def test_a_foreign_network_is_no_single_box():
    with torch.device("meta"):
        resnet, vit = (
            create_model("torchvision:resnet18", image_size=64),
            create_model("torchvision:vit_b_16", image_size=32, input_size=224),
        )
    labels = [n.label for n in trace(resnet)]
    assert (
        labels.count("BasicBlock, 64 → 64") == 2
        and labels[-1] == "linear, 512 → 10"
        and not overlaps(trace(resnet))
    )
    assert [n.label for n in trace(vit)].count("EncoderBlock, 768 → 768") == 12


def test_a_chain_is_listed_alike_in_every_stage():
    with torch.device("meta"):
        net = create_model("vggsnn", T=4, in_channels=2, image_size=48)
    stages = [n.label for n in trace(net) if n.name.startswith("stage")]
    assert all("BatchNorm" in s and "LIF, T = 4" in s and "3×3 conv" in s for s in stages), stages


def test_a_name_is_not_a_network():
    for look in (draw, dot, table):
        with pytest.raises(UserError, match=r"create_model\('resnet20'\)"):
            look("resnet20")
