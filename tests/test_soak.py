"""What comes from outside: kills at any moment, disks that are full, places that cannot be written, two at once.

A few tries of each belong to the suite; `make soak` tries as often as it takes to believe it.
"""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import pytest
from PIL import Image
from test_runs import TINY

from symbreak.outcome import Run
from symbreak.records import RunFiles
from symbreak.files import home
from symbreak.train import train

# kills

TRAIN = """
import json, sys, torch
from symbreak.train import Config, train
torch.set_num_threads(1)
print("begins", flush=True)
train(Config(**json.loads(sys.argv[2])), sys.argv[1], checkpoint_every_s=0)
"""


def training(config, folder):
    command = [sys.executable, "-c", TRAIN, folder, json.dumps(asdict(config))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_at_some_moment(process, draw, folder):
    """After a few epochs more, or none, and somewhere within the next one."""
    process.stdout.readline()  # it has imported what it needs
    def state(): return path.stat().st_mtime_ns if (path := RunFiles(folder).metrics).exists() else 0
    for _ in range(draw.randrange(6)):
        before = state()
        while state() == before and process.poll() is None: time.sleep(1e-3)
    time.sleep(draw.uniform(0, 0.03))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it has come to its end before"


def same(run, other):
    assert run.metrics == other.metrics and run.steps == other.steps
    assert run.record["digests"] == other.record["digests"] and run.record["status"] == "finished"


def test_killed_at_any_moment_a_training_ends_with_the_same_bits(tmp_path, times):
    config, draw = replace(TINY, epochs=times(40, 300), measure_steps=20), random.Random(0)
    for _ in range(times(4, 30)): kill_at_some_moment(training(config, tmp_path / "run"), draw, tmp_path / "run")
    assert RunFiles(tmp_path / "run").checkpoint.exists()
    same(train(config, tmp_path / "run"), straight := train(config))
    same(Run.load(tmp_path / "run"), straight)


def test_when_one_of_two_at_once_is_killed_the_other_goes_on(tmp_path, times):
    config, draw = replace(TINY, epochs=40), random.Random(0)
    straight = train(config)
    for attempt in range(times(1, 10)):
        folder = tmp_path / str(attempt)
        both = [training(config, folder) for _ in range(2)]
        draw.shuffle(both)
        kill_at_some_moment(both[0], draw, folder)
        assert "Traceback" not in both[1].communicate(timeout=300)[1] and both[1].returncode == 0
        same(Run.load(folder), straight)


def symbreak(*options): return [sys.executable, "-m", "symbreak", *map(str, options)]


def reproduce(name, folder): return symbreak("reproduce", name, "--runs", folder / "runs", "--out", folder / "out")


@pytest.mark.parametrize("name", ["fig02", pytest.param("fig01", marks=pytest.mark.soak)])
def test_killed_at_any_moment_a_campaign_draws_the_same(tmp_path, times, name):
    """One that measures, and one that trains 48 runs; only the first is the same on every machine."""
    draw = random.Random(0)
    for _ in range(times(1, 10)):
        process = subprocess.Popen(reproduce(name, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for line in process.stderr:
            if name.encode() in line: break  # until then it imports
        time.sleep(draw.uniform(0, 4))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it has come to its end before"
    subprocess.run(reproduce(name, tmp_path), check=True, capture_output=True, timeout=900)
    shown = tmp_path / "out" / "quick"
    if name == "fig02": reference = home() / "figures" / "quick"
    else:
        subprocess.run(reproduce(name, tmp_path / "undisturbed"), check=True, capture_output=True, timeout=900)
        reference = tmp_path / "undisturbed" / "out" / "quick"
    assert (shown / f"{name}.csv").read_bytes() == (reference / f"{name}.csv").read_bytes()
    kinds = {path.suffix for path in shown.glob(f"{name}.*")}
    assert kinds == {".csv", ".json", ".png", ".svg", ".ipynb"}
    assert not [path for path in tmp_path.rglob("*ipc*")]


# disks that are full, once as they are, and once as a process sees them whose files may not grow

FULL = """
mount -t tmpfs -o size={size} tmpfs "$0" || exit 99
"$@"; code=$?
find "$0" -type f > "$0.found"
mount -o remount,size=256m "$0"
"$@"; again=$?
cp -r "$0/." "$0.kept"
exit $((10 * code + again))
"""
FIRST = dict(limit="choose another", tmpfs="make room or choose another")


@lru_cache
def may_mount() -> bool:
    """Whether this process may have mounts of its own, as users may on most systems and in few containers."""
    return shutil.which("unshare") is not None and subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0


def limited(size):
    import resource
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def twice(way, command, disk, size, **environment):
    """What a command says on a full disk, then with room; the codes of both, and what was on the full disk."""
    disk.mkdir()
    environment = os.environ | {name: str(value) for name, value in environment.items()}
    options = dict(capture_output=True, text=True, env=environment, timeout=300)
    if way == "tmpfs":
        if not may_mount(): pytest.skip("no mount namespaces here; files that may not grow are tried instead")
        done = subprocess.run(["unshare", "-rm", "sh", "-c", FULL.format(size=size), disk, *command], **options)
        found = Path(f"{disk}.found").read_text().split("\n")[:-1]
        shutil.copytree(f"{disk}.kept", disk, dirs_exist_ok=True)
        return done.stderr, divmod(done.returncode, 10), found
    done = subprocess.run(command, preexec_fn=limited(size), **options)
    found = [str(path) for path in disk.rglob("*") if path.is_file()]
    again = subprocess.run(command, **options)
    return done.stderr + again.stderr, (done.returncode, again.returncode), found


def images(root):
    for i in range(40):
        for split in "train", "test":
            path = root / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((32, 32), 50 + i).save(path)
    return root


SMALL = [f"--{name.replace('_', '-')}={value}" for name, value in replace(TINY, epochs=2).changed.items()]


def on_images(root, tmp_path):
    options = "--depth=7", "--width=1", "--epochs=1", "--folder", tmp_path / "run"
    return symbreak("train", f"--data=folder:{root}", *options)


def scene(place, tmp_path, disk): # the command, the size of the disk, environment
    if place == "runs": return symbreak("train", *SMALL, "--folder", disk / "run"), 100_000, {}
    if place == "report": return symbreak("report", "--profile", "cifar", "--out", disk), 100_000, {}
    if place == "figures":
        return symbreak("reproduce", "fig02", "--runs", tmp_path / "runs", "--out", disk), 50_000, {}
    pets = images(tmp_path / "pets")
    return on_images(pets, tmp_path), 50_000, dict(SYMBREAK_CACHE=disk)


@pytest.mark.parametrize("way", ["limit", pytest.param("tmpfs", marks=pytest.mark.soak)])
@pytest.mark.parametrize("place", ["runs", "cache", pytest.param("report", marks=pytest.mark.soak),
                                   pytest.param("figures", marks=pytest.mark.soak)])
def test_a_full_disk_is_named_and_with_room_the_same_command_goes_on(tmp_path, place, way):
    disk = tmp_path / "disk"
    command, size, environment = scene(place, tmp_path, disk)
    said, codes, found = twice(way, command, disk, size, **environment)
    assert codes == (2, 0), said
    [error] = [line for line in said.splitlines() if "symbreak: error:" in line]
    assert str(disk) in error and ("No space left" in error or "File too large" in error), error
    assert "Traceback" not in said and FIRST[way] in error, error
    assert not [path for path in found if path.endswith((".tmp", ".part", ".pt"))]
    if place == "runs": same(Run.load(disk / "run"), train(replace(TINY, epochs=2)))


# places that cannot be written

READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'


def read_only(folder, command, **environment):
    """What a command does where nothing can be written into a folder: its code, and all it says."""
    options = dict(capture_output=True, text=True, env=os.environ | environment, timeout=300)
    if os.geteuid():
        for path in (folder, *folder.rglob("*")): path.chmod(path.stat().st_mode & ~0o222)
        done = subprocess.run(command, **options)
        for path in (folder, *folder.rglob("*")): path.chmod(path.stat().st_mode | 0o200)
    elif may_mount(): done = subprocess.run(["unshare", "-rm", "sh", "-c", READ_ONLY, folder, *command], **options)
    else: pytest.skip("root may write everywhere, and there are no mount namespaces here; other users try it")
    return done.returncode, done.stdout + done.stderr


def test_what_is_finished_can_be_read_where_nothing_can_be_written(tmp_path):
    config, folder = replace(TINY, epochs=2), tmp_path / "there"
    straight = train(config, folder / "finished")
    train(config, folder / "begun", stop=lambda: True)
    code, said = read_only(folder, symbreak("train", *SMALL, "--folder", folder / "finished"))
    assert code == 0 and said.startswith("finished after 2 epochs"), said
    code, said = read_only(folder, symbreak("train", *SMALL, "--folder", folder / "begun"))
    says = rf"symbreak: error: folder: cannot write to {folder} .*; choose another folder with --folder"
    assert code == 2 and re.fullmatch(says + "\n", said), said
    same(train(config, folder / "begun"), straight)


@pytest.mark.soak
@pytest.mark.parametrize("command", ["report", "reproduce"])
def test_a_figure_or_report_that_cannot_be_written_is_named_at_once(tmp_path, command):
    folder = tmp_path / "there"
    folder.mkdir()
    options = dict(report=("--profile", "cifar"), reproduce=("fig02", "--runs", tmp_path / "runs"))[command]
    code, said = read_only(folder, symbreak(command, *options, "--out", folder / "out"))
    assert code == 2 and re.fullmatch(rf"symbreak: error: .*{folder / 'out'}.*--out\n", said), said


def test_images_are_read_from_a_cache_that_cannot_be_written(tmp_path):
    cache, pets = tmp_path / "cache", images(tmp_path / "pets")
    cache.mkdir()
    command = on_images(pets, tmp_path)
    code, said = read_only(cache, command, SYMBREAK_CACHE=str(cache))
    assert code == 2 and re.search(rf"symbreak: error: {cache}: cannot write the cache .*with cache= or SYMBREAK", said)
    subprocess.run(command, env=os.environ | dict(SYMBREAK_CACHE=str(cache)), check=True, capture_output=True)
    assert read_only(cache, command, SYMBREAK_CACHE=str(cache))[0] == 0
