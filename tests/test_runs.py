"""What needs several processes: two at once, one that is killed, a budget."""
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from filelock import FileLock
from PIL import Image

from symbreak.config import Config
from symbreak.costs import Speed, _row
from symbreak.data import load
from symbreak.experiments import Request
from symbreak.files import home, locked, own_checkout, past_damage
from symbreak.outcome import Run
from symbreak.records import RunFiles, read_checkpoint, read_lines
from symbreak.results import archive
from symbreak.runs import Store, default_store, execute
from symbreak.train import train

TINY = Config(depth=7, width=1, epochs=4, train_size=400, test_size=100, batch_size=50, lr=0.05, dropout=0.1,
              augment="crop", gradient_ulps=1)
CODE = """
import sys, torch
from dataclasses import replace
from symbreak.config import Config
from symbreak.data import load
from symbreak.experiments import Request
from symbreak.runs import Store, execute
torch.set_num_threads(1)
if __name__ == "__main__":
    base = Config.from_dict(eval(sys.argv[2]))
    execute([replace(base, seed=s) for s in range(3)], Store(sys.argv[1]), workers=2)
"""


def start(folder, config):
    command = [sys.executable, "-c", CODE, str(folder), repr(config.changed)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def visible(folder):
    return sorted(p.name for p in folder.iterdir() if p.name != ".lock")


def test_two_processes_at_once_train_each_run_once(tmp_path):
    both = [start(tmp_path, TINY) for _ in range(2)]
    for process in both:
        assert process.wait(timeout=120) == 0, process.stderr.read()
    for seed in range(3):
        config = replace(TINY, seed=seed)
        folder = Store(tmp_path).folder(config)
        assert visible(folder) == ["config.json", "metrics.jsonl", "model.pt", "record.json"]
        assert [row["epoch"] for row in read_lines(RunFiles(folder).metrics)] == [0, 1, 2, 3, 4]
        assert Run.load(folder).record["status"] == "finished"


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    config = replace(TINY, epochs=30)
    code = ("import sys; from symbreak.train import *; "
            "train(Config.from_dict(eval(sys.argv[2])), sys.argv[1], checkpoint_every_s=0)")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run"), repr(config.changed)],
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    files, deadline = RunFiles(tmp_path / "run"), time.time() + 60
    while len(read_lines(files.metrics)) < 6 and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert files.checkpoint.exists(), "killed too late to say anything"
    resumed = train(config, tmp_path / "run")
    straight = train(config)
    assert resumed.metrics == straight.metrics
    assert resumed.record["digests"] == straight.record["digests"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_the_last_whole_epoch_and_says_so(tmp_path, number):
    config, files = replace(TINY, epochs=10_000), RunFiles(tmp_path / "run")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in config.changed.items()]
    command = [sys.executable, "-m", "symbreak", "train", f"--folder={tmp_path / 'run'}", *options]
    said = []
    for lines in (4, 7):  # by then a checkpoint holds the first epoch, no more
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
            while len(read_lines(files.metrics)) < lines and process.poll() is None: time.sleep(0.01)
            process.send_signal(number)
            said.append(process.communicate(timeout=60)[1])
        assert process.returncode == 130
    first, second = (int(re.search(r"interrupted; the same command goes on after epoch (\d+) of 10000", text)[1])
                     for text in said)
    assert first >= 2 and f"going on after epoch {first} of 10000" in said[1] and second >= 5
    assert read_checkpoint(files.checkpoint)["epoch"] == second
    assert [row["epoch"] for row in read_lines(files.metrics)][:second + 1] == list(range(second + 1))


def test_who_waits_for_a_run_says_so(tmp_path):
    store = Store(tmp_path)
    folder = store.folder(TINY)
    folder.mkdir()
    with locked(RunFiles(folder).lock, "this test"):
        process = start(tmp_path, TINY)
        assert process.stderr.readline().startswith(f"waiting for the run in {folder}: process {os.getpid()} on ")
        assert store.find(TINY) is None
    process.communicate(timeout=60)
    assert store.find(TINY)


def test_workers_save_what_they_have_when_the_parent_is_interrupted(tmp_path):
    config = replace(TINY, epochs=100_000)
    files = RunFiles(Store(tmp_path).folder(config))
    with start(tmp_path, config) as process:
        while len(read_lines(files.metrics)) < 5 and process.poll() is None: time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        try: said = process.communicate(timeout=60)[1]
        finally: process.kill()  # else a parent that waits for its workers is waited for without end
    assert said.strip().endswith("KeyboardInterrupt") and "Process Spawn" not in said
    assert read_checkpoint(files.checkpoint)["epoch"] >= 3  # the row of epoch 4 is there a moment before its checkpoint


def test_a_worker_that_is_killed_is_named_with_its_run(tmp_path):
    config, killed = replace(TINY, epochs=100_000), []

    def tick():
        if killed or not RunFiles(Store(tmp_path).folder(config)).metrics.exists(): return
        killed.extend(child.kill() or child for child in multiprocessing.active_children())
    with pytest.raises(RuntimeError, match="killed .out of memory.*epochs=100000.*fewer workers"):
        execute([config], Store(tmp_path), tick=tick)


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    config = replace(TINY, epochs=100_000)
    process = start(tmp_path, config)
    files, deadline = RunFiles(Store(tmp_path).folder(config)), time.time() + 60
    while not files.checkpoint.exists() and time.time() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert files.checkpoint.exists(), "killed too early to say anything"
    with FileLock(files.lock).acquire(timeout=20):  # a worker holds it while it trains
        pass


def test_budget_pauses_and_the_next_call_goes_on(tmp_path):
    store, configs = Store(tmp_path), [replace(TINY, seed=s) for s in range(2)]
    assert execute(configs, store, workers=2, budget_s=0) == []
    runs = execute(configs, store, workers=2)
    assert multiprocessing.active_children() == []  # workers have gone when the runs are there
    assert [run.config for run in runs] == configs


def test_a_budget_pauses_runs_that_are_under_way(tmp_path):
    store, config = Store(tmp_path), replace(TINY, epochs=10_000)
    done = [0]
    for _ in range(2):
        budget_s = 4
        while store.epochs_done(config) == done[-1]:  # on a busy machine a worker takes long to begin
            budget_s *= 2
            assert budget_s < 300
            assert execute([config], store, workers=1, budget_s=budget_s) == []
        assert visible(store.folder(config)) == ["checkpoint.pt", "config.json", "metrics.jsonl", "record.json"]
        done.append(store.epochs_done(config))
    assert done[1] < done[2] < config.epochs  # the second call went on


def test_auto_accepts_a_run_of_any_device(tmp_path):
    store, config = Store(tmp_path), replace(TINY, epochs=1)
    store.train(replace(config, device="cpu"))
    assert store.load(config).config == replace(config, device="cpu")
    assert store.find(replace(config, device="cuda")) is None
    kept = store.archive(config, tmp_path / "results")
    assert Store(tmp_path / "elsewhere", (tmp_path / "results",)).find(config) == kept


def test_workers_run_under_the_instruction_set_that_is_asked_for(tmp_path):
    config = replace(TINY, onednn_isa="AVX2", epochs=1)
    assert execute([config], Store(tmp_path))[0].record["config"]["onednn_isa"] == "AVX2"


def test_an_error_in_a_worker_reaches_the_caller(tmp_path):
    with pytest.raises(ValueError, match="source: unknown 'nowhere'; allowed: digits"):
        execute([replace(TINY, data="nowhere")], Store(tmp_path))


def test_display_counts_what_is_on_disk(tmp_path):
    store, ticks = Store(tmp_path), []
    execute([TINY], store, tick=lambda: ticks.append(store.epochs_done(TINY)))
    assert ticks[-1] == TINY.epochs and ticks == sorted(ticks)


def test_from_any_other_folder_runs_and_results_are_those_of_the_checkout(tmp_path, monkeypatch):
    monkeypatch.delenv("SYMBREAK_RUNS", raising=False)
    inside = home(), default_store()
    assert inside[0] == own_checkout() and inside[1].archives
    monkeypatch.chdir(tmp_path)
    assert (home(), default_store()) == inside


def test_the_library_of_one_checkout_refuses_the_notebooks_of_another(tmp_path, monkeypatch):
    (tmp_path / "symbreak").mkdir()
    (tmp_path / "settings.ini").touch()
    monkeypatch.chdir(tmp_path)
    where = re.escape(str(tmp_path))
    with pytest.raises(ValueError, match=f"in the checkout {where}, but symbreak is imported from the checkout"):
        home()


@pytest.mark.parametrize("differs", [lambda code: (code / "claims.py").write_text("# of another version\n"),
                                     lambda code: (code / "claims.py").unlink(),
                                     lambda code: (code / "new.py").touch()])
def test_an_installed_library_refuses_the_notebooks_of_another_version(tmp_path, monkeypatch, differs):
    shutil.copytree(home() / "symbreak", tmp_path / "symbreak")
    (tmp_path / "settings.ini").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("symbreak.files.own_checkout", lambda: None)  # as an installed package
    assert home() == tmp_path  # the same version
    differs(tmp_path / "symbreak")
    with pytest.raises(ValueError, match=f"in the checkout {re.escape(str(tmp_path))}, but .*, another version; "):
        home()


def test_a_store_and_an_archive_are_where_people_say(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    config, store = replace(TINY, epochs=1), Store("~/mine", archives=["~/old"])
    assert [run.config for run in execute([config], store, 1)] == [config]
    assert Run.load(f"~/mine/{config.hash}").config == config
    (store.root / "measured").mkdir()
    (store.root / "measured" / "fig02-quick-cpu.json").touch()
    assert archive("quick", "~/kept", store) == 1 and store.archive(config, "~/old") == store.archives[0] / config.hash
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"mine", "kept", "old"}
    assert not list((tmp_path / "cwd").iterdir())


# no answer from other images

def folder_of(images, root):
    "The first digits as a folder of PNG files, 8 of each class to train with and 2 to test with"
    for label in range(2):
        these = images.train_images[images.train_labels == label][:10, 0].numpy()
        for i, image in enumerate(these):
            path = root / ("train" if i < 8 else "test") / str(label) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root


def test_images_that_were_replaced_give_no_old_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("SYMBREAK_CACHE", str(tmp_path / "cache"))
    root, store = folder_of(load(), tmp_path / "pets"), Store(tmp_path / "runs")
    config = Config(data=f"folder:{root}/", depth=7, width=1, epochs=1, batch_size=8)
    first = store.train(config)
    treatment = {name: first.record["treatment"][name] for name in ("channels", "augment", "pad")}
    assert treatment == dict(channels=3, augment="crop_flip", pad=1)
    assert store.load(config).metrics == first.metrics and store.load(config).unchecked == ""
    image = root / "train" / "0" / "3.png"
    Image.new("L", (8, 8), 200).save(image)
    says = f"the finished run in {re.escape(str(store.folder(config)))} has seen other images than 'folder:.*' has now"
    for ask in (lambda: store.load(config), lambda: store.train(config), lambda: train(config, store.folder(config)),
                lambda: execute([config], store)):
        with pytest.raises(ValueError, match=says): ask()
    with pytest.raises(ValueError, match=says): execute([replace(config, seed=1), config], store)
    assert not store.folder(replace(config, seed=1)).exists(), "trained before the error came"
    assert "no such folder" not in store.read(config).unchecked
    with past_damage() as said: assert _row("x", [config], store, Speed([], "here", False, print))["left"] == 1
    assert re.search(says, *said)
    root.rename(tmp_path / "elsewhere")
    assert "no such folder" in store.load(config).unchecked
    assert store.history([config]).attrs == dict(unchecked=[first.record["data"]])
    assert _row("x", [config], store, Speed([], "here", False, print))["left"] == 0


def test_images_of_a_caller_are_not_those_of_the_configuration(tmp_path):
    store, config = Store(tmp_path), replace(TINY, epochs=1)
    usual = load("digits", train_size=config.train_size, test_size=config.test_size)
    mine = replace(usual, train_images=16 - usual.train_images)
    run = store.train(config, data=mine)
    assert store.train(config, data=mine).metrics == run.metrics
    for ask in (lambda: store.train(config), lambda: store.load(config), lambda: store.train(config, data=load())):
        with pytest.raises(ValueError, match="has seen other images than 'digits' has now"): ask()
    for wrong in (load(), usual.subset(399), usual.subset(None, 99)):
        with pytest.raises(ValueError, match=r"data: \d+ images, but t\w+_size is [14]00; allowed: as many"):
            store.train(replace(config, seed=1), data=wrong)


def test_two_spellings_of_a_folder_are_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Config(data="folder:~/x").hash == Config(data=f"folder:{tmp_path}/x").hash
    assert Config(data="folder:/y/../x").hash == Config(data="folder:/x").hash == "e7c9c13add6d"
    assert Config(data="folder:cifar10-jpeg").hash == "e43090f408e5"
    assert Config(data="folder:/x//y/").hash == Config(data="folder:/x/y").hash != Config(data="folder:/x/z").hash
    assert Request("fig04", data="folder:/x/") == Request("fig04", data="folder:/x")
