"""Files that claim more than they can hold, and numbers that are slips of the pen: refused before anything is built."""

from __future__ import annotations

import gzip
import io
import zipfile

import helpers
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastic_rec.feature_store.datasets import fetch
from elastic_rec.feature_store.datasets.movielens_formats import Bundle
from elastic_rec.feature_store.ingestion.create import IngestConfig, ingest
from elastic_rec.feature_store.utils import limits
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.models.towers.config import MemoryConfig, TowerConfig
from elastic_rec.pipeline.config.evaluate import EvaluateConfig
from elastic_rec.pipeline.config.parallel import ParallelConfig
from elastic_rec.pipeline.config.score import FullScoreConfig, RankingScoreConfig
from elastic_rec.pipeline.config.train import RunConfig
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.tasks.ranking.scoring import check_parts

ZEROS = bytes(1 << 20)


@pytest.fixture
def zeros(monkeypatch) -> list[bytes]:
    """A little more than is always allowed, which is lowered here."""
    monkeypatch.setattr(limits, "ALWAYS_BYTES", 8 << 20)
    return [ZEROS] * 9


def test_a_zip_that_grows_a_thousandfold(zeros, tmp_path):
    path = tmp_path / "ml-100k.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("u.item", "w") as member:
        for block in zeros:
            member.write(block)
    assert path.stat().st_size < 12_000
    with pytest.raises(DataError, match=r"ml-100k.zip: u.item: [\d,]+ bytes unpack to 9,437,184 or more, over 200"):
        Bundle(path)


def test_a_gzip_that_grows_a_thousandfold_is_read_no_farther_than_the_limit(zeros, tmp_path):
    path = tmp_path / "events.csv.gz"
    with gzip.open(path, "wb") as file:
        file.write(b"user_id,item_id,timestamp\n")
        for block in zeros * 3:
            file.write(block)
    with pytest.raises(DataError, match=r"events.csv.gz: [\d,]+ bytes unpack to 9,437,184 or more"):
        ingest(IngestConfig(input=[str(path)], out=str(tmp_path / "store")))
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_download_that_does_not_end(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "MOST_BYTES", 10 << 20)
    with pytest.raises(DataError, match="x: over 10,485,760 bytes"):
        fetch.copy_checked(io.BytesIO(ZEROS * 30), tmp_path / "x", algorithm="md5", expected="", name="x")
    assert not list(tmp_path.iterdir())


def test_candidates_that_claim_two_to_the_forty_rows(tmp_path):
    path = tmp_path / "lists.parquet"
    pq.write_table(pa.table({"user_id": range(12_345), "item_id": range(12_345)}), path)
    limits.check_footer(path, pq.read_metadata(path), size_bytes=path.stat().st_size)
    helpers.claim_rows(path, 12_345, 1 << 40)
    assert pq.read_metadata(path).num_rows == 1 << 40
    with pytest.raises(DataError, match=r"says that it has 1,099,511,627,776 rows in [\d,]+ bytes.+ is damaged"):
        limits.check_footer(path, pq.read_metadata(path), size_bytes=path.stat().st_size)


def test_more_parts_than_names():
    check_parts(1_000_000, 10)
    with pytest.raises(ConfigError, match="set part_rows to at least 11"):
        check_parts(1_000_001, 10)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: TowerConfig(width=10**8), "model.width=100000000: set at least 1, at most 16384"),
        (lambda: TowerConfig(chunk=10**9), "model.chunk"),
        (lambda: TowerConfig(experts=10**7), "model.experts"),
        (lambda: MemoryConfig(num_keys=10**6), "memory.num_keys=1000000: set at least 1, at most 32768"),
        (lambda: FullScoreConfig(k=10**12), "k=1000000000000: set at least 1, at most 100000"),
        (lambda: RankingScoreConfig(part_rows=10**12), "part_rows"),
        (lambda: EvaluateConfig(k=[10, 10**12]), "at most 100000"),
        (lambda: EvaluateConfig(k=[0, 10]), "set at least 1"),
        (lambda: RunConfig(seed=10**20), "run.seed"),
        (lambda: IngestConfig(threads=10**8), "threads=100000000: set at least 0, at most 4096"),
        (lambda: ParallelConfig(timeout_s=0), "parallel.timeout_s=0: set at least 1, at most 604800"),
    ],
)
def test_numbers_that_no_machine_can_hold(make, text):
    with pytest.raises(ValueError, match=text):
        make()
