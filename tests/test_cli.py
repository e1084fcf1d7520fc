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

from symbreak import cli
from symbreak.config import Config
from symbreak.experiments import Request, plan
from symbreak.headlines import committed, committed_table
from symbreak.records import RunFiles
from symbreak.terminal import print_table
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


@pytest.mark.parametrize("module", ["symbreak", "symbreak.cli"])
def test_python_runs_the_package_as_the_command(module):
    done = subprocess.run([sys.executable, "-m", module, "frobnicate"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("symbreak: error: verb: 'frobnicate'; allowed: reproduce")


@pytest.mark.parametrize("argv, named", [
    (["frobnicate"], "verb: 'frobnicate'; allowed: reproduce"),
    (["reproduce", "fig99"], "experiment: 'fig99'; allowed: fig01"),
    (["reproduce", "--profile", "huge"], "profile: 'huge'; allowed: quick, ladder, cifar, full, paper, sprint"),
    (["reproduce", "--device", "tpu"], "device: 'tpu'; allowed: auto, cpu, cuda"),
    (["reproduce", "--workers", "0"], "workers: 0; allowed: at least 1"),
    (["reproduce", "--budget-min", "nan"], "budget_min: nan; allowed: at least 0"),
    (["train", "--data", "imagenet"], "source: unknown 'imagenet'; allowed: digits"),
    (["plan", "quick", "--data", "imagenet"], "source: unknown 'imagenet'; allowed: digits"),
    (["report", "--data", "imagenet"], "source: unknown 'imagenet'; allowed: digits"),
    (["reproduce", "fig04", "--data", "imagenet"], "source: unknown 'imagenet'; allowed: digits"),
    (["train", "--init", "hee"], "init: 'hee'; allowed: identical, he"),
    (["train", "--depth", "8"], "depth: 8; allowed: 3n + 4"),
    (["train", "--data", "folder:/nowhere/at/all"], "/nowhere/at/all"),
    (["train", "--wdth", "1"], "Unrecognized options: --wdth, 1; perhaps you meant --width; see symbreak train --help"),
    (["train", "--net", "LeakyNet", "--init", "he"], "unknown letter 'e' in 'he'; allowed: identical, or i (identity)"),
    (["train", "--width", "two"], "error: --width: 'two'; allowed: int; see"),
    (["train", "--lr", "x"], "error: --lr: 'x'; allowed: float; see"),
    (["train", "--train-size", "1.5"], "error: --train-size: '1.5'; allowed: int or None; see"),
    (["reproduce", "--budget-min", "x"], "error: --budget-min: 'x'; allowed: float or None; see"),
    (["train", "--skip", "no"], "error: --skip: 'no'; allowed: 'linear', 'rectified'; see"),
    (["reproduce", "--workers", "many"], "error: --workers: 'many'; allowed: int or None; see"),
    (["report", "--nothing"], "Unrecognized options: --nothing"),
    (["sweep", "--grid", "seed=5..1"], "grid: '5..1' of seed; allowed: at most 100,000 values, in rising order"),
])
def test_bad_arguments(capsys, tmp_path, monkeypatch, argv, named):
    monkeypatch.setenv("SYMBREAK_RUNS", str(tmp_path))
    assert named in fails(capsys, *argv)


@pytest.mark.parametrize("verb, said", [("train", "; the same command goes on after the last whole epoch"),
                                        ("sweep", "; the same command goes on after the last whole epoch"),
                                        ("reproduce", "; the same command goes on after the last whole epoch"),
                                        ("probe", ""), ("check", ""), ("report", ""), ("plan", ""), ("list", "")])
def test_sigterm_is_heard_while_a_verb_is_imported(verb, said):
    code = ("import signal, sys; from symbreak import cli; "
            "cli.VERBS[sys.argv[1]] = lambda: signal.raise_signal(signal.SIGTERM); sys.exit(cli.main())")
    done = subprocess.run([sys.executable, "-c", code, verb], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, f"symbreak: interrupted{said}\n")


GRID = ["sweep", *SMALL, "--grid", "seed=0", "--engine", "debug", "--runs", "runs"]
LAYER = ["probe", "--from-model", "torch.nn:Linear", "--options", "in_features=3", "out_features=3", "--input", "3",
         "--batches", "4", "--reruns", "1", "--processes", "0"]


@pytest.mark.parametrize("argv, code, written, unbuffered", [
    (["--help"], 0, [], ""), (["help", "list"], 0, [], ""), (["--version"], 0, [], ""), (["--version"], 0, [], "1"),
    (["list"], 0, [], ""), (["plan", "quick", "fig11", "--no-stopwatch"], 0, [], "1"), (["frobnicate"], 2, [], ""),
    ([*GRID, "--out", "o.csv"], 0, ["o.csv"], ""),
    ([*LAYER, "--json", "p.json", "--csv", "p.csv"], 0, ["p.json", "p.csv"], "")])
def test_a_reader_that_has_left_is_no_error_and_takes_no_file_away(tmp_path, argv, code, written, unbuffered):
    process = subprocess.Popen([sys.executable, "-m", "symbreak", *argv], cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True,
                               env=os.environ | dict(PYTHONUNBUFFERED=unbuffered))
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(timeout=120) == code and "BrokenPipe" not in said and "Traceback" not in said
    assert {path.name for path in tmp_path.iterdir()} - {"runs"} == set(written)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_a_full_disk_behind_standard_output_takes_no_file_away(tmp_path):
    asked = ([*GRID, "--out", "o.csv"], {"o.csv"}), ([*LAYER, "--json", "p.json"], {"p.json"}), (["--version"], set())
    for argv, written in asked:
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, "-m", "symbreak", *argv], stdout=full, stderr=subprocess.PIPE,
                                  text=True, cwd=tmp_path, env=os.environ | dict(PYTHONUNBUFFERED=""))
        assert done.returncode == 2 and done.stderr.endswith("No space left on device\n")
        assert "Traceback" not in done.stderr and written <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("error", [
    MemoryError("no room"), RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                 "to allocate 9 bytes.\nError code 12 (Cannot allocate memory)")])
def test_too_little_memory_names_the_options_that_want_less(capsys, tmp_path, monkeypatch, error):
    def refuse(*_, **__): raise error
    monkeypatch.setattr("symbreak.training.train", refuse)
    said = fails(capsys, "train", *SMALL, "--folder", tmp_path / "run")
    assert str(error).split(".")[0] in said
    assert said.endswith("; memory is short: choose a smaller width, depth or batch size")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu(capsys):
    assert "device: 'cuda', but torch sees 0 CUDA devices" in fails(capsys, "train", "--device", "cuda")


def test_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    error = fails(capsys, "reproduce", "fig11", "--runs", tmp_path / "file" / "runs")
    assert "cannot write to" in error and "--runs" in error


@pytest.mark.parametrize("argv, option", [
    (["reproduce", "fig11", "--runs", ""], "runs"), (["reproduce", "fig11", "--out", ""], "out"),
    (["train", "--folder", ""], "folder"), (["report", "--out", ""], "out"), (["report", "--figures", ""], "figures")])
def test_the_empty_path_is_not_the_working_directory(capsys, tmp_path, monkeypatch, argv, option):
    monkeypatch.setenv("SYMBREAK_RUNS", str(tmp_path))
    assert f"{option}: ''; allowed: the name of a folder" in fails(capsys, *argv)


def test_a_tilde_is_home_wherever_a_path_may_stand(capsys, tmp_path, monkeypatch):
    (tmp_path / "home" / "images").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    run(capsys, "train", *SMALL, "--folder=~/run")
    run(capsys, "reproduce", "fig04", "--budget-min=0", "--runs=~/runs", "--out=~/figures")
    monkeypatch.setenv("SYMBREAK_RUNS", "~/more")
    run(capsys, "train", *SMALL)
    assert str(tmp_path / "home" / "images") in fails(capsys, "train", "--data=folder:~/images", "--folder=~/run2")
    assert run(capsys, *LAYER, "--json=~/p.json", "--csv=~/p.csv")[0] == 0
    assert run(capsys, "probe", "--compare", "~/p.json", "~/p.json")[0] == 0
    torch.save(torch.ones(2, 3), tmp_path / "home" / "batch.pt")
    check = ["check", "torch.nn:Linear", "--options", "in_features=3", "out_features=3", "--no-probe"]
    assert run(capsys, *check, "--batch=~/batch.pt")[0] == 0
    left = {path.name for path in (tmp_path / "home").iterdir()}
    assert left >= {"run", "runs", "figures", "more", "p.json", "p.csv"}
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_without_a_home_the_way_out_is_named(capsys, tmp_path, monkeypatch):
    def homeless(self):
        if str(self).startswith("~"): raise RuntimeError("Could not determine home directory.")
        return self
    monkeypatch.setattr(Path, "expanduser", homeless)
    for name in ("SYMBREAK_CACHE", "XDG_CACHE_HOME"): monkeypatch.delenv(name, raising=False)
    assert "HOME: '~', but no such home is known; set HOME" in fails(capsys, "reproduce", "fig02", "--out", tmp_path)
    assert "SYMBREAK_CACHE: '~/.cache/symbreak', but no" in fails(capsys, "train", "--data=folder:x")
    assert run(capsys, "train", *SMALL, "--folder", tmp_path / "run")[0] == 0


def test_full_disk(capsys, tmp_path, monkeypatch):
    def full(self, data): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(Path, "write_bytes", full)
    error = fails(capsys, "reproduce", "fig11", "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    assert "No space left on device" in error
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob(".write-test*"))


def test_disk_that_fills_up_while_training(tmp_path, monkeypatch):
    def full(state, f): f.write(b"half"); raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(torch, "save", full)
    said = "cannot write .*checkpoint.pt .No space left on device.; make room or choose another folder"
    with pytest.raises(OSError, match=said): train(CONFIG, tmp_path / "run", checkpoint_every_s=0)
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


@pytest.mark.parametrize("net", ["ConstNet", "LeakyNet", "UniqueFeatureMLP"])
def test_every_network_trains_by_its_name_alone(capsys, tmp_path, net):
    code, printed = run(capsys, "train", "--net", net, "--epochs=1", "--train-size=100", "--folder", tmp_path / "run")
    assert code == 0 and "asymmetry            0\n" in printed.out and "distinct_features    1\n" in printed.out
    assert "Nothing broke the symmetry" in printed.out and "    --weight-noise 1e-3\n" in printed.out
    for option in ("--dropout", "--reduction atomic"): assert (option in printed.out) == (net != "UniqueFeatureMLP")


def test_train_and_again(capsys, tmp_path):
    code, printed = run(capsys, "train", *SMALL, "--folder", tmp_path / "run")
    assert code == 0 and printed.out.startswith("finished after 2 epochs")
    code, again = run(capsys, "train", *SMALL, "--folder", tmp_path / "run")
    assert code == 0 and again.out == printed.out  # read, not trained


def test_diverged_training_is_a_failure(capsys, tmp_path):
    code, printed = run(capsys, "train", *SMALL, "--init", "he", "--lr", "1e30", "--folder", tmp_path / "run")
    assert code == 1 and printed.out.startswith("diverged")


def test_a_terminal_without_unicode_still_gets_its_report(tmp_path):
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "SYMBREAK_RUNS": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "symbreak", "report", "--profile", "cifar", "--out", tmp_path / "out"],
                          capture_output=True, env=env)
    assert done.returncode == 0 and (tmp_path / "out" / "index.html").exists(), done.stderr
    assert b" % ? " in done.stdout and b"Report: " in done.stdout  # +- is no ASCII


def test_a_run_that_is_finished_is_read_where_nothing_can_be_written(capsys, tmp_path, monkeypatch):
    first = run(capsys, "train", *SMALL, "--folder", tmp_path / "run")
    def refused(*_): raise OSError("read-only")
    monkeypatch.setattr("symbreak.training.check_writable", refused)
    assert run(capsys, "train", *SMALL, "--folder", tmp_path / "run") == first


def test_reproduce_says_which_verdicts_are_not_those_that_are_committed(capsys, monkeypatch):
    table = committed_table("fig03", "quick", committed)
    deepest = (table.network == "ConstNet") & (table.depth == table.depth.max())
    for mine, said in ((table, "4 of 4 verdicts are those that are committed"),
                       (table.assign(gradient_norm=table.gradient_norm.where(~deepest, 9.)), "3 of 4 verdicts")):
        monkeypatch.setattr("symbreak.campaign.run", lambda *_, mine=mine: {"fig03": mine})
        code, printed = run(capsys, "reproduce", "fig03")
        assert code == 0 and said in printed.out and ("; the others:\n" in printed.out) == (mine is not table)
    last = printed.out.splitlines()[-1]
    assert last.startswith("  fig03, ConstNet: gradient norm does not") and last.endswith("asked: at most 1.01")
    assert "verdicts are" not in run(capsys, "reproduce", "fig03", "--data", "mnist")[1].out  # of other images
    assert "verdicts are" not in run(capsys, "reproduce", "fig03", "--set", "width=1")[1].out  # of another network


def test_list_and_report(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SYMBREAK_RUNS", str(tmp_path))
    code, printed = run(capsys, "list")
    assert code == 0 and "fig04" in printed.out and f"0/{len(plan(Request('fig04')))}" in printed.out
    code, printed = run(capsys, "report", "--profile", "quick", "--strict", "--out", tmp_path / "report")
    assert code == 0 and "not tested" in printed.out  # untested is not failed


def test_list_names_what_is_damaged_and_goes_on(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SYMBREAK_RUNS", str(tmp_path))
    record = RunFiles(tmp_path / plan(Request("fig05"))[0].config.hash).record  # of fig04 too, and named once
    record.parent.mkdir()
    record.write_text("null")
    assert cli.main(["list"]) == 0
    said = capsys.readouterr()
    assert "abl04" in said.out and said.err.count(f"symbreak: not counted: {record}: damaged") == 1


def test_train_goes_on_with_more_epochs_and_leaves_the_shorter_run(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SYMBREAK_RUNS", str(tmp_path / "runs"))
    options = [*SMALL, "--schedule", "constant"]
    for folder in ([], ["--folder", str(tmp_path / "own")]):
        for epochs in ("1", "2"): assert cli.main(["train", *options, "--epochs", epochs, *folder]) == 0
        assert "going on after epoch 1 of 2" in capsys.readouterr().err
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.parametrize("asked", ["help", "--version"])
def test_a_reader_that_has_seen_enough_is_no_error(asked):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "symbreak", asked], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert "Traceback" not in done.stderr


def test_brackets_in_a_table_are_no_markup(capsys):
    print_table(pd.DataFrame({"last words": ["[/pair.cc:534] Connection closed"], "data": ["folder:x[b]"]}), "Two")
    said = capsys.readouterr().out
    assert "[/pair.cc:534] Connection closed" in said and "folder:x[b]" in said


def test_what_runs_of_a_sweep_share_need_not_be_valid_without_the_grid(capsys, tmp_path):
    options = "--depth 7 --width 1 --epochs 1 --train-size 100 --test-size 100 --copies 3 --quotient".split()
    assert cli.main(["sweep", *options, "--grid", "weight_noise=1e-3,1e-6", "--engine", "debug",
                     "--runs", f"{tmp_path}/runs"]) == 0
    assert "2 done, 0 failed" in capsys.readouterr().err
