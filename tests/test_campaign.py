"""A campaign from Python: figures are drawn as soon as they can be, failures are told, and a budget is kept."""
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from symbreak import campaign, cli, kernels
from symbreak.cache import AbsentError
from symbreak.campaign import Campaign, carry_out, draw, run
from symbreak.config import Config
from symbreak.data import load as load_source
from symbreak.engines import Engine
from symbreak.experiments import Request
from symbreak.figures import FigureFiles
from symbreak.plans import Planned
from symbreak.runs import Store


class Figures:
    """Figures `a` to `d` are made of one finished run each, `slow` is not finished yet, `m` is measured."""

    def __init__(self, folder, monkeypatch):
        self.store, self.measured, self.made = Store(folder), False, []
        small = dict(train_size=64, test_size=50, depth=7, width=1)
        done, slow = Config(epochs=1, **small), Config(epochs=2, **small)
        self.store.train(done)
        self.planned = {"slow": [Planned("x", slow)], **{name: [Planned("x", done)] for name in "abcd"}, "m": []}
        monkeypatch.setattr(campaign, "plan", self.planned.get)
        monkeypatch.setattr(campaign, "is_complete", lambda request, store: self.measured)
        monkeypatch.setattr(campaign, "reproduce", self.reproduce)
        monkeypatch.setattr(campaign, "make_figure", self.make)
        monkeypatch.setattr(Campaign, "collect", self.collect)
        monkeypatch.setattr(Campaign, "files", lambda *_: None)

    def collect(self, name):
        table = pd.DataFrame()
        table.attrs["missing"] = sum(self.store.find(p.config) is None for p in self.planned[name])
        return table

    def reproduce(self, *_): self.measured = True

    def make(self, notebook, request, table, files, store, say):
        self.made.append(notebook)
        if notebook == "b": raise ValueError("b cannot be drawn")
        time.sleep(0.2)

    def run(self, *names, deadline=None, engine=None):
        class Request(str):  # a request is only handed through
            profile = device = data = name = None
        return carry_out(Campaign({n: Request(n) for n in names}, self.store, workers=1, deadline=deadline,
                                  engine=engine),
                         {n: n for n in names})


def test_a_figure_is_made_when_its_runs_are_there_whatever_comes_before_it(tmp_path, monkeypatch):
    figures = Figures(tmp_path, monkeypatch)
    tables = figures.run("slow", "a", "m")
    assert figures.made == ["m", "a", "slow"] and list(tables) == ["slow", "a", "m"]


def test_a_notebook_that_fails_is_told_at_once_and_costs_no_training(tmp_path, monkeypatch, capsys):
    figures = Figures(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="b cannot be drawn"): figures.run("a", "b", "slow", "c")
    assert figures.made == ["a", "b", "c", "slow"]
    assert capsys.readouterr().err.count("failed: b cannot be drawn") == 1


def test_what_needs_no_images_is_drawn_where_they_are_absent(tmp_path, monkeypatch):
    figures = Figures(tmp_path, monkeypatch)
    absent = replace(figures.planned["slow"][0].config, data=f"folder:{tmp_path / 'images'}")
    figures.planned["slow"] = [Planned("x", absent)]
    def fail_at_once(*_): load_source(absent.data)
    monkeypatch.setattr(campaign, "execute", fail_at_once)  # before any figure is looked at
    with pytest.raises(AbsentError, match="images: no such folder.*without these images not finished: slow"):
        figures.run("slow", "a", "m", "c")
    assert sorted(figures.made) == ["a", "c", "m"]


def test_what_a_notebook_asserts_counts_for_the_images_and_the_profile_that_it_was_written_for(tmp_path, monkeypatch):
    tolerated = []
    monkeypatch.setattr(kernels, "execute_notebook", lambda *args: tolerated.append(args[-1]) or "")
    monkeypatch.setattr(FigureFiles, "is_whole", lambda self: True)
    for asked in (dict(), dict(data="digits"), dict(data="mnist"), dict(profile="quick+width=1")):
        draw(tmp_path / "x.ipynb", Request("fig04", **asked), FigureFiles("fig04", tmp_path))
    assert tolerated == ["", "", "AssertionError", "AssertionError"]


def test_too_few_images_are_told_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("SYMBREAK_CACHE", str(tmp_path / "cache"))
    for place, count in (("train", 400), ("test", 50)):
        for name in "ab":
            (tmp_path / place / name).mkdir(parents=True)
            for i in range(count): Image.new("L", (8, 8), i % 256).save(tmp_path / place / name / f"{i}.png")
    asked = dict(data=f"folder:{tmp_path}", runs=tmp_path / "runs", out=tmp_path / "out")
    with pytest.raises(ValueError, match="^fig11: train_size: 1280; allowed: 1..800; .* allowed: fig02 fig03$"):
        run(["fig02", "fig11", "fig03"], **asked)
    with pytest.raises(ValueError, match="^fig11: train_size: 1280; allowed: 1..800$"): run(["fig11"], **asked)
    with pytest.raises(ValueError, match="^fig06: train_size: 5000; .*; fig01, fig04: train_size: 10000; allowed: 1.."):
        run(["fig06", "fig01", "fig04"], "cifar", **asked)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "out").exists()


def test_nothing_is_measured_or_trained_when_the_budget_is_spent(tmp_path, monkeypatch):
    figures = Figures(tmp_path, monkeypatch)
    tables = figures.run("slow", "a", "m", deadline=time.monotonic())
    assert figures.made == ["a"] and not figures.measured and tables["slow"].attrs["missing"] == 1
    figures.measured = True  # by an earlier call
    figures.run("m", deadline=time.monotonic())
    assert figures.made == ["a", "m"]


def reproduce(folder, **where):
    command = [sys.executable, "-m", "symbreak", "reproduce", "fig02", "--runs", folder / "runs", "--out", folder]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                            **where)


def test_two_commands_draw_a_figure_once_wherever_they_stand(tmp_path):
    both = [reproduce(tmp_path, cwd=tmp_path) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("fig02: executing" in text for text in said) == 1 and sum("up to date" in text for text in said) == 1
    assert {path.name for path in (tmp_path / "quick").glob("*.*")} >= {"fig02.png", "fig02.ipynb", "fig02.csv"}
    assert not list(tmp_path.rglob("*-ipc-*")) and not list(tmp_path.rglob("kernel*"))


def test_an_interrupt_ends_a_notebook_and_leaves_nothing(tmp_path):
    with tempfile.TemporaryDirectory() as short:
        process = reproduce(tmp_path, env={**os.environ, "TMPDIR": short})
        def listens(): return any(file.startswith("kernel") for *_, files in os.walk(short) for file in files)
        while not listens() and process.poll() is None: time.sleep(0.01)  # glob fails where folders come and go
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 130 and "interrupted; the same command goes on" in said and "Trace" not in said
        assert "failed" not in said
        assert time.monotonic() - began < 20 and not list(Path(short).glob("symbreak-*"))
    assert [path.name for path in (tmp_path / "quick").iterdir()] == [".half-fig02.lock"]


def test_a_finished_store_may_be_read_only(tmp_path, monkeypatch):
    checked, written = [], campaign.write_json
    monkeypatch.setattr(campaign, "check_writable", lambda folder, option: checked.append(option))
    (tmp_path / "out" / "quick").mkdir(parents=True)
    def refused(path, value):
        if path.parent.name == "made": raise OSError("Read-only file system")
        written(path, value)
    monkeypatch.setattr(campaign, "write_json", refused)
    for _ in range(2): run(["fig02"], runs=tmp_path / "runs", out=tmp_path / "out")
    assert checked == ["--runs", "--out", "--out"] and (tmp_path / "out" / "quick" / "fig02.png").exists()


def test_run_pauses_and_leaves_the_environment_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("SYMBREAK_RUNS", raising=False)
    tables = run(["fig04"], runs=tmp_path / "runs", out=tmp_path / "out", budget_min=0)
    assert tables["fig04"].attrs["missing"] > 0 and not list(tmp_path.rglob("*.png"))
    assert "SYMBREAK_RUNS" not in campaign.os.environ


def test_the_command_is_the_same_call(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(campaign, "run", lambda *args: asked.append(args) or {"fig01": _flat()})
    assert cli.main(["reproduce", "fig01", "--out", str(tmp_path), "--budget-min", "5"]) == 0
    assert asked == [(("fig01",), "quick", "auto", None, None, str(tmp_path), None, 5., None)]


def test_a_campaign_trains_its_runs_as_jobs(tmp_path, monkeypatch):
    figures, engine = Figures(tmp_path, monkeypatch), Engine("debug")
    assert figures.run("slow", "a", engine=engine)["slow"].attrs["missing"] == 0 and figures.made == ["a", "slow"]
    [broken] = figures.planned["bad"] = [Planned("x", replace(figures.planned["slow"][0].config, data="nowhere"))]
    with pytest.raises(RuntimeError, match=f"run: .* failed: .*unknown 'nowhere'.*{broken.config.hash}.error.txt"):
        figures.run("bad", "c", engine=engine)


def test_on_slurm_there_is_no_budget(tmp_path):
    with pytest.raises(ValueError, match="budget_min: 5 on Slurm"):
        run(["fig04"], runs=tmp_path, budget_min=5, engine=Engine("slurm"))


def test_the_command_makes_an_engine(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(campaign, "run", lambda *args: asked.append(args[-1]) or {"fig01": _flat()})
    monkeypatch.setattr("symbreak.sweep.check_engine", lambda engine: None)  # there may be no Slurm
    cli.main(["reproduce", "fig01", "--engine", "slurm", "--workers", "9", "--timeout-min", "90", "--slurm", "mem=8GB"])
    assert asked == [Engine("slurm", at_once=9, timeout_min=90., options=dict(mem="8GB"))]


def _flat():
    table = pd.DataFrame([dict(seed=s, distinct_at_init=q, noise=n, test_accuracy=0.5)
                          for s in range(3) for q in (1, 128) for n in (0., .01)])
    table.attrs["missing"] = 0
    return table


def test_strict_fails_for_a_claim_that_is_not_reproduced(capsys):
    assert cli.print_claims({"fig01": _flat()}, "quick", strict=True) == 1
    assert cli.print_claims({"fig01": _flat()}, "quick", strict=False) == 0
    assert "not reproduced" in capsys.readouterr().out
