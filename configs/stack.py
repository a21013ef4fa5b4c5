"""One question, asked before anything imports TorchRec: do torch, torchrec and fbgemm-gpu belong together?

The three are released together, torch 2.(m+5) with torchrec 1.m and fbgemm-gpu 1.m, and share a binary interface.
pip does not know that (torchrec accepts any fbgemm-gpu, fbgemm-gpu names no torch), so a mismatch installs cleanly and
ends in a missing symbol, a missing libcudart, or a crash inside a kernel. `check_stack` turns those into one line.
Known to work: 2.13.0 / 1.8.0 / 1.8.0 and 2.11.0 / 1.6.1 / 1.6.0.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator

# The two builds of FBGEMM install the same import package. The CPU install has both names: "fbgemm-gpu" is then an
# empty stand-in (packaging/fbgemm-gpu-shim), so where both are there the one called -cpu holds the code.
FBGEMM = ("fbgemm-gpu-cpu", "fbgemm-gpu")
MODULES = {"torch": "torch", "torchrec": "torchrec", "fbgemm-gpu-cpu": "fbgemm_gpu", "fbgemm-gpu": "fbgemm_gpu"}


@functools.cache
def check_versions() -> dict[str, str | None]:
    """Raises ImportError, one line with versions and fix, where a package is missing or its metadata say that it does
    not belong to the others. Imports none of them: what only moves events needs none. Returns the versions.

    A version that cannot be found out (no metadata, a nightly, a local build) raises no alarm.
    """
    quiet_known_noise()
    versions = installed_versions()
    _raise_if(describe_missing(versions) or describe_mismatch(versions))
    return versions


@functools.cache
def check_stack() -> None:
    """As check_versions, and raises unless FBGEMM's libraries load."""
    versions = check_versions()
    importlib.import_module("torch")
    try:
        with _muted_logging():  # FBGEMM logs a failure in many lines before it raises it
            if (
                importlib.import_module("fbgemm_gpu").__file__ is None
            ):  # an uninstall leaves folders, which import as a shell
                raise ModuleNotFoundError("only empty folders of it are left", name="fbgemm_gpu")
    except Exception as error:  # OSError, RuntimeError, ImportError: whatever the loader and its libraries come to
        raise ImportError(describe_broken_fbgemm(versions, error)) from error
    # What lies in a plain folder on PYTHONPATH has no metadata; now that importing is safe, ask the modules.
    _raise_if(describe_mismatch({name: version or _module_version(name) for name, version in versions.items()}))


def installed_versions() -> dict[str, str | None]:
    """Version by distribution name, FBGEMM under the name of its build; None: no metadata, so it is not known yet."""
    found = {name: _metadata_version(name) for name in ("torch", "torchrec")}
    fbgemm = next((name for name in FBGEMM if _metadata_version(name)), "fbgemm-gpu")
    return {**found, fbgemm: _metadata_version(fbgemm)}


def describe_missing(versions: dict[str, str | None]) -> str | None:
    """One line when a package of the trio is not there at all, else None."""
    missing = [n for n, version in versions.items() if version is None and importlib.util.find_spec(MODULES[n]) is None]
    if not missing:
        return None
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version) or "nothing"
    return f"{' and '.join(missing)} not installed (found {found}): run `make install`"


def describe_mismatch(versions: dict[str, str | None]) -> str | None:
    """One line when the known versions do not belong together, else None. The odd one out is named in the fix."""
    minors = {name: _torchrec_minor(name, version) for name, version in versions.items()}
    known = [minor for minor in minors.values() if minor is not None]
    if len(set(known)) < 2:
        return None
    wanted = Counter(known).most_common(1)[0][0]  # a tie goes to torch, which comes first
    pins = " ".join(
        f'"torch==2.{wanted + 5}.*"' if name == "torch" else f'"{name}==1.{wanted}.*"'
        for name, minor in minors.items()
        if minor not in (None, wanted)
    )
    return (
        f"{_listing(versions)} do not belong together (torch 2.(m+5) needs torchrec 1.m and fbgemm-gpu 1.m): "
        "run `make install`" + (f", or pip install {pins}" if 0 <= wanted < 1000 else "")
    )


def describe_broken_fbgemm(versions: dict[str, str | None], error: Exception) -> str:
    """One line for an FBGEMM whose files are gone, or whose libraries do not load beside this torch."""
    torch = importlib.import_module("torch")
    minor = _torchrec_minor("torch", torch.__version__)
    cpu_torch = torch.version.cuda is None and torch.version.hip is None
    build = "fbgemm-gpu-cpu" if cpu_torch else "fbgemm-gpu"
    pin = f"{build}==1.{minor}.*" if minor is not None else build
    if isinstance(error, ModuleNotFoundError) and error.name == "fbgemm_gpu":
        what = "the files of fbgemm_gpu are gone"
    elif cpu_torch and isinstance(error, OSError):
        what = "fbgemm_gpu is a CUDA build beside a CPU build of torch"
    else:
        what = f"fbgemm_gpu does not load ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    listing = _listing({**versions, "torch": torch.__version__})
    return (
        f"{what} ({listing}): run `make install`, or pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu and then "
        f'pip install --no-deps "{pin}"'
    )


def quiet_known_noise() -> None:
    """Mutes warnings of these versions that ask nothing of a user (design notes of torchrec 1.6 to 1.8)."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torchrec\..*")
    warnings.filterwarnings("ignore", message=r".*broadcast_buffers.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r".*deprecating ShardedTensor.*", category=FutureWarning)
    logging.getLogger("torchrec.distributed.planner").setLevel(logging.ERROR)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


def _metadata_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _module_version(name: str) -> str | None:
    return getattr(importlib.import_module(MODULES[name]), "__version__", None)


def _torchrec_minor(name: str, version: str | None) -> int | None:
    """The m of the rule; None where the version says nothing: unknown, a date (nightly), or built from source."""
    match = re.match(r"(\d+)\.(\d+)\.", version or "")
    if match is None or "+git" in version or "dev" in version:
        return None
    major, minor = int(match[1]), int(match[2])
    if major > 100 or (major, minor) == (0, 0):
        return None
    if name == "torch":
        major, minor = major - 1, minor - 5
    return minor + 1000 * (major - 1)


def _listing(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version or '(version unknown)'}" for name, version in versions.items())


def _raise_if(message: str | None) -> None:
    if message:
        raise ImportError(message)


@contextlib.contextmanager
def _muted_logging() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
