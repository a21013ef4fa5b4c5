"""The command `elastic-rec VERB [key=value ...]`, beside `python pipeline/VERB.py [key=value ...]`.

    elastic-rec train experiment=ml100k
    torchrun --nproc-per-node 2 -m elastic_rec train experiment=ml100k

Without a verb, or with --help, it lists the verbs. Exit code 2 for a verb that does not exist.
"""

from __future__ import annotations

import importlib
import sys

from elastic_rec.pipeline.config.commands import COMMANDS


def usage() -> str:
    """The verbs, a line each."""
    lines = [f"  {name:<18}{command.help}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: elastic-rec VERB [key=value ...]; elastic-rec VERB --help lists its keys", "", *lines])


def main() -> None:
    """Runs the verb that sys.argv names."""
    _, *arguments = sys.argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    if arguments[0] not in COMMANDS:
        verbs = ", ".join(name for name in COMMANDS if " " not in name)
        print(f"elastic-rec: no verb {arguments[0]!r}; it is one of {verbs}", file=sys.stderr)
        sys.exit(2)
    name, module = arguments[0], COMMANDS[arguments[0]].module
    sub_command = [name] if name != module else []
    sys.argv = [f"elastic-rec {name}", *sub_command, *arguments[1:]]
    importlib.import_module(f"elastic_rec.pipeline.{module}").main()


if __name__ == "__main__":
    main()
