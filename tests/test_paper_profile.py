"""The paper's profile at reduced size on a CPU: it makes progress within a budget, stops cleanly, and goes on."""
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from symbreak import cli, measurements
from symbreak.data import DataError
from symbreak.profiles import PROFILES
from symbreak.results import archive, reproduce
from symbreak.runs import Store


@pytest.fixture
def small_paper(tmp_path, monkeypatch):
    """Profile `paper` on a folder of 40 made-up images of CIFAR's size, with tiny networks and two epochs."""
    pixels = np.random.default_rng(0)
    for split, count in (("train", 15), ("test", 5)):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(pixels.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    monkeypatch.setenv("SYMBREAK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SYMBREAK_RUNS", str(tmp_path / "runs"))
    paper = PROFILES["paper"]
    small = dict(epochs=2, width=1, batch_size=16, precision="float32", data=f"folder:{tmp_path / 'images'}")
    monkeypatch.setitem(PROFILES, "paper", replace(paper, seeds=1, base=replace(paper.base, depth=7, **small),
                                                   leaky=replace(paper.leaky, **small)))
    return Store(tmp_path / "runs")


def test_no_budget_left_trains_nothing_and_says_what_is_next(small_paper, capsys, tmp_path):
    code = cli.main(["reproduce", "fig04", "--profile", "paper", "--device", "cpu", "--budget-min", "0", "--out",
                     str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert code == 0 and "Not finished: fig04 (8 runs). The same command goes on." in " ".join(printed.out.split())
    assert "not tested" in printed.out and not list(tmp_path.rglob("fig04.png"))


def test_runs_of_the_paper_pause_and_finish(small_paper):
    paused = reproduce("fig04", "paper", "cpu", store=small_paper, workers=2, budget_s=8)
    assert 0 <= paused.attrs["missing"] <= 8
    table = reproduce("fig04", "paper", "cpu", store=small_paper, workers=2)
    assert table.attrs["missing"] == 0 and table.attrs["provenance"]["profile"] == "paper"
    assert set(table.status) == {"finished"}
    strings = reproduce("fig06", "paper", "cpu", store=small_paper, workers=2)
    assert strings.curve.nunique() == 7 and set(strings.status) == {"finished"}


def test_what_was_archived_stands_in_for_data_and_hours(small_paper, tmp_path, monkeypatch):
    monkeypatch.setattr(measurements, "DEPTHS", (10,))
    made = {name: reproduce(name, "paper", store=small_paper) for name in ("fig03", "abl01")}
    assert archive("paper", tmp_path / "results", small_paper) == 6 + 1  # the runs of abl01, and fig03
    shutil.rmtree(tmp_path / "images")
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(DataError, match="no such folder"):
        reproduce("fig03", "paper", store=small_paper)
    elsewhere = Store(tmp_path / "runs", (tmp_path / "results",))
    for name, table in made.items():
        again = reproduce(name, "paper", store=elsewhere)
        assert again.equals(table) and again.attrs == table.attrs | dict(unchecked=["images"])  # which are gone
    assert not list((tmp_path / "runs").rglob("checkpoint.pt"))
