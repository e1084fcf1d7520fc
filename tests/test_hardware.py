"""The probe finds what is wrong on purpose, is silent about what is right, and leaves no traces on torch's state."""
import json
import os
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch

from symbreak import probe
from symbreak.breaking import ONE_ULP_RMS, from_probe, ulp_noise_
from symbreak.calls import recorded
from symbreak.config import Config
from symbreak.hardware import SIZES, compared, concerned, cores, read_probe, save_probe, summary, under_load
from symbreak.numerics import numerics, switches
from symbreak.operations import accumulations, all_reduce, chunk_sum, convolution, linear, operations
from symbreak.probing import Probe
from symbreak.train import train
from symbreak.provenance import device_name

ATOMIC = {"put_, accumulate", "index_put_, accumulate"}  # the only ones that race on a CPU


def in_order(x, weight):
    total = torch.zeros(len(x), len(weight), dtype=x.dtype)
    for i in range(x.shape[1]): total = total + x[:, i, None] * weight[:, i]
    return total


def edge(x, weight):  # the last five channels are added up backwards
    return torch.cat([in_order(x, weight[:11]), in_order(x.flip(1), weight[11:].flip(1))], 1)


def crowded(x, weight):  # a batch of an odd size is added up backwards
    return in_order(x, weight) if len(x) % 2 == 0 else in_order(x.flip(1), weight.flip(1))


class Alternating:
    calls = 0

    def __call__(self, x, weight):
        self.calls += 1
        total = in_order(x, weight)
        return torch.nextafter(total, total + 1) if self.calls % 2 else total


@pytest.mark.parametrize("run, failing", [(in_order, None), (edge, "equivariant"), (crowded, "batch_invariant")])
def test_faults_are_found_and_nothing_else(run, failing):
    row, = probe("cpu", only=[replace(linear(8, 64, 16)[0], run=run)], dtypes=("float32",), threads=(1,),
                 settings=("default",), reruns=2).to_dict("records")
    assert {name: row[name] for name in SIZES} == {name: name != failing for name in SIZES}
    assert (row["max_ulp"] > 0) == (failing is not None)
    assert row["tile"] == (11 if run is edge else 16) and row["distinct"] == (2 if run is edge else 1)


def test_noise_is_found():
    row = probe("cpu", only=[replace(linear(8, 64, 16)[0], run=Alternating())], dtypes=("float32",), threads=(1,),
                settings=("default",), reruns=3).iloc[0]
    assert not row.deterministic
    assert row.rerun_max_ulp == 1 and row.rerun_share == 1


class Noisy:
    """A linear layer whose results move by an ulp at random, as ulp_noise_ moves gradients"""
    generator = torch.Generator().manual_seed(0)

    def __call__(self, x, weight):
        total = torch.nn.Parameter(in_order(x, weight))
        total.grad = total.detach().clone()
        ulp_noise_([total], self.generator)
        return total.grad


def test_what_a_probe_finds_is_emulated_at_its_size():
    """Noise that is put in comes out of the probe, through from_probe, within a factor of two."""
    asked = dict(dtypes=("float32",), threads=(1,), settings=("default",), reruns=2)
    table = probe("cpu", only=[replace(linear(64, 32, 64)[0], run=Noisy())], **asked)
    assert ONE_ULP_RMS / 2 < from_probe(table, by="noise")["gradient_noise"] < 2 * ONE_ULP_RMS
    assert from_probe(table)["reduction"] == "element"
    tiled = probe("cpu", only=[replace(linear(8, 64, 16)[0], run=edge)], **asked)
    assert from_probe(tiled)["reduction"] == "row" and tiled.equivariant.eq(False).all()
    clean = probe("cpu", only=[replace(linear(8, 64, 16)[0], run=in_order)], **asked)
    assert from_probe(clean) == from_probe(clean, by="noise") == {}
    with pytest.raises(ValueError, match="by: 'chance'; allowed: reduction, noise"): from_probe(clean, by="chance")


def test_an_emulated_probe_breaks_the_symmetry():
    row = dict(deterministic=False, equivariant=True, rerun_size=1.9, rerun_share=0.1, rerun_median_ulp=1.,
               dtype="float32", tile=1.)
    few = dict(train_size=200, test_size=100, epochs=1, width=1, depth=7, batch_size=32, device="cpu")
    for by in ("reduction", "noise"):
        run = train(Config(**few, **from_probe(pd.DataFrame([row]), by=by)))
        assert run.history.distinct_features.iloc[-1] > 1, by
    assert train(Config(**few)).history.distinct_features.iloc[-1] == 1


def test_no_traces():
    random = torch.random.get_rng_state()
    with numerics(deterministic=True):
        torch.set_num_threads(1)
        before = switches(), torch.get_num_threads()
        probe("cpu", only=linear(4, 8, 8), threads=(1, 2), reruns=1)
        assert (switches(), torch.get_num_threads()) == before
    assert torch.equal(torch.random.get_rng_state(), random)


def test_convolutions_of_cifar_are_clean_in_float32():
    stages = [o for c, pixels in ((16, 32), (32, 16), (64, 8)) for o in convolution(8, c, c, (pixels, pixels))]
    table = probe("cpu", only=stages, dtypes=("float32",), threads=(1,), reruns=2)
    assert not len(concerned(table, "nondeterministic", "asymmetric")) and (table.refused == "").all()


def test_only_put_may_race():
    asked = [o for o in operations() if o.linear]
    table = probe("cpu", only=asked, dtypes=("float32",), threads=(1, 2), reruns=2)
    racing = concerned(table, "nondeterministic")
    assert set(racing.op) <= ATOMIC
    assert (racing.threads == 2).all() and (racing.setting == "default").all() and (racing["shape"] != "8x512").all()


def test_sums_of_odd_shapes_and_of_three_processes_are_unequal():
    table = probe("cpu", only=[*linear(16, 37, 37), chunk_sum(8, 37, 37), chunk_sum(8, 64, 64), all_reduce(3, 4096)],
                  threads=(1, 2), dtypes=("float32", "float64"), reruns=1)
    unequal = set(concerned(table, "asymmetric")[["op", "shape", "dtype"]].itertuples(index=False, name=None))
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert ("sum of chunks", "8x37x37x3x3", "float32") in unequal
        if "AMD" in device_name(torch.device("cpu")): assert ("linear", "16x37 37x37", "float64") in unequal
    assert ("all-reduce, gloo, 3 ranks", "3x4096", "float32") in unequal
    assert table.deterministic.all()


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="oneDNN's AVX2 kernels")
def test_weight_gradient_of_2x2_maps_under_avx2(tmp_path):
    code = ("from symbreak.hardware import *; from symbreak.operations import convolution; "
            "only = [convolution(8, c, c, (pixels, pixels))[2] for c, pixels in ((32, 2), (64, 8))]; "
            f"save_probe(probe('cpu', only=only, dtypes=('float32',), threads=(1,), reruns=1), {str(tmp_path/'a')!r})")
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | dict(ONEDNN_MAX_CPU_ISA="AVX2"))
    table = read_probe(tmp_path/"a")
    assert table.attrs["machine"]["onednn_isa"] == "AVX2"
    small = table[(table["shape"] == "8x32x2x2 32x32x3x3") & (table.memory_format == "contiguous")]
    assert len(small) == 2 and not small.equivariant.any() and (small.distinct == 2).all()
    assert table[table["shape"] == "8x64x8x8 64x64x3x3"].equivariant.all()


def test_a_new_process_and_load_leave_the_bits_alone():
    table = probe("cpu", only=linear(4, 8, 8), dtypes=("float32",), threads=(1,), reruns=1, processes=1)
    assert (table.fresh_differ == 0).all() and (table.load_differ == 0).all() and table.deterministic.all()
    load = table.attrs["load"]
    assert load["processes"] == cores() and load["cpu_s"] > 0 and load["wall_s"] > 0
    assert table.p_below.unique().tolist() == [3 / 3]  # a rerun, one under load, one in a new process


def test_what_differs_elsewhere_or_under_load_is_not_deterministic(monkeypatch):
    """The faults are in the digests here, since a new process cannot import this file."""
    asked = dict(only=linear(4, 8, 8)[:1], dtypes=("float32",), threads=(1,), settings=("default",), reruns=1)
    clean = probe("cpu", **asked, processes=1)
    for fresh, again, column in ((["other"], None, "fresh_differ"), (None, ["other"], "load_differ")):
        def faulty(cases, device, seed, processes):
            others, ours, load = under_load(cases, device, seed, processes)
            return [fresh] if fresh else others, again or ours, load
        monkeypatch.setattr("symbreak.hardware.under_load", faulty)
        row = probe("cpu", **asked, processes=1).iloc[0]
        assert row[column] == 1 and not row.deterministic and clean.deterministic.all()


def test_files_and_comparison(tmp_path):
    table = probe("cpu", only=linear(8, 37, 37), threads=(1,), reruns=1)
    save_probe(table, tmp_path/"a.json")
    assert set(json.loads((tmp_path/"a.json").read_text())) == {"machine", "load", "missed", "rows"}
    again = read_probe(tmp_path/"a.json")
    assert compared(table, again).empty
    assert len(compared(table, again.assign(tile=1.))) == (table.tile != 1).sum()
    with pytest.raises(ValueError, match="no case in common"): compared(table, again.assign(op="other"))
    assert summary(table).cases.sum() == len(table)


def test_a_network_is_heard_and_not_changed():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten(),
                                torch.nn.Linear(8 * 36, 4)).eval()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    heard = recorded(model, (3, 8, 8), (4, 3))
    assert [o.sizes["i"] for o in heard if o.name == "head"] == [288, 288]
    assert {o.sizes.get("n") or o.sizes.get("N") for o in heard} == {4, 3}
    assert not model.training and all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("wrong, named", [
    (dict(fail_on="slow"), "fail_on: 'slow'; allowed: nondeterministic, asymmetric, batch-dependent"),
    (dict(input="3x"), "input: '3x'; allowed"), (dict(from_model="nothing"), "model: 'nothing'; allowed: MODULE:NAME"),
    (dict(from_model="torch.nn:Linear", options=("in_features=3", "out_features=3"), input="4"),
     "input: Linear does not run on 16 x (4,)"),
    (dict(device="tpu"), "device: 'tpu'; allowed"), (dict(reruns=0), "reruns: 0; allowed"),
    (dict(dtypes=("int8",)), "dtypes: 'int8'; allowed here: float32"), (dict(width=0), "width: 0; allowed")])
def test_errors(wrong, named):
    with pytest.raises(ValueError) as error: Probe(**wrong)()
    assert named in str(error.value)


def test_exit_codes(tmp_path, monkeypatch, capsys):
    (tmp_path/"theirs.py").write_text("from torch import nn\ndef net(): return nn.Linear(37, 37)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    asked = dict(from_model="theirs:net", input="37", batches="8", reruns=1, processes=0)
    assert Probe(**asked, json=tmp_path/"a.json", fail_on="nondeterministic")() == 0
    assert "p < 1" in capsys.readouterr().out
    assert Probe(compare=(tmp_path/"a.json", tmp_path/"a.json"))() == 0
    assert "No verdict differs" in capsys.readouterr().out
    unequal = read_probe(tmp_path/"a.json").batch_invariant.eq(False).any()
    assert Probe(**asked, fail_on="batch-dependent")() == int(unequal)


def test_the_default_set_holds_all_that_must_be_found():
    asked = {(o.name, o.shape) for o in operations()}
    wanted = [convolution(8, 32, 32, (2, 2))[2], *linear(8, 37, 37), chunk_sum(8, 37, 37), all_reduce(3, 4096),
              *accumulations(8, 36864)[:2], *(o for c, p in ((16, 32), (32, 16), (64, 8))
                                              for o in convolution(8, c, c, (p, p)))]
    assert {(o.name, o.shape) for o in wanted} <= asked


def test_what_a_network_calls_is_asked_at_its_shapes_and_what_is_not_is_said(capsys):
    asked = dict(input="7", tokens=11, batches="4,3", reruns=1, processes=0)
    code = Probe(from_model="test_hardware:Reader", **asked)()
    printed = capsys.readouterr().out
    assert code == 0 and "Called, but not asked: lstm." in printed and "head" in printed and "embedding" in printed
    table = probe("cpu", Reader().double(), input=(7,), tokens=11, batches=(4,), reruns=1)
    assert set(table.dtype) == {"float64"} and table.attrs["missed"] == dict(lstm=1)


class Reader(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.body = torch.nn.Embedding(11, 8), torch.nn.LSTM(8, 6, batch_first=True)
        self.head = torch.nn.Linear(6, 11)

    def forward(self, x): return self.head(self.body(self.table(x))[0])


def test_the_command_lets_waiting_threads_sleep():
    """Said before torch is loaded, which reads it then."""
    code = ("import sys, os; from symbreak.cli import parse; parse('probe', []); "
            "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)")
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.split() == ["passive", "False"]


def test_racing_sizes_and_cores():
    large, small = (accumulations(8, c)[0] for c in (36864, 512))
    assert large.sizes["k"] * large.sizes["c"] >= 32768 > small.sizes["k"] * small.sizes["c"] and cores() >= 1
