"""Switches for determinism: what they set, what they refuse, and that every one is put back."""
import os
import subprocess
import sys

import pytest
import torch

from symbreak.numerics import ALGORITHMS, WORKSPACE, deterministic, numerics, switches


def test_switches_come_back_after_nesting_and_errors():
    before = switches()
    with pytest.raises(RuntimeError, match="inside"):
        with deterministic() as outer:
            with numerics(deterministic=False, tf32=True, benchmark=True) as inner:
                assert inner[ALGORITHMS] == "off" and inner["backends.cudnn.benchmark"]
                assert torch.backends.cuda.matmul.allow_tf32
            assert switches() == outer
            with deterministic(enabled=False) as same:
                assert same == outer
            raise RuntimeError("inside")
    assert switches() == before and (WORKSPACE in os.environ) == (before[WORKSPACE] is not None)


def test_deterministic_makes_pytorch_refuse_what_it_cannot_repeat():
    with deterministic() as state:
        assert torch.get_deterministic_debug_mode() == 2
        assert os.environ[WORKSPACE] == state[WORKSPACE] == ":4096:8"
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        with torch.backends.cudnn.flags(enabled=True, deterministic=True):
            pass  # this reads the old TF32 name, which raises when old and new names disagree
        assert torch.get_float32_matmul_precision() == "highest"


def test_states_of_the_caller_come_back_exactly():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    try:
        before = switches()
        with deterministic():
            pass
        with numerics(deterministic=False, tf32=True):
            pass
        assert switches() == before and before[ALGORITHMS] == "warn"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="only the old TF32 names")
def test_tf32_set_by_the_new_name_alone_is_kept():
    before = switches()
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # from here the old name cannot be read
    try:
        with deterministic() as state:
            assert state["backends.cuda.matmul.fp32_precision"] == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before["backends.cuda.matmul.fp32_precision"]
    assert switches() == before


def test_a_stopwatch_is_not_deterministic():
    before = switches()
    with pytest.raises(ValueError, match="benchmark: True"):
        with numerics(deterministic=True, benchmark=True):
            pass
    assert switches() == before


def test_the_switch_does_not_import_the_compiler():
    """It would take almost a second of every process that trains."""
    code = ("import sys; from symbreak.numerics import numerics\n"
            "with numerics(deterministic=True) as state: assert state['use_deterministic_algorithms'] == 'error'\n"
            "assert 'torch._inductor.config' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)
