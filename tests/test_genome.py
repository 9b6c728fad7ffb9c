"A genome and its network agree, however it is written and whatever the image."

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snnkd_nb.core import UserError
from snnkd_nb.models.genome import (
    EXAMPLES,
    check_genome,
    dsas,
    fit_genome,
    genome_parameters,
    genome_text,
    halvings,
    parse_genome,
    set_slopes,
)
from snnkd_nb.spec import ModelSpec, RunSpec

GENES = st.tuples(st.sampled_from("nd"), st.integers(1, 40))
GENOMES = st.lists(GENES, min_size=1, max_size=9)


@given(GENOMES)
def test_text_lists_and_json_are_one_genome(genome):
    text = genome_text(genome)
    forms = [
        genome,
        [list(g) for g in genome],
        text.split(),
        json.loads(json.dumps(genome)),
        f"  {text}\n",
    ]
    assert all(genome_text(f) == text and parse_genome(f) == tuple(genome) for f in forms)


@given(
    genome=GENOMES,
    K=st.integers(1, 200),
    c=st.integers(1, 4),
    stem=st.none() | st.integers(1, 20),
    T=st.sampled_from([None, 2]),
)
@settings(max_examples=30, deadline=None)
def test_the_formula_counts_the_built_network(genome, K, c, stem, T):
    with torch.device("meta"):
        net = dsas(genome, stem, num_classes=K, in_channels=c, T=T, image_size=512)
    assert sum(p.numel() for p in net.parameters()) == genome_parameters(genome, K, c, stem)


@given(genome=GENOMES, size=st.integers(1, 40), stem=st.sampled_from([None, 3]))
@settings(max_examples=25, deadline=None)
def test_any_image_after_fitting(genome, size, stem):
    genes = fit_genome(genome, size)
    assert check_genome(genes, size) == genes and [g.channels for g in genes] == [
        c for _, c in genome
    ]
    shapes = list(dsas(genes, stem, image_size=size, in_channels=2).feature_shapes().values())
    if stem:
        assert shapes.pop(0) == (3, size, size)
    for g, shape in zip(genes, shapes, strict=True):
        assert g.stride == 1 or size > 1
        size = -(-size // g.stride)
        assert shape == (g.channels, size, size)


@given(st.integers(1, 4096))
def test_halvings(size):
    n, edge = 0, size
    while edge > 1:
        edge, n = -(-edge // 2), n + 1
    assert halvings(size) == n


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("genome, c", [("n3 n6", 3), ("n6", 3), ("d3 n3", 3), ("d8", 1)])
def test_a_static_image_equals_repeated_frames(genome, c, training):
    torch.manual_seed(0)
    net, x = dsas(genome, T=3, in_channels=c, image_size=8), torch.rand(4, c, 8, 8)
    for _ in range(5):
        net(x)
    with torch.no_grad():
        once, feats = net.train(training)(x, features=True)
        torch.testing.assert_close(once, net(x.expand(3, *x.shape)), atol=1e-5, rtol=1e-4)
    assert feats["stem"].sum() > 0, "a dead network would pass this test"


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run_small_as_both(name):
    genome = fit_genome(EXAMPLES[name], 8)
    ann, snn = (dsas(genome, T=T, width=1 / 32, image_size=8, in_channels=1) for T in (None, 2))
    snn.load_state_dict(ann.state_dict())
    for net in (ann, snn):
        net(torch.rand(2, 1, 8, 8)).sum().backward()
        assert all(p.grad is not None for p in net.parameters())
    assert snn.stage_names == ("stem", *(f"stage{i}" for i in range(1, len(genome))))


def test_a_spec_keeps_a_genome_in_either_form():
    for genome in ("n4 d8", [["n", 4], ["d", 8]]):
        spec = RunSpec.from_dict(
            json.loads(RunSpec(model=ModelSpec("dsas", args={"genome": genome})).canonical())
        )
        assert dsas(**spec.model.args).feature_channels() == {"stem": 4, "stage1": 8}


@pytest.mark.parametrize(
    "genome, words",
    [
        ("n64 x64", "valid: d, n"),
        ("N64", "valid: d, n"),
        ("64", "write a kind"),
        ("n", "write a kind"),
        ("n64,d64", "write a kind"),
        ("n0", "above 0"),
        ("n-1", "above 0"),
        ("n" + "9" * 5000, "write a kind"),
        ([["n", True]], "above 0"),
        ([["n", 1, 2]], "write a kind"),
        ([[["n"], 4]], "write a kind"),
        ([None], "write a kind"),
        ("", "no blocks"),
        ([], "no blocks"),
        (7, "text or a list"),
        ({"n": 4}, "text or a list"),
        ("d1 d1 d1 d1 d1 d1", "32×32 pixels allow 5"),
    ],
)
def test_mistakes_are_one_line(genome, words):
    with pytest.raises(UserError) as e:
        dsas(genome)
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("stem", [0, -1, 1.5, True, "64"])
def test_a_stem_is_a_number_of_channels(stem):
    with pytest.raises(UserError, match="stem = "):
        dsas("n4", stem)


def test_a_part_without_a_neuron_is_left_out():
    def at(genome):
        return [
            m.surrogate.alpha
            for m in dsas(
                genome, slopes=[2.0, 2.5, 3.0], T=1, neuron="dsas", image_size=8
            ).modules()
            if hasattr(m, "surrogate")
        ]

    assert (
        at("n4") == [2.0, 3.0]
        and at("n4 n4") == [2.0, 2.5, 2.5, 3.0]
        and at("n4 d4 n4") == [2.0, 2.0, 2.5, 2.5, 3.0, 3.0]
    )
    with pytest.raises(UserError, match="no spiking neurons"):
        set_slopes(dsas("n4", image_size=8), [2.0])
