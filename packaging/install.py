"""Makes the virtual environment that every make target runs in. Called by `make install`; needs nothing but Python.

    python3 packaging/install.py            # environment: VENV (.venv unless set), stack: STACK=auto|cpu|cuda

What it takes care of (why: docs/decisions/0001-install.md):
- torch, torchrec and fbgemm-gpu must match, and a CPU machine should not download gigabytes of CUDA code;
- it is called before every test and demo, so when nothing changed it only compares a stamp and returns;
- a run that was killed leaves a stamp that says "unfinished", and the next run starts over.

The file itself must parse on older Pythons, or they could not print the message that names the right one.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHIM = ROOT / "packaging" / "fbgemm-gpu-shim"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
STAMP = "elastic-rec-install.json"
LOG = "elastic-rec-install.log"
SUPPORTED = ((3, 11), (3, 12))
# Distributions whose absence or change means that someone else's pip has been at work in the environment.
WATCHED = ("torch", "torchrec", "fbgemm_gpu", "fbgemm_gpu_cpu", "elastic_rec")

SMOKE_TEST = """
from elastic_rec.configs.stack import check_stack
check_stack()
import fbgemm_gpu, torch, torchrec
device = "CUDA" if torch.cuda.is_available() else "CPU"
print(f"torch {torch.__version__}, torchrec {torchrec.__version__}, fbgemm {fbgemm_gpu.__version__}, runs on {device}")
"""


class InstallError(Exception):
    """Something a person has to put right; the message says what and how."""


def say(text: str) -> None:
    print("install: " + text, flush=True)


def check_python() -> None:
    """Raises InstallError unless this interpreter is supported and can make virtual environments."""
    if sys.version_info[:2] not in SUPPORTED:
        usable = [name for name in ("python3.12", "python3.11") if _answers(name)]
        fix = (
            f"run `make install PYTHON={usable[0]}`" if usable else "install one, then `make install PYTHON=python3.12`"
        )
        found = ".".join(str(part) for part in sys.version_info[:3])
        raise InstallError(f"needs Python 3.11 or 3.12, but {sys.executable} is Python {found}: {fix}")
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        raise InstallError(
            f"{sys.executable} has no ensurepip, so it cannot make a virtual environment; "
            f"on Debian and Ubuntu `apt-get install {package}` adds it"
        ) from None


def _answers(name: str) -> bool:
    return shutil.which(name) is not None and subprocess.run([name, "-c", ""], capture_output=True).returncode == 0


def choose_stack(asked: str) -> str:
    """ "cpu" or "cuda"; auto takes CUDA when an NVIDIA GPU answers."""
    if asked in ("cpu", "cuda"):
        return asked
    if asked not in ("", "auto"):
        raise InstallError(f"STACK={asked!r} is unknown; choose STACK=cpu, STACK=cuda or leave it out")
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "cuda" if listed.returncode == 0 and "GPU" in listed.stdout else "cpu"


def layout(venv: Path, stack: str) -> dict:
    """What an environment cannot change in place: any difference here means building it again."""
    return {"python": sys.version, "base": sys.base_prefix, "stack": stack, "venv": str(venv), "checkout": str(ROOT)}


def recipe_hash() -> str:
    """Hash of what gets installed. Of pyproject.toml only the tables that pip reads: a lint rule reinstalls nothing."""
    import tomllib  # 3.11+, so not at the head of the file

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    parts = {
        "project": project["project"],
        "build": project["build-system"],
        "setuptools": project["tool"]["setuptools"],
        "shim": (SHIM / "pyproject.toml").read_text(encoding="utf-8"),
        "install": Path(__file__).read_text(encoding="utf-8"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def watched_records(venv: Path) -> dict:
    """Size of RECORD for each watched distribution: changes when another pip run replaced or removed one of them."""
    found = {}
    for folder in sorted(venv.glob("lib/python3*/site-packages/*.dist-info")):
        if folder.name.split("-")[0] in WATCHED and (folder / "RECORD").is_file():
            found[folder.name] = (folder / "RECORD").stat().st_size
    return found


def read_stamp(venv: Path) -> dict:
    try:
        return json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_stamp(venv: Path, stamp: dict) -> None:
    """Atomic: a kill leaves the old stamp or the new one."""
    fresh = venv / (STAMP + ".new")
    fresh.write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    os.replace(fresh, venv / STAMP)


@contextlib.contextmanager
def locked(folder: Path):
    """Two `make` runs at once: the second waits, then finds the work done.

    The lock dies with the processes that hold it. pip inherits it, so that one which outlives a killed parent is not
    written under by the next run.
    """
    handle = os.open(folder, os.O_RDONLY)
    os.set_inheritable(handle, True)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another install is at work in {folder}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def prepare(venv: Path, wanted: dict) -> None:
    """Leaves an environment of the wanted layout, whose stamp says "unfinished"."""
    stamp = read_stamp(venv)
    if not stamp:
        made_here = not any(venv.iterdir())
        if not made_here:
            check_foreign(venv)
            say(f"taking over the environment found at {venv}")
        reuse = not made_here
    else:
        made_here = stamp["made_here"]
        finished = stamp["state"] == "finished"
        reuse = finished and stamp["layout"] == wanted and stamp["records"] == watched_records(venv)
        why = "its install was not finished" if not finished else "it was made for, or changed to, something else"
        if not reuse and not made_here:
            raise InstallError(f"{venv} was not made here and cannot be used ({why}): rm -rf {venv}, then try again")
        if not reuse:
            say(f"building {venv} anew: {why}")
    write_stamp(venv, {"state": "unfinished", "made_here": made_here, "layout": wanted})
    if not reuse:
        clear(venv)
        run("virtual environment", [sys.executable, "-m", "venv", str(venv)], venv=venv)


def check_foreign(venv: Path) -> None:
    """Raises InstallError unless the folder, which has no stamp, is a virtual environment of this Python version."""
    try:
        config = (venv / "pyvenv.cfg").read_text(encoding="utf-8")
    except OSError:
        raise InstallError(f"{venv} is not empty and no virtual environment; name another with VENV=") from None
    version = next((line.split("=")[1].strip() for line in config.splitlines() if line.startswith("version")), "?")
    if version.split(".")[:2] != [str(part) for part in sys.version_info[:2]]:
        raise InstallError(f"{venv} holds Python {version}, not {sys.version.split()[0]}; remove it or set VENV=")


def clear(venv: Path) -> None:
    """Empties the folder, but for the stamp, which says unfinished. The folder itself stays: it carries the lock."""
    for entry in venv.iterdir():
        if entry.name == STAMP:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def run(what: str, command: list, *, venv: Path, may_fail: bool = False) -> bool:
    """One step: a line with its seconds on the screen, output in the log. Raises InstallError with the log's tail."""
    started = time.monotonic()
    with open(venv / LOG, "a", encoding="utf-8") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        begin = log.tell()
        done = subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, close_fds=False
        )
    if done.returncode == 0:
        say(f"{what}: {time.monotonic() - started:.0f} s")
        return True
    if may_fail:
        return False
    tail = (venv / LOG).read_bytes()[begin:].decode(errors="replace").splitlines()[-15:]
    raise InstallError("\n  ".join([f"{what} failed (exit code {done.returncode}; whole log: {venv / LOG})", *tail]))


def install_packages(venv: Path, stack: str) -> None:
    """The pip runs. CPU: torch first, by itself, so that only torch is looked for on PyTorch's index."""
    pip = [str(venv / "bin" / "python"), "-I", "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    if stack == "cuda":
        run("torch, torchrec, fbgemm-gpu (CUDA) and the rest", [*pip, "-e", ".[cuda,dev]"], venv=venv)
        return
    version = next(item.split("==")[1] for item in requirements() if item.startswith("torch=="))
    # Short limits: where the index is blocked, three tries of 15 s are the most that is lost.
    cpu_build = [
        "--no-deps",
        "--retries",
        "2",
        "--timeout",
        "15",
        "--extra-index-url",
        CPU_INDEX,
        f"torch=={version}+cpu",
    ]
    if not run(f"torch {version} (CPU build)", [*pip, *cpu_build], venv=venv, may_fail=True):
        say("*" * 100)
        say(f"WARNING: no CPU build of torch {version} could be had from {CPU_INDEX} (log: {venv / LOG}).")
        say("WARNING: taking torch from the configured index, where it may be the CUDA build: gigabytes, but it works.")
        say("*" * 100)
        run(f"torch {version}", [*pip, f"torch=={version}"], venv=venv)
    run("torchrec, fbgemm-gpu-cpu and the rest", [*pip, str(SHIM), "-e", ".[dev]"], venv=venv)


def requirements() -> list:
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]


def smoke_test(venv: Path) -> str:
    """Imports the trio as a user will. Raises InstallError with the last line of what it said."""
    done = subprocess.run(
        [str(venv / "bin" / "python"), "-I", "-c", SMOKE_TEST], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        raise InstallError(
            "installed, but it does not import: " + (done.stderr.strip().splitlines() or ["no output"])[-1]
        )
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    started = time.monotonic()
    check_python()
    venv = Path(os.path.abspath(ROOT / (os.environ.get("VENV") or ".venv")))
    stack = choose_stack(os.environ.get("STACK", ""))
    wanted = layout(venv, stack)
    venv.mkdir(parents=True, exist_ok=True)
    with locked(venv):
        recipe = recipe_hash()
        finished = {"state": "finished", "recipe": recipe, "layout": wanted, "records": watched_records(venv)}
        stamp = read_stamp(venv)
        if {key: stamp.get(key) for key in finished} == finished:
            return
        say(f"{stack.upper()} stack into {venv} (log: {venv / LOG})")
        prepare(venv, wanted)
        install_packages(venv, stack)
        say(smoke_test(venv))
        made_here = read_stamp(venv)["made_here"]
        write_stamp(venv, {**finished, "records": watched_records(venv), "made_here": made_here})
        say(f"done in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except InstallError as error:
        sys.exit(f"install: ERROR: {error}")
    except KeyboardInterrupt:
        sys.exit("install: interrupted; the next `make install` starts over")
