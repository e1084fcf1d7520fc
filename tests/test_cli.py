"""The command as a user meets it: one line of error that names the thing, and its exit code."""
import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from symbreak import cli, experiments
from symbreak.config import Config
from symbreak.experiments import plan
from symbreak.runs import Store
from symbreak.train import train

SMALL = ["--depth", "7", "--width", "1", "--epochs", "2", "--train-size", "200", "--test-size", "100"]
CONFIG = Config(depth=7, width=1, epochs=2, train_size=200, test_size=100)


def run(capsys, *argv):
    code = cli.main([str(a) for a in argv])
    return code, capsys.readouterr()


def fails(capsys, *argv):
    code, printed = run(capsys, *argv)
    error = printed.err.strip()
    assert code == 2 and error.startswith("symbreak: error: ") and "\n" not in error, printed
    return error


def test_help_is_fast():
    start = time.perf_counter()
    done = subprocess.run([Path(sys.executable).parent / "symbreak", "--help"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and "reproduce" in done.stdout
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("argv, named", [
    (["frobnicate"], "verb: 'frobnicate'; allowed: reproduce"),
    (["reproduce", "fig99"], "experiment: 'fig99'; allowed: fig01"),
    (["reproduce", "--profile", "huge"], "profile: 'huge'; allowed: quick, cifar, paper"),
    (["reproduce", "--device", "tpu"], "device: 'tpu'; allowed: auto, cpu, cuda"),
    (["reproduce", "--workers", "0"], "workers: 0; allowed: at least 1"),
    (["train", "--data", "imagenet"], "'imagenet'; allowed: digits"),
    (["train", "--init", "hee"], "init: 'hee'; allowed: identical, he"),
    (["train", "--depth", "8"], "depth: 8; allowed: 3n + 4"),
    (["train", "--data", "folder:/nowhere/at/all"], "/nowhere/at/all"),
    (["train", "--wdth", "1"], "Unrecognized options: --wdth, 1; perhaps you meant --width; see symbreak train --help"),
    (["train", "--width", "two"], "--width: invalid literal for int() with base 10: 'two'"),
    (["train", "--skip", "no"], "invalid choice 'no' for argument '--skip'. Expected one of ('linear', 'rectified')"),
    (["reproduce", "--workers", "many"], "--workers: no type matching {None}|INT could be instantiated from ['many']"),
    (["report", "--nothing"], "Unrecognized options: --nothing"),
])
def test_bad_arguments(capsys, tmp_path, monkeypatch, argv, named):
    monkeypatch.setenv("SYMBREAK_RUNS", str(tmp_path))
    assert named in fails(capsys, *argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu(capsys):
    assert "device: 'cuda', but torch sees 0 CUDA devices" in fails(capsys, "train", "--device", "cuda")


def test_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    error = fails(capsys, "reproduce", "fig11", "--runs", tmp_path / "file" / "runs")
    assert "cannot write to" in error and "--runs" in error


def test_full_disk(capsys, tmp_path, monkeypatch):
    def full(self, data): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(Path, "write_bytes", full)
    error = fails(capsys, "reproduce", "fig11", "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    assert "No space left on device" in error
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob(".write-test*"))


def test_disk_that_fills_up_while_training(tmp_path, monkeypatch):
    def full(state, f): f.write(b"half"); raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot write .*checkpoint.pt .No space left on device.; make room or choose another folder"): train(CONFIG, tmp_path / "run", checkpoint_every_s=0)
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.name != ".lock") == ["config.json", "metrics.jsonl"]


def test_folder_of_another_configuration(capsys, tmp_path):
    train(CONFIG, tmp_path / "run")
    error = fails(capsys, "train", *SMALL, "--dropout", "0.5", "--folder", tmp_path / "run")
    assert "dropout is 0.0, asked for 0.5" in error and "use another folder or delete it" in error


def test_truncated_checkpoint(capsys, tmp_path):
    train(CONFIG, tmp_path / "run", stop=lambda: True)
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    error = fails(capsys, "train", *SMALL, "--folder", tmp_path / "run")
    assert str(checkpoint) in error and "delete it" in error


def test_config_file_that_is_not_json(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{")
    assert "cannot be read" in fails(capsys, "train", *SMALL, "--folder", tmp_path / "run")


def test_train_and_again(capsys, tmp_path):
    code, printed = run(capsys, "train", *SMALL, "--folder", tmp_path / "run")
    assert code == 0 and printed.out.startswith("finished after 2 epochs")
    code, again = run(capsys, "train", *SMALL, "--folder", tmp_path / "run")
    assert code == 0 and again.out == printed.out  # read, not trained


def test_diverged_training_is_a_failure(capsys, tmp_path):
    code, printed = run(capsys, "train", *SMALL, "--init", "he", "--lr", "1e30", "--folder", tmp_path / "run")
    assert code == 1 and printed.out.startswith("diverged")


def test_list_and_report(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SYMBREAK_RUNS", str(tmp_path))
    code, printed = run(capsys, "list")
    assert code == 0 and "fig04" in printed.out and f"0/{len(plan('fig04'))}" in printed.out
    code, printed = run(capsys, "report", "--profile", "quick", "--strict", "--out", tmp_path / "report")
    assert code == 0 and "not tested" in printed.out  # untested is not failed


def test_strict_fails_for_a_claim_that_is_not_reproduced(capsys, monkeypatch):
    flat = pd.DataFrame([dict(seed=s, distinct_at_init=q, noise=n, test_accuracy=0.5) for s in range(3) for q in (1, 8) for n in (0, .01)])
    flat.attrs["missing"] = 0
    assert cli.print_claims({"fig01": flat}, "quick", strict=True) == 1
    assert cli.print_claims({"fig01": flat}, "quick", strict=False) == 0
    assert "not reproduced" in capsys.readouterr().out


class Figures:
    """Stands in for the registry: figures `a` to `d` are made of one finished run each, `slow` is not finished yet, `m` is measured."""

    def __init__(self, folder, monkeypatch, measured=False):
        self.store, self.measured, self.made = Store(folder), measured, []
        done, slow = Config(epochs=1, train_size=64, test_size=50, depth=7, width=1), Config(epochs=2, train_size=64, test_size=50, depth=7, width=1)
        self.store.train(done)
        self.planned = {"slow": [("x", slow)], **{name: [("x", done)] for name in "abcd"}, "m": []}
        monkeypatch.setattr(experiments, "collect", self.collect)
        monkeypatch.setattr(experiments, "reproduce", self.reproduce)
        monkeypatch.setattr(experiments, "is_measured", lambda *_: self.measured)

    def collect(self, name, *_):
        table = pd.DataFrame()
        table.attrs["missing"] = sum(self.store.find(config) is None for _, config in self.planned[name])
        return table

    def reproduce(self, name, *_): self.measured = True

    def make(self, name, table, say):
        self.made.append(name)
        if name == "b": raise ValueError("b cannot be drawn")
        time.sleep(0.2)

    def run(self, *names, **options):
        return cli.Reproduce(**options).measure_and_train({name: self.planned[name] for name in names}, self.store, self.make)


def test_a_figure_is_made_when_its_runs_are_there_whatever_comes_before_it(tmp_path, monkeypatch):
    figures = Figures(tmp_path, monkeypatch)
    tables = figures.run("slow", "a", "m", workers=1)
    assert figures.made == ["m", "a", "slow"] and set(tables) == {"m", "a", "slow"}


def test_a_notebook_that_fails_ends_the_command_and_spares_the_rest(tmp_path, monkeypatch):
    figures = Figures(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="b cannot be drawn"): figures.run("a", "b", "c", "d")
    assert figures.made[:2] == ["a", "b"] and "d" not in figures.made


def test_nothing_is_measured_or_trained_when_the_budget_is_spent(tmp_path, monkeypatch):
    figures = Figures(tmp_path, monkeypatch)
    tables = figures.run("slow", "a", "m", budget_min=0.)
    assert figures.made == ["a"] and not figures.measured and tables["slow"].attrs["missing"] == 1
    figures.measured = True  # by an earlier call
    figures.run("m", budget_min=0.)
    assert figures.made == ["a", "m"]
