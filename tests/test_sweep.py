"""Runs as jobs: processes of this machine, jobs that are killed or run out of time, and a Slurm played by scripts."""
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from PIL import Image

from symbreak import cli, jobs, runs
from symbreak.config import Config
from symbreak.engines import Engine
from symbreak.jobs import Jobs, TrainJob, failure_file, failures, jobs_folder, run_jobs, states
from symbreak.processes import terminable
from symbreak.records import RunFiles
from symbreak.runs import Budget, Store
from symbreak.sweep import sweep

TINY = Config(depth=7, width=1, epochs=2, train_size=200, test_size=100, batch_size=50, lr=0.05)
LONG = replace(TINY, epochs=100_000)
FOREVER_S = 120


def wait_for(what, seconds=FOREVER_S):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def children(job):
    """The processes that submitit's process between us and a job has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try: state, parent = entry.read_text().rpartition(")")[2].split()[:2]
        except OSError: continue
        if parent == job.job_id and state != "Z": found.append(int(entry.parent.name))
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")


def test_jobs_of_this_machine_give_the_same_bits_and_leave_no_files_behind(tmp_path):
    store = Store(tmp_path / "jobs")
    table = sweep(TINY, seed=range(2), engine=Engine("local", at_once=2), store=store)
    straight = Store(tmp_path / "straight")
    for seed in range(2):
        config = replace(TINY, seed=seed)
        assert store.load(config).record["digests"] == straight.train(config).record["digests"]
    assert list(table.seed) == [0, 0, 0, 1, 1, 1] and table.attrs["missing"] == 0 and table.attrs["failed"] == {}
    assert [path.name for path in jobs_folder(store).iterdir()] == ["controllers.log"]


def test_a_failed_run_keeps_its_traceback_and_is_tried_again_on_request_only(tmp_path, capsys):
    store, broken = Store(tmp_path), replace(TINY, data="nowhere")
    table = sweep(TINY, data=["nowhere", "digits"], engine="local", store=store)
    assert set(table.data) == {"digits"} and table.attrs["missing"] == 1
    assert table.attrs["failed"] == {"data=nowhere": failures([broken], store)[broken]}
    assert "unknown 'nowhere'" in table.attrs["failed"]["data=nowhere"]
    said = capsys.readouterr().err
    assert "1 done, 1 failed" in said and str(failure_file(store, broken)) in said
    text = failure_file(store, broken).read_text()
    assert text.startswith(broken.label) and "Traceback" in text and "data.py" in text
    assert {path.name for path in jobs_folder(store).iterdir()} == {failure_file(store, broken).name, "controllers.log"}

    before = failure_file(store, broken).stat().st_mtime_ns
    sweep(TINY, data=["nowhere", "digits"], engine="local", store=store)
    assert failure_file(store, broken).stat().st_mtime_ns == before
    sweep(TINY, data=["nowhere", "digits"], engine="debug", store=store, retry=True)
    assert failure_file(store, broken).stat().st_mtime_ns > before


@needs_proc
def test_a_job_that_is_killed_at_once_is_a_failure_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 1)
    store = Store(tmp_path)
    under_way = Jobs([LONG], store, Engine("local"))
    under_way.hand_out()
    assert states(under_way) == {LONG: "running"}
    [job] = under_way.at_work
    wait_for(lambda: children(job))
    os.kill(children(job)[0], signal.SIGKILL)
    wait_for(job.done)
    under_way.look()
    assert states(under_way) == {LONG: "failed"} and "out of memory?" in failures([LONG], store)[LONG]


@needs_proc
def test_out_of_time_a_job_goes_on_from_its_checkpoint_and_killed_later_it_is_queued_again(tmp_path, monkeypatch):
    """The signal that comes before the end of the time comes as soon as there is a checkpoint."""
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 1)
    store = Store(tmp_path)
    under_way = Jobs([LONG], store, Engine("local", timeout_min=10))
    under_way.hand_out()
    [job] = under_way.at_work
    wait_for(RunFiles(store.folder(LONG)).checkpoint.exists)
    [first] = children(job)
    os.kill(first, signal.SIGUSR2)
    wait_for(lambda: children(job) not in ([first], []))
    assert "this job is timed-out" in job.stderr() and "Requeued job" in job.stdout()
    before, seen = store.epochs_done(LONG), []
    while not seen or max(seen) <= before or len(seen) < 100:  # until it has come further
        seen.append(store.epochs_done(LONG))
        time.sleep(0.01)
    assert min(seen) > 0  # and has not begun at the beginning

    os.kill(children(job)[0], signal.SIGKILL)
    wait_for(job.done)
    under_way.look()
    assert states(under_way) == {LONG: "queued"} and not failures([LONG], store)


def test_what_is_interrupted_stops_its_jobs(tmp_path):
    store = Store(tmp_path)

    def interrupt(under_way):
        if store.epochs_done(LONG): raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt): run_jobs([LONG], store, "local", tick=interrupt)
    with FileLock(RunFiles(store.folder(LONG)).lock).acquire(timeout=30): pass  # nobody trains any longer
    assert [path.name for path in jobs_folder(store).iterdir()] == ["controllers.log"]


@pytest.mark.parametrize("engine", ["local", "debug"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_says_where_its_runs_go_on(tmp_path, engine, number):
    store, options = Store(tmp_path), [f"--{name.replace('_', '-')}={value}" for name, value in LONG.changed.items()]
    command = [sys.executable, "-m", "symbreak", "sweep", *options, "--grid", "seed=0..1", "--runs", tmp_path]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([*command, "--engine", engine], **pipes)
    wait_for(RunFiles(store.folder(LONG)).checkpoint.exists)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1].splitlines()[-1]
    saved = {seed: store.saved_epochs(replace(LONG, seed=seed)) for seed in range(2)}
    assert process.returncode == 130 and said.startswith("symbreak: interrupted; the same command goes on after ")
    assert f"after epoch {saved[0]} of 100000 (seed=0)" in said
    assert not saved[1] or f"after epoch {saved[1]} of 100000 (seed=1)" in said


SLOW_TO_SAVE = """
import sys, time
from pathlib import Path
from symbreak import jobs
from symbreak.config import Config
from symbreak.runs import Store

class SlowToSave(jobs.TrainJob):
    def __call__(self):
        from symbreak import journal
        write = journal.write_checkpoint
        journal.write_checkpoint = lambda *args: (time.sleep(2), write(*args))
        return super().__call__()

jobs.TrainJob = SlowToSave
jobs.run_jobs([Config.from_dict(eval(sys.argv[2]))], Store(Path(sys.argv[1])), "local")
"""


@pytest.mark.parametrize("number, signal_to",
                         [(signal.SIGINT, os.kill), (signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)])
def test_what_an_interrupted_job_has_done_is_saved_however_long_that_takes(tmp_path, number, signal_to):
    """Ctrl-C goes to the whole group of processes; submitit's own would kill a job a second later."""
    store = Store(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", SLOW_TO_SAVE, tmp_path, repr(LONG.changed)],
                               stderr=subprocess.PIPE, start_new_session=True)
    wait_for(RunFiles(store.folder(LONG)).checkpoint.exists)
    before = store.epochs_done(LONG)
    wait_for(lambda: store.epochs_done(LONG) > before + 1)
    signal_to(process.pid, number)
    process.communicate(timeout=FOREVER_S)
    with FileLock(RunFiles(store.folder(LONG)).lock).acquire(timeout=FOREVER_S): pass  # nobody trains any longer
    saved, done = store.saved_epochs(LONG), store.epochs_done(LONG)
    assert before < saved <= done <= saved + 1  # a signal may come between an epoch's metrics and its state


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_is_interrupted_while_it_submits_still_stops_what_it_has_submitted(tmp_path, monkeypatch, number):
    submit, store = jobs._submit_here, Store(tmp_path)

    def disturbed(*args):
        submitted = submit(*args)
        signal.raise_signal(number)
        return submitted

    monkeypatch.setattr(jobs, "_submit_here", disturbed)
    under_way = Jobs([replace(LONG, seed=seed) for seed in range(2)], store, Engine("local", at_once=2))
    with terminable(), under_way.closing:
        with pytest.raises(KeyboardInterrupt): under_way.hand_out()
        assert [ours.config.seed for ours in under_way.at_work.values()] == [0]
        under_way.cancel()
        assert all(job.done() for job in under_way.at_work)


def test_a_short_job_is_told_before_its_time_is_up(tmp_path):
    store = Store(tmp_path)
    under_way = Jobs([LONG], store, Engine("local", timeout_min=0.5))
    with under_way.closing:
        under_way.hand_out()
        [job] = under_way.at_work
        wait_for(lambda: store.saved_epochs(LONG) > 1 and "Requeued job" in (job.stdout() or ""))
        under_way.cancel()


@needs_proc
def test_jobs_of_a_sweep_that_is_killed_pause(tmp_path):
    store = Store(tmp_path)
    code = (f"from pathlib import Path; from symbreak.sweep import sweep; from symbreak.config import Config; "
            f"from symbreak.runs import Store; sweep(Config.from_dict({LONG.changed!r}), engine='local', "
            f"store=Store(Path({str(tmp_path)!r})))")
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    wait_for(lambda: store.epochs_done(LONG))
    process.kill()
    process.communicate()
    with FileLock(RunFiles(store.folder(LONG)).lock).acquire(timeout=FOREVER_S): pass  # nobody trains any longer
    assert store.saved_epochs(LONG) > 0 and not store.find(LONG)
    wait_for(lambda: list(jobs_folder(store).glob("at-work-*/*/*_result.pkl")))
    run_jobs([TINY], store, "debug")
    assert [path.name for path in jobs_folder(store).iterdir()] == ["controllers.log"]


def test_jobs_of_this_machine_see_the_gpus_that_their_caller_sees(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    [job] = Jobs([TINY], Store(tmp_path), Engine("local"))._next()
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")  # what submitit would have it see
    assert job() == "finished" and os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_images_that_have_changed_are_told_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SYMBREAK_CACHE", str(tmp_path / "cache"))
    for number in range(12):
        path = tmp_path / "images" / "train" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(path)
    shutil.copytree(tmp_path / "images" / "train", tmp_path / "images" / "test")
    config = replace(TINY, data=f"folder:{tmp_path / 'images'}", train_size=None, test_size=None, batch_size=4)
    store = Store(tmp_path / "runs")
    store.train(config)
    (tmp_path / "images").rename(tmp_path / "away")
    label = store.read(config).record["data"]
    assert sweep(config, seed=0, engine="debug", store=store).attrs["unchecked"] == [label]
    assert f"not compared: the images of {label}, which are not at hand" in capsys.readouterr().err
    (tmp_path / "away").rename(tmp_path / "images")
    path.unlink()
    with pytest.raises(ValueError, match="other images"): sweep(config, seed=range(2), engine="debug", store=store)
    assert not store.folder(replace(config, seed=1)).exists()


def test_a_budget_pauses_jobs_of_this_machine(tmp_path):
    store, seen = Store(tmp_path), []
    assert run_jobs([LONG], store, "local", budget_s=0, tick=lambda j: seen.append(states(j)[LONG])) == []
    assert seen == ["paused"] and store.epochs_done(LONG) == 0
    assert TrainJob(LONG, store, Budget.of(0))() == "paused" and store.epochs_done(LONG) == 1
    with pytest.raises(ValueError, match="budget_s: 5 on Slurm"): run_jobs([LONG], store, "slurm", budget_s=5)


SLURM = {"sbatch": """
import os, pathlib, re, subprocess, sys
script = pathlib.Path(sys.argv[1])
flags = dict(re.findall(r"^#SBATCH --([\\w-]+)=(.*)$", script.read_text(), re.M))
home = pathlib.Path(os.environ["FAKE_SLURM"])
number = 100 + len(list(home.glob("*.flags")))
(home / f"{number}.flags").write_text(repr(flags))
last = re.match(r"0-(\\d+)", flags.get("array", ""))
for task in range(int(last[1]) + 1) if last else [None]:
    name = f"{number}" if task is None else f"{number}_{task}"
    (home / f"{name}.state").write_text("PENDING")
    env = dict(os.environ, SLURM_JOB_ID=str(number), FAKE_NAME=name)
    if task is not None: env |= dict(SLURM_ARRAY_JOB_ID=str(number), SLURM_ARRAY_TASK_ID=str(task))
    if "FAKE_HOLD" not in env:
        subprocess.Popen([sys.executable, str(home / "node.py"), str(script)], env=env, start_new_session=True,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(f"Submitted batch job {number}")
""", "node.py": """
import os, pathlib, subprocess, sys
state = pathlib.Path(os.environ["FAKE_SLURM"]) / (os.environ["FAKE_NAME"] + ".state")
state.write_text("RUNNING")
code = subprocess.run(["bash", sys.argv[1]]).returncode
state.write_text("FAILED" if code else "COMPLETED")
""", "srun": """
import os, sys
words = sys.argv[1:]
while words[0].startswith("--"): words = words[2:] if words[0] in ("--output", "--error") else words[1:]
os.execvp(words[0], words)
""", "sacct": """
import os, pathlib
print("JobID|State|NodeList")
for path in sorted(pathlib.Path(os.environ["FAKE_SLURM"]).glob("*.state")):
    print(f"{path.stem}|{path.read_text()}|here")
"""}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands that behave as Slurm's, as far as submitit looks, and start everything at once."""
    home = tmp_path / "slurm"
    home.mkdir()
    for name, code in SLURM.items():
        path = home / name
        path.write_text(f"#!{sys.executable}\n{code}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("FAKE_SLURM", str(home))
    monkeypatch.setenv("PATH", f"{home}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("submitit.slurm.slurm.SlurmJob.watcher._delay_s", 1)
    monkeypatch.setattr("submitit.slurm.slurm.SlurmJob.watcher._registered", set())
    monkeypatch.setattr("submitit.slurm.slurm.SlurmJob.watcher._finished", set())
    monkeypatch.setattr("submitit.slurm.slurm.SlurmJob.watcher._info_dict", {})
    return home


def test_slurm_gets_an_array_for_each_kind_of_request(tmp_path, slurm):
    store, two = Store(tmp_path / "runs"), replace(TINY, threads=2)
    configs = [TINY, replace(TINY, seed=1), two]
    engine = Engine("auto", at_once=7, timeout_min=90.5, options=dict(partition="night", account="us"))
    assert engine.kind == "slurm"
    assert [run.config for run in run_jobs(configs, store, engine)] == configs
    flags = [eval(path.read_text()) for path in sorted(slurm.glob("*.flags"))]
    assert [(f.get("array"), f["cpus-per-task"], f["time"]) for f in flags] == [("0-1%2", "1", "91"), (None, "2", "91")]
    assert all((f["partition"], f["account"], f["job-name"]) == ("night", "us", "symbreak") for f in flags)
    assert not list(jobs_folder(store).glob("*.json")) and not list(jobs_folder(store).glob("*.pkl"))


def test_a_second_call_finds_the_jobs_of_the_first_in_the_queue(tmp_path, slurm, monkeypatch):
    store, configs = Store(tmp_path / "runs"), [TINY, replace(TINY, seed=1)]
    monkeypatch.setenv("FAKE_HOLD", "1")  # nothing starts
    first = Jobs(configs, store, Engine("slurm"))
    first.hand_out()
    assert set(states(first).values()) == {"queued"}
    first.cancel()  # we leave, they stay
    second = Jobs(configs, store, Engine("slurm"))
    second.hand_out()
    assert {job.job_id for job in second.at_work} == {job.job_id for job in first.at_work}
    assert len(list(slurm.glob("*.flags"))) == 1
    for path in slurm.glob("*.state"): path.write_text("CANCELLED by 7")  # somebody has thought better of it
    jobs.import_submitit().SlurmJob.watcher.clear()
    Jobs(configs, store, Engine("slurm")).hand_out()
    assert len(list(slurm.glob("*.flags"))) == 2


def test_a_parameter_that_slurm_does_not_know(tmp_path, slurm):
    with pytest.raises(ValueError, match="options: unknown 'partitn'; allowed: account, "):
        run_jobs([TINY], Store(tmp_path / "runs"), Engine("slurm", options=dict(partitn="night")))


def test_without_submitit_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[slurm\]'"):
        run_jobs([TINY], Store(tmp_path), "local")


def test_a_script_without_a_guard_is_told_in_one_line(tmp_path):
    script = tmp_path / "mine.py"
    asks = f"execute([Config.from_dict({TINY.changed!r})], Store({str(tmp_path / 'runs')!r}))"
    head = "from symbreak.config import Config\nfrom symbreak.runs import Store, execute\n"

    def run(text):
        script.write_text(head + text)
        return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=FOREVER_S)

    done = run(asks)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip().splitlines() == [runs._GUARD] and '__name__ == "__main__"' in done.stderr
    done = run(f"if __name__ == '__main__': {asks}")
    assert (done.returncode, done.stderr) == (0, "")
    asks = "execute([Config(data='nowhere')], Store('runs'))"  # would fail where workers begin
    done = subprocess.run([sys.executable, "-"], input=head + asks, capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr.strip().endswith("and <stdin> is no file; allowed: a script in a file")


def test_a_sweep_is_not_for_many_processes_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="^engine: jobs of 2 processes that were started together; allowed: of one"):
        sweep(TINY, seed=range(2), engine="debug", store=Store(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [["--engine=slurm"], ["--engine=local", "--slurm=partition=gpu"]])
def test_an_engine_that_cannot_work_leaves_nothing_behind(tmp_path, monkeypatch, capsys, wrong):
    monkeypatch.setenv("PATH", "")
    places = ["--runs", str(tmp_path / "runs")]
    assert cli.main(["sweep", "--grid", "seed=0..1", *places, *wrong]) == 2
    assert cli.main(["reproduce", "fig01", *places, "--out", str(tmp_path / "out"), *wrong]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and set(said) <= {
        "symbreak: error: engine: 'slurm', but this machine has no sbatch; allowed here: local, debug",
        "symbreak: error: options: 'partition' is for Slurm, and jobs run on this machine; allowed: signal_delay_s"}
    assert not list(tmp_path.iterdir())


def test_a_job_can_be_pickled_and_asks_for_itself_again(tmp_path):
    job = TrainJob(TINY, Store(tmp_path))
    again = job.checkpoint()
    assert again.function == replace(job, in_vain=1) and again.result() == "finished"
    assert json.loads((Store(tmp_path).folder(TINY) / "record.json").read_text())["status"] == "finished"
