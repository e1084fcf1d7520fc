"""The names that other people's code relies on come from symbreak itself, and cost nothing until they are asked for."""
import subprocess
import sys
from importlib import import_module

import pytest

import symbreak


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
