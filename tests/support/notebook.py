"""Runs the code cells of a notebook in one namespace, in this process: python tests/support/notebook.py FILE.ipynb

No kernel, so no magics: the notebooks of docs/examples are plain Python. Cells of a notebook are named in tracebacks.
"""

import json
import sys
from pathlib import Path


def main(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(cells, 1):
        exec(compile("".join(cell["source"]), f"{path.name}, code cell {number}", "exec"), namespace)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
