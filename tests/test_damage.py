"""Damage is noticed by digest, and named; a file is written whole or not at all; only safe formats are loaded."""
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from symbreak import cache, cli, records
from symbreak.campaign import check_file
from symbreak.checking import read_batch
from symbreak.config import Config
from symbreak.data import load
from symbreak.experiments import Request, plan
from symbreak.measurements import archived_measurement, kept_measurement, take_measurement
from symbreak.outcome import Run, read_weights
from symbreak.records import (RunFiles, append_line, check_files, read_checkpoint, read_record, read_sealed,
                              write_atomic)
from symbreak.files import home, past_damage
from symbreak.results import collect
from symbreak.runs import Store, default_store, execute
from symbreak.train import train

TINY = Config(depth=7, width=1, epochs=4, train_size=400, test_size=100, batch_size=50, lr=0.05, dropout=0.1,
              augment="crop", gradient_ulps=1)


def flipped(path, place, bit=0):
    "The content of a file with one bit changed"
    whole = bytearray(path.read_bytes())
    whole[place] ^= 1 << bit
    return bytes(whole)


@pytest.fixture
def damages(times):
    """Contents of a file with one bit changed, at random; the file is as it was afterwards."""
    def of(path, few=40, many=400):
        draw, whole = random.Random(0), path.read_bytes()
        for _ in range(times(few, many)):
            path.write_bytes(flipped(path, draw.randrange(len(whole)), draw.randrange(8)))
            yield path.read_bytes()
            path.write_bytes(whole)
    return of


# what a run has written

def test_no_bit_of_a_checkpoint_can_change_unseen(tmp_path, damages):
    train(TINY, tmp_path / "run", stop=lambda: True)
    for _ in damages(RunFiles(tmp_path / "run").checkpoint, 100, 1000):
        with pytest.raises(ValueError, match="checkpoint.pt cannot be read .*; delete it to start that run again"):
            train(TINY, tmp_path / "run")
    assert train(TINY, tmp_path / "run").record["status"] == "finished"


def test_no_bit_of_a_result_can_change_unseen(tmp_path):
    config = replace(TINY, epochs=1, measure_steps=2)
    files, draw = RunFiles(Store(tmp_path).folder(config)), random.Random(0)
    Store(tmp_path).train(config)
    assert Store(tmp_path).load(config)
    for path in (files.config, files.metrics, files.steps, files.record):
        whole = path.read_bytes()
        for place in [0, len(whole) - 2, *(draw.randrange(len(whole)) for _ in range(100))]:
            path.write_bytes(flipped(path, place, draw.randrange(7)))
            try: found = Store(tmp_path).load(config)
            except ValueError as e: assert str(path) in str(e) and "delete" in str(e)
            else: assert json.loads(path.read_text()) == json.loads(whole) and found  # white space, or 1.0 as 1e0
            assert Store(tmp_path).epochs_done(config) in (0, 1)
            path.write_bytes(whole)
        for damaged in (b"", b"null", whole[:len(whole) // 2]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=re.escape(str(path))): Store(tmp_path).load(config)
            path.write_bytes(whole)
        path.unlink()
        if path == files.record: assert Store(tmp_path).load(config) is None
        else:
            with pytest.raises(ValueError, match=re.escape(str(path))): Store(tmp_path).load(config)
        path.write_bytes(whole)


def test_a_damaged_line_of_an_unfinished_run_ends_nothing(tmp_path):
    store = Store(tmp_path)
    store.train(TINY, stop=lambda: True)
    for damaged in ("null\n", "{\n", '{"epoch": "x"}\n[]\n', "{}\n", '{"epoch": null, "step": 0}\n', '{"epoch": "3"}\n',
                    '{"epoch": 5}\n', '{"epoch": [1]}\n'):
        RunFiles(store.folder(TINY)).metrics.write_text(damaged)
        assert store.epochs_done(TINY) == 0
    ticks = []
    assert execute([TINY], store, tick=lambda: ticks.append(store.epochs_done(TINY)))[0].metrics == train(TINY).metrics


def test_no_bit_of_the_final_weights_can_change_unseen(tmp_path, damages):
    files = RunFiles(tmp_path / "run")
    train(TINY, files.folder)
    for _ in damages(files.model):
        with pytest.raises(ValueError, match="model.pt: not what the record beside it was written for; restore it, or"):
            check_files(read_record(files.folder), files.model)
    check_files(read_record(files.folder), files.model)


def test_committed_results_are_sealed():
    """symbreak.results.archive seals what it copies."""
    folders = [path.parent for path in (home() / "results").glob("*/*/record.json")]
    assert folders
    for folder in folders:
        record, files = read_record(folder), RunFiles(folder)
        assert {"seal", "files"} <= set(record), folder
        check_files(record, files.metrics, files.steps)
        assert Run.load(folder).config.hash == folder.name
    for path in (home() / "results").glob("*/measured/*.json"): assert "seal" in read_sealed(path, ""), path


# displays

@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The committed results of profile full, in a checkout of their own and without the images."""
    shutil.copytree(home() / "results" / "full", tmp_path / "results" / "full")
    monkeypatch.setenv("SYMBREAK_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("SYMBREAK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("symbreak.runs.home", lambda: tmp_path)
    monkeypatch.setattr("symbreak.cache.own_checkout", lambda: None)
    monkeypatch.chdir(tmp_path)
    return min(path.parent for path in (tmp_path / "results" / "full").glob("*/record.json"))


def shown(capsys, *argv):
    code, said = cli.main([*map(str, argv)]), capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("name, content", [
    ("record.json", ""), ("record.json", '{"status": "finished"}'), ("metrics.jsonl", ""), ("metrics.jsonl", None),
    ("config.json", ""), ("config.json", '{"seed": 9}'), ("config.json", None)])
def test_displays_go_on_past_a_damaged_run_and_name_it(capsys, kept, name, content):
    path = kept / name
    path.unlink() if content is None else path.write_text(content)
    for argv in (["list"], ["plan", "full", "fig04", "--no-stopwatch"]):
        code, out, err = shown(capsys, *argv)
        assert (code, err.count("symbreak: not counted: "), err.count(f"delete {kept} to ")) == (0, 1, 1), err
        assert str(path) in err and re.search(r"fig04 .* 7/8 " if argv == ["list"] else r"fig04 +8 +1 ", out), out
    [config] = [p.config for p in plan(Request("fig04", "full", "cpu")) if p.config.hash == kept.name]
    with pytest.raises(ValueError, match=re.escape(str(path))): default_store().load(config)


@pytest.mark.parametrize("name", ["record.json", "metrics.jsonl", "config.json"])
def test_displays_go_on_past_a_run_that_cannot_be_read(capsys, kept, name):
    """As with files of somebody else; permissions would not stop root."""
    path = kept / name
    path.unlink()
    path.mkdir()
    for profile, figure, needed, said in (("full", "fig04", 1, r"fig04 +8 +1 "), ("quick", "fig01", 0, "fig01 ")):
        code, out, err = shown(capsys, "plan", profile, figure, "--no-stopwatch")
        assert code == 0 and re.search(said, out) and err.count("not counted: ") == needed, err
    code, out, err = shown(capsys, "list")
    assert code == 0 and re.search(r"fig04 .* 7/8 ", out) and str(path) in err, err
    [config] = [p.config for p in plan(Request("fig04", "full", "cpu")) if p.config.hash == kept.name]
    assert Store(kept.parent).epochs_done(config) in (0, config.epochs)  # the latter by the record alone
    RunFiles(kept).checkpoint.touch()
    assert Store(kept.parent).shorter(replace(config, schedule="constant")) is None


@pytest.mark.parametrize("changes", [
    dict(wall_s=None), dict(wall_s="1"), dict(data_digest=None), dict(treatment=None), dict(treatment=[]),
    dict(layers=None), dict(digests=None), dict(device_name=None)], ids=str)
def test_a_field_of_another_type_in_an_older_record_is_damage(capsys, kept, changes):
    """Later records have a seal."""
    path, record = RunFiles(kept).record, read_record(kept)
    older = {name: value for name, value in record.items() if name not in ("seal", "files")}
    records.write_json(path, older)
    assert shown(capsys, "plan", "full", "fig04", "--no-stopwatch")[2] == ""
    records.write_json(path, older | changes)
    for argv, said in ((["list"], r"fig04 .* 7/8 "), (["plan", "full", "fig04", "--no-stopwatch"], r"fig04 +8 +1 ")):
        code, out, err = shown(capsys, *argv)
        assert code == 0 and re.search(said, out) and f"{path}: damaged, {next(iter(changes))}: " in err, err


def test_older_metrics_without_epochs_are_damage(capsys, kept):
    files, record = RunFiles(kept), read_record(kept)
    records.write_json(files.record, {name: v for name, v in record.items() if name not in ("seal", "files")})
    files.metrics.write_text("{}\n")
    [config] = [p.config for p in plan(Request("fig04", "full", "cpu")) if p.config.hash == kept.name]
    with pytest.raises(ValueError, match="metrics.jsonl: damaged, a line that is not of an epoch"):
        default_store().history([config])
    with past_damage() as damaged: assert default_store().history([config]).empty
    assert len(damaged) == 1


def test_a_report_goes_on_past_a_damaged_run_and_a_strict_one_fails(capsys, kept, tmp_path):
    report = ["report", "--profile", "full", "--figures", tmp_path / "figures", "--out", tmp_path / "out"]
    assert shown(capsys, *report, "--strict")[2] == ""
    (path := kept / "metrics.jsonl").write_text(path.read_text().replace("1", "7", 1))
    code, out, err = shown(capsys, *report, "--strict")
    assert code == 1 and "Not finished: fig04 (1 runs)" in out and "Report: " in out
    assert err.startswith(f"symbreak: not counted: {path}: not what the record") and err.count("\n") == 1


def test_runs_that_do_not_belong_together_are_no_value_of_a_display(kept):
    record = read_record(kept)
    records.write_json(RunFiles(kept).record, records.sealed(record | dict(data_digest="other")))
    def collected(): return collect("fig04", "full", store=default_store())
    with pytest.raises(ValueError, match="have seen different images"): collected()
    with past_damage() as damaged: assert (len(collected()), collected().attrs["missing"]) == (0, 8)
    assert len(damaged) == 1


# measurements and caches

def test_no_bit_of_a_measurement_can_change_unseen(tmp_path, damages):
    request, store = Request("fig02"), Store(tmp_path / "runs")
    take_measurement(request, store)
    [path] = (tmp_path / "runs" / "measured").iterdir()
    committed, whole = Store(tmp_path, (tmp_path / "runs",)), json.loads(path.read_bytes())
    for damaged in damages(path, 150, 2000):
        try:
            if json.loads(damaged) == whole: continue  # a number in other words, such as 1.0 and 1.00
        except ValueError: pass
        assert kept_measurement(request, store) is None
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}: damaged, .*; restore it, or move it out of"):
            archived_measurement(request, committed)
    assert len(kept_measurement(request, store)) and len(archived_measurement(request, committed))


def test_no_bit_of_a_cache_can_change_unseen(tmp_path, damages):
    content = dict(zip(cache.TENSORS, load().subset(40, 20).tensors), classes=["café", "cat"])
    path = tmp_path / "images.pt"
    def kept(): return cache.cached(path, "key", lambda: pytest.fail("made again"))
    cache._store(path, "key", content)
    for _ in damages(path, 200, 2000):
        try: found = kept()
        except cache.DataError as e: assert str(e) == f"{path}: damaged cache file; delete it, and it is made again"
        except pytest.fail.Exception: pass  # a key that is not the same any more
        else:
            assert found.pop("classes") == content["classes"]
            assert all(torch.equal(found[name], content[name]) for name in cache.TENSORS)
    assert kept()["classes"] == content["classes"]


@pytest.mark.parametrize("error, says", [
    (MemoryError("no room"), "no room"), (RuntimeError("can't allocate memory: 3 bytes"), "can't allocate memory"),
    (PermissionError(13, "Permission denied", "x.pt"), "Permission denied: 'x.pt'")])
def test_a_file_is_not_called_damaged_for_want_of_memory_or_permission(tmp_path, monkeypatch, error, says):
    config, path = replace(TINY, epochs=1), tmp_path / "images.pt"
    Store(tmp_path).train(config, stop=lambda: True)
    run, files = Store(tmp_path).train(config), RunFiles(Store(tmp_path).folder(config))
    cache._store(path, "key", dict(zip(cache.TENSORS, load().subset(40, 20).tensors)))
    records.write_checkpoint(files.checkpoint, dict(epoch=1))
    def refuse(*_, **__): raise error
    monkeypatch.setattr(torch, "load", refuse)
    reads = [lambda: cache._read(path, "key"), lambda: read_weights(run.record, files.folder), lambda: read_batch(path)]
    if not isinstance(error, OSError): reads.append(lambda: read_checkpoint(files.checkpoint))  # opened without torch
    for read in reads:
        with pytest.raises(type(error), match=says) as raised: read()
        assert raised.value is error


# written whole or not at all

def test_who_reads_while_a_file_is_written_sees_the_old_one(tmp_path):
    path, seen = tmp_path / "x", []
    path.write_bytes(b"old")
    def write(f):
        f.write(b"n")
        f.flush()
        seen.append(path.read_bytes())
        f.write(b"ew")
    write_atomic(path, write)
    assert (seen, path.read_bytes(), list(tmp_path.iterdir())) == ([b"old"], b"new", [path])


def test_what_cannot_be_written_to_its_end_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    def write(f):
        f.write(b"new")
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match=f"cannot write {path} .No space left on device.; make room or choose another"):
        write_atomic(path, write)
    def fault(f): raise RuntimeError("not the disk's")
    with pytest.raises(RuntimeError, match="^not the disk's$"): write_atomic(path, fault)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_pipe_stays_one_and_gets_what_is_written(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True) as reader:
        check_file(pipe, "out")
        write_atomic(pipe, lambda f: pd.DataFrame(dict(a=[1])).to_csv(f, index=False))
        assert reader.communicate(timeout=10)[0] == "a\n1\n"
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


def test_a_link_leads_to_what_is_written(tmp_path):
    (tmp_path / "else").mkdir()
    for name in ("old", "none"): (tmp_path / name).symlink_to(f"else/{name}.csv")
    (tmp_path / "else" / "old.csv").write_text("old")
    for name in ("old", "none"): write_atomic(tmp_path / name, lambda f: f.write(b"new"))
    assert {path.name for path in (tmp_path / "else").iterdir()} == {"old.csv", "none.csv"}
    assert all(path.read_text() == "new" for path in (tmp_path / "else").iterdir())
    assert all((tmp_path / name).is_symlink() for name in ("old", "none"))


def test_killed_while_it_writes_a_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    code = ("import os, signal, sys; from symbreak.records import write_atomic; "
            "write_atomic(sys.argv[1], lambda f: (f.write(b'n' * 10 ** 6), os.kill(os.getpid(), signal.SIGKILL)))")
    process = subprocess.run([sys.executable, "-c", code, path])
    assert process.returncode == -signal.SIGKILL and path.read_bytes() == b"old"
    [left] = set(tmp_path.iterdir()) - {path}
    write_atomic(path, lambda f: f.write(b"new"))
    assert left.exists(), "somebody may be writing it"
    os.utime(left, (0, 0))
    write_atomic(path, lambda f: f.write(b"newer"))
    assert path.read_bytes() == b"newer" and list(tmp_path.iterdir()) == [path]


def test_all_that_a_run_writes_appears_at_once(tmp_path, monkeypatch):
    """But for single lines of metrics: a line that is cut off is left out, and written again."""
    renamed, replace, appended = set(), os.replace, set()
    monkeypatch.setattr(records.os, "replace", lambda old, new: (renamed.add(new.name), replace(old, new)))
    def noted(path, row): appended.add(path.name), append_line(path, row)
    monkeypatch.setattr("symbreak.journal.append_line", noted)
    config = Config(depth=7, width=1, epochs=2, train_size=64, test_size=20, measure_steps=1)
    train(config, tmp_path / "run", stop=lambda: True)
    paused = set(path.name for path in (tmp_path / "run").iterdir())
    train(config, tmp_path / "run")
    written = paused | set(path.name for path in (tmp_path / "run").iterdir())
    assert written - renamed == {".lock"} and appended == {"metrics.jsonl"}
    assert {"config.json", "metrics.jsonl", "steps.jsonl", "checkpoint.pt", "model.pt", "record.json"} <= written


# only safe formats are loaded

class Trap:
    """Makes a folder when it is unpickled."""
    def __init__(self, folder): self.folder = folder
    def __reduce__(self): return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("what", ["checkpoint.pt", "cache.pt", "batch.pt"])
def test_code_in_a_file_is_not_run(tmp_path, what):
    path, ran = tmp_path / what, tmp_path / "ran"
    state = dict(key="key", content=Trap(ran))
    if what == "checkpoint.pt": records.write_checkpoint(path, state)
    else: torch.save(state, path)
    read, says = {"checkpoint.pt": (read_checkpoint, "checkpoint.pt cannot be read .UnpicklingError"),
                  "cache.pt": (lambda path: cache._read(path, "key"), "cache.pt: damaged cache file"),
                  "batch.pt": (read_batch, "batch.pt cannot be read .UnpicklingError")}[what]
    with pytest.raises((ValueError, cache.DataError), match=says): read(path)
    assert not ran.exists()
    torch.load(io.BytesIO(path.read_bytes().partition(b"PK")[2].join((b"PK", b""))), weights_only=False)
    assert ran.exists(), "a trap that does not snap shows nothing"


def test_only_safe_formats_are_loaded():
    """What belongs to runs, figures and data sets is read by formats that cannot run anything. Pickles go between
    processes: through pipes to fresh ones (`processes`) and to workers, between those of one run (`team`, `ranks`),
    and, by submitit, to jobs and back, through files in `jobs/` of a store, of which docs/howto/slurm.md warns. And
    torchvision unpickles the archives of CIFAR, of the checksums that it knows."""
    sources = {path.name: path.read_text(encoding="utf-8") for folder in ("symbreak", "tools", "scripts", "benchmarks")
               for path in Path(home(), folder).rglob("*.py")}
    unpickles = r"^\s*(import|from)\s.*\b(pickle|cloudpickle|dill|joblib|marshal|shelve)\b|read_pickle"
    unsafe = r"torch\.load\((?!.*weights_only=True)|np\.load\(.*allow_pickle=True|yaml\.load\(|(?<![\w.])(eval|exec)\("
    def which(pattern): return {name for name, text in sources.items() if re.search(pattern, text, re.MULTILINE)}
    assert which(unpickles) == {"processes.py"}
    assert which(r"\b(\w*_object|\w*_object_list)\(") == {"ranks.py", "team.py"}
    assert which(r"\bProcessPoolExecutor\(|\bPool\(") == {"runs.py", "notebooks.py", "gpu_campaign.py"}
    assert which(r"\bsubmitit\b") == {"engines.py", "jobs.py"}
    assert which(unsafe) == set()


def test_a_damaged_run_is_not_archived(tmp_path):
    store = Store(tmp_path / "runs")
    config = Config(train_size=100, test_size=50, depth=7, width=1, epochs=1)
    store.train(config)
    files = RunFiles(store.folder(config))
    files.metrics.write_text(files.metrics.read_text().replace("1", "2", 1))
    with pytest.raises(ValueError, match="metrics.jsonl: not what the record beside it was written for"):
        store.archive(config, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
