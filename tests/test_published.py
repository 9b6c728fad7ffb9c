"The published numbers as a whole: complete, consistent with what the papers say, cheap to load."

import csv
import io
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snnkd_nb.core import UserError
from snnkd_nb.papers.experiments import artefacts
from snnkd_nb.papers.published import (
    Claim,
    claims,
    computed,
    contradictions,
    evaluate_claim,
    failing,
    holds,
    paper_folders,
    parse_table,
    published,
    published_keys,
    stated,
    value,
)

COUNTS = {"dsas": 15, "sastc": 12, "eskd": 7, "ckdsnn": 5}
PAPERS = tuple(COUNTS)
OF_TABLES = [claim for claim in claims() if claim.key in published_keys()]


def test_all_tables_are_there():
    assert tuple(paper_folders()) == PAPERS
    assert {p: len(published_keys(p)) for p in PAPERS} == COUNTS
    assert published_keys() == [f"{p}/table{i:02}" for p in PAPERS for i in range(1, COUNTS[p] + 1)]


@pytest.mark.parametrize("key", published_keys())
def test_every_table_is_described_and_parses(key):
    t = published(key)
    assert all((t.where, t.place, t.caption, t.protocol, t.unit)) and t.records
    assert "Table" in t.where
    numbers = [r for r in t.records if r["value"] is not None]
    assert all(set(r) == {*t.index, "column", "value", "std", "extra", "text"} for r in t.records)
    assert numbers or key == "dsas/table14"
    assert bool(t.extra) == any(r["extra"] is not None for r in t.records)


@pytest.mark.parametrize("key", [k for k in published_keys() if published(k).unit == "top-1 (%)"])
def test_accuracies_are_percentages(key):
    assert all(10 < r["value"] < 100 for r in published(key).records if r["value"] is not None)
    assert all(r["std"] is None or 0 < r["std"] < 1 for r in published(key).records)


@pytest.mark.parametrize(
    "key, at, number",
    [
        (
            "dsas/table12",
            {"teacher": "ResNet-34", "student": "ResNet-18", "T": 4, "column": "CIFAR-100"},
            77.13,
        ),
        ("dsas/table15", {"teacher": "ResNet-18", "column": "CIFAR-10"}, 94.13),
        (
            "sastc/table02",
            {
                "dataset": "CIFAR-10",
                "student": "WRN-16-2",
                "teacher": "WRN-28-4",
                "T": 7,
                "column": "SASTC",
            },
            93.72,
        ),
        (
            "sastc/table02",
            {
                "dataset": "CIFAR-100",
                "student": "ResNet-18",
                "teacher": "WRN-40-2",
                "T": 3,
                "column": "Baseline",
            },
            75.72,
        ),
        ("sastc/table07", {"noise": 50, "method": "SASTC", "column": "accuracy"}, 73.87),
        ("sastc/table08", {"images": 25, "method": "Teacher"}, 60.97),
        ("eskd/table05", {"dataset": "CIFAR-10", "student": "R19", "T": 8}, 97.04),
        (
            "ckdsnn/table01",
            {
                "method": "CKDSNN (Ours)",
                "T": 4,
                "model": "Spikformer-4-384",
                "dataset": "CIFAR-100",
            },
            84.88,
        ),
    ],
)
def test_value(key, at, number):
    assert value(key, **at) == number


def test_names_of_tables_that_others_rely_on():
    names = {
        k: (published(k).index, published(k).columns)
        for k in ("dsas/table12", "dsas/table15", "sastc/table02", "sastc/table07", "sastc/table08")
    }
    assert names == {
        "dsas/table12": (("teacher", "student", "T"), ("CIFAR-10", "CIFAR-100")),
        "dsas/table15": (
            ("teacher",),
            ("Tiny-ImageNet", "CIFAR-100", "CIFAR-10", "CIFAR10-DVS", "DVS128-Gesture"),
        ),
        "sastc/table02": (
            ("dataset", "student", "teacher", "T"),
            ("Baseline", "KD", "Feature KD", "SASTC"),
        ),
        "sastc/table07": (("method", "noise"), ("accuracy",)),
        "sastc/table08": (("method", "images"), ("accuracy",)),
    }


@pytest.mark.parametrize("paper", PAPERS)
def test_exactly_the_recorded_contradictions_fail(paper):
    named = [i for c in contradictions(paper) for i in c.stated]
    assert len(named) == len(set(named))
    assert failing(stated(paper)) == set(named)


@pytest.mark.parametrize("paper", PAPERS)
def test_contradictions_are_whole(paper):
    for c in contradictions(paper):
        assert c.paper == paper and len(c.places) == len(c.values) >= 2 and c.note


def test_errors_the_papers_are_known_for():
    bad = {(s.key.partition("/")[0], s.id): computed(s) for s in stated() if not holds(s)}
    assert bad["eskd", "gap-cifar-10-r19-2"] == pytest.approx(-0.68)
    assert bad["sastc", "count"] == 13
    assert bad["sastc", "c100-t2"] == 80.28
    assert bad["ckdsnn", "c100-gain"] == pytest.approx(2.03)
    assert bad["dsas", "tiny-text"] == 65.50


@pytest.mark.parametrize("claim", OF_TABLES, ids=lambda c: f"{c.key}:{c.id}")
def test_what_the_papers_own_numbers_say(claim):
    assert evaluate_claim(claim, published(claim.key).records) == claim.paper


@pytest.mark.parametrize("claim", OF_TABLES, ids=lambda c: f"{c.key}:{c.id}")
def test_claims_without_runs_and_turned_round(claim):
    records = published(claim.key).records
    assert evaluate_claim(claim, [{**r, "value": None} for r in records]) == "not run"
    if claim.paper == "holds" and claim.margin > 0:
        assert (
            evaluate_claim(
                claim, [r if r["value"] is None else {**r, "value": -r["value"]} for r in records]
            )
            == "fails"
        )


def test_ids_are_unique():
    for things in (claims(), stated()):
        ids = [(x.key, x.id) for x in things]
        assert len(ids) == len(set(ids))
    assert {s.key for s in stated()} <= set(published_keys())
    assert {c.key for c in claims()} <= {a.id for a in artefacts()}


def test_selection_of_claims():
    assert {c.key for c in claims("sastc/table07")} == {"sastc/table07"}
    assert {c.key.partition("/")[0] for c in claims("eskd")} == {"eskd"}
    assert claims("sastc/table12") == []


def test_wrong_names():
    with pytest.raises(UserError, match="did you mean 'sastc/table02'"):
        published("sastc/tabel02")
    with pytest.raises(UserError, match="unknown paper"):
        published("x/table01")
    with pytest.raises(UserError, match="did you mean 'student'"):
        value("sastc/table02", studnet="VGG-11")
    with pytest.raises(UserError, match="0 cells"):
        value("sastc/table02", student="VGG-12")


WORDS = (
    st.text("abcXYZ -", min_size=1, max_size=6).map(str.strip).filter(lambda s: s not in ("", "-"))
)
CELLS = st.one_of(
    st.none(),
    st.decimals(0, 100, places=2).map(str),
    st.tuples(st.decimals(0, 100, places=2), st.decimals(0, 9, places=2)).map(
        lambda p: f"{p[0]}±{p[1]}"
    ),
)


@settings(max_examples=50, deadline=None)
@given(
    st.data(),
    st.lists(WORDS, min_size=1, max_size=4, unique=True),
    st.lists(WORDS, min_size=1, max_size=4, unique=True),
)
def test_what_is_written_is_read(data, lines, columns):
    cells = [[data.draw(CELLS) for _ in columns] for _ in lines]
    rows = [[name, *(cell or "-" for cell in row)] for name, row in zip(lines, cells)]
    file = io.StringIO()
    csv.writer(file).writerows([["name", *columns], *rows])
    names, records = parse_table(file.getvalue(), ["name"])
    assert names == tuple(columns)
    assert [r["text"] for r in records] == [c or "-" for row in cells for c in row]
    assert all(
        (r["value"] is None) == (r["text"] == "-") and (r["std"] is not None) == ("±" in r["text"])
        for r in records
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8))
def test_claim_counts(pairs):
    records = [
        {"at": i, "column": c, "value": float(v)}
        for i, p in enumerate(pairs)
        for c, v in zip("ab", p)
    ]
    n, k = len(pairs), sum(a > b for a, b in pairs)
    got = evaluate_claim(Claim("", "", "", "", {"column": "a"}, {"column": "b"}, "at"), records)
    assert got == ("holds" if k == n else "fails" if k == 0 else f"partly {k}/{n}")


def test_published_numbers_load_without_heavy_packages():
    code = (
        "import sys\nfrom snnkd_nb.papers.published import published_keys, published\nfor k in published_keys(): published(k).records\n"
        "print(sorted({'torch', 'pandas', 'numpy', 'matplotlib', 'nbdev', 'fastcore'} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
