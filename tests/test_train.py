"""Training: arithmetic that is refused, every option on a few steps, and resuming for every kind of run."""
import math
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from symbreak import numerics as arithmetic
from symbreak import outcome, records
from symbreak import train as training
from symbreak.config import Config, learning_rate
from symbreak.data import load
from symbreak.outcome import Run
from symbreak.provenance import weights_digest
from symbreak.records import RunFiles, whose
from symbreak.runs import Store
from symbreak.train import Trainer, run_epoch, train

TINY = Config(depth=7, width=1, epochs=2, train_size=200, test_size=100, batch_size=64, lr=0.05)
MLP = dict(net="UniqueFeatureMLP", width=32, depth=Config.depth)


def bits(run):
    return weights_digest(run.model)


def test_bf16_without_the_instructions_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(arithmetic, "cpu_has_bf16", lambda: False)
    with pytest.raises(ValueError, match="AVX512-BF16.*allowed here: float32, float64"):
        train(replace(TINY, precision="bf16", device="cpu"))


def test_bf16_where_the_instructions_are_there(monkeypatch):
    monkeypatch.setattr(arithmetic, "cpu_has_bf16", lambda: True)  # slow without them, but right
    run = train(replace(TINY, precision="bf16", init="he", device="cpu"))
    assert run.record["status"] == "finished"
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["tf32", "float32"])
def test_a_gpu_multiplies_in_tf32_only_where_that_is_asked_for(precision, monkeypatch):
    monkeypatch.setattr(training, "usable_device", lambda config: torch.device("cpu"))  # which has no use for it
    switches = train(replace(TINY, precision=precision, epochs=1)).record["switches"]
    assert switches["backends.cuda.matmul.allow_tf32"] == switches["backends.cudnn.allow_tf32"] == (precision == "tf32")


@pytest.mark.parametrize("option", [
    dict(precision="float64"), dict(channels_last=True), dict(skip="rectified"), dict(reduction="row"),
    dict(reduction="global"), dict(weight_noise=1e-3), dict(input_noise=0.1), dict(gradient_ulps=2),
    dict(ulp_layer="stem", ulp_step=5), dict(quotient=True), dict(deterministic=True), dict(augment="crop"),
    dict(schedule="released"), dict(schedule="constant"), dict(measure_every=2), dict(data_seed=7),
    dict(net="LeakyNet", init="1_i11", lr=0.01), dict(MLP, distinct=4), dict(MLP, distinct=4, quotient=True),
], ids=str)
def test_option_trains_and_resumes_to_the_same_bits(tmp_path, option):
    config = replace(TINY, device="cpu", **option)
    straight = train(config)
    assert straight.record["status"] == "finished" and straight.record["config"] == asdict(config)
    while (resumed := train(config, tmp_path / "run", stop=lambda: True)).record["status"] == "paused":
        pass
    assert bits(resumed) == bits(straight)
    assert resumed.metrics == straight.metrics


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("c++") is None,
                    reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_training_runs():
    run = train(replace(TINY, compile=True, epochs=1, device="cpu"))
    assert run.record["status"] == "finished"


@pytest.mark.parametrize("bad, message", [
    (dict(compile=True, reduction="element"), "compile"), (dict(quotient=True, dropout=0.1), "dropout"),
    (dict(quotient=True, reduction="row"), "quotient"),
    (dict(MLP, reduction="element"), "reduction: .* net='UniqueFeatureMLP', which has no use for it"),
    (dict(ulp_layer="stages.9"), "allowed: stem")])
def test_options_that_do_not_go_together(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        train(replace(TINY, **bad), tmp_path / "run")
    assert not (tmp_path / "run").exists()  # nothing half-made is left behind


def test_torch_forgets_what_it_has_compiled_before_it_compiles_again(monkeypatch):
    """From the third configuration of a process on it would fall back to eager, without a word."""
    done = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: done.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda model: done.append("compile") or model)
    data = load("digits")
    Trainer(TINY, data, torch.device("cpu"))
    assert done == []
    Trainer(replace(TINY, compile=True), data, torch.device("cpu"))
    assert done == ["reset", "compile"]


def test_a_finished_run_is_read_and_nothing_is_loaded_or_built(tmp_path, monkeypatch):
    first = train(TINY, tmp_path / "run")
    for name in ("images", "Trainer"): monkeypatch.delattr(training, name)
    again = train(TINY, tmp_path / "run")
    assert again.metrics == first.metrics and again.record == first.record


def test_checkpoints_come_after_the_first_epoch_and_then_every_so_many_seconds(tmp_path, monkeypatch):
    now, epochs = [0.], []
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(training, "save_checkpoint", lambda journal: epochs.append(journal.metrics[-1]["epoch"]))
    def report(epoch, row): now[0] += 1
    train(replace(TINY, epochs=8), tmp_path / "run", report=report, checkpoint_every_s=2.5)
    assert epochs == [1, 4, 7]


def test_a_run_that_goes_on_has_its_next_checkpoint_as_many_seconds_later(tmp_path, monkeypatch):
    config, now, epochs = replace(TINY, epochs=8, schedule="constant"), [10.], []
    train(config, tmp_path / "run", stop=lambda: True)  # pauses after the first epoch
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(training, "save_checkpoint", lambda journal: epochs.append(journal.metrics[-1]["epoch"]))
    def report(epoch, row): now[0] += 1
    train(config, tmp_path / "run", report=report, checkpoint_every_s=2.5)
    assert epochs == [4, 7, 8]  # the last one for whoever makes it longer


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    train(replace(TINY, epochs=1))
    assert torch.equal(torch.rand(3), expected)


class Waits(TorchDispatchMode):
    """Counts, among the operations inside, those whose result a host can only have by waiting for the device."""
    names = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique2"}

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.names: self.seen.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("option", [{}, dict(dropout=0.1), dict(gradient_ulps=1), dict(reduction="element"),
                                    dict(input_noise=0.1), dict(quotient=True), dict(precision="float64")], ids=str)
def test_an_epoch_waits_for_the_device_once_at_its_end(monkeypatch, option):
    data = load("digits", train_size=200, test_size=100)
    trainer = Trainer(replace(TINY, augment="crop", **option), data, torch.device("cpu"))
    digested = []
    monkeypatch.setattr(training, "weights_digest", lambda weights: digested.append(trainer.step))
    for epoch in (1, 2):
        with Waits() as waits: run_epoch(trainer)
        assert waits.seen == ["_local_scalar_dense"] * 2  # mean loss and accuracy
    assert digested == [4]  # of the weights after step 1, but read after the epoch


def test_the_digest_after_step_one_is_of_step_one():
    digests = train(replace(TINY, epochs=1, batch_size=200)).record["digests"]  # an epoch of one step
    assert digests["step_1"] == bits(train(replace(TINY, epochs=1, batch_size=200)))
    longer = train(replace(TINY, epochs=1))
    assert longer.record["digests"]["step_1"] != bits(longer)


def test_learning_rate_is_scaled_by_the_length():
    config = Config(epochs=10, lr=1.)
    assert [round(learning_rate(config, e), 6) for e in range(10)] == [1, 1, 1, .2, .2, .2, .04, .04, .008, .008]


def test_steps_are_measured_and_survive_a_pause(tmp_path):
    config = replace(TINY, gradient_ulps=1, measure_steps=5, device="cpu")
    straight = train(config)
    while (resumed := train(config, tmp_path / "run", stop=lambda: True)).record["status"] == "paused":
        pass
    assert [row["step"] for row in straight.steps] == [1, 2, 3, 4, 5]
    assert resumed.steps == straight.steps
    assert set(straight.step_layers.layer) == set(straight.record["layers"])


def test_with_an_infinite_interval_checkpoints_are_for_pauses(tmp_path, monkeypatch):
    saved, write = [], records.write_checkpoint
    monkeypatch.setattr("symbreak.journal.write_checkpoint", lambda path, state: saved.append(state["epoch"]) or
                        write(path, state))
    config = replace(TINY, epochs=3, schedule="constant")
    train(config, tmp_path / "run", stop=lambda: len(saved) == 0, checkpoint_every_s=math.inf)
    assert saved == [1]
    resumed = train(config, tmp_path / "run", checkpoint_every_s=math.inf)
    assert saved == [1, 3] and bits(resumed) == bits(train(config))  # no older checkpoint is left beside the end
    assert not (train(config, tmp_path / "other", checkpoint_every_s=math.inf) and saved[2:])


def paused(tmp_path, config=TINY):
    train(config, tmp_path / "run", stop=lambda: True)
    return RunFiles(tmp_path / "run")


def change(checkpoint, **values):
    state = records.read_checkpoint(checkpoint)
    state["record"].update(values)
    records.write_checkpoint(checkpoint, state)


def test_a_run_does_not_go_on_with_other_images(tmp_path):
    files = paused(tmp_path)
    change(files.checkpoint, data_digest="0" * 64)
    with pytest.raises(ValueError, match="data_digest 0000.*delete the file to start that run again"):
        train(TINY, files.folder)


def test_a_run_does_not_change_between_cpu_and_gpu(tmp_path):
    files = paused(tmp_path)
    change(files.checkpoint, device="cuda")
    with pytest.raises(ValueError, match="made with device cuda, this process has cpu"):
        train(TINY, files.folder)


def test_a_run_that_went_on_under_another_commit_says_so(tmp_path):
    files = paused(tmp_path)
    change(files.checkpoint, commit="abc")
    assert train(TINY, files.folder).record["earlier"] == [{"commit": "abc"}]


def test_a_full_disk_at_the_very_end_loses_nothing(tmp_path, monkeypatch):
    files, write = paused(tmp_path), outcome.write_json
    def full(path, value):
        if path == files.record: raise OSError(28, "No space left on device")
        write(path, value)
    monkeypatch.setattr(outcome, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        train(TINY, files.folder)
    monkeypatch.setattr(outcome, "write_json", write)
    assert files.checkpoint.exists() and train(TINY, files.folder).metrics == train(TINY).metrics


def test_metrics_that_were_lost_come_back_from_the_checkpoint(tmp_path):
    files = paused(tmp_path)
    files.metrics.unlink()
    assert train(TINY, files.folder).metrics == train(TINY).metrics


def test_a_damaged_record_is_named(tmp_path):
    train(TINY, tmp_path / "run")
    RunFiles(tmp_path / "run").record.write_text("")
    with pytest.raises(ValueError, match="record.json: damaged, .*; restore it, or delete"):
        train(TINY, tmp_path / "run")


def test_determinism_is_what_the_configuration_says(tmp_path):
    torch.use_deterministic_algorithms(True)
    try: switches = train(replace(TINY, epochs=0)).record["switches"]
    finally: torch.use_deterministic_algorithms(False)
    assert switches["use_deterministic_algorithms"] == "off"


LONG = replace(TINY, schedule="constant", warmup=2, measure_every=3, dropout=0.1, gradient_ulps=1, epochs=5)


def same(one, other):
    weights = other.load_model().state_dict()
    assert one.metrics == other.metrics and one.record["digests"] == other.record["digests"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in one.model.state_dict().items())


@pytest.mark.parametrize("changes", [{}, dict(measure_steps=40), dict(quotient=True, dropout=0.)])
def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(tmp_path, changes):
    longer = replace(LONG, **changes)
    straight = train(longer)
    for epochs in (2, 4): train(replace(longer, epochs=epochs), tmp_path / "run")
    told = []
    train(longer, tmp_path / "run", report=lambda epoch, row: told.append(epoch))
    run = Run.load(tmp_path / "run")
    same(straight, run)
    assert run.steps == straight.steps and told == [4, 5]
    assert [then["config"]["epochs"] for then in run.record["earlier"]] == [2, 4]
    assert whose(tmp_path / "run") == longer == run.config


def test_a_longer_run_goes_on_where_a_shorter_one_was_paused(tmp_path):
    shorter = replace(LONG, epochs=4)
    assert train(shorter, tmp_path / "run", stop=lambda: True).record["status"] == "paused"
    train(LONG, tmp_path / "run")
    same(train(LONG), Run.load(tmp_path / "run"))


@pytest.mark.parametrize("died", ["before it had the folder", "before it had trained"])
def test_a_longer_run_that_was_killed_at_once_loses_nothing(tmp_path, monkeypatch, died):
    files = RunFiles(tmp_path / "run")
    train(replace(LONG, epochs=3), files.folder)
    def die(*_): raise SystemExit
    with monkeypatch.context() as dying, pytest.raises(SystemExit):
        if died == "before it had the folder": dying.setattr(records, "write_json", die)
        else: dying.setattr(training, "run_epochs", die)
        train(LONG, files.folder)
    assert not records.is_finished(files.folder)
    train(LONG, files.folder)
    same(train(LONG), Run.load(files.folder))


@pytest.mark.parametrize("changes, why", [
    (dict(schedule="scaled"), "epochs is 2, asked for 5, but with schedule='scaled' its learning rates depend"),
    (dict(epochs=6), "epochs is 6, asked for 5\\); use another folder"),
    (dict(seed=1), "epochs is 2, asked for 5\\); use another folder"),
    (dict(lr=1e30), "that is over \\(diverged\\) and has left no checkpoint to go on from"),
])
def test_what_cannot_go_on_says_why(tmp_path, changes, why):
    shorter = replace(LONG, **dict(epochs=2) | changes)
    train(shorter, tmp_path / "run")
    longer = replace(shorter, epochs=5, seed=0)
    with pytest.raises(ValueError, match=why): train(longer, tmp_path / "run")
    assert Run.load(tmp_path / "run").config == shorter


def test_a_store_goes_on_from_a_shorter_run_only_if_it_is_whole_and_of_the_same_images(tmp_path):
    store, usual = Store(tmp_path), load("digits", train_size=LONG.train_size, test_size=LONG.test_size)
    data = replace(usual, train_images=16 - usual.train_images)
    kept = store.train(replace(LONG, epochs=3))
    other = store.train(LONG, data=data)
    assert "earlier" not in other.record and other.metrics == train(LONG, data=data).metrics
    shutil.rmtree(store.folder(LONG))
    checkpoint = store.shorter(LONG)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    assert "earlier" not in store.train(LONG).record
    assert store.load(replace(LONG, epochs=3)).metrics == kept.metrics


def test_a_damaged_end_costs_a_shorter_run_nothing(tmp_path):
    """Its checkpoint cannot be gone on from; its record and weights stay."""
    train(replace(LONG, epochs=2), tmp_path / "run")
    checkpoint = RunFiles(tmp_path / "run").checkpoint
    saved = bytearray(checkpoint.read_bytes())
    saved[len(saved) // 2] ^= 1
    checkpoint.write_bytes(saved)
    with pytest.raises(ValueError, match="checkpoint: .* cannot be read"): train(LONG, tmp_path / "run")
    assert Run.load(tmp_path / "run").config.epochs == 2
    assert RunFiles(tmp_path / "run").model.exists()
