"""What is handed out: an sdist, the wheel made from it, and the command of that wheel, far from any checkout."""
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools import build_meta; build_meta.build_{}('.')"  # what `python -m build` calls, without a network


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of an unpacked wheel."""
    folder = tmp_path_factory.mktemp("package")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in (name for name in names if name.split("/")[0] not in ("results", "figures", "nbs", "")):
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / "source" / name)
    quiet = dict(check=True, capture_output=True)
    subprocess.run([sys.executable, "-c", BUILD.format("sdist")], cwd=folder / "source", **quiet)
    with tarfile.open(next((folder / "source").glob("*.tar.gz"))) as sdist: sdist.extractall(folder / "sdist")
    source = next((folder / "sdist").iterdir())
    subprocess.run([sys.executable, "-c", BUILD.format("wheel")], cwd=source, **quiet)
    with zipfile.ZipFile(next(source.glob("*.whl"))) as wheel: wheel.extractall(folder / "installed")
    return folder / "installed"


def command(installed, cwd, *argv):
    env = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, "-m", "symbreak", *argv], cwd=cwd, env=env, capture_output=True, text=True)


def test_the_wheel_of_the_sdist_holds_the_package(installed):
    assert {path.name for path in (installed / "symbreak").glob("*.py")} == {
        path.name for path in (ROOT / "symbreak").glob("*.py")}
    assert list((installed / "symbreak" / "assets").iterdir())


def test_the_package_trains_where_there_is_no_checkout(installed, tmp_path):
    done = command(installed, tmp_path, "train", "--epochs=1", "--train-size=100", "--depth=7")
    assert done.returncode == 0 and f": {tmp_path / 'runs'}" in done.stdout, done.stderr


def test_in_a_clone_of_another_version_it_takes_nothing_of_it(installed, tmp_path):
    shutil.copytree(installed / "symbreak", tmp_path / "symbreak")
    (tmp_path / "settings.ini").touch()
    (tmp_path / "nbs").mkdir()
    assert "in a clone of the repository" in command(installed, tmp_path / "nbs", "reproduce", "fig02").stderr
    (tmp_path / "symbreak" / "claims.py").unlink()
    done = command(installed, tmp_path / "nbs", "reproduce", "fig02")
    assert done.returncode == 2 and f"is imported from {installed / 'symbreak'}, another version" in done.stderr


@pytest.mark.parametrize("argv", [["report"], ["reproduce", "fig01"]])
def test_what_needs_a_clone_says_so_first(installed, tmp_path, argv):
    done = command(installed, tmp_path, *argv)
    assert done.returncode == 2 and done.stdout == "" and "in a clone of the repository" in done.stderr
    assert not list(tmp_path.iterdir())
