"""Print the statistics of the house, and exit with an error where one is over its limit.

    python tools/house.py [CHECKOUT]

The rooms are the notebooks nbs/NN_name.ipynb: 0x is the argument; 1x, 2x and 3x are the machinery. The columns:

- words: words in Markdown cells, split at white space; headings, tables and formulas count.
- lines: exported lines, those of cells with `#| export`, without directives and blank lines, without cells that only
  import.
- ratio: words over lines; at least 3 in the machinery as a whole.
- cells, median, p90, max: number of exported cells, and their size in exported lines; over the whole machinery, the
  median is at most 15 and the 90th percentile at most 30.
- code, prose: length of the longest line in code and Markdown cells, at most 120 characters, in figure notebooks too.
  What cannot be wrapped is left out of prose: rows of tables, HTML, displayed formulas, lines that are one link.
- module: all lines of symbreak/NAME.py, at most 300.

Imports: a cell of a room, exported or not, imports only from rooms with a smaller number, inside functions too. Modules
have no cycle.
"""
import ast
import re
import sys
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median, quantiles

import nbformat

WIDTH, MODULE_LINES, WORDS_PER_LINE, MEDIAN, P90 = 120, 300, 3.0, 15, 30
COLUMNS = ("words", "lines", "ratio", "cells", "median", "p90", "max", "code", "prose", "module")
EXPORT = re.compile(r"^#\|\s*export", re.MULTILINE)
DISPLAYED = re.compile(r"^\$\$.*?\$\$$", re.MULTILINE | re.DOTALL)
NOT_WRAPPED = re.compile(r"\s*(\||<|([-*]|\d+\.)?\s*!?\[[^\]]*\]\([^)]*\)[.,:;]?$)")


@dataclass(frozen=True)
class Room:
    """A library notebook."""

    path: Path

    @property
    def number(self) -> str: return self.path.stem.partition("_")[0]

    @property
    def module(self) -> str: return self.path.stem.partition("_")[2]

    @property
    def is_machinery(self) -> bool: return not self.number.startswith("0")

    def sources(self, kind: str) -> list[str]:
        """The text of all code or all Markdown cells."""
        return [cell.source for cell in cells(self.path) if cell.cell_type == kind]

    def words(self) -> int: return sum(len(source.split()) for source in self.sources("markdown"))

    def exported(self) -> list[int]:
        """The exported lines of each exported cell."""
        found = [source for source in self.sources("code") if EXPORT.search(source) and not only_imports(source)]
        return [sum(bool(line.strip()) and line[:2] != "#|" for line in source.splitlines()) for source in found]

    def imports(self) -> set[str]:
        """The modules of this package that any of its cells imports."""
        return {name for source in self.sources("code") for name in imported(python(source))}


@cache
def cells(path: Path) -> list: return nbformat.read(path, 4).cells


def python(source: str) -> ast.Module:
    """The syntax tree of a cell, without IPython's own commands."""
    return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE))


def only_imports(source: str) -> bool:
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in python(source).body)


def imported(tree: ast.AST) -> set[str]:
    """The modules of this package that a piece of code imports; `from symbreak import name` may name something else."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            path = ["symbreak"] * (node.level > 0) + (node.module.split(".") if node.module else [])
            if path[:1] == ["symbreak"]: found.update(path[1:2] or [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            found.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("symbreak."))
    return found


def upward(rooms: list[Room]) -> list[str]:
    """Imports from rooms below."""
    number = {room.module: room.number for room in rooms}
    return [f"{room.path.name} imports {name}, which comes after it" for room in rooms
            for name in sorted(room.imports()) if number.get(name, "") > room.number]


def cycles(package: Path) -> list[str]:
    """Modules that need each other."""
    code = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in package.glob("*.py")}
    needs = {name: imported(tree) & code.keys() for name, tree in code.items()}
    try: TopologicalSorter(needs).prepare()
    except CycleError as error: return [f"modules in a cycle: {' -> '.join(error.args[1])}"]
    return []


def wrapped_lines(path: Path) -> list[tuple[str, str, str]]:
    """All lines of a notebook that could be shorter, each after the kind and the id of its cell."""
    found = []
    for cell in cells(path):
        is_prose = cell.cell_type == "markdown"
        text = DISPLAYED.sub("", cell.source) if is_prose else cell.source
        found += [(cell.cell_type, cell.id, line) for line in text.splitlines()
                  if not (is_prose and NOT_WRAPPED.match(line))]
    return found


def longest(paths: list[Path], kind: str) -> int:
    return max((len(line) for path in paths for of, _, line in wrapped_lines(path) if of == kind), default=0)


def long_lines(path: Path) -> list[str]:
    """Where a notebook has lines that are too long."""
    return [f"{path.parent.name}/{path.name}, {kind} cell {cell}: {len(line)} characters in {line.strip()[:40]!r}..."
            for kind, cell, line in wrapped_lines(path) if len(line) > WIDTH]


def p90(sizes: list[int]) -> float:
    return quantiles(sizes, n=10, method="inclusive")[-1] if len(sizes) > 1 else max(sizes, default=0)


def ratio(rooms: list[Room]) -> float:
    """Words of prose per exported line."""
    return sum(room.words() for room in rooms) / max(1, sum(sum(room.exported()) for room in rooms))


def row(rooms: list[Room], module: object = "") -> tuple:
    """The statistics of some rooms, a value per column."""
    sizes = [size for room in rooms for size in room.exported()]
    paths = [room.path for room in rooms]
    return (sum(room.words() for room in rooms), sum(sizes), f"{ratio(rooms):.2f}",
            len(sizes), f"{median(sizes or [0]):g}", f"{p90(sizes):g}", max(sizes, default=0),
            longest(paths, "code"), longest(paths, "markdown"), module)


def print_row(title: str, values: tuple) -> None: print(f"{title:20}", *(f"{value:>6}" for value in values))


def over_limits(machinery: list[Room], modules: dict[str, int]) -> list[str]:
    """Rooms, cells and modules that are over a limit."""
    found = []
    if ratio(machinery) < WORDS_PER_LINE:
        found.append(f"machinery: {ratio(machinery):.2f} words per exported line; at least {WORDS_PER_LINE:g}")
    sizes = [size for room in machinery for size in room.exported()]
    for name, value, limit in (("median", median(sizes), MEDIAN), ("90th percentile", p90(sizes), P90)):
        if value > limit: found.append(f"cells of the machinery: {name} {value:g} lines; at most {limit}")
    return found + [f"symbreak/{name}.py: {count} lines; at most {MODULE_LINES}"
                    for name, count in modules.items() if count > MODULE_LINES]


def main(checkout: Path) -> int:
    package = checkout / "symbreak"
    rooms = [Room(path) for path in sorted((checkout / "nbs").glob("[0-9]*.ipynb"))]
    figures = sorted((checkout / "nbs/figures").glob("*.ipynb"))
    modules = {path.stem: len(path.read_text(encoding="utf-8").splitlines())
               for path in sorted(package.glob("*.py")) if path.stem != "_modidx"}
    argument, machinery = ([room for room in rooms if room.is_machinery == kind] for kind in (False, True))
    print_row("", COLUMNS)
    for room in rooms: print_row(room.path.stem, row([room], modules.get(room.module, "")))
    print_row("argument, 0x", row(argument))
    print_row("machinery, 1x to 3x", row(machinery))
    print_row("figures", ("",) * 7 + (longest(figures, "code"), longest(figures, "markdown"), ""))
    too_long = [line for path in [room.path for room in rooms] + figures for line in long_lines(path)]
    imports = upward(rooms) + cycles(package)
    found = too_long + imports + over_limits(machinery, modules)
    print(f"\n{len(too_long)} lines of notebooks over {WIDTH} characters, {len(imports)} imports up or round,"
          f" {len(found) - len(too_long) - len(imports)} other limits exceeded", *found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parents[1])))
