"Whatever a space draws is in it, is built, and is counted; whatever it counts it can draw."

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snnkd_nb.core import UserError
from snnkd_nb.models.genome import (
    Gene,
    Space,
    count_genome_macs,
    create_space,
    create_space_for_teacher,
    genome_parameters,
    genome_text,
    halvings,
    list_spaces,
    searched,
)
from snnkd_nb.models.zoo import create_model, macs

RANGE = st.tuples(st.integers(0, 3), st.integers(0, 3)).map(sorted)


@st.composite
def spaces(draw, longest=3):
    size, channels = (
        draw(st.integers(1, 40)),
        draw(st.sets(st.integers(1, 20), min_size=1, max_size=3)),
    )
    normal, down = draw(RANGE), draw(RANGE)
    down[0] = min(down[0], halvings(size))
    if not normal[1] + min(down[1], halvings(size)):
        normal[1] = 1
    return Space(
        "drawn", tuple(channels), tuple(normal), tuple(down), size, draw(st.integers(1, 3))
    )


@given(space=spaces(), seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_drawn_genomes_are_valid_built_and_counted(space, seed):
    rng = np.random.default_rng(seed)
    for _ in range(3):
        g = space.sample(rng)
        assert (
            space.find_violation(g) == ""
            and space.check(genome_text(g)) == g
            and all(type(x) is Gene and type(x.channels) is int for x in g)
        )
        with torch.device("meta"):
            net = searched(
                g, num_classes=7, T=2, in_channels=space.in_channels, image_size=space.image_size
            )
        assert sum(p.numel() for p in net.parameters()) == genome_parameters(
            g, 7, space.in_channels
        )


@given(space=spaces())
@settings(max_examples=25, deadline=None)
def test_the_size_is_the_number_of_valid_genomes(space):
    longest = max(n + d for n, d in space.splits)
    if (2 * len(space.channels)) ** longest > 3_000:
        return
    words = [Gene(k, c) for k in "nd" for c in space.channels]
    valid = sum(
        space.find_violation(g) == ""
        for n in range(1, longest + 2)
        for g in itertools.product(words, repeat=n)
        if n <= longest
    )
    assert valid == space.size()


@pytest.mark.parametrize("name", list_spaces())
def test_ten_thousand_draws_are_valid_and_uniform_over_the_splits(name):
    space, rng = create_space(name), np.random.default_rng(1)
    draws = [space.sample(rng) for _ in range(10_000)]
    assert not any(space.find_violation(g) for g in draws)
    splits = [(sum(x.kind == "n" for x in g), sum(x.kind == "d" for x in g)) for g in draws]
    expected = len(draws) / len(space.splits)
    chi2, free = (
        sum((splits.count(s) - expected) ** 2 / expected for s in space.splits),
        len(space.splits) - 1,
    )
    assert abs(chi2 - free) < 5 * math.sqrt(2 * free)
    first = [g[0] for g in draws]
    for c in space.channels:
        assert (
            abs(sum(g.channels == c for g in first) / len(draws) - 1 / len(space.channels)) < 0.025
        )
    share = np.mean(
        [d / (n + d) for n, d in splits]
    )  # every position is as likely to be a downsample block
    assert abs(sum(g.kind == "d" for g in first) / len(draws) - share) < 0.025


def test_a_draw_depends_on_its_generator_alone():
    space = create_space("cifar10")
    first = [space.sample(np.random.default_rng(5)) for _ in range(2)]
    np.random.seed(0)
    torch.manual_seed(0)
    assert (
        first[0]
        == first[1]
        == space.sample(np.random.default_rng(5))
        != space.sample(np.random.default_rng(6))
    )


@pytest.mark.parametrize(
    "genome, words",
    [
        ("n64 d64 d64", "1 normal blocks, allowed are 3 to 15"),
        ("n64 n64 n64 d64", "1 downsample blocks, allowed are 2 to 3"),
        ("n64 n64 n65 d64 d64", "65 are not among"),
        ("", "no blocks"),
        ("n64 q64", "unknown kind of block"),
        ([["n", 1.5]], "whole number"),
    ],
)
def test_a_violation_is_one_line(genome, words):
    space = create_space("cifar10")
    assert words in space.find_violation(genome) and "\n" not in space.find_violation(genome)
    with pytest.raises(UserError, match="not in space 'cifar10'"):
        space.check(genome)


def test_the_image_limits_the_downsample_blocks():
    space = create_space("cifar10", image_size=4)
    assert space.limits["d"] == (2, 2) and {d for _, d in space.splits} == {2}
    assert "4×4 pixels allow no more" in space.find_violation("n64 n64 n64 d64 d64 d64")
    with pytest.raises(UserError, match="2×2 pixels allow 1"):
        create_space("cifar10", image_size=2)


def test_a_space_survives_json_and_is_hashable():
    import dataclasses
    import json

    space = create_space("digits", width=0.5, downsample=[1, 1])
    assert (
        Space(**json.loads(json.dumps(dataclasses.asdict(space)))) == space
        and {space: 1}[space] == 1
        and space.channels == (4, 8, 16, 32)
    )


@pytest.mark.parametrize(
    "name, kw, base",
    [
        ("resnet18", {"width": 0.25}, 128),
        ("resnet50", {"width": 0.25}, 128),
        ("resnet19_ckd", {"width": 0.25}, 128),
        ("torchvision:resnet18", {"image_size": 32}, 512),
    ],
)
def test_channels_come_from_the_teacher(name, kw, base):
    with torch.device("meta"):
        net = create_model(name, **kw)
    space = create_space_for_teacher(net, image_size=16)
    assert space.channels == (base // 4, base // 2, base, 2 * base) and (
        space.image_size,
        space.in_channels,
    ) == (16, 3)


def test_impossible_channels_name_their_cure():
    with torch.device("meta"):
        net = create_model("resnet18", width=1 / 512)
    with pytest.raises(
        UserError, match=r"0.25 of it is 0.25, 0.5 of it is 0.5; take factors=\(1, 2\)"
    ):
        create_space_for_teacher(net)


@given(space=spaces(), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_multiply_accumulates_are_those_of_the_network(space, seed):
    g = space.sample(np.random.default_rng(seed))
    with torch.device("meta"):
        net = searched(g, num_classes=5, in_channels=space.in_channels, image_size=space.image_size)
    assert macs(net, (space.in_channels, space.image_size, space.image_size)) == count_genome_macs(
        g, 5, space.in_channels, space.image_size
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"downsample": (3, 4)}, "2×2 pixels allow 1"),
        ({"channels": ()}, "different whole numbers above 0"),
        ({"channels": (4, 4)}, "different whole numbers above 0"),
        ({"channels": 8}, "a list of whole numbers"),
        ({"normal": (2, 1)}, "fewest, most"),
        ({"normal": (0, 0), "downsample": (0, 2), "image_size": 1}, "no block at all"),
        ({"image_size": 0}, "a whole number of at least 1"),
    ],
)
def test_impossible_spaces_are_errors(changes, words):
    fields = {"channels": (4, 8), "normal": (0, 2), "downsample": (1, 2), "image_size": 2}
    with pytest.raises(UserError, match=words):
        Space("tiny", **{**fields, **changes})


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("cifar1", {}, "did you mean 'cifar10'"),
        ("cifar10", {"chanels": (1,)}, "did you mean 'channels'"),
        ("cifar10", {"width": 0}, "width = 0: give a number above 0"),
        ("cifar10", {"width": 1e-3}, "different whole numbers"),
        ("cifar10", {"image_size": 2}, "2×2 pixels allow 1"),
    ],
)
def test_wrong_names_and_widths_of_spaces_are_errors(name, options, words):
    with pytest.raises(UserError, match=words):
        create_space(name, **options)


def test_a_teacher_without_stages_gives_no_space():
    with pytest.raises(UserError, match="shows no stages"):
        create_space_for_teacher(torch.nn.Linear(2, 2))
    with torch.device("meta"):
        net = create_model("resnet18", width=0.125)
    with pytest.raises(UserError, match="give a Space its channels"):
        create_space_for_teacher(net, (0.001,))


def test_the_old_name_of_find_violation_warns():
    space = create_space("cifar10")
    with pytest.warns(DeprecationWarning, match="find_violation"):
        assert space.why_not("n64") == space.find_violation("n64") != ""
