"""Verification of a run's checkpoints and of scores: every byte is read and compared with what was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from elastic_rec.feature_store.inspection.verify import Findings
from elastic_rec.feature_store.utils.checked_json import fault_in, read_checked, read_signed
from elastic_rec.feature_store.utils.errors import DataError

CHECKPOINT, SCORES, JOB = "complete.json", "_manifest.json", "_job.json"  # not imported: what writes them needs torch


def verify_run(run: Path, findings: Findings) -> None:
    """Checks the run's description, and marker and files of every complete checkpoint; DataError where there is no
    run."""
    if not (run / "checkpoints").is_dir():
        raise DataError(f"{run}: not a run, it has no folder checkpoints")
    for name, read in (("config.yaml", read_signed), ("tables.json", read_checked), ("baselines.json", read_checked)):
        if name != "baselines.json" or (run / name).exists():
            with findings.about("run_files"):
                _read(run / name, read=read, remedy="restore it from a copy of the run")
    for marker in sorted(run.glob(f"checkpoints/step-*/{CHECKPOINT}")):
        files: dict[str, dict] = {}
        with findings.about("checkpoints"):
            files = _read(marker, "files")
        _verify_files(marker.parent, files, "checkpoint_files", findings)


def verify_scores(scores: Path, findings: Findings) -> None:
    """Checks the job, each part of a finished scoring, and that there are no others."""
    parts: dict[str, dict] = {}
    with findings.about("score_jobs"):
        _read(scores / JOB, remedy="remove the folder and score again")
    with findings.about("score_manifests"):
        parts = {entry["path"]: entry for entry in _read(scores / SCORES, "parts")}
    _verify_files(scores, parts, "score_parts", findings)
    for path in sorted(scores.glob("part-*.parquet")):
        if parts and path.name not in parts:
            findings.broken.append(f"{path} is not named by {SCORES}")


def _verify_files(folder: Path, files: dict[str, dict], kind: str, findings: Findings) -> None:
    for name, entry in files.items():
        with findings.about(kind):
            fault = f"{folder} names files elsewhere: {name}" if Path(name).name != name else ""
            if fault := fault or fault_in(folder, {name: entry}):
                raise DataError(fault)
            findings.counts["bytes"] += entry["bytes"]


def _read(
    path: Path,
    key: str | None = None,
    *,
    read: Callable[[Path], Any] = read_checked,
    remedy: str = "the job has not ended, run it again",
) -> Any:
    """A file that carries its sha256, or what it has under a key."""
    try:
        return read(path) if key is None else read(path)[key]
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: {remedy}") from error
    except KeyError as error:
        raise DataError(f"{path} has no {key}: written by an earlier version") from error
