"""One thread and oneDNN's default kernels: both are part of the arithmetic, and workers choose for themselves.

`pytest --soak` tries for longer: more kills, more flips, more examples, and others each time.
"""
import os
import signal
import subprocess
from pathlib import Path

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would ours
os.environ.pop("ONEDNN_MAX_CPU_ISA", None)  # before torch computes anything
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait for others sleep; no bit depends on it

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, configuration, settings  # noqa: E402

torch.set_num_threads(1)
configuration.set_hypothesis_home_dir(Path(__file__).parents[1] / "build" / "hypothesis")
settings.register_profile("short", derandomize=True, database=None, max_examples=40, deadline=None,
                          suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("soak", max_examples=400, deadline=None, print_blob=True,
                          suppress_health_check=[HealthCheck.too_slow])


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="try for longer, with other examples each time")


def pytest_configure(config):
    soak = config.getoption("--soak")
    settings.load_profile("soak" if soak else "short")
    config.addinivalue_line("markers", "soak: takes long, and is left to `make soak`")
    if not soak and not config.option.markexpr: config.option.markexpr = "not soak"


@pytest.fixture
def times(request):
    """How often something is tried: `times(few, many)` of the short suite and of `make soak`."""
    return lambda few, many: many if request.config.getoption("--soak") else few


def places():
    """The variables that say where a command finds its files."""
    return {name: value for name, value in os.environ.items() if name.startswith(("SYMBREAK_", "XDG_", "HOME"))}


PLACES = places()


@pytest.fixture(autouse=True)
def nothing_is_left_at_work(monkeypatch):
    """A test finds the places of the suite, and if it fails it takes the processes that it has started with it."""
    assert places() == PLACES, "a test before, or a fixture that outlives one, has set them, and others read there"
    started, start = [], subprocess.Popen.__init__

    def noted(process, *args, **options):
        start(process, *args, **options)
        started.append(process)
    monkeypatch.setattr(subprocess.Popen, "__init__", noted)
    yield
    for process in started:
        if process.poll() is None: process.kill()
