"""Documents name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs/explanation/reliability.md"


def test_every_test_that_reliability_names_exists():
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", PAGE.read_text())
    assert len(named) > 30
    paths = {path.name: path for path in TESTS.rglob("test_*.py")}
    for file, test in named:
        assert file in paths, file
        assert f"def {test or 'test_'}" in paths[file].read_text(), f"{file}::{test}"
