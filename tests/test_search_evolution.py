"""Evolution: always valid genomes, the same search whoever computes it and however often it is stopped, each architecture scored once."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snnkd_nb.core import UserError, canonical_json
from snnkd_nb.models.genome import Gene, Space, create_space, genome_text, list_spaces, parse_genome
from snnkd_nb.models.zoo import create_model
from snnkd_nb.search.evolution import (
    SELECTIONS,
    Rates,
    ScoreCache,
    check_selection,
    choose_parents,
    create_offspring,
    create_rates,
    crossover,
    evolve,
    mutate,
    read_search_state,
    save_state,
    search,
    select_survivors,
)
from snnkd_nb.search.job import format_generation
from snnkd_nb.search.score import (
    Score,
    Scorer,
    ScoringPool,
    as_score,
    score_from_json,
    score_to_json,
)

SMALL = Space("small", channels=(8, 16, 32), normal=(1, 6), downsample=(1, 3), image_size=8)


def toy(genome):
    return abs(len(genome) - 7) + sum(g.channels for g in genome) / 1000


toy.key = "toy"


class Counted:
    "The toy; it breaks off after some calls, and counts them."

    key = "toy"

    def __init__(self, calls=10**6):
        self.calls, self.seen = calls, []

    def __call__(self, g):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return self.seen.append(genome_text(g)) or toy(g)


# --- operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_spaces())
def test_ten_thousand_children_are_in_their_space(name):
    space, rng = create_space(name), np.random.default_rng(0)
    genomes = [space.sample(rng) for _ in range(60)]
    lengths, rates, made = set(), Rates(mutation=0.8), 0
    while made < 10_000:
        children = create_offspring(genomes, [len(g) for g in genomes], space, rng, rates)
        for c in children:
            assert not space.why_not(c)
            lengths.add(len(c))
            genomes[int(rng.integers(60))] = c
        made += 2
    assert len(lengths) > 1


@st.composite
def spaces(draw):
    n, d = (sorted(draw(st.tuples(st.integers(0, 5), st.integers(0, 5)))) for _ in range(2))
    channels = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True))
    try:
        return Space("drawn", tuple(channels), tuple(n), tuple(d), draw(st.sampled_from([8, 32])))
    except UserError:
        return SMALL


@given(space=spaces(), seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_operators_stay_in_any_space_and_end(space, seed):
    rng = np.random.default_rng(seed)
    a, b = space.sample(rng), space.sample(rng)
    for child in (*crossover(a, b, space, rng), mutate(a, space, rng)):
        assert not space.why_not(child) and all(isinstance(g, Gene) for g in child)


def test_a_space_of_one_genome_is_searched_to_its_end():
    one = Space("one", (8,), (1, 1), (0, 0), 8)
    for algorithm in ("ga", "nsga2", "random"):
        found = evolve(one, lambda g: Score(1.0, {}, 5, 6.0, ""), 4, 3, algorithm)
        assert found.best == "n8" and found.cost()["evaluated"] == 1


@given(
    st.lists(st.floats(-1, 1) | st.just(math.inf), min_size=2, max_size=30),
    st.integers(0, 2**32),
    st.sampled_from(SELECTIONS),
)
@settings(max_examples=100, deadline=None)
def test_the_best_survives_and_parents_differ(fitness, seed, selection):
    rng = np.random.default_rng(seed)
    kept = select_survivors(fitness, max(1, len(fitness) // 2), rng, selection)
    assert len(kept) == max(1, len(fitness) // 2) and min(fitness[i] for i in kept) == min(fitness)
    i, j = choose_parents(fitness, rng)
    assert i != j and {i, j} <= set(range(len(fitness)))


# --- the cache --------------------------------------------------------------------------------------------------------

GENOMES = st.lists(st.tuples(st.sampled_from("nd"), st.integers(1, 600)), min_size=1, max_size=12)


@given(GENOMES, GENOMES)
@settings(max_examples=300, deadline=None)
def test_two_phenotypes_never_share_a_text(a, b):
    assert (genome_text(a) == genome_text(b)) == (parse_genome(a) == parse_genome(b))


@given(
    scores=st.dictionaries(GENOMES.map(genome_text), st.floats(allow_nan=False), max_size=8),
    keys=st.tuples(st.text(min_size=1, max_size=6), st.text(min_size=1, max_size=6)),
)
@settings(max_examples=60, deadline=None)
def test_a_memo_answers_what_was_put_and_nothing_of_another_scorer(tmp_path_factory, scores, keys):
    folder = tmp_path_factory.mktemp("memo")
    scores = {t: as_score(v) for t, v in scores.items()}
    ScoreCache(keys[0], folder).put(scores)
    assert ScoreCache(keys[0], folder).known == scores
    if keys[0] != keys[1]:
        assert not ScoreCache(keys[1], folder).known


def test_scores_go_through_json_without_loss():
    for s in (
        Score(0.1 + 0.2, {"mas": 1 / 3}, 12, 1e9 / 7, ""),
        Score(math.inf, {"mas": math.inf}, 12, 0.0, "block 2 is silent"),
    ):
        assert score_from_json(json.loads(canonical_json(score_to_json(s)))) == s


def test_each_architecture_is_scored_once_and_a_second_search_shares(tmp_path):
    seen = []

    class Scorer:
        key = "toy"

        def __call__(self, g):
            return seen.append(genome_text(g)) or toy(g)

    first = evolve(SMALL, Scorer(), 20, 6, cache=ScoreCache("toy", tmp_path))
    assert len(seen) == len(set(seen)) == first.cost()["evaluated"]
    seen.clear()
    again = evolve(SMALL, Scorer(), 20, 6, cache=ScoreCache("toy", tmp_path))
    assert (
        not seen
        and [g.genomes for g in again.generations] == [g.genomes for g in first.generations]
        and again.cost()["evaluated"] == 0
    )
    with pytest.raises(UserError, match="another scorer"):
        evolve(SMALL, Scorer(), 4, 1, cache=ScoreCache("other"))


# --- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ga", "nsga2", "random"])
@given(stops=st.lists(st.integers(0, 40), min_size=1, max_size=4), seed=st.integers(0, 50))
@settings(max_examples=12, deadline=None)
def test_stopped_anywhere_any_number_of_times_it_ends_the_same(
    tmp_path_factory, algorithm, stops, seed
):
    seen, path = [], tmp_path_factory.mktemp("stops") / "a.search"

    class Fragile:
        key = "toy"

        def __init__(self, calls):
            self.calls = calls

        def __call__(self, g):
            self.calls -= 1
            if self.calls < 0:
                raise KeyboardInterrupt
            seen.append(genome_text(g))
            return Score(
                toy(g),
                {"toy": toy(g)},
                sum(x.channels for x in g),
                1.0,
                "" if len(g) > 2 else "too short",
            )

    kw = {"population": 8, "generations": 5, "algorithm": algorithm, "seed": seed}
    whole = evolve(SMALL, Fragile(10**6), **kw)
    seen.clear()
    for n in stops:
        with contextlib.suppress(KeyboardInterrupt):
            evolve(SMALL, Fragile(n), checkpoint=path, **kw)
    assert evolve(SMALL, Fragile(10**6), checkpoint=path, **kw) == whole
    assert len(seen) == len(set(seen)), "nothing was scored twice"


SLOW = """
import sys, time
from snnkd_nb.search.evolution import evolve
from snnkd_nb.models.genome import Space
space = Space("small", channels=(8, 16, 32), normal=(1, 6), downsample=(1, 3), image_size=8)
def toy(g):
    time.sleep(0.01)
    return abs(len(g) - 7) + sum(x.channels for x in g) / 1000
toy.key = "toy"
evolve(space, toy, 12, 30, checkpoint=sys.argv[1], on_event=lambda e: print(e["generation"], flush=True))
"""


def test_killed_outright_it_goes_on_with_the_same_generations(tmp_path):
    path = tmp_path / "a.search"
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(path)], stdout=subprocess.PIPE, text=True
    )
    while child.stdout.readline().strip() != "3":
        pass
    time.sleep(0.05)
    child.kill()
    child.wait()
    rest = Counted()
    resumed = evolve(SMALL, rest, 12, 30, checkpoint=path)
    whole = evolve(SMALL, toy, 12, 30)
    assert resumed == whole and 0 < len(rest.seen) < len(whole.scores)


def test_a_checkpoint_is_of_one_fitness(tmp_path):
    path = tmp_path / "a.search"
    with pytest.raises(UserError, match="has no key"):
        evolve(SMALL, lambda g: 1.0, 4, 1, checkpoint=path)
    evolve(SMALL, toy, 4, 1, checkpoint=path)

    def other(g):
        return -toy(g)

    other.key = "other"
    with pytest.warns(UserWarning, match="another search"):
        assert evolve(SMALL, other, 4, 1, checkpoint=path).score.fitness < 0


@pytest.mark.parametrize("stop", [0, 5, 14, 30])
def test_what_a_memo_knew_is_not_counted_as_scored_after_a_stop(tmp_path, stop):
    def memo(name):
        made = ScoreCache("toy", tmp_path / name)
        return (
            made.put(
                {
                    t: as_score(toy(parse_genome(t)))
                    for t in list(evolve(SMALL, toy, 12, 4).scores)[::2]
                }
            )
            or made
        )

    whole = evolve(SMALL, toy, 12, 4, cache=memo("a"))
    with (
        pytest.raises(KeyboardInterrupt)
        if stop < whole.cost()["evaluated"]
        else contextlib.nullcontext()
    ):
        evolve(SMALL, Counted(stop), 12, 4, cache=memo("b"), checkpoint=tmp_path / "b.search")
    again = evolve(
        SMALL,
        Counted(),
        12,
        4,
        cache=ScoreCache("toy", tmp_path / "b"),
        checkpoint=tmp_path / "b.search",
    )
    assert again == whole and 0 < again.cost()["evaluated"] < len(again.scores)


def test_a_damaged_or_foreign_file_is_not_used(tmp_path):
    path = tmp_path / "a.search"
    whole = evolve(SMALL, toy, 6, 2, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.warns(UserWarning, match="damaged"):
        assert evolve(SMALL, toy, 6, 2, checkpoint=path) == whole
    with pytest.warns(UserWarning, match="another search"):
        assert evolve(SMALL, toy, 6, 2, seed=1, checkpoint=path) != whole
    save_state(path, "x", {"a": 1})
    assert read_search_state(path, "x")["a"] == 1


# --- processes --------------------------------------------------------------------------------------------------------

CHORES = """
import os, signal
FLAG = __file__ + ".flag"
def dies_once(genome):
    if not os.path.exists(FLAG): open(FLAG, "w").close(), os.kill(os.getpid(), signal.SIGKILL)
    return len(genome)
def dies(genome): os.kill(os.getpid(), signal.SIGKILL)
"""


def product(genome):
    import torch

    a = torch.randn(200, 200, generator=torch.Generator().manual_seed(len(genome)))
    return float((a @ a @ a).sum()) % 1


def test_workers_change_nothing():
    assert evolve(SMALL, product, 10, 3, workers=2) == evolve(SMALL, product, 10, 3)


def test_a_dead_worker_is_replaced_once(tmp_path, monkeypatch):
    (tmp_path / "search_chores.py").write_text(CHORES)
    monkeypatch.syspath_prepend(str(tmp_path))
    import search_chores

    texts = [" ".join(["n8"] * n) for n in range(1, 9)]
    with (
        pytest.warns(UserWarning, match="scored again"),
        ScoringPool(search_chores.dies_once, 2) as pool,
    ):
        assert {t: s.fitness for t, s in pool.scores(texts)} == {t: len(t.split()) for t in texts}
    with (
        pytest.warns(UserWarning),
        pytest.raises(RuntimeError, match="died twice"),
        ScoringPool(search_chores.dies, 1 + 1) as pool,
    ):
        list(pool.scores(texts))


ORPHAN = """
import os, sys, time
from snnkd_nb.search.score import ScoringPool
def slow(g):
    print(os.getpid(), flush=True)
    time.sleep(60)
with ScoringPool(slow, 2) as pool: list(pool.scores(["n8", "n16"]))
"""


def test_a_script_is_not_run_again_and_workers_end_with_their_parent(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("print('once', flush=True)\n" + ORPHAN)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    lines = [parent.stdout.readline().strip() for _ in range(2)]
    assert lines[0] == "once" and lines[1].isdigit()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.time() + 30
    while os.path.exists(f"/proc/{lines[1]}") and time.time() < deadline:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{lines[1]}")


# --- algorithms -------------------------------------------------------------------------------------------------------


def test_evolution_beats_chance_on_a_smooth_fitness():
    wide = Space("wide", tuple(range(1, 40)), (1, 12), (1, 3), 32)

    def f(g):
        return sum(abs(x.channels - 20) for x in g) / 20 + abs(len(g) - 10)

    mean = {
        a: np.mean([evolve(wide, f, 30, 20, a, seed=s).score.fitness for s in range(6)])
        for a in ("ga", "random")
    }
    assert mean["ga"] < mean["random"]


def test_nsga2_keeps_no_dead_and_no_twice():
    def f(g):
        return (
            Score(math.inf, {}, 1, 1.0, "dead")
            if len(g) < 4
            else Score(toy(g), {}, sum(x.channels for x in g), 1.0, "")
        )

    found = evolve(SMALL, f, 20, 8, "nsga2")
    last = found.generations[-1]
    assert (
        len(set(last.genomes)) == 20
        and all(math.isfinite(x) for x in last.fitness)
        and len(found.front) >= 2
    )
    sizes, fits = (
        [getattr(found.scores[t], k) for t in found.front] for k in ("parameters", "fitness")
    )
    assert sizes == sorted(sizes) and fits == sorted(fits, reverse=True)


@pytest.mark.parametrize(
    "kw, words",
    [
        ({"population": 1}, "two different parents"),
        ({"population": True}, "at least 2"),
        ({"generations": 0}, "at least 1"),
        ({"selection": "roulette"}, "fitness above 0"),
        ({"algorithm": "nsga"}, "did you mean 'nsga2'"),
        ({"workers": 0}, "at least 1"),
        ({"second": "ops"}, "did you mean 'sops'"),
        ({"cache": "scores"}, "give ScoreCache"),
        ({"rates": {"mutation": 0.5}}, "create_rates"),
    ],
)
def test_mistakes_are_one_line(kw, words):
    with pytest.raises(UserError) as e:
        search(None, SMALL, None, **{"population": 4, "generations": 1, "fitness": toy, **kw})
    assert words in str(e.value) and "\n" not in str(e.value)


def test_all_dead_is_said():
    with (
        pytest.raises(UserError, match="every one of"),
        pytest.warns(UserWarning, match="the first draw"),
    ):
        evolve(SMALL, lambda g: math.inf, 4, 1)
    with (
        pytest.raises(UserError, match="every one of.*of them: its fitness is nan"),
        pytest.warns(UserWarning, match="the first draw"),
    ):
        evolve(SMALL, lambda g: Score(math.nan, {}, 1, 1.0, ""), 4, 1)
    found = evolve(SMALL, lambda g: Score(-math.inf if len(g) > 4 else 1.0, {}, 1, 1.0, ""), 8, 2)
    assert (
        found.score.fitness == 1
        and any("its fitness is -inf" in s.dead for s in found.scores.values())
        and found.generations[0].row()["dead"]
    )
    with pytest.raises(UserError, match="options of the Scorer"):
        search(None, SMALL, None, fitness=toy, T=4)


# --- a search as its users call it ------------------------------------------------------------------------------------


class Odd(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.fc = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.c1(x).relu().mean((2, 3)))


def small_teacher(seed=0):
    torch.manual_seed(seed)
    return create_model("resnet20", width=0.25, num_classes=4, image_size=8)


def images(n=16, classes=4):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(
        n
    ) % classes


def test_the_found_network_is_the_one_that_was_scored():
    found = search(small_teacher(), SMALL, images(), 4, 1, T=3, neuron_args={"v_threshold": 0.7})
    net = found.network()
    neurons = [m for m in net.modules() if hasattr(m, "surrogate")]
    assert (
        net.T == 3
        and net(images()[0]).shape == (3, 16, 4)
        and found.network(genome="n8 d16").stage_names == ("stem", "stage1")
    )
    assert {m.v_threshold for m in neurons} == {0.7} and all(m.decay_input for m in neurons)
    assert {m.surrogate.alpha for m in neurons} <= set(found.built["slopes"]) and len(
        found.built["slopes"]
    ) == 3
    assert search(small_teacher(), SMALL, images(), 4, 1, "mas", T=3).built.get("slopes") is None
    with pytest.raises(UserError, match="does not define how its networks are built"):
        evolve(SMALL, toy, 4, 1).network()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"space": Space("m", (8, 16), (1, 2), (1, 5), 32)}, "8×8 pixels allow 3"),
        ({"space": Space("m", (8, 16), (1, 2), (1, 2), 8, 7)}, "with 7 channels, these have 3"),
        ({"space": "cifar10"}, "give a Space"),
        ({"batch": images()[0]}, "give a pair"),
        ({"batch": (images()[0].numpy(), images()[1].numpy())}, "of ndarray: give tensors"),
        ({"batch": (images()[0], torch.zeros(16).long())}, "a batch of one class"),
        ({"fitness": ["mas", "tgs"]}, "joined by +"),
        ({"fitness": None}, "joined by +"),
        ({"metric": "mas"}, "give it as fitness"),
        ({"layers": "last"}, r"e.g. \['last'\]"),
        ({"fitness": lambda g: None}, "a fitness of None"),
        ({"fitness": lambda g: "x"}, "a fitness of 'x'"),
        (
            {
                "teacher": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4)),
                "fitness": "tgs",
            },
            "no weights before its last layer",
        ),
        ({"teacher": Odd(), "fitness": "mas"}, "Odd has no stages to compare.*c1"),
        (
            {
                "batch": (torch.rand(16, 1, 8, 8), images()[1]),
                "teacher": torch.nn.Sequential(
                    torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 4)
                ),
            },
            "give images with 3 channels",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Odd has no stages")
def test_what_a_user_gets_wrong_is_one_line(change, words):
    with pytest.raises(UserError, match=words) as e:
        search(
            **{
                "teacher": small_teacher(),
                "space": SMALL,
                "batch": images(),
                "population": 4,
                "generations": 1,
                **change,
            }
        )
    assert "\n" not in str(e.value)


def test_few_classes_in_the_batch_are_warned_of_and_blanks_do_not_matter():
    with pytest.warns(UserWarning, match="3 of 5 classes"):
        Scorer(
            create_model("resnet20", width=0.25, num_classes=5, image_size=8),
            *images(classes=2),
            "tgs",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            Scorer(small_teacher(), *images(classes=1), "tgs", mode="sample").key
            and Scorer(small_teacher(), *images(), "mas + tgs").key
            == Scorer(small_teacher(), *images()).key
        )


def test_what_is_read_from_a_file_is_said_to_be(tmp_path):
    told = [[], []]
    for events in told:
        evolve(SMALL, toy, 6, 3, checkpoint=tmp_path / "x.search", on_event=events.append)
    assert not any("replayed" in e for e in told[0]) and all(e.pop("replayed") for e in told[1])
    assert "from the checkpoint" in format_generation(
        {**told[1][0], "replayed": True}
    ) and "s left" in format_generation(told[0][0])


# --- wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Rates(crossover=1.5), "crossover = 1.5"),
        (lambda: Rates(mutation=None), "mutation = None"),
        (lambda: Rates(mutation=float("nan")), "mutation = nan"),
        (lambda: Rates(add=0.9), "sum to 1"),
        (lambda: create_rates(mutatoin=0.1), "did you mean 'mutation'"),
        (lambda: check_selection("roulette"), "above 0"),
        (lambda: check_selection("tournment"), "did you mean 'tournament'"),
        (lambda: ScoringPool(toy, 0), "at least 1"),
        (lambda: as_score("x"), "a fitness of 'x'"),
    ],
)
def test_wrong_rates_selections_and_pools_are_errors(make, words):
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"population": 1}, "at least 2"),
        ({"population": 2.0}, "at least 2"),
        ({"generations": 0}, "at least 1"),
        ({"algorithm": "gaa"}, "unknown algorithm"),
        ({"selection": "roulette"}, "above 0"),
        ({"second": "size"}, "unknown second objective"),
        ({"workers": 0}, "workers = 0"),
        ({"cache": ScoreCache("another")}, "another scorer"),
        ({"rates": {"mutation": 0.5}}, "create_rates"),
    ],
)
def test_evolve_names_wrong_arguments(change, words):
    with pytest.raises(UserError, match=words):
        evolve(SMALL, toy, **{"population": 4, "generations": 1, **change})


def test_a_second_objective_needs_a_score():
    def sized(genome):
        return Score(1.0, {}, len(genome), None, "")

    with pytest.raises(UserError, match="does not give the sops"):
        evolve(SMALL, sized, 4, 1, "nsga2", second="sops")


def test_the_old_keyword_of_the_cache_warns(tmp_path):
    with pytest.warns(DeprecationWarning, match="'memo' is now 'cache'"):
        old = evolve(SMALL, toy, 4, 1, memo=ScoreCache("toy", tmp_path))
    assert old == evolve(SMALL, toy, 4, 1)
    with pytest.warns(DeprecationWarning, match="network_options"):
        assert old.built == {}


def test_a_space_with_one_genome_stays_as_it_is():
    lonely = Space("one", channels=(8,), normal=(1, 1), downsample=(0, 0), image_size=8)
    genome, rng = parse_genome("n8"), np.random.default_rng(0)
    assert mutate(genome, lonely, rng) == genome
    assert crossover(genome, genome, lonely, rng) == (genome, genome)


def test_an_error_of_the_fitness_names_the_genome():
    with pytest.raises(RuntimeError, match="scoring 'n8': ZeroDivisionError"):
        list(ScoringPool(lambda genome: 1 / 0).scores(["n8"]))
