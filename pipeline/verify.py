"""Reads every byte of a store, a run's checkpoints or scores, and compares it with what was written.

python pipeline/verify.py store=stores/ml1m
python pipeline/verify.py store=stores/mine run=runs/mine scores=runs/mine/scores

Exit code 0 and counts of whole files by kind; or 2, and a line on stderr for each broken file.
"""

import json
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from elastic_rec.feature_store.errors import DataError
from elastic_rec.feature_store.filesystem import open_location
from elastic_rec.feature_store.verify import Findings, verify_store
from elastic_rec.pipeline.data_schema import VerifyConfig
from elastic_rec.pipeline.launch import verb

MARKER, SCORES = "complete.json", "_manifest.json"


@verb("verify", VerifyConfig)
def main(config: VerifyConfig) -> dict:
    began, findings = time.perf_counter(), Findings()
    if config.store:
        verify_store(open_location(config.store), findings)
    if config.run:
        verify_run(Path(config.run), findings)
    if config.scores:
        verify_scores(Path(config.scores), findings)
    for line in findings.broken:
        print(f"broken: {line}", file=sys.stderr, flush=True)
    if findings.broken:
        whole = sum(count for kind, count in findings.counts.items() if kind != "bytes")
        raise DataError(f"{len(findings.broken)} files are broken (named above), {whole} are whole")
    return {**findings.counts, "broken": 0, "seconds": round(time.perf_counter() - began, 3)}


def verify_run(run: Path, findings: Findings) -> None:
    """Checks the files of every complete checkpoint; DataError where there is no run."""
    root = run / "checkpoints"
    if not root.is_dir():
        raise DataError(f"{run}: not a run, it has no folder checkpoints")
    for marker in sorted(root.glob(f"step-*/{MARKER}")):
        files: dict[str, dict] = {}
        with findings.about("checkpoints"):
            files = _entries(marker, "files")
            if not files:
                raise DataError(f"{marker}: says nothing of its files; written before checkpoints had digests")
        for name, entry in files.items():
            with findings.about("checkpoint_files"):
                _check_file(marker.parent, name, entry, findings)


def verify_scores(scores: Path, findings: Findings) -> None:
    """Checks that each part of a finished scoring can be read to its end and has its rows."""
    manifest, parts = scores / SCORES, []
    with findings.about("score_manifests"):
        parts = _entries(manifest, "parts")
    for entry in parts:
        with findings.about("score_parts"):
            _check_file(scores, entry["path"], entry, findings)
            _check_rows(scores / entry["path"], entry)


def _entries(path: Path, key: str) -> list[dict] | dict[str, dict]:
    """What the JSON file at `path` says of its files."""
    try:
        entries = json.loads(path.read_bytes()).get(key, {})
        named = entries.items() if isinstance(entries, dict) else ((entry["path"], entry) for entry in entries)
        if all(Path(name).name == name and isinstance(entry, dict) for name, entry in named):
            return entries
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read ({error!r})") from error
    raise DataError(f"{path}: names files outside its folder")


def _check_file(folder: Path, name: str, entry: dict, findings: Findings) -> None:
    path = folder / name
    if not path.is_file():
        raise DataError(f"{path}: missing")
    size = path.stat().st_size
    findings.counts["bytes"] += size
    if size != entry.get("bytes", size):
        raise DataError(f"{path}: {size} bytes, {entry['bytes']} were written")
    if "sha256" in entry and open_location(path).digest() != entry["sha256"]:
        raise DataError(f"{path}: changed since it was written (sha256 differs)")


def _check_rows(path: Path, entry: dict) -> None:
    expected = entry.get("rows", entry.get("users"))
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as part:
            rows = sum(batch.num_rows for batch in part.iter_batches())
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read to its end ({error})") from error
    if rows != expected:
        raise DataError(f"{path}: {rows} rows, its manifest says {expected}")


if __name__ == "__main__":
    main()
