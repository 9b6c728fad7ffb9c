"""The book: links between pages, pages of results, links that lead nowhere."""

import re
from pathlib import Path

import pytest

from snnkd_nb.core import UserError, root
from snnkd_nb.papers.experiments import artefact
from snnkd_nb.runner import book


def test_modules_in_texts_become_links():
    targets = {"losses.sastc": "50.ipynb"}
    link = "[`losses.sastc`](50.ipynb)"
    assert book.link_modules("see `losses.sastc`", targets) == f"see {link}"
    assert book.link_modules("`snnkd_nb.losses.sastc`", targets) == (
        "[`snnkd_nb.losses.sastc`](50.ipynb)"
    )
    unchanged = f"{link} `torch.nn` ```\n`losses.sastc`\n``` `losses.sastc.loss`"
    assert book.link_modules(unchanged, targets) == unchanged


def test_rows_of_a_table_name_their_runs(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("method,T,ours,n,runs\nKD,2,70.1,2,a b\nalone,2,69.0,0,\n")
    assert book.run_ids(table) == [("KD, 2", ["a", "b"])]


def test_a_page_of_results_has_table_figure_and_runs():
    found = artefact("ckdsnn/table03")
    text = book.result_page(found, "small")
    table = (root() / "results/tables/ckdsnn/table03-small.md").read_text(encoding="utf-8")
    assert table.partition("\n")[2].strip() in text
    runs = re.findall(r"\]\(\.\./runs/(.+?)\.json\)", text)
    assert len(runs) == 12
    assert all((root() / "results/runs" / f"{run}.json").is_file() for run in runs)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("book")
    book.write_source(folder)
    return folder


def test_every_page_of_the_project_is_in_the_book(source):
    listed = set()
    for page in source.rglob("*.md"):
        for contents in re.findall(r"```\{toctree\}(.*?)```", page.read_text(), re.DOTALL):
            entries = [line for line in contents.splitlines() if line and line[0] != ":"]
            listed.update(entry.lstrip("/") for entry in entries)
    missing = [entry for entry in listed if not list(source.glob(f"{entry}.*"))]
    assert missing == []
    notebooks = {
        path.relative_to(root()).with_suffix("").as_posix()
        for path in (root() / "nbs").rglob("*.ipynb")
        if "example_paper" not in path.parts
    }
    assert notebooks - listed == set()


def test_generated_links_lead_to_files(source):
    broken = []
    for page in source.rglob("*.md"):
        if "deviations" in page.name:
            continue
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+?)\)", text):
            if "://" in link:
                continue
            target = source / link[1:] if link.startswith("/") else page.parent / link
            if not target.exists():
                broken.append(f"{page.relative_to(source)} -> {link}")
    assert broken == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "b.html").write_text('<p id="place">')
    (tmp_path / "a.html").write_text(
        '<a href="b.html#place"></a><a href="b.html#nowhere"></a><img src="c.png">'
        '<a href="https://example.org"></a><a href="#"></a>'
    )
    assert book.broken_links(tmp_path) == ["a.html -> b.html#nowhere", "a.html -> c.png"]


def test_a_missing_sphinx_is_one_line(monkeypatch):
    monkeypatch.setattr(book, "REQUIRED", ("no_such_package",))
    with pytest.raises(UserError, match=r"no_such_package.*pip install 'snnkd_nb\[book\]'"):
        book.build_book()


def test_readers_see_no_directives():
    cells = [
        {"cell_type": "code", "source": ["#| default_exp x\n"]},
        {"cell_type": "code", "source": ["#| hide\n", "import tempfile\n"]},
        {"cell_type": "code", "source": ["#| export\n", "x = 1\n"]},
        {"cell_type": "markdown", "source": ["#| stays"]},
    ]
    assert [cell["source"] for cell in book.for_readers(cells)] == ["x = 1\n", "#| stays"]


def test_docstrings_reach_the_reference_as_they_are_meant():
    assert book.escape_for_sphinx("a `b*c` of 2*x and w_") == r"a ``b*c`` of 2\*x and w\_"
    lines = book.parameter_lines(book.run_ids)
    assert lines == [":param table: a CSV file of results/tables"]
    assert book.parameter_lines(len) == []
