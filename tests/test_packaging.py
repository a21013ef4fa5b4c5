"""What gets installed: the package list, the wheel, the import rules, and the installer's decisions."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
import structure

from elastic_rec.configs.stack import describe_mismatch

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("configs", "feature_store", "models", "pipeline")
ROOT_PACKAGE = "packaging/elastic_rec"
LEAST_DOCUMENTED = 0.9  # share of public classes, functions and methods
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def load_installer():
    spec = importlib.util.spec_from_file_location("elastic_rec_install", ROOT / "packaging" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python_files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported_names(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_package_list_is_the_tree():
    folders = {path.parent.relative_to(ROOT) for room in ROOMS for path in python_files(room)}
    without_init = [str(folder) for folder in folders if not (ROOT / folder / "__init__.py").is_file()]
    assert without_init == []
    in_tree = {".".join(("elastic_rec", *folder.parts)) for folder in folders}
    assert in_tree | {"elastic_rec"} == set(PROJECT["tool"]["setuptools"]["packages"])


def test_git_ignores_no_file_of_the_package():
    """`data/` in .gitignore, meant for ./data, would swallow configs/data: all is well here, and a clone is broken."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    files = [str(path) for room in ROOMS for path in [*python_files(room), *(ROOT / room).rglob("*.yaml")]]
    done = subprocess.run(["git", "check-ignore", "--no-index", "--", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, f"ignored by git: {done.stdout or done.stderr}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built without a network from a copy (setuptools writes build/ into its source)."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for room in (*ROOMS, ROOT_PACKAGE):
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(out), str(source)]
    done = subprocess.run([sys.executable, *build], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("elastic_rec-*.whl"))


def test_wheel_holds_every_module_and_yaml_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = [path for room in ROOMS for path in python_files(room)] + sorted((ROOT / "configs").rglob("*.yaml"))
    expected.append(ROOT / "pipeline/reports/store_page.html")
    public = [
        path.relative_to(ROOT / ROOT_PACKAGE)
        for path in [*python_files(ROOT_PACKAGE), ROOT / ROOT_PACKAGE / "py.typed"]
    ]
    assert names == {"elastic_rec/" + path.as_posix() for path in [*(p.relative_to(ROOT) for p in expected), *public]}


def test_every_module_imports_from_the_wheel_in_a_foreign_folder(wheel, tmp_path):
    """-S leaves the editable install out, so what is imported is the wheel's content and nothing of the checkout."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    modules = [".".join(path.relative_to(site).with_suffix("").parts) for path in sorted(site.rglob("*.py"))]
    modules = [name.removesuffix(".__init__") for name in modules]
    code = (
        "import importlib, sys\n"
        f"loaded = [importlib.import_module(name) for name in {modules!r}]\n"
        "print(sorted({module.__file__.split('/elastic_rec/')[0] for module in loaded}))\n"
        "import elastic_rec\n"
        "assert elastic_rec.CausalTower and elastic_rec.Store\n"
    )
    path = os.pathsep.join([str(site), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([str(site)])


def test_installed_package_is_found_from_any_folder(tmp_path):
    code = "import elastic_rec.configs.stack as s; print(s.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip().endswith("configs/stack.py"), done.stderr


@pytest.mark.parametrize("room", ROOMS)
def test_ruff_rejects_imports_that_bypass_the_import_root(room):
    code = f"import {room}.x\nfrom {room} import y\nfrom elastic_rec.{room} import z\n"
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--output-format", "json"]
    done = subprocess.run(
        [*command, "--stdin-filename", "x.py", "-"], cwd=ROOT, input=code, capture_output=True, text=True
    )
    assert [(hit["code"], hit["location"]["row"]) for hit in json.loads(done.stdout)] == [("TID251", 1), ("TID251", 2)]


# folder -> room -> the rooms it may import (tests/support/structure.py). A new arrow is a decision: it comes in here.
ALLOWED = {
    "feature_store": {
        "inspection": {"batches", "ingestion", "reading", "states", "table", "utils"},
        "reading": {"batches", "ingestion", "table", "utils"},
        "states": {"batches", "table", "utils"},
        "datasets": {"ingestion", "utils"},
        "batches": {"table", "utils"},
        "ingestion": {"table", "utils"},
        "table": {"utils"},
        "utils": set(),
    },
    "models": {
        "ranking": {"dropout", "retrieval", "towers"},
        "retrieval": {"dropout", "ops", "towers"},
        "towers": {"dropout", "tiles", "ops"},
        "ops": {"tiles"},
        "dropout": set(),
        "tiles": set(),
    },
    "pipeline": {
        "train": {"config", "runtime", "tasks", "training"},
        "evaluate": {"config", "runtime", "tasks", "training"},
        "score": {"config", "runtime", "tasks", "training"},
        "runs": {"runtime", "tasks", "training"},
        "benchmark": {"config", "reports", "runtime"},
        "demo": {"config", "reports", "runtime"},
        "describe": {"config", "reports", "runtime"},
        "ingest": {"config", "runtime"},
        "verify": {"config", "reports", "runtime"},
        "training": {"config", "runtime", "tasks"},
        "tasks": {"config", "runtime"},
        "reports": {"config", "runtime"},
        "runtime": {"config"},
        "config": set(),
    },
}
MOST = {"feature_store": (9, 6), "models": (9, 6), "pipeline": (14, 6)}  # rooms, levels


@pytest.mark.parametrize("folder", ALLOWED)
def test_rooms_import_only_what_they_may(folder):
    found = structure.arrows(folder)
    assert found.keys() == ALLOWED[folder].keys()
    assert {
        name: others - ALLOWED[folder][name] for name, others in found.items() if others - ALLOWED[folder][name]
    } == {}
    rooms, levels = MOST[folder]
    assert len(found) <= rooms and max(structure.levels(found).values()) <= levels


def test_a_circle_of_rooms_is_noticed():
    assert structure.levels({"a": {"b"}, "b": set(), "c": {"a", "b"}}) == {"b": 1, "a": 2, "c": 3}
    with pytest.raises(ValueError, match=r"a circle among \['a', 'b'\]"):
        structure.levels({"a": {"b"}, "b": {"a"}, "c": set()})


def test_no_file_and_no_function_is_long():
    lines = {str(file): len((ROOT / file).read_text().splitlines()) for file in structure.files()}
    assert {file: count for file, count in lines.items() if count > 400} == {}
    assert {name: count for name, count in structure.functions().items() if count > 60} == {}


def test_what_is_public_says_what_it_does():
    documented = {name: has for file in structure.files() for name, has in structure.public(file).items()}
    missing = [name for name, has in documented.items() if not has]
    share = 1 - len(missing) / len(documented)
    assert len(documented) > 800 and share >= LEAST_DOCUMENTED, f"{share:.3f} are documented, not {missing}"


def test_no_file_imports_past_the_import_root_or_against_the_grain():
    forbidden = {
        "configs": {"feature_store", "models", "pipeline"},
        "feature_store": {"models", "pipeline"},
        "models": {"feature_store", "pipeline"},
        "pipeline": set(),
        "tests": set(),
    }
    found = []
    for room, others in forbidden.items():
        for path in python_files(room):
            for name in imported_names(path):
                bypass = name.split(".")[0] in ROOMS
                against = name.startswith("elastic_rec.") and name.split(".")[1] in others
                if bypass or against:
                    found.append(f"{path.relative_to(ROOT)} imports {name}")
    assert found == []


def test_pinned_versions_belong_together():
    pins = dict(item.split("==") for item in PROJECT["project"]["dependencies"] if "==" in item)
    cuda = dict(item.split("==") for item in PROJECT["project"]["optional-dependencies"]["cuda"])
    shim = tomllib.loads((ROOT / "packaging/fbgemm-gpu-shim/pyproject.toml").read_text())["project"]
    cpu = dict(item.split("==") for item in shim["dependencies"])
    assert shim["version"] == cuda["fbgemm-gpu"] == cpu["fbgemm-gpu-cpu"]
    assert describe_mismatch({"torch": pins["torch"], "torchrec": pins["torchrec"], **cpu}) is None


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split()
    listing = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True).stdout
    assert [line.split()[0] for line in listing.splitlines()[1:]] == targets


@pytest.mark.parametrize("version", [(3, 10, 4), (3, 13, 0)])
def test_installer_names_the_python_it_wants(monkeypatch, version):
    installer = load_installer()
    monkeypatch.setattr(installer.sys, "version_info", version)
    with pytest.raises(installer.InstallError, match=r"needs Python 3\.11 or 3\.12, but .*make install PYTHON=python3"):
        installer.check_python()


@pytest.mark.parametrize(
    ("script", "stack"),
    [("echo 'GPU 0: NVIDIA H100 (UUID: x)'", "cuda"), ("echo 'No devices found.'; exit 6", "cpu"), (None, "cpu")],
)
def test_installer_asks_nvidia_smi(monkeypatch, tmp_path, script, stack):
    if script:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    installer = load_installer()
    assert installer.choose_stack("auto") == stack
    assert installer.choose_stack("cpu") == "cpu"
    with pytest.raises(installer.InstallError, match="STACK='gpu' is unknown"):
        installer.choose_stack("gpu")


def run_installer(venv: Path) -> subprocess.CompletedProcess:
    """No index and no wheels: an install that gets as far as pip fails there, and at once."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {"VENV": str(venv), "STACK": "cpu", "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    command = [sys.executable, str(ROOT / "packaging" / "install.py")]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_installer_refuses_a_folder_that_is_no_environment(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    done = run_installer(tmp_path)
    assert done.returncode == 1
    assert "is not empty and no virtual environment; name another with VENV=" in done.stderr
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_killed_install_starts_over_and_a_failed_one_says_why(tmp_path):
    """A stamp that says unfinished, as kill -9 leaves it, beside half-copied packages."""
    installer = load_installer()
    half = tmp_path / "lib" / "python3.11" / "site-packages" / "torch"
    half.mkdir(parents=True)
    installer.write_stamp(tmp_path, {"state": "unfinished", "made_here": True, "layout": {}})
    done = run_installer(tmp_path)
    assert "anew: its install was not finished" in done.stdout
    assert not half.exists() and (tmp_path / "bin" / "python").exists()
    assert "WARNING: no CPU build of torch" in done.stdout
    assert done.returncode == 1 and "No matching distribution found for torch==" in done.stderr
    assert installer.read_stamp(tmp_path)["state"] == "unfinished"


def test_second_install_does_nothing_until_something_changed(tmp_path):
    installer = load_installer()
    (tmp_path / "lib" / "python3.11" / "site-packages" / "torch-2.13.0.dist-info").mkdir(parents=True)
    record = tmp_path / "lib" / "python3.11" / "site-packages" / "torch-2.13.0.dist-info" / "RECORD"
    record.write_text("torch/__init__.py,,\n")
    finished = {
        "state": "finished",
        "recipe": installer.recipe_hash(),
        "layout": installer.layout(tmp_path, "cpu"),
        "records": installer.watched_records(tmp_path),
        "made_here": False,
    }
    installer.write_stamp(tmp_path, finished)
    done = run_installer(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    record.write_text("another torch\n")  # as after a pip install by hand
    done = run_installer(tmp_path)
    assert done.returncode == 1 and "was not made here and cannot be used" in done.stderr
