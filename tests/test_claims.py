"""Verdicts on claims about our runs: constructed records for every case."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from snnkd_nb.core import UserError
from snnkd_nb.papers.experiments import Cell
from snnkd_nb.papers.published import Claim
from snnkd_nb.reports.claims import (
    cell_record,
    describe_gain,
    find_verdict,
    judge_records,
    judge_together,
    list_comparisons,
    records_by_arm,
    shorten_verdict,
)
from snnkd_nb.spec import RunSpec


def claim(better, worse, **options):
    return Claim("x/table01", "id", "a claim", "a place", better, worse, **options)


def record(values, chance=None, **place):
    "A record of our runs; no values: not run."
    by_seed = dict(enumerate(values))
    return {
        **place,
        "column": "accuracy",
        "value": float(np.mean(values)) if values else None,
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "n": len(values),
        "values": by_seed,
        "chance": chance,
    }


OURS, OTHER = {"method": "Ours"}, {"method": "Other"}
GOOD, BAD = [72.1, 73.0, 71.8, 72.3], [70.0, 71.1, 69.9, 70.2]
OVER = claim(OURS, OTHER)


def verdict(first, second, **options):
    "The verdict on `Ours` over `Other`."
    records = [record(first, method="Ours"), record(second, method="Other")]
    return judge_together([claim(OURS, OTHER, **options)], records)[0]


def test_effect_and_interval_are_those_of_the_paired_test():
    found = verdict(GOOD, BAD)
    interval = stats.ttest_rel(GOOD, BAD).confidence_interval()
    assert found.text == "holds"
    assert found.lead == f"+2 [{interval.low:+.3g}, {interval.high:+.3g}]"
    assert found.comparison == "Ours over Other"
    assert verdict(BAD, GOOD).text == "fails"
    assert verdict(BAD, GOOD, lower=True).text == "holds"


def test_one_seed_decides_nothing():
    found = verdict([90.0], [10.0])
    assert found.text == "undecided (one seed)"
    assert found.lead == "+80"
    assert verdict([10.0], [90.0]).text == "undecided (one seed)"
    assert verdict(GOOD, [60.0]).text == "undecided (one seed)"


def test_no_significant_difference_states_the_smallest_that_could_be_found():
    found = verdict([70.0, 72.0, 69.0, 73.0], [70.5, 69.0, 71.5, 70.0])
    assert found.text.startswith("undecided (smallest detectable difference ")
    assert float(found.text.rpartition(" ")[2].rstrip(")")) > 1
    assert shorten_verdict(found.text) == "undecided"


def test_equal_numbers_are_a_tie_and_do_not_fail():
    rivals = [record([56.0] * 3, method=f"rival {i}") for i in range(9)]
    records = [record([56.0] * 3, method="Ours"), *rivals]
    of_all = claim(OURS, {"method": tuple(r["method"] for r in rivals)})
    assert find_verdict(of_all, records) == "tie"
    assert find_verdict(OVER, [record([5.0], method="Ours"), record([5.0], method="Other")]) != (
        "fails"
    )


def test_values_without_spread_that_differ_are_undecided():
    assert "no spread" in verdict([71.0, 71.0], [70.0, 70.0]).text


@pytest.mark.parametrize("low_arm", ["Ours", "Other"])
def test_an_arm_at_chance_decides_nothing_and_is_named(low_arm):
    values = {"Ours": GOOD, "Other": BAD, low_arm: [10.2, 10.0, 11.0, 9.8]}
    records = [record(v, chance=10.0, method=method) for method, v in values.items()]
    found = judge_together([OVER], records)[0]
    assert found.text == f"undecided ({low_arm} is at chance)"
    assert "[" in found.lead, "the effect is still shown"
    above = [{**r, "chance": 1.0} for r in records]
    assert shorten_verdict(find_verdict(OVER, above)) in ("holds", "fails")


def test_the_number_of_classes_gives_the_chance_level():
    specs = [RunSpec(seed=seed) for seed in range(2)]
    cell = Cell({"method": "KD"}, "accuracy", tuple((spec,) for spec in specs))
    stored = SimpleNamespace(
        metrics={"acc_last": 6.0, "acc_best_val": 7.0, "firing_rate": 0.2}, dataset={"classes": 20}
    )
    runs = dict.fromkeys(specs, stored)
    assert cell_record(cell, runs)["chance"] == 5
    assert cell_record(cell, runs, "acc_best_val")["chance"] == 5
    assert cell_record(cell, runs, "firing_rate")["chance"] is None
    assert cell_record(cell, {})["chance"] is None


def test_an_arm_at_chance_does_not_make_other_claims_harder():
    failed = [
        record([10.0 + 0.1 * i, 10.3, 10.1], chance=10, method=f"failed {i}") for i in range(9)
    ]
    records = [record(GOOD, 10, method="Ours"), record(BAD, 10, method="Other"), *failed]
    others = [claim(OURS, {"method": r["method"]}) for r in failed]
    assert judge_together([OVER, *others], records)[0] == judge_together([OVER], records)[0]


def test_rivals_that_were_run_are_counted_first():
    rivals = tuple(f"rival {i}" for i in range(15))
    records = [record(GOOD, method="Ours"), record(BAD, method="rival 3")]
    records += [record([], method=name) for name in rivals if name != "rival 3"]
    found = find_verdict(claim(OURS, {"method": rivals}), records)
    assert found == "1 of 15 rivals run: holds"
    assert shorten_verdict(found) == "holds as far as run"


def test_a_rival_counts_once_for_all_its_places():
    records = [
        record(values, method=method, T=T)
        for T in (2, 4)
        for method, values in (("Ours", GOOD), ("A", BAD), ("B", []))
    ]
    of_all = claim(OURS, {"method": ("A", "B")}, by="T")
    assert find_verdict(of_all, records) == "1 of 2 rivals run: holds"
    assert [c.rival for c in list_comparisons(of_all, records)] == ["A", "B"] * 2


def test_missing_places_of_one_rival_are_counted_as_comparisons():
    records = [record(GOOD, method="Ours", T=T) for T in (2, 4)]
    records += [record(BAD, method="Other", T=2), record([], method="Other", T=4)]
    assert find_verdict(claim(OURS, OTHER, by="T"), records) == "1 of 2 comparisons run: holds"
    only_missing = [record([], method="Ours", T=2), record([], method="Other", T=2)]
    assert find_verdict(claim(OURS, OTHER, by="T"), only_missing) == "not run"


def test_a_printed_dash_is_no_rival():
    records = [
        {**record(GOOD, method="Ours"), "paper": 73.0},
        {**record(BAD, method="A"), "paper": 71.0},
        {**record([], method="B"), "paper": None},
    ]
    assert find_verdict(claim(OURS, {"method": ("A", "B")}), records) == "holds"


def test_several_outcomes_are_counted_and_the_weakest_lead_is_shown():
    records = [record(GOOD, method="Ours"), record(BAD, method="A"), record([75.0], method="B")]
    found = judge_together([claim(OURS, {"method": ("A", "B")})], records)[0]
    assert found.text == "holds 1, undecided 1 (one seed)"
    assert shorten_verdict(found.text) == "holds in part"
    assert found.comparison == "Ours over B"
    assert found.lead == "-2.7; 1 of 2 are positive"


def test_claims_of_a_page_are_corrected_for_their_number():
    first, second = [62.0, 63.0, 61.0, 62.5], [60.4, 61.3, 60.6, 61.2]
    assert verdict(first, second).text == "holds"
    noise = np.random.default_rng(0).normal(70, 1, (10, 4)).tolist()
    records = [record(first, method="Ours"), record(second, method="Other")]
    records += [record(values, method=f"arm {i}") for i, values in enumerate(noise)]
    others = [claim({"method": f"arm {i}"}, {"method": f"arm {i + 5}"}) for i in range(5)]
    assert judge_together([OVER, *others], records)[0].text.startswith("undecided (smallest")
    assert judge_together([OVER] * 6, records)[0].text == "holds", "one test, asked six times"


def test_a_margin_is_part_of_the_claim():
    assert verdict(GOOD, BAD, margin=1.0).text == "holds"
    assert verdict(GOOD, BAD, margin=5.0).text == "fails"
    assert verdict(BAD, GOOD, margin=-3.0).text == "holds"
    assert verdict(GOOD, BAD, margin=5.0).lead == verdict(GOOD, BAD).lead


def test_a_trend_compares_neighbours():
    records = [
        record([base + 0.1 * seed for seed in (0, 2, 1)], method="Ours", T=T)
        for T, base in ((4, 75.0), (1, 60.0), (2, 70.0))
    ]
    records[0]["values"] = {0: 75.0, 1: 75.4, 2: 75.0}
    records[2]["values"] = {0: 70.1, 1: 70.0, 2: 70.3}
    rises = claim(OURS, None, over="T")
    names = [comparison.name for comparison in list_comparisons(rises, records)]
    assert names == ["T = 2 over 1", "T = 4 over 2"]
    assert find_verdict(rises, records) == "holds"


def test_the_trend_of_a_lead_is_compared_seed_by_seed():
    records = []
    for images, gain in ((25, 6.0), (50, 3.0)):
        base = [60.0, 61.5, 59.0]
        ours = [b + gain + e for b, e in zip(base, (0.1, -0.2, 0.15 * gain / 3), strict=True)]
        records += [record(ours, method="Ours", images=images)]
        records += [record(base, method="Other", images=images)]
    shrinks = claim(OURS, OTHER, over="images", lower=True)
    assert find_verdict(shrinks, records) == "holds"
    assert judge_together([shrinks], records)[0].comparison == "images = 50 over 25"
    without_seeds = [{**r, "values": list(r["values"].values())} for r in records]
    with pytest.raises(UserError, match="seed of every value"):
        find_verdict(shrinks, without_seeds)


def test_records_without_values_are_tested_by_mean_and_spread():
    summaries = []
    for values, method in ((GOOD, "Ours"), (BAD, "Other")):
        whole = record(values, method=method)
        summaries.append({name: whole[name] for name in ("method", "value", "std", "n")})
    interval = stats.ttest_ind(GOOD, BAD, equal_var=False).confidence_interval()
    found = judge_together([OVER], summaries)[0]
    assert found.lead == f"+2 [{interval.low:+.3g}, {interval.high:+.3g}]"


def test_rows_with_seeds_are_paired():
    frame = pd.DataFrame(
        {
            "arm": ["Ours"] * 4 + ["Other"] * 4,
            "seed": [0, 1, 2, 3] * 2,
            "accuracy": GOOD + BAD,
        }
    )
    paired = judge_records([OVER], records_by_arm(frame, "arm", ["accuracy"]))
    assert paired["smallest lead [95 %]"][0] == verdict(GOOD, BAD).lead
    unpaired = judge_records(
        [OVER], records_by_arm(frame.drop(columns="seed"), "arm", ["accuracy"])
    )
    assert unpaired["smallest lead [95 %]"][0] != verdict(GOOD, BAD).lead


def test_printed_numbers_are_compared_as_they_are():
    printed = [{"method": "Ours", "value": 71.0}, {"method": "Other", "value": 70.0}]
    assert find_verdict(OVER, printed) == "holds"


def test_a_gain_in_words():
    rows = [record(GOOD, method="KD"), record(BAD, method="Baseline"), record([75.0], method="X")]
    table = pd.DataFrame(rows).rename(columns={"value": "mean"})
    assert describe_gain(table, "KD", "Baseline").startswith("KD over Baseline: +2.00 points [")
    assert describe_gain(table, "X", "KD") == "X over KD: +2.70 points, undecided: one seed."
    assert describe_gain(table, "KD", "Y") == "KD over Y: not run."
    equal = table.assign(values=[{0: 5.0, 1: 5.0}] * 3, n=2)
    assert describe_gain(equal, "KD", "Baseline").endswith("+0.00 points [+0.00, +0.00], a tie.")


def test_the_detectable_differences_of_several_comparisons_are_a_range():
    records = [record([70.0, 72.0, 69.0, 73.0], method="Ours")]
    records += [record([70.5, 69.0, 71.5, 70.0], method="A")]
    records += [record([70.1, 71.6, 69.3, 72.8], method="B"), record([75.0], method="C")]
    text = find_verdict(claim(OURS, {"method": ("A", "B", "C")}), records)
    assert text.startswith("undecided (one seed; smallest detectable difference ")
    low, high = text.removesuffix(")").split(" difference ")[1].split(" to ")
    assert 0 < float(low) < float(high)
