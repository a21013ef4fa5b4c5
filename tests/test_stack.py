"""The check of the torch / torchrec / fbgemm trio: real packages, or folders laid in front of or in place of them."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from elastic_rec.configs.stack import describe_mismatch

ROOT = Path(__file__).resolve().parent.parent
SITE = Path(sysconfig.get_path("purelib"))
ROOMS = ("configs", "feature_store", "models", "pipeline")
TRIO = ("torch", "torchrec", "fbgemm_gpu")


def run_python(code: str, *, path: Path, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *flags, "-c", code], env=environment, cwd=path, capture_output=True, text=True, timeout=120
    )


def fake_metadata(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def plain_folder(tmp_path: Path, *, without: tuple[str, ...] = ()) -> Path:
    """A site folder of links to what is really installed, without metadata for the trio: how a GPU machine has it."""
    folder = tmp_path / "site"
    (folder / "elastic_rec").mkdir(parents=True)
    for room in ROOMS:
        (folder / "elastic_rec" / room).symlink_to(ROOT / room)
    sources = {Path(importlib.util.find_spec(name).origin).parent.parent for name in TRIO} | {SITE}
    for source in sources:
        for entry in source.iterdir():
            is_metadata = entry.name.endswith(".dist-info") and entry.name.split("-")[0] in (*TRIO, "fbgemm_gpu_cpu")
            if is_metadata or entry.name in without or (folder / entry.name).exists():
                continue
            (folder / entry.name).symlink_to(entry)
    return folder


def test_installed_trio_is_accepted_and_only_torchrecs_noise_is_muted(tmp_path):
    code = (
        "import elastic_rec.feature_store.batches.prefix_batch, elastic_rec.models, elastic_rec.pipeline, warnings\n"
        "warnings.warn_explicit('known noise', FutureWarning, 'f.py', 1, module='torchrec.distributed.x')\n"
        "warnings.warn_explicit('news', FutureWarning, 'f.py', 1, module='somebody.else')\n"
    )
    done = run_python(code, path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "known noise" not in done.stderr
    assert "news" in done.stderr


@pytest.mark.parametrize("room", ["feature_store.batches.prefix_batch", "models", "pipeline"])
def test_mismatch_stops_the_import_with_one_line(tmp_path, room):
    for name, version in (("torch", "2.13.0+cpu"), ("torchrec", "1.8.0"), ("fbgemm-gpu-cpu", "1.7.0")):
        fake_metadata(tmp_path, name, version)
    done = run_python(f"import elastic_rec.{room}", path=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: torch 2.13.0+cpu, torchrec 1.8.0, fbgemm-gpu-cpu 1.7.0 do not belong together "
        "(torch 2.(m+5) needs torchrec 1.m and fbgemm-gpu 1.m): "
        'run `make install`, or pip install "fbgemm-gpu-cpu==1.8.*"'
    )


def test_an_ingest_imports_none_of_them(tmp_path):
    code = "import elastic_rec.pipeline.ingest, sys; print({'torch', 'torchrec', 'fbgemm_gpu'} & set(sys.modules))"
    done = run_python(code, path=tmp_path)
    assert (done.stdout, done.stderr) == ("set()\n", "")


@pytest.mark.skipif(torch.version.cuda is not None, reason="the message under test is the one for a CPU build of torch")
@pytest.mark.parametrize("first", ["models", "feature_store.batches.prefix_batch", "pipeline.train", "pipeline.score"])
def test_cuda_fbgemm_beside_cpu_torch_is_named_in_one_line(tmp_path, first):
    """The stand-in fails as the CUDA wheel does: the dynamic loader cannot open a library; it logs, then raises."""
    (tmp_path / "fbgemm_gpu").mkdir()
    (tmp_path / "fbgemm_gpu" / "__init__.py").write_text(
        "import logging, torch\n"
        "try:\n"
        "    torch.ops.load_library('/nonexistent/fbgemm_gpu_config.so')\n"
        "except OSError as error:\n"
        "    logging.error('noise over several lines')\n"
        "    raise\n"
    )
    for name, version in (("torch", "2.13.0+cpu"), ("torchrec", "1.8.0"), ("fbgemm-gpu-cpu", "1.8.0")):
        fake_metadata(tmp_path, name, version)
    done = run_python(f"import elastic_rec.{first}", path=tmp_path)
    minor = int(torch.__version__.split(".")[1]) - 5
    assert done.returncode == 1
    assert "noise over several lines" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: fbgemm_gpu is a CUDA build beside a CPU build of torch (torch {torch.__version__}, "
        "torchrec 1.8.0, fbgemm-gpu-cpu 1.8.0): run `make install`, or pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu "
        f'and then pip install --no-deps "fbgemm-gpu-cpu==1.{minor}.*"'
    )


def test_plain_folders_without_metadata_raise_no_alarm(tmp_path):
    folder = plain_folder(tmp_path)
    code = "import elastic_rec.models, importlib.metadata as m; print([d.name for d in m.distributions(name='torch')])"
    done = run_python(code, path=folder, flags=("-S",))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_plain_folder_with_a_foreign_torchrec_is_caught_by_its_version(tmp_path):
    folder = plain_folder(tmp_path, without=("torchrec",))
    (folder / "torchrec").mkdir()
    (folder / "torchrec" / "__init__.py").write_text("__version__ = '1.4.0'\n")
    done = run_python("import elastic_rec.models", path=folder, flags=("-S",))
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: torch 2.") and "torchrec 1.4.0" in last and 'pip install "torchrec==1.' in last


def test_missing_package_is_named(tmp_path):
    folder = plain_folder(tmp_path, without=("torchrec",))
    done = run_python("import elastic_rec.feature_store.batches.prefix_batch", path=folder, flags=("-S",))
    assert done.stderr.splitlines()[-1] == "ImportError: torchrec not installed (found nothing): run `make install`"


@pytest.mark.parametrize(
    "versions",
    [
        {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"},
        {"torch": "2.11.0+cu130", "torchrec": "1.6.1", "fbgemm-gpu": "1.6.0"},
        {"torch": "2.11.0+cu130", "torchrec": None, "fbgemm-gpu": None},
        {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu": "INTERNAL"},
        {"torch": "2.14.0.dev20260801", "torchrec": "2026.8.1", "fbgemm-gpu": "2026.8.1"},
    ],
)
def test_matching_or_unknowable_versions_raise_no_alarm(versions):
    assert describe_mismatch(versions) is None


@pytest.mark.parametrize(
    ("versions", "pins"),
    [
        ({"torch": "2.14.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0"}, '"torch==2.13.*"'),
        ({"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.9.0"}, '"fbgemm-gpu==1.8.*"'),
        ({"torch": "2.13.0", "torchrec": "1.7.0", "fbgemm-gpu": None}, '"torchrec==1.8.*"'),
        ({"torch": "2.13.0", "torchrec": "0.8.0", "fbgemm-gpu": "1.9.0"}, '"torchrec==1.8.*" "fbgemm-gpu==1.8.*"'),
    ],
)
def test_the_odd_one_out_is_what_gets_pinned(versions, pins):
    assert describe_mismatch(versions).endswith("or pip install " + pins)
