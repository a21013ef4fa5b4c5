"""The command `elastic-rec VERB [key=value ...]`, beside `python pipeline/VERB.py [key=value ...]`.

    elastic-rec train experiment=ml100k
    torchrun --nproc-per-node 2 -m elastic_rec train experiment=ml100k

Without a verb, or with --help, it lists the verbs. Exit code 2 for a verb that does not exist.
"""

from __future__ import annotations

import importlib
import sys
from typing import NamedTuple


class Verb(NamedTuple):
    """arguments: what stands before the user's own. module: in pipeline/, with a function main()."""

    module: str
    help: str
    arguments: tuple[str, ...] = ()


VERBS = {
    "ingest": Verb("ingest", "raw events -> history store"),
    "append": Verb("ingest", "a day's events -> the next version of a store", ("data.ingest.mode=append",)),
    "vacuum": Verb("ingest", "delete the files of old versions", ("data.ingest.mode=vacuum",)),
    "restore": Verb("ingest", "make an old version the current one", ("data.ingest.mode=restore",)),
    "impressions": Verb("ingest", "labelled impressions beside the histories", ("data.ingest.mode=impressions",)),
    "train": Verb("train", "history store -> trained model"),
    "evaluate": Verb("evaluate", "trained model -> metrics, beside counting baselines"),
    "score": Verb("score", "trained model -> top-k items, or a score per candidate, in Parquet"),
    "describe": Verb("describe", "what is in a store, as a page and as figures"),
    "verify": Verb("verify", "read every byte of a store, run or scores, and compare digests"),
    "benchmark": Verb("benchmark", "speed and memory against peers"),
    "demo": Verb("demo", "the whole pipeline on MovieLens-100K"),
}


def usage() -> str:
    """The verbs, a line each."""
    lines = [f"  {name:<12}{verb.help}" for name, verb in VERBS.items()]
    return "\n".join(["usage: elastic-rec VERB [key=value ...]; elastic-rec VERB --help lists its keys", "", *lines])


def main() -> None:
    """Runs the verb that sys.argv names."""
    _, *arguments = sys.argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    if arguments[0] not in VERBS:
        print(f"elastic-rec: no verb {arguments[0]!r}; it is one of {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(2)
    verb = VERBS[arguments[0]]
    sys.argv = [f"elastic-rec {arguments[0]}", *verb.arguments, *arguments[1:]]
    importlib.import_module(f"elastic_rec.pipeline.{verb.module}").main()


if __name__ == "__main__":
    main()
