"""Documents name tests and pages that exist, and the notebooks run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import structure

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PAGE = ROOT / "docs/explanation/reliability.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NOTEBOOKS = sorted(ROOT.glob("docs/examples/*.ipynb"))


def test_every_test_that_reliability_names_exists():
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", PAGE.read_text())
    assert len(named) > 30
    paths = {path.name: path for path in TESTS.rglob("test_*.py")}
    for file, test in named:
        assert file in paths, file
        assert f"def {test or 'test_'}" in paths[file].read_text(), f"{file}::{test}"


def links(page: Path) -> list[tuple[str, str]]:
    """(file, anchor) of each relative link; code is left out."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
    targets = re.findall(r"\]\(([^()\s]+)\)", text)
    return [target.partition("#")[::2] for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    headings = re.findall(r"^#+ +(.*?) *$", text, flags=re.M)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for file, anchor in links(page):
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name} links to {file}, which is not there"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {target.name} has no heading #{anchor}"


def test_every_page_is_linked_from_somewhere():
    """From the README, or from a page that is."""
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            todo += [(page.parent / file).resolve() for file, _ in links(page) if file]
    unlinked = {page for page in PAGES if page not in reached and page.parent.name != "decisions"}
    assert sorted(str(page.relative_to(ROOT)) for page in unlinked) == []


def test_every_path_in_pages_and_code_exists():
    """models/ranking/model.py, `models/ranking/`; the end of a path will do. NAME.py is any; logs tell of what was."""
    folders = (*structure.FOLDERS, "docs", "packaging", "tests")
    files = [path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py")]
    ends = {"/".join(file.parts[start:]) for file in files for start in range(len(file.parts))}
    pages = [
        page for page in PAGES if page.name not in ("lab-log.md", "CHANGELOG.md") and page.parent.name != "decisions"
    ]
    dead = []
    for source in [*pages, *(ROOT / file for file in structure.files())]:
        text = source.read_text()
        modules = re.findall(r"(?<![\w/.])(?:\w+/)+[a-z0-9_]+\.py\b", text)
        dead += [(source.name, path) for path in modules if path not in ends]
        folders = re.findall(rf"`((?:{'|'.join(structure.FOLDERS)}|tests)(?:/\w+)+)/?`", text)
        dead += [(source.name, path) for path in folders if not (ROOT / path).is_dir() and f"{path}.py" not in ends]
    assert dead == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_and_keep_no_output(notebook, tmp_path):
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    command = [sys.executable, str(TESTS / "support/notebook.py"), str(notebook)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
