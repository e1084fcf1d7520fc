"""Where the time of an epoch goes: shares of the operations, and of the page faults that all of them pay.

    python benchmarks/epoch_profile.py [--widths 1 2] [--batch-size 128] [--depth 10] [--write]

Shares of processor time are those of PyTorch's profiler, on one thread, at 32x32 and channels last, with freed memory
kept. What it costs to hand freed memory back is counted in a process of its own, by the operating system: the time that
it spends itself, and the faults.
"""
import argparse
import os
import resource
import subprocess
import sys

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

from loop_overhead import random_images
from page import write
from ratios import AS_IT_COMES
from symbreak.config import Config
from symbreak.provenance import provenance
from symbreak.train import Trainer, run_epoch

KINDS = {"convolution (oneDNN)": ("convolution",), "batch norm": ("batch_norm",),
         "ReLU": ("threshold", "clamp", "relu"), "sums with skips": ("aten::add",)}


def kind(operation: str) -> str:
    """What an operation is counted as."""
    return next((name for name, parts in KINDS.items() if any(part in operation for part in parts)), "all else")


def trainer(width: int, batch_size: int, depth: int) -> Trainer:
    """One that has been through an epoch."""
    config = Config(depth=depth, width=width, init="he", lr=0.01, batch_size=batch_size, channels_last=True)
    made = Trainer(config, random_images(1280), torch.device("cpu"))
    run_epoch(made)
    return made


def shares(made: Trainer) -> pd.Series:
    """Of an epoch's processor time, by kind of operation."""
    with profile(activities=[ProfilerActivity.CPU]) as found: run_epoch(made)
    times = pd.Series({event.key: event.self_cpu_time_total for event in found.key_averages()})
    times = times.groupby([kind(name) for name in times.index]).sum()
    return (times / times.sum())[[*KINDS, "all else"]]


def faults(made: Trainer) -> None:
    """Print seconds of the program and of the system, and page faults, of an epoch; the smallest of five."""
    def used():
        before = resource.getrusage(resource.RUSAGE_SELF)
        run_epoch(made)
        after = resource.getrusage(resource.RUSAGE_SELF)
        return (after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt)
    print(*min(used() for _ in range(5)))


def counted(size: tuple[int, ...], environment: dict) -> list[float]:
    """What `faults` prints in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--faults", *map(str, size)], env=os.environ | environment,
                          check=True, capture_output=True, text=True)
    return [float(number) for number in done.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--depth", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="into benchmarks/README.md")
    parser.add_argument("--faults", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.faults: return faults(trainer(*options.faults))
    table = {}
    for width in options.widths:
        size = (width, options.batch_size, options.depth)
        column = {name: f"{share:.1%}" for name, share in shares(trainer(*size)).items()}
        for name, environment in {"handed back": AS_IT_COMES, "kept": {}}.items():
            program, system, count = counted(size, environment)
            column[f"system, memory {name}"] = f"{system / (program + system):.1%}, {count:,.0f} faults"
        table[f"k={width}"] = column
    where, shown = provenance(torch.device("cpu")), pd.DataFrame(table).to_markdown()
    small_print = f"{where['device_name']}, one thread, torch {where['torch']}, commit {where['commit']}."
    if options.write: write("profile", shown, small_print)
    print(shown, small_print, sep="\n\n")


if __name__ == "__main__":
    main()
