"""Reads every byte of a store, a run's checkpoints or scores, and compares it with what was written.

python pipeline/verify.py store=stores/ml1m
python pipeline/verify.py store=stores/mine run=runs/mine scores=runs/mine/scores

Exit code 0 and counts of whole files by kind; or 2, and a line on stderr for each broken file.
"""

import sys
import time
from pathlib import Path
from typing import Any

from elastic_rec.feature_store.inspection.verify import Findings, verify_store
from elastic_rec.feature_store.table.location import open_location
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.pipeline.config.verify import VerifyConfig
from elastic_rec.pipeline.reports.verified_files import verify_run, verify_scores
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.launch import verb


@verb("verify", VerifyConfig)
def main(config: VerifyConfig) -> dict[str, Any]:
    """The verb."""
    if not (config.store or config.run or config.scores):
        raise ConfigError("nothing to verify: set store=, run= or scores=")
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


if __name__ == "__main__":
    main()
