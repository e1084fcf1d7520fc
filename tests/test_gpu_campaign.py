"""The campaign for a GPU, as far as a CPU can tell: every piece at reduced size, on a machine that lacks what draws."""
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from symbreak import diversity
from symbreak.config import Config
from symbreak.data import load
from symbreak.nets import ConstNet, LeakyNet
from symbreak.numerics import resolve_device
from symbreak.profiles import PROFILES
from symbreak.provenance import git_commit, provenance
from symbreak.records import RunFiles
from symbreak.runs import Store, is_finished
from symbreak.train import train

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "gpu_campaign.py"
BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"fastcore", "tyro", "papermill", "nbdev", "rich", "nbformat", "nbclient", "nbconvert",
                                  "IPython", "traitlets"}: raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Block())
"""


def blocked(code, *arguments, **environment):
    """Run code where the packages that draw, document and parse do not exist."""
    return subprocess.run([sys.executable, "-c", BLOCKED + code, *map(str, arguments)], text=True, capture_output=True,
                          env=os.environ | environment, timeout=300)


def campaign(*arguments, **environment):
    return blocked(f"import runpy; sys.argv[0] = {str(SCRIPT)!r}; runpy.run_path(sys.argv[0], run_name='__main__')",
                   *arguments, **environment)


def test_a_campaign_from_python_draws_nothing_and_says_so(tmp_path):
    done = blocked("import symbreak.campaign as c\n"
                   "if __name__ == '__main__': print(len(c.run(['fig11'], out=sys.argv[1])['fig11']))",
                   tmp_path / "out", SYMBREAK_RUNS=str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0 and "fig11: not drawn, since papermill is not installed" in done.stderr
    assert not list((tmp_path / "out").rglob("*.png"))


def test_the_campaign_pauses_goes_on_to_its_end_and_is_brought_in(tmp_path):
    where = dict(SYMBREAK_RUNS=str(tmp_path / "runs"), SYMBREAK_COMMIT="0123456789")
    options = ("--rehearse", "--device", "cpu", "--out", tmp_path / "out")
    first = campaign(*options, "--minutes", "0", **where)
    assert first.returncode == 0, first.stderr
    assert "Next: speed: precision=float32" in (tmp_path / "out" / "STATUS.md").read_text()
    for _ in range(40):  # as many calls as this machine needs
        again = campaign(*options, "--minutes", "0.3", **where)
        assert again.returncode == 0, again.stderr
        status = (tmp_path / "out" / "STATUS.md").read_text()
        if "Next: nothing: all is done" in status: break
    assert [line for line in status.splitlines() if "FAILED" in line and "tf32" not in line] == []  # a CPU has none
    for what in ("abl03 at paper: bf16, atomic additions, deterministic", "fig07 at paper: ConstNet: noise everywhere",
                 "fig06 at sprint: 1_1111_1111_1111", "fig04 at sprint: exact control"):
        assert re.search(f"^- {what}, seed 0: finished", status, re.MULTILINE), what
    assert re.search(r"^- measured, in speed\.json: \d+ rows$", status, re.MULTILINE)
    assert re.search(r"^- fig04 at sprint: hardware noise, seed 0: finished, 2 epochs", status, re.MULTILINE)
    assert re.search(r"^- twice: precision=float32 deterministic=True.* equal bits, asymmetry 0", status, re.MULTILINE)
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as tar: names = tar.getnames()
    assert {"gpu/speed.json", "STATUS.md"} <= set(names)
    assert any(re.fullmatch(r"gpu/probe-.*-float32\.json", name) for name in names)
    assert any(name.endswith("metrics.jsonl") for name in names)
    speed = json.loads((tmp_path / "runs" / "rehearsal" / "gpu" / "speed.json").read_text())
    assert {"deterministic", "quotient", "reduction", "benchmark"} <= set().union(*(row["kind"] for row in speed))
    checkout = tmp_path / "checkout"
    (checkout / "symbreak").mkdir(parents=True)
    (checkout / "settings.ini").touch()
    brought = blocked("import importlib.util, pathlib\n"
                      f"spec = importlib.util.spec_from_file_location('gpu_campaign', {str(SCRIPT)!r})\n"
                      "module = importlib.util.module_from_spec(spec); sys.modules['gpu_campaign'] = module\n"
                      "spec.loader.exec_module(module)\n"
                      "print(module.bring_in(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])))",
                      tmp_path / "out" / "results.tar.gz", checkout / "results" / "gpu")
    assert brought.returncode == 0, brought.stderr
    assert (checkout / "results" / "gpu" / "speed.json").exists()
    folders = [path for path in (checkout / "results" / "gpu").iterdir() if path.is_dir()]
    assert int(brought.stdout) == sum(map(is_finished, folders)) > 5
    for folder in folders:
        assert Config.from_dict(json.loads((folder / "config.json").read_text())).hash == folder.name


@pytest.fixture
def script(monkeypatch):
    """The script as a module."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("gpu_campaign", SCRIPT)
    monkeypatch.setitem(sys.modules, "gpu_campaign", module := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


def test_what_ends_without_a_result_stops_nothing_else(script, tmp_path):
    store = Store(tmp_path / "runs")
    ours = script.Campaign(tmp_path, torch.device("cpu"), float("inf"), store, load("digits"),
                           provenance(torch.device("cpu")))
    ours.path("").mkdir(parents=True)
    good, killed = (Config(depth=7, width=1, quotient=True, epochs=1, seed=seed) for seed in (0, 1))
    script.attempt(ours, script.Task("killed", lambda: 1 / 0))
    store.folder(killed).mkdir(parents=True)
    RunFiles(store.folder(killed)).config.write_text(json.dumps(asdict(killed)))  # as a kill leaves it
    script.attempt(ours, script.Task("good", lambda: script.run_one(ours, good)))
    assert "Next: the same command goes on after good" in (tmp_path / "STATUS.md").read_text()
    script.save(ours, "nothing")
    assert ours.failed == {"killed": "ZeroDivisionError: division by zero"} and ours.done["good"].startswith("finished")
    assert "ZeroDivisionError" in (tmp_path / "errors.log").read_text()
    assert script.bring_in(tmp_path / "results.tar.gz", tmp_path / "brought") == 1
    assert [path.name for path in (tmp_path / "brought").iterdir() if path.is_dir()] == [good.hash]


def test_an_older_archive_takes_nothing_away(script, tmp_path):
    config = Config(depth=7, width=1, quotient=True, epochs=2, schedule="constant")
    card = dict(kind=dict(precision="float32"), step_s=1.)
    def archive(name, rows, **how):
        ours = script.Campaign(tmp_path / name, torch.device("cpu"), float("inf"), Store(tmp_path / name / "runs"),
                               load("digits"), provenance(torch.device("cpu")))
        ours.path("").mkdir(parents=True)
        ours.path("speed.json").write_text(json.dumps(rows))
        train(config, ours.store.folder(config), **how)
        script.save(ours, "nothing")
        return tmp_path / name / "results.tar.gz"
    older = archive("older", [card | dict(card="H200")], stop=lambda: True)
    for name in (archive("newer", [card | dict(card="H100")]), older):
        assert script.bring_in(name, tmp_path / "brought") == 1
    assert is_finished(tmp_path / "brought" / config.hash)
    speed = json.loads((tmp_path / "brought" / "speed.json").read_text())
    assert [row["card"] for row in speed] == ["H100", "H200"]


def test_an_interrupt_is_not_held_against_a_task(script, tmp_path):
    ours = script.Campaign(tmp_path, torch.device("cpu"), float("inf"), Store(tmp_path / "runs"), load("digits"),
                           provenance(torch.device("cpu")))
    ours.path("").mkdir(parents=True)
    def interrupt(): raise KeyboardInterrupt
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt): script.attempt(ours, script.Task("long", interrupt))
    assert script.tries(ours) == {}


def test_the_device_of_another_process_is_not_ours(script):
    with pytest.raises(RuntimeError, match="a process of its own: .*literal") as caught:
        script.in_new_process(int, "x")
    assert not script.is_cuda_error(caught.value)


def test_a_task_that_takes_the_device_with_it_is_tried_twice(script, tmp_path):
    def lose(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
    def new_process():
        ours = script.Campaign(tmp_path, torch.device("cpu"), float("inf"), Store(tmp_path / "runs"), load("digits"),
                               provenance(torch.device("cpu")))
        ours.path("").mkdir(parents=True, exist_ok=True)
        return ours
    for _ in range(2):
        with pytest.raises(RuntimeError, match="CUDA error"): script.attempt(new_process(), script.Task("bad", lose))
    ours = new_process()
    script.attempt(ours, script.Task("bad", lose))
    assert "twice" in ours.failed["bad"]
    script.attempt(ours, script.Task("other", lambda: "fine"))
    assert ours.done == {"other": "fine"}


def test_a_run_that_came_further_each_time_is_not_given_up(script, tmp_path):
    """Whatever ends its processes, it is not the run: the third one goes on from the checkpoint of the second."""
    config = Config(depth=7, width=1, quotient=True, epochs=4, schedule="constant", train_size=64, test_size=64)
    ours = script.Campaign(tmp_path, torch.device("cpu"), float("inf"), Store(tmp_path / "runs"), load("digits"),
                           provenance(torch.device("cpu")))
    ours.path("").mkdir(parents=True)
    class Killed(BaseException): pass
    def kill(): raise Killed
    def an_epoch_and_a_kill():
        train(config, ours.store.folder(config), data=ours.data.subset(64, 64), stop=lambda: True)
        kill()
    for epoch, work, times in ((1, an_epoch_and_a_kill, 1), (2, an_epoch_and_a_kill, 1), (2, kill, 1), (2, kill, 2)):
        with pytest.raises(Killed): script.attempt(ours, script.Task("run", work, config))
        assert ours.store.saved_epochs(config) == epoch and script.tries(ours)["run"][0] == times
    train(config, ours.store.folder(config), data=ours.data.subset(64, 64), stop=lambda: True)  # it comes further
    for _ in range(2):  # and to its end, where the next call finds it
        script.attempt(ours, script.Task("run", lambda: script.run_one(ours, config), config))
        assert ours.done.pop("run").startswith("finished") and script.tries(ours) == {} == ours.failed


def test_a_lost_device_ends_the_call_and_status_says_what_to_do(script, tmp_path, monkeypatch):
    def lose(campaign): raise RuntimeError("CUDA error: device-side assert triggered")
    monkeypatch.setattr(script, "work_through", lose)
    for known in PROFILES: monkeypatch.setitem(PROFILES, known, PROFILES[known])  # are put back
    monkeypatch.setenv("SYMBREAK_RUNS", str(tmp_path / "runs"))
    assert script.main(["--rehearse", "--device", "cpu", "--out", str(tmp_path / "out")]) == 1
    status = (tmp_path / "out" / "STATUS.md").read_text()
    assert "- FAILED the device: RuntimeError: CUDA error: device-side assert triggered" in status
    assert "Next: the same command, in a new process: the device was lost" in status


def test_every_curve_of_the_campaign_is_one_of_fig04(script, tmp_path):
    ours = script.Campaign(tmp_path, torch.device("cpu"), float("inf"), Store(tmp_path / "runs"), None, {})
    assert all(list(script.figure(ours, "fig04", "sprint", curve)) for curve in script.CURVES)
    with pytest.raises(ValueError, match="curve: 'dropout', which fig04 has not"):
        list(script.figure(ours, "fig04", "sprint", "dropout"))


def test_cublas_is_told_before_the_first_call_on_a_gpu(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    assert resolve_device("cpu").type == "cpu" and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device in ("auto", "cuda"):
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        assert resolve_device(device).type == "cuda" and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_parts_that_run_out_of_seconds_come_back_at_the_end(script, tmp_path, monkeypatch):
    ours = script.Campaign(tmp_path, torch.device("cpu"), float("inf"), Store(tmp_path / "runs"), load("digits"),
                           provenance(torch.device("cpu")))
    ours.path("").mkdir(parents=True)
    def tasks(name): return (script.Task(f"{name}{i}", lambda: "done") for i in range(2))
    monkeypatch.setattr(script, "parts", lambda _: [(0, tasks("a")), (math.inf, tasks("b"))])
    assert script.work_through(ours) == "nothing: all is done"
    assert list(ours.done) == ["b0", "b1", "a0", "a1"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_the_script_starts_where_nothing_is_installed_and_refuses_weeks_on_a_cpu(tmp_path):
    done = subprocess.run([sys.executable, "-P", "-c", "import runpy, sys\n"
                           "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
                           f"sys.argv = [{str(SCRIPT)!r}, '--out', 'out']\n"
                           "runpy.run_path(sys.argv[0], run_name='__main__')"],
                          cwd=tmp_path, text=True, capture_output=True, timeout=300,
                          env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert done.returncode == 2 and "--device: torch sees no GPU here; allowed: --rehearse" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_commit_of_a_copy_without_git_can_be_told(monkeypatch):
    monkeypatch.setenv("PATH", "")  # no git
    monkeypatch.setenv("SYMBREAK_COMMIT", "0123456789")
    assert git_commit() == "0123456789"
    monkeypatch.delenv("SYMBREAK_COMMIT")
    assert git_commit() == "unknown"


NETWORKS = pytest.mark.parametrize(
    "make", [lambda colours: ConstNet(16, 10, in_channels=colours),
             lambda colours: ConstNet(16, 10, in_channels=colours, init="he"),
             lambda colours: LeakyNet("1_iiii_11ii_iiii", 16, 10, in_channels=colours)],
    ids=["ConstNet", "He", "LeakyNet"])


@NETWORKS
def test_a_step_at_full_size_mixes_no_devices(make):
    """On the meta device, where shapes, dtypes and devices are all there is: loader, network, loss, gradients."""
    net = make(1).to("meta")
    x, y = next(iter(load("digits").to("meta").loader("train", 32, augment="crop_flip")))
    F.cross_entropy(net(x), y).backward()
    assert {p.grad.device.type for p in net.parameters()} == {"meta"}
    torch.optim.SGD(net.parameters(), 0.03, momentum=0.9, weight_decay=5e-4).step()


@NETWORKS
def test_all_measures_at_full_size_stay_on_their_device_until_they_leave_it(make, monkeypatch):
    """On the meta device: a torch without CUDA does not sort or decompose CUDA tensors that are not there."""
    measured = {}
    def leave(tensors):
        measured.update(tensors)
        return {what: torch.ones(t.shape).tolist() for what, t in tensors.items()}
    monkeypatch.setattr(diversity, "_together", leave)
    diversity.measure(make(3).to("meta"), torch.empty(32, 3, 32, 32, device="meta"))
    assert {t.device.type for t in measured.values()} == {"meta"} and len(measured) > 40


@NETWORKS
def test_a_forward_pass_and_its_loss_on_cuda_tensors_that_are_not_there(make):
    """As far as a torch without CUDA lets fake ones go: no gradients, and batch norm as it is in evaluation."""
    with torch.device("meta"): net = make(3).eval()
    with FakeTensorMode(), torch.no_grad():
        for module in net.modules():
            for name, own in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                delattr(module, name)
                module.register_buffer(name, torch.empty(own.shape, dtype=own.dtype, device="cuda"))
        x, y = torch.empty(32, 3, 32, 32, device="cuda"), torch.empty(32, dtype=torch.long, device="cuda")
        assert F.cross_entropy(net(x), y).device.type == "cuda"
        with pytest.raises(RuntimeError, match="device"): F.cross_entropy(net(x), y.cpu())


@pytest.mark.parametrize("name, profile", [("fig07", "paper"), ("abl03", "paper"), ("fig06", "sprint")])
def test_the_later_parts_of_the_campaign_begin(name, profile, script, tmp_path, monkeypatch):
    for known in PROFILES: monkeypatch.setitem(PROFILES, known, PROFILES[known])  # are put back
    script.rehearse()
    ours = script.Campaign(tmp_path, torch.device("cpu"), float("inf"), Store(tmp_path / "runs"), load("digits"),
                           provenance(torch.device("cpu")))
    ours.path("").mkdir(parents=True)
    tasks = [task for task in script.figure(ours, name, profile) if "tf32" not in task.name]  # for which a CPU is none
    script.attempt(ours, tasks[0])
    assert ours.done[tasks[0].name].startswith("finished"), ours.failed


def test_images_that_decode_to_other_pixels_get_a_label_of_their_own(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SYMBREAK_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    packed = tmp_path / "images.tar.xz"
    for i, place in enumerate(f"{split}/{kind}" for split in ("train", "test") for kind in ("cat", "dog")):
        (tmp_path / "images" / place).mkdir(parents=True)
        Image.new("RGB", (32, 32), (60 * i, 10, 20)).save(tmp_path / "images" / place / "0.png")
    with tarfile.open(packed, "w:xz") as tar:
        for split in ("train", "test"): tar.add(tmp_path / "images" / split, split)
    data = script.images_of(packed, "folder:cifar10-jpeg")
    assert data.label == f"{script.LABEL}, digest {data.digest[:8]}" and len(data.train_labels) == 2
    assert "decode to other pixels" in capsys.readouterr().out
    assert script.images_of(packed, "folder:cifar10-jpeg").digest == data.digest  # is there already
