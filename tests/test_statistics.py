"""Verdicts on claims: constructed cases against scipy and closed forms."""

import math

import numpy as np
import pytest
from scipy import stats

from snnkd_nb.core import UserError
from snnkd_nb.metrics.statistics import (
    OUTCOMES,
    Verdict,
    holm,
    is_at_chance,
    judge_claim,
    judge_claims,
    smallest_detectable_difference,
)


def arms(gain=1.0, n=5, spread=0.3, seed=0, shared=2.0):
    "Two arms with the same seeds, whose values share a seed effect."
    rng = np.random.default_rng(seed)
    common = rng.normal(0, shared, n)
    first = 60 + gain + common + rng.normal(0, spread, n)
    second = 60 + common + rng.normal(0, spread, n)
    return dict(enumerate(first)), dict(enumerate(second))


@pytest.mark.parametrize("n", [2, 3, 5, 9])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_the_same_seeds_are_a_paired_t_test(n, level):
    first, second = arms(n=n)
    verdict = judge_claim(first, second, level)
    reference = stats.ttest_rel(list(first.values()), list(second.values()))
    assert verdict.p_value == pytest.approx(reference.pvalue)
    assert verdict.interval == pytest.approx(tuple(reference.confidence_interval(level)))
    assert verdict.effect == pytest.approx(
        np.mean(list(first.values())) - np.mean(list(second.values()))
    )


def test_seeds_pair_by_name_and_not_by_order():
    first, second = arms()
    turned = dict(reversed(list(second.items())))
    assert judge_claim(first, turned) == judge_claim(first, second)


@pytest.mark.parametrize(
    "first, second",
    [
        ([61.0, 62.5, 60.2, 61.7], [58.0, 59.5, 60.0]),
        ({0: 61.0, 1: 62.5, 2: 60.2}, {0: 58.0, 1: 59.5, 3: 60.0}),
        ([61.0, 62.5], [58.0, 58.0]),
    ],
)
def test_other_arms_are_welchs_test(first, second):
    a, b = (list(arm.values()) if isinstance(arm, dict) else arm for arm in (first, second))
    verdict = judge_claim(first, second)
    reference = stats.ttest_ind(a, b, equal_var=False)
    assert verdict.p_value == pytest.approx(reference.pvalue)
    assert verdict.interval == pytest.approx(tuple(reference.confidence_interval(0.95)))


def test_pairing_finds_what_welch_cannot():
    first, second = arms(gain=1.0, spread=0.1)
    assert judge_claim(first, second).outcome == "supported"
    assert judge_claim(list(first.values()), list(second.values())).outcome == "undecided"


def test_a_claim_can_be_contradicted_and_lower_can_be_better():
    first, second = arms(gain=1.0, spread=0.1)
    assert judge_claim(second, first).outcome == "contradicted"
    assert judge_claim(second, first, higher_is_better=False).outcome == "supported"


@pytest.mark.parametrize("one", [{0: 75.0}, [75.0]])
def test_one_seed_decides_nothing(one):
    for verdict in (judge_claim(one, arms()[1]), judge_claim(arms()[1], one)):
        assert (verdict.outcome, verdict.reason) == ("undecided", "undecided: one seed")
        assert math.isnan(verdict.p_value)
        assert verdict.interval == (-math.inf, math.inf)
        assert verdict.smallest_detectable == math.inf
    assert judge_claim({0: 75.0}, {0: 70.0}).effect == 5


def test_runs_without_spread_decide_nothing_unless_they_are_equal():
    assert judge_claim([70.0, 70.0], [71.0, 71.0]).outcome == "undecided"
    assert "no spread" in judge_claim([70.0, 70.0], [71.0, 71.0]).reason
    assert judge_claim({0: 1.0, 1: 2.0}, {0: 1.5, 1: 2.5}).outcome == "undecided"  # differences
    assert judge_claim([70.0, 70.0], [70.0, 70.0]).outcome == "tie"
    first, _ = arms()
    tie = judge_claim(first, dict(first))
    assert (tie.outcome, tie.effect) == ("tie", 0)
    assert math.isnan(tie.p_value), "there is no test"


def test_rounding_is_no_spread():
    first = dict.fromkeys(range(3), 70 + 0.1 * 3)
    second = dict.fromkeys(range(3), 70 + 0.3)
    assert judge_claim(first, second).outcome == "tie"


def test_an_arm_at_chance_decides_nothing():
    good, _ = arms()
    failed = {seed: 10 + 0.1 * seed for seed in range(5)}
    for first, second, which in ((failed, good, "first"), (good, failed, "second")):
        verdict = judge_claim(first, second, chance=10.0)
        assert verdict.outcome == "undecided"
        assert verdict.reason == f"undecided: the {which} arm is at chance"
    assert judge_claim(good, failed).outcome == "supported"
    weak = {seed: 13 + 0.1 * seed for seed in range(5)}
    assert judge_claim(good, weak, chance=10.0).outcome == "supported"
    assert judge_claim(good, weak, chance=10.0, chance_margin=5.0).outcome == "undecided"


def test_an_interval_inside_the_margin_is_a_tie():
    first, second = arms(gain=0.0, spread=0.05, seed=2)
    assert judge_claim(first, second).outcome == "undecided"
    assert judge_claim(first, second, margin=1.0).outcome == "tie"
    assert judge_claim(first, second, margin=1e-3).outcome == "undecided"


def test_holm_against_a_table():
    # 0.01 · 4, then 0.02 · 3, then max(0.03 · 2, 0.06), then max(0.06, 0.05)
    assert holm([0.03, 0.01, 0.05, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([]) == []
    found = holm([math.nan, 0.02, math.nan])
    assert found[1] == 0.02
    assert math.isnan(found[0])
    assert math.isnan(found[2])


def test_holm_keeps_order_and_never_lowers_a_value():
    p = np.random.default_rng(0).random(30)
    corrected = np.array(holm(p))
    assert (corrected >= p).all()
    assert (corrected <= np.minimum(1, 30 * p)).all()
    assert (np.diff(corrected[np.argsort(p)]) >= 0).all()


def test_several_claims_are_corrected_for_their_number():
    claims = {f"claim {i}": arms(gain=1.0, spread=0.4, seed=i) for i in range(4)}
    together = judge_claims(claims)
    alone = {name: judge_claim(*pair) for name, pair in claims.items()}
    expected = holm([verdict.p_value for verdict in alone.values()])
    assert [v.p_value for v in together.values()] == pytest.approx(expected)
    assert all(together[name].interval == alone[name].interval for name in claims)
    assert all(
        together[name].smallest_detectable > alone[name].smallest_detectable for name in claims
    )
    assert all(v.outcome in OUTCOMES for v in together.values())


def test_a_claim_may_fall_to_the_correction():
    first, second = [62.0, 63.0, 61.0, 62.4], [60.0, 61.0, 60.6, 61.2]
    assert judge_claim(first, second).outcome == "supported"
    verdicts = judge_claims({str(i): (first, second) for i in range(10)})
    assert {v.outcome for v in verdicts.values()} == {"undecided"}


@pytest.mark.parametrize("dof", [1, 2, 4, 8, 30])
@pytest.mark.parametrize("power", [0.5, 0.8, 0.9])
def test_the_smallest_detectable_difference_by_simulation(dof, power):
    difference = smallest_detectable_difference(1.0, dof, power=power)
    rng = np.random.default_rng(0)
    estimated = np.sqrt(rng.chisquare(dof, 200_000) / dof)
    t = (rng.normal(size=200_000) + difference) / estimated
    detected = (np.abs(t) > stats.t.ppf(0.975, dof)).mean()
    assert detected == pytest.approx(power, abs=0.006)


def test_the_smallest_detectable_difference_of_many_runs():
    expected = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    assert smallest_detectable_difference(2.0, 1e7) == pytest.approx(2 * expected, rel=1e-4)


def test_a_true_null_is_rejected_at_the_level():
    rng = np.random.default_rng(1)
    outcomes = []
    for _ in range(600):
        first, second = rng.normal(size=(2, 4))
        outcomes.append(judge_claim(list(first), list(second)).outcome)
    assert np.mean([outcome != "undecided" for outcome in outcomes]) < 0.08


@pytest.mark.parametrize(
    "bad, text",
    [
        ({"first": []}, "no values"),
        ({"first": [1.0, math.nan]}, "finite"),
        ({"level": 1}, "level = 1"),
        ({"margin": -1}, "margin = -1"),
    ],
)
def test_wrong_claims_are_one_line(bad, text):
    options = {"first": [1.0, 2.0], "second": [1.0, 3.0]} | bad
    with pytest.raises(UserError, match=text) as error:
        judge_claim(**options)
    assert "\n" not in str(error.value)


def test_a_verdict_is_plain_data():
    verdict = judge_claim(*arms())
    assert isinstance(verdict, Verdict)
    assert hash(verdict) == hash(judge_claim(*arms()))


def test_claims_without_a_test_do_not_make_the_others_harder():
    alone = judge_claim(*arms())
    verdicts = judge_claims({"tested": arms(), "one seed": ([1.0], [2.0]), "tie": ([1, 1], [1, 1])})
    assert verdicts["tested"] == alone
    assert is_at_chance(12.0, 10.0) and not is_at_chance(12.1, 10.0)
    assert not is_at_chance(11.0, 10.0, margin=0.5)
