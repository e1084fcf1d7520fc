"""The names that other people's code relies on come from symbreak itself, and cost nothing until they are asked for."""
import builtins
import dis
import subprocess
import sys
from importlib import import_module
from types import CodeType

import pytest

import symbreak
from symbreak.files import home


@pytest.mark.parametrize("name, module", symbreak._PLACES.items())
def test_names_are_those_of_their_modules(name, module):
    assert getattr(symbreak, name) is getattr(import_module(f"symbreak.{module}"), name)
    assert name in dir(symbreak)


def test_a_name_that_does_not_exist():
    with pytest.raises(AttributeError, match="no attribute 'ConstNett'"): symbreak.ConstNett


@pytest.mark.parametrize("code, absent", [
    ("import symbreak", {"torch", "pandas", "matplotlib", "numpy"}),
    ("from symbreak import ConstNet, asymmetry", {"pandas", "matplotlib", "papermill"}),
    ("import symbreak.train, symbreak.quotient", {"pandas", "matplotlib", "papermill"})])
def test_nothing_is_imported_before_it_must(code, absent):
    check = f"{code}\nimport sys\nprint(*{absent!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_modules_named_like_their_function_stay_modules():
    import symbreak.quotient
    import symbreak.train
    assert callable(symbreak.quotient.quotient) and callable(symbreak.train.train)


def _code_of(code: CodeType):
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType): yield from _code_of(inner)


@pytest.mark.parametrize("path", sorted((home() / "symbreak").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_functions_know_all_names_that_they_use(path):
    """Star imports of a notebook can hide from lint that its module lacks an import."""
    known = vars(builtins) | vars(import_module(f"symbreak.{path.stem}"))
    used = {step.argval for code in _code_of(compile(path.read_text(encoding="utf-8"), path, "exec"))
            for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    assert not used - set(known)
