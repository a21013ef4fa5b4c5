"""What every verb shares: typed config, errors, and the JSON on the last line; distributed ones get a World (world.py).

    @verb("train", TrainConfig, distributed=True)
    def main(config: TrainConfig, world: World) -> dict: ...

What a verb cannot go on from, signals too, ends as one line on stderr and an exit code of endings.py; a wrong or
unknown config key is Hydra's own message and exit code 1; a fault of the program is a traceback and exit code 1.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

import elastic_rec.configs
from elastic_rec.feature_store.atomic_write import to_json
from elastic_rec.pipeline import interrupts
from elastic_rec.pipeline.endings import end, ending_of, in_thread
from elastic_rec.pipeline.errors import ConfigError

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
                    from elastic_rec.pipeline.world import run_in_world

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
                    print("all keys, types and defaults: docs/reference/config.md, or --help", file=sys.stderr)
                raise

        return checked

    return decorate


def _report(figures: dict[str, Any]) -> None:
    print(to_json(figures), flush=True)


def _typed(raw: DictConfig) -> Any:
    """DictConfig -> dataclass; a failed cross-field check in __post_init__ becomes a ConfigError."""
    try:
        return OmegaConf.to_object(raw)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _end(error: BaseException) -> None:
    """Ends the process, unless the error is a fault of the program."""
    with interrupts.deferred():
        if ending := ending_of(error):
            end(ending)
