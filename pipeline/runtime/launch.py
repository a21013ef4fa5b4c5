"""What every verb shares: typed config, errors, and the JSON on the last line; distributed ones get a World (world.py).

    @verb("train", TrainConfig, distributed=True)
    def main(config: TrainConfig, world: World) -> dict: ...

What a verb cannot go on from, signals too, ends as one line on stderr and an exit code of endings.py; a wrong or
unknown config key is Hydra's own message and exit code 1; a fault of the program is a traceback and exit code 1.
"""

from __future__ import annotations

import re
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

import elastic_rec.configs
from elastic_rec.feature_store.utils.atomic_write import to_json
from elastic_rec.feature_store.utils.credentials import refuse_credentials
from elastic_rec.pipeline.runtime import interrupts
from elastic_rec.pipeline.runtime.endings import end, ending_of, in_thread
from elastic_rec.pipeline.runtime.errors import ConfigError

CONFIG_DIR = str(Path(elastic_rec.configs.__file__).parent.resolve())


def verb(name: str, schema: type, *, distributed: bool = False) -> Callable:
    """Make `main(config[, world]) -> figures` a command with Hydra overrides.

    The decorated function's dataclass config is composed from configs/{name}.yaml and checked against
    `schema` before anything is built. Its returned dict is printed by rank 0 as the last line on stdout.
    """
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)

    def decorate(main: Callable[..., dict[str, Any]]) -> Callable[[], None]:
        composed = False

        def task(raw: DictConfig) -> None:
            nonlocal composed
            composed = True
            try:
                config = _typed(raw)
                if distributed:
                    # Here and not above: it imports torch, whose 300 MiB and seconds other verbs do without.
                    from elastic_rec.pipeline.runtime.world import run_in_world

                    run_in_world(main, config, report=_report)
                else:
                    _report(main(config))
            except BaseException as error:
                _end(error)
                raise

        command = hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name=name)(task)

        def checked() -> None:
            interrupts.listen()
            threading.excepthook = in_thread
            try:
                command()
            except interrupts.Interrupted as error:  # before the config was composed
                _end(error)
            except SystemExit as stop:
                # Hydra has printed what is wrong with the config, but its advice (+key=value) does not help here.
                if stop.code and not composed:
                    print(quoting_advice(sys.argv[1:]), end="", file=sys.stderr)
                    print("all keys, types and defaults: docs/reference/config.md, or --help", file=sys.stderr)
                raise

        return checked

    return decorate


def commands(default: Callable[[], None], **others: Callable[[], None]) -> Callable[[], None]:
    """One file, several commands: `python pipeline/ingest.py append store=...`.

    A first argument that is a word without "=" chooses among `others`; where there is none, `default` runs. All are
    what verb() gives. Another word ends the process with exit code 2 and the names of the commands.
    """

    def chosen() -> None:
        name = next(iter(sys.argv[1:]), "")
        if not name.isidentifier():
            return default()
        if name not in others:
            _end(ConfigError(f"{name}: neither a command ({', '.join(others)}) nor key=value"))
        del sys.argv[1]
        return others[name]()

    return chosen


def quoting_advice(arguments: list[str]) -> str:
    """A line for each override that Hydra cannot parse as it is, and can with its values in quotes: paths with "=",
    brackets, "~", umlauts, commas and the like. Values of a list end at its commas."""
    parser, lines = OverridesParser.create(), []
    for argument in arguments:
        key, separator, value = argument.partition("=")
        if not separator or _is_plain(parser, argument):
            continue
        is_list = value.startswith("[") and value.endswith("]")
        values = [_quoted(part.strip()) for part in value[1:-1].split(",")] if is_list else [_quoted(value)]
        quoted = f"{key}=[{','.join(values)}]" if is_list else f"{key}={values[0]}"
        if _is_plain(parser, quoted):
            lines.append(f"quote the value for Hydra (and all of it for the shell): {shlex.quote(quoted)}\n")
    return "".join(lines)


def _quoted(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        return value
    return '"' + re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + (m[2] and '\\"'), value) + '"'


def _is_plain(parser: OverridesParser, argument: str) -> bool:
    """Does it give one value? A comma outside of a list makes a sweep, which a path with a comma was not meant for."""
    try:
        return not (parser.parse_override(argument).is_sweep_override() and "/" in argument)
    except HydraException:
        return False


def _report(figures: dict[str, Any]) -> None:
    print(to_json(figures), flush=True)


def _typed(raw: DictConfig) -> Any:
    """DictConfig -> dataclass; a failed cross-field check in __post_init__ becomes a ConfigError. No URL in it may hold
    credentials: settings are written into run folders, job files and manifests."""
    for key, value in strings_of(OmegaConf.to_container(raw, resolve=True)):
        refuse_credentials(value, key=key)
    try:
        return OmegaConf.to_object(raw)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def strings_of(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value) of every string in a tree of dicts and lists."""
    if isinstance(tree, str):
        yield path, tree
    elif isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from strings_of(value, f"{path}.{key}".removeprefix("."))


def _end(error: BaseException) -> None:
    """Ends the process, unless the error is a fault of the program."""
    with interrupts.deferred():
        if ending := ending_of(error):
            end(ending)
