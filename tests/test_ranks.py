"""One run on several processes: what it computes, who writes, and how it ends."""
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from symbreak import ranks
from symbreak.cli import main
from symbreak.config import Config
from symbreak.costs import stopwatch
from symbreak.ranks import roll_call
from symbreak.outcome import Run
from symbreak.records import RunFiles, read_checkpoint, read_lines
from symbreak.runs import Store
from symbreak.team import PartDropout, SharedBatchNorm2d
from symbreak.train import train

SMALL = Config(depth=7, width=1, epochs=2, train_size=201, test_size=100, batch_size=50, lr=0.05, device="cpu")
MIXED = replace(SMALL, precision="float64", init="he", dropout=0.1, input_noise=0.1, gradient_noise=1e-3,
                augment="crop")


@cache
def trained(config): return train(config)


def assert_close(run, other, rtol):
    ours, theirs = (torch.cat([v.flatten().double() for v in r.model.state_dict().values()]) for r in (run, other))
    assert 0 < theirs.norm() and (ours - theirs).norm() <= rtol * theirs.norm()


@pytest.mark.parametrize("count", [2, 3])
def test_ordered_keeps_the_symmetry_to_the_bit_and_equals_one_process(count):
    run = trained(replace(SMALL, processes=count, allreduce="ordered"))
    assert run.history.asymmetry.eq(0).all() and run.history.distinct_features.eq(1).all()
    assert_close(run, trained(SMALL), 1e-6)  # after ten steps in float32
    assert run.history.test_accuracy.iloc[-1] == pytest.approx(trained(SMALL).history.test_accuracy.iloc[-1], abs=0.02)


def test_two_terms_commute_and_three_do_not():
    run, two = trained(replace(SMALL, processes=3)), trained(replace(SMALL, processes=2))
    assert two.history.asymmetry.eq(0).all()
    assert 1e-12 < run.history.asymmetry.iloc[-1] < 1e-6 and run.history.distinct_features.iloc[-1] > 1
    assert_close(run, trained(SMALL), 1e-6)


@pytest.mark.parametrize("allreduce", ["default", "ordered"])
def test_all_that_is_drawn_is_drawn_as_by_one_process(allreduce):
    run, one = trained(replace(MIXED, processes=3, allreduce=allreduce)), trained(MIXED)
    assert_close(run, one, 1e-13)
    assert [row["train_accuracy"] for row in run.metrics[1:]] == [row["train_accuracy"] for row in one.metrics[1:]]
    assert run.record["digests"]["step_0"] == one.record["digests"]["step_0"]
    assert not any(isinstance(layer, (SharedBatchNorm2d, PartDropout)) for layer in run.model.modules())


def test_fewer_images_than_processes():
    config = replace(SMALL, precision="float64", train_size=11, batch_size=2, epochs=1)  # the last batch is one image
    assert_close(train(replace(config, processes=3)), train(config), 1e-13)


def test_the_other_network_with_batch_norm():
    config = replace(SMALL, precision="float64", epochs=1, net="LeakyNet", init="1_i11", lr=0.01)
    assert_close(train(replace(config, processes=2)), train(config), 1e-13)


def test_a_run_that_is_paused_goes_on_to_the_same_bits_with_as_many_processes(tmp_path):
    config = replace(MIXED, processes=3)
    paused = train(config, tmp_path / "run", stop=lambda: True)
    assert paused.record["status"] == "paused" and RunFiles(tmp_path / "run").checkpoint.exists()
    with pytest.raises(ValueError, match="processes is 3, asked for 2"):
        train(replace(config, processes=2), tmp_path / "run")
    run, straight = train(config, tmp_path / "run"), trained(config)  # which is a rerun, too
    assert run.record["digests"] == straight.record["digests"] and run.metrics == straight.metrics
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", "config.json", "metrics.jsonl", "model.pt",
                                                                   "record.json"]


def test_what_is_trained_is_an_ordinary_network():
    model = trained(replace(MIXED, processes=3)).model.train()
    model(torch.randn(4, 1, 8, 8, dtype=torch.float64)).sum().backward()
    assert model.stem.weight.grad.any()


def torchrun(count, *options, **kwargs):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "symbreak.cli",
               "train", "--device=cpu", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def options_of(config):
    return [f"--{name.replace('_', '-')}={value}" for name, value in config.changed.items()]


def test_torchrun_trains_one_run_of_which_rank_0_speaks(tmp_path):
    process = torchrun(2, *options_of(SMALL), cwd=tmp_path, env={**os.environ, "SYMBREAK_RUNS": str(tmp_path / "runs")})
    told, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert re.findall("^finished after 2 epochs", told, re.M) == ["finished after 2 epochs"]
    config = replace(SMALL, processes=2)  # which torchrun says, no option
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == [config.hash]
    found, here = Store(tmp_path / "runs").load(config), trained(config)
    assert found.metrics == here.metrics and found.record["digests"] == here.record["digests"]


@pytest.mark.parametrize("option, words", [
    ("--processes=3", "processes: 3, but 2 were started together; allowed here: 2"),
    ("--quotient", "quotient: True with processes=2"), ("--reduction=row", "reduction: 'row' with processes=2")])
def test_what_torchrun_cannot_do_is_refused(tmp_path, monkeypatch, capsys, option, words):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", option, "--device=cpu", f"--folder={tmp_path / 'run'}"]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()


def wait_for(files, lines, process):
    while len(read_lines(files.metrics)) < lines and process.poll() is None: time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_torchrun_that_is_interrupted_leaves_a_checkpoint_and_no_process(tmp_path, number):
    config, files = replace(SMALL, epochs=10_000), RunFiles(tmp_path / "run")
    process = torchrun(2, *options_of(config), f"--folder={tmp_path / 'run'}")
    wait_for(files, 4, process)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]  # ends when none is left that could write
    done = int(re.search(r"symbreak: interrupted; the same command goes on after epoch (\d+) of 10000", errors)[1])
    assert done >= 2 and read_checkpoint(files.checkpoint)["epoch"] == done
    assert errors.count("symbreak: ") == 1


CODE = "import sys; from symbreak.train import *; train(Config.from_dict(eval(sys.argv[2])), sys.argv[1])"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_that_rank_0_has_started_end_with_it_and_leave_nothing_for_good(tmp_path, monkeypatch, number):
    config, files = replace(SMALL, epochs=10_000, processes=3), RunFiles(tmp_path / "run")
    command = [sys.executable, "-c", CODE, str(tmp_path / "run"), repr(config.changed)]
    with tempfile.TemporaryDirectory() as temporary:  # with a short path
        monkeypatch.setattr(tempfile, "tempdir", temporary)
        def meetings(): return list(Path(temporary).glob("symbreak-*"))
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True,
                                   env={**os.environ, "TMPDIR": temporary})
        wait_for(files, 4, process)
        assert len(meetings()) == 1
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)  # Ctrl-C reaches all of them
        errors = process.communicate(timeout=60)[1]
        if number == signal.SIGKILL: roll_call(Config(processes=2))  # the next one takes away what is left
        assert meetings() == []
    assert files.checkpoint.exists()
    if number == signal.SIGINT: assert re.search(r"KeyboardInterrupt: after epoch \d+ of 10000\n$", errors)


def test_a_process_that_is_killed_ends_the_run_with_words_and_a_checkpoint(tmp_path, monkeypatch):
    config, started, start = replace(SMALL, epochs=10_000, processes=3), [], ranks.start_processes

    def noted(*args):
        new = start(*args)
        started.extend(new)
        return new

    monkeypatch.setattr(ranks, "start_processes", noted)
    with pytest.raises(ConnectionError, match="processes: another one of this run has ended"):
        train(config, tmp_path / "run", report=lambda epoch, _: epoch == 3 and started[1].kill())
    assert read_checkpoint(RunFiles(tmp_path / "run").checkpoint)["epoch"] >= 2
    assert [process.poll() is None for process in started] == [False, False]
    assert len(set(roll_call(Config(processes=2)))) == 2  # this process can begin anew


def test_a_process_of_several_trains_no_run_of_its_own(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="processes: 1, but 2 were started together; allowed here: 2"):
        train(SMALL)


def test_a_stopwatch_needs_no_others():
    assert stopwatch(replace(SMALL, processes=3), 0.1) > 1e6


def test_old_runs_have_one_process(tmp_path):
    train(replace(SMALL, epochs=0), tmp_path / "run")
    config = Run.load(tmp_path / "run").config
    assert (config.processes, config.allreduce) == (1, "default")
    assert replace(config, processes=2).hash != config.hash == replace(SMALL, epochs=0).hash
