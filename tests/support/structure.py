"""How the folders of the product depend on each other: python tests/support/structure.py

A room of feature_store/ (or models/, pipeline/) is a sub-folder or a module directly in it. An arrow goes from a room
to one that it imports. A room's level is 1 where it imports no other, else one more than the highest room it imports.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("configs", "feature_store", "models", "pipeline")
ROOT_PACKAGE = "packaging/elastic_rec"
Arrows = dict[str, set[str]]


def files() -> list[Path]:
    """The modules of the product, relative to the repository's root; of the root package, too."""
    return [
        path.relative_to(ROOT) for folder in (*FOLDERS, ROOT_PACKAGE) for path in sorted((ROOT / folder).rglob("*.py"))
    ]


@cache
def imports(file: Path) -> frozenset[Path]:
    """The product's modules that a module imports, in functions and under TYPE_CHECKING, too."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {_module(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {_module(f"{node.module}.{alias.name}") for alias in node.names}
    return frozenset(found - {None, file})


def _module(name: str) -> Path | None:
    """The file of elastic_rec.x.y, or of elastic_rec.x where y is a name inside it."""
    parts = name.split(".")[1:] if name.startswith("elastic_rec.") else []
    for path in (Path(*parts), Path(*parts[:-1])):
        for file in (path.with_suffix(".py") if path.name else path, path / "__init__.py"):
            if file.parts and (ROOT / file).is_file():
                return file
    return None


def room(file: Path, folder: str) -> str | None:
    """The room of a file in a folder; None outside of it, and for its __init__.py, which holds them together."""
    if file.parts[0] != folder or file.parts[1:] == ("__init__.py",):
        return None
    return file.parts[1].removesuffix(".py")


def arrows(folder: str) -> Arrows:
    """room -> the rooms of the same folder that it imports."""
    found: Arrows = {room(file, folder): set() for file in files() if room(file, folder)}
    for file in files():
        here = room(file, folder)
        found.get(here, set()).update({room(other, folder) for other in imports(file)} - {here, None})
    return found


def levels(of: Arrows) -> dict[str, int]:
    """room -> its level. Raises ValueError where rooms import each other in a circle."""
    found: dict[str, int] = {}
    while len(found) < len(of):
        ready = {name: others for name, others in of.items() if name not in found and others <= found.keys()}
        if not ready:
            raise ValueError(f"a circle among {sorted(of.keys() - found.keys())}")
        found |= {name: 1 + max((found[other] for other in others), default=0) for name, others in ready.items()}
    return found


def functions() -> dict[str, int]:
    """file:name -> lines, of every function of the product."""
    found: dict[str, int] = defaultdict(int)
    for file in files():
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found[f"{file}:{node.name}"] = max(found[f"{file}:{node.name}"], node.end_lineno - node.lineno + 1)
    return dict(found)


def public(file: Path) -> dict[str, bool]:
    """Public classes, functions and methods of a module -> whether a docstring says what they do.

    A torch module's forward may be told in its class's docstring, a verb's main in its module's.
    """
    found = {}
    tree = ast.parse((ROOT / file).read_text())
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        about = ast.get_docstring(node) or ""
        found[f"{file}:{node.name}"] = bool(about) or (node.name == "main" and ast.get_docstring(tree) is not None)
        for method in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                told = method.name == "forward" and "forward" in about
                found[f"{file}:{node.name}.{method.name}"] = told or ast.get_docstring(method) is not None
    return found


def main() -> None:
    for folder in FOLDERS[1:]:
        of = arrows(folder)
        level = levels(of)
        lines = sum(len((ROOT / file).read_text().splitlines()) for file in files() if file.parts[0] == folder)
        count = sum(map(len, of.values()))
        print(f"{folder}: {len(of)} rooms, {count} arrows, {max(level.values())} levels, {lines} lines")
        for name in sorted(of, key=lambda name: (-level[name], name)):
            print(f"  {level[name]} {name} -> {', '.join(sorted(of[name]))}")
    documented = [has for file in files() for has in public(file).values()]
    print(f"docstrings: {sum(documented)} of {len(documented)} public classes, functions and methods")


if __name__ == "__main__":
    main()
