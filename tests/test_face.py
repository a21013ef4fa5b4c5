"""The public API: `import elastic_rec`, its names, and the command elastic-rec."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import elastic_rec
from elastic_rec import __main__ as command
from elastic_rec.pipeline.config.commands import COMMANDS

ROOT = Path(__file__).parents[1]


def output_of(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_public_name_is_there_and_type_checkers_see_the_same():
    assert elastic_rec.__version__ == importlib.metadata.version("elastic-rec")
    assert all(getattr(elastic_rec, name) is not None for name in elastic_rec.__all__)
    assert sorted(dir(elastic_rec)) == sorted(elastic_rec.__all__)
    tree = ast.parse(Path(elastic_rec.__file__).read_text())
    typed = {
        alias.name: node.module.removeprefix("elastic_rec.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("elastic_rec")
        for alias in node.names
    }
    assert typed == elastic_rec._HOMES
    assert {*typed, "__version__"} == set(elastic_rec.__all__)


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known():
    with pytest.raises(AttributeError, match=r"elastic_rec has no 'Tower'; it has CausalTower, "):
        elastic_rec.Tower  # noqa: B018


def test_importing_the_root_loads_neither_torch_nor_arrow(tmp_path):
    code = "import elastic_rec, sys; elastic_rec.__version__; print({'torch', 'pyarrow', 'numpy'} & set(sys.modules))"
    assert output_of(code, tmp_path) == "set()"
    code = "import elastic_rec, sys; elastic_rec.Store; print({'torch'} & set(sys.modules))"
    assert output_of(code, tmp_path) == "set()"


def test_command_lists_its_verbs_and_each_has_a_script(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["elastic-rec", "--help"])
    command.main()
    listed = [line[2:20].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == list(COMMANDS)
    scripts = {path.stem for path in (ROOT / "pipeline").glob("*.py") if "verb(" in path.read_text()}
    assert {each.module for each in COMMANDS.values()} == scripts


def test_command_refuses_an_unknown_verb(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["elastic-rec", "trian"])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 2
    assert "no verb 'trian'; it is one of ingest, append," in capsys.readouterr().err


@pytest.mark.parametrize("launcher", [["-m", "elastic_rec"], [str(Path(sys.executable).with_name("elastic-rec"))]])
def test_command_runs_a_verb_as_its_script_does(launcher, tmp_path):
    """verify is a verb without torch; what it says of a store that is not there is its script's message."""
    start = [sys.executable, *launcher] if launcher[0] == "-m" else launcher
    done = subprocess.run([*start, "verify", "store=nowhere"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "nowhere" in done.stderr, done.stderr
