"""The names that `elastic_rec.feature_store` gives: all are there, and an ingest loads no torch for them."""

import subprocess
import sys

import pytest

from elastic_rec import feature_store


@pytest.mark.parametrize("name", feature_store.__all__)
def test_every_name_is_there(name):
    assert getattr(feature_store, name).__name__ == name


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match=r"elastic_rec\.feature_store.*'nothing'"):
        feature_store.nothing  # noqa: B018


def test_ingest_and_append_load_no_torch():
    code = "import sys; sys.modules['torch'] = None; from elastic_rec.feature_store import Store, append, ingest"
    subprocess.run([sys.executable, "-c", code], check=True)
