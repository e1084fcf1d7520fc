"""Execute notebooks: in place, or to test them and see that the outputs they hold are still what they put out.

    python tools/notebooks.py write NOTEBOOK ...   execute in place, then clean
    python tools/notebooks.py test NOTEBOOK ...    change nothing; fail on an error, and on outputs that are not fresh

Outputs are fresh if their text has the same words and whole numbers, and decimals within 1 % or 1e-6: from there on
processors and versions differ, and assertions in the notebooks guard what matters. Pictures and warnings are not
compared, nor is any cell with the tag `varies`, for outputs that hang on time or on the machine.
"""
import argparse
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from math import isclose
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import clean_nb, nbdev_clean

from symbreak.kernels import kernel_settings

DECIMAL = re.compile(r"[-+]?\d+(?:\.\d*(?:e[-+]?\d+)?|e[-+]?\d+)")
DIRECTIVE = re.compile(r"^#\|\s*(slow|cuda|eval:\s*false)\b", re.MULTILINE)


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of an execution in its own folder, as Jupyter does it."""
    notebook = nbformat.read(path, 4)
    asked = nbformat.from_dict(notebook)
    for cell in asked.cells:  # what nbdev would not run either
        if DIRECTIVE.search(cell.source): cell.metadata["tags"] = ["skip-execution"]
    with kernel_settings() as settings:
        client = NotebookClient(asked, kernel_name="python3", coalesce_streams=True, record_timing=False,
                                config=settings, resources={"metadata": {"path": str(path.parent)}})
        done = client.execute()
    for cell, executed in zip(notebook.cells, done.cells):
        if cell.cell_type == "code": cell.outputs = executed.outputs
    return notebook


def texts(cell: nbformat.NotebookNode) -> list[str]:
    """The lines of text that a code cell put out."""
    printed = "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
    shown = [text for output in cell.outputs for kind, text in sorted(output.get("data", {}).items())
             if kind.startswith("text/")]
    return "\n".join([printed, *shown]).strip().splitlines()


def agree(line: str, other: str) -> bool:
    """Whether two lines of output say the same, up to rounding."""
    words = [" ".join(DECIMAL.sub(" # ", text).split()) for text in (line, other)]
    pairs = zip(DECIMAL.findall(line), DECIMAL.findall(other))
    return words[0] == words[1] and all(isclose(float(a), float(b), rel_tol=0.01, abs_tol=1e-6) for a, b in pairs)


def stale(committed: nbformat.NotebookNode, executed: nbformat.NotebookNode) -> list[str]:
    """What is not fresh in the committed outputs, a line each."""
    clean_nb(executed)  # addresses of objects go, as they went from what is committed
    found = []
    for old, new in zip(committed.cells, executed.cells):
        if old.cell_type != "code" or "varies" in old.metadata.get("tags", ()): continue
        before, after = texts(old), texts(new)
        length = max(len(before), len(after))
        pairs = zip(*(lines + [""] * (length - len(lines)) for lines in (before, after)))
        found += [f"cell {old.id} holds {a!r}, puts out {b!r}" for a, b in pairs if not agree(a, b)][:3]
    return found


def write(path: Path) -> list[str]:
    """Execute in place and clean."""
    nbformat.write(execute(path), path)
    nbdev_clean(str(path))
    return []


def test(path: Path) -> list[str]:
    """What is wrong with a notebook, a line each."""
    return stale(nbformat.read(path, 4), execute(path))


def attempt(what, path: Path) -> list[str]:
    """Write or test; an error is one more thing that is wrong."""
    try: return what(path)
    except Exception as error: return [f"{type(error).__name__}: {error}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("write", "test"))
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    os.environ["IN_TEST"] = "1"  # tells nbdev_export() in a notebook's last cell to do nothing
    paths = [path.absolute() for path in options.notebooks]
    with ProcessPoolExecutor(options.workers) as pool:
        wrong = dict(zip(paths, pool.map(partial(attempt, {"write": write, "test": test}[options.what]), paths)))
    for path, lines in wrong.items():
        for line in lines: print(f"{path.name}: {line}")
    failed = sum(map(bool, wrong.values()))
    print(f"Notebooks: {len(paths) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
