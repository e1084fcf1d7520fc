"""The tools that judge notebooks see what they should, and nothing else."""
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import nbformat.v4 as v4
import pytest
import torch
from house import Room, cycles, imported, long_lines, python, upward
from mutants import outcome
from notebooks import agree, stale, test as wrong_with, texts
from reading_order import NBS, reading_order

from symbreak.provenance import device_name

TOOLS = Path(__file__).parents[1] / "tools"


def write(path, *cells):
    path.write_text(v4.writes(v4.new_notebook(cells=list(cells))), encoding="utf-8")


@pytest.mark.parametrize("line, other, same", [
    ("loss 0.8123", "loss 0.8124", True),
    ("loss 0.81", "loss 0.91", False),
    ("residue -6.9e-15", "residue +1.2e-14", True),  # rounding, on either side of zero
    ("distinct 128", "distinct 127", False),
    ("allowed: fig01", "allowed: fig01, fig02", False),
    ("| 1.0   |", "| 1.004 |", True),
    ("1e-3 of 2", "1.001e-3 of 2", True),
    ("no number", "no number", True),
])
def test_outputs_agree_up_to_rounding(line, other, same):
    assert agree(line, other) is same


def notebook(*printed, tags=()):
    cells = [v4.new_code_cell("...", outputs=[v4.new_output("stream", name="stdout", text=text)],
                              metadata={"tags": list(tags)}, id=f"cell{i}") for i, text in enumerate(printed)]
    return v4.new_notebook(cells=cells)


def test_stale_outputs_are_named_with_their_cell():
    assert stale(notebook("a\n", "b\n"), notebook("a\n", "c\n")) == ["cell cell1 holds 'b', puts out 'c'"]
    assert stale(notebook("a\nb\n"), notebook("a\n")) == ["cell cell0 holds 'b', puts out ''"]
    assert stale(notebook("3 s", tags=["varies"]), notebook("4 s")) == []


@pytest.mark.parametrize("path", sorted(NBS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_outputs_that_must_be_fresh_do_not_name_the_machine(path):
    """On another one they would be stale for ever: such a cell is tagged `varies`."""
    said = "\n".join(line for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"
                     and "varies" not in cell.metadata.get("tags", ()) for line in texts(cell))
    assert torch.__version__ not in said and device_name(torch.device("cpu")) not in said


def test_a_notebook_is_executed_in_its_folder_and_cells_for_other_machines_are_not(tmp_path):
    (tmp_path / "here.txt").touch()
    path = tmp_path / "x.ipynb"
    write(path, v4.new_code_cell("assert __import__('os').path.exists('here.txt')"),
          v4.new_code_cell("#| cuda\n1/0"), v4.new_code_cell("#| eval: false\n1/0"))
    assert wrong_with(path) == []


@pytest.mark.parametrize("code, modules", [
    ("from symbreak.nets import ConstNet", {"nets"}),
    ("def f():\n    from symbreak import plots, runs", {"plots", "runs"}),
    ("from .nets import blocks\nfrom . import data", {"nets", "data"}),
    ("import symbreak.cli as c, torch", {"cli"}),
    ("%matplotlib inline\nfrom nbdev.showdoc import *", set()),
])
def test_imports_are_found(code, modules):
    assert imported(python(code)) == modules


def test_the_order_of_rooms_is_kept(tmp_path):
    upwards, downwards = "def f():\n    from symbreak.high import g", "from symbreak.low import f"
    for name, code in (("01_low", upwards), ("02_high", downwards)):
        write(tmp_path / f"{name}.ipynb", v4.new_code_cell(code))
        (tmp_path / f"{name[3:]}.py").write_text(code)
    rooms = [Room(path) for path in sorted(tmp_path.glob("*.ipynb"))]
    assert upward(rooms) == ["01_low.ipynb imports high, which comes after it"]
    assert len(cycles(tmp_path)) == 1


def test_prose_that_cannot_be_wrapped_may_be_long(tmp_path):
    long = "word " * 30
    prose = f"| {long} |\n$$\n{long}\n$$\n- [{long}](there.md)\n{long}"
    path = tmp_path / "x.ipynb"
    write(path, v4.new_markdown_cell(prose), v4.new_code_cell(f"# {long}"))
    assert [line.split(",")[1].split()[0] for line in long_lines(path)] == ["markdown", "code"]


def test_every_notebook_is_listed():
    listed = reading_order()
    names = [path.relative_to(NBS).as_posix() for path in (*NBS.glob("*.ipynb"), *NBS.glob("figures/*.ipynb"))]
    assert [name for name in names if f"]({name})" not in listed] == []


@pytest.mark.parametrize("asked", ["sample nosuch --seed 1", "sample --seed 1 nosuch"])
def test_modules_of_mutants_may_come_before_or_after_options(asked):
    done = subprocess.run([sys.executable, TOOLS / "mutants.py", *asked.split()], capture_output=True, text=True)
    assert done.returncode == 2 and "MODULE: nosuch; allowed: quotient, breaking" in done.stderr


@pytest.mark.parametrize("test_outcome, output, fared", [
    ("survived", "5 passed", "survived"), ("killed", "1 failed", "caught"), ("killed", "timeout", "out of time"),
    ("killed", "cannot be imported: NameError()", "stillborn")])
def test_a_mutant_that_ran_out_of_time_is_told_from_one_that_a_test_caught(test_outcome, output, fared):
    assert outcome(SimpleNamespace(test_outcome=test_outcome, output=output)) == fared
