"""Speed as ratios, each measured side by side: what `benchmarks/README.md` shows.

    python benchmarks/ratios.py [--rounds 5] [--write]

Every pair is timed in turns, round by round, on one thread; what is printed is the median of the ratios and their
range. Pairs: the loop against a customary one, at 32x32, and with freed memory kept against handed back, each in a
process of its own, since how memory is kept holds for a whole process; a step of the quotient against one of the wide
network, at the paper's size; atomic additions against plain ones; and what a start costs beside importing torch.
"""
import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import pandas as pd
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as Images

from loop_overhead import random_images, seconds
from page import write
from symbreak.cache import import_torchvision
from symbreak.config import Config
from symbreak.data import Dataset, load
from symbreak.nets import ConstNet
from symbreak.numerics import cpu_threads
from symbreak.provenance import provenance
from symbreak.quotient import quotient
from symbreak.train import Trainer, run_epoch



class Pictures(Images):
    """Images as torchvision's CIFAR10 hands them out: one PIL image at a time, transformed by the worker."""

    def __init__(self, data: Dataset):
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in data.train_images]
        self.labels = data.train_labels.tolist()
        transforms = import_torchvision().transforms
        self.transform = transforms.Compose([
            transforms.RandomCrop(32, padding=data.pad, padding_mode="reflect"), transforms.RandomHorizontalFlip(),
            transforms.ToTensor(), transforms.Normalize(data.mean, data.std)])

    def __len__(self) -> int: return len(self.images)

    def __getitem__(self, i: int) -> tuple: return self.transform(self.images[i]), self.labels[i]


def customary_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, batches: DataLoader) -> float:
    """The loop of most tutorials: a worker that transforms PIL images, and `.item()` after every step."""
    model.train()
    loss_sum = correct = 0
    for x, y in batches:
        optimizer.zero_grad()
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(y)
        correct += (logits.argmax(1) == y).sum().item()
    return loss_sum / len(batches.dataset)


def in_turns(one: Callable, other: Callable, rounds: int) -> list[float]:
    """Seconds of one over those of the other, by round; the first warms up."""
    return [seconds(one) / seconds(other) for _ in range(rounds + 1)][1:]


AS_IT_COMES = {"GLIBC_TUNABLES": ""}  # the environment in which `keep_freed_memory` leaves the C library alone


@contextmanager
def elsewhere(loop: str, width: int, layout: str, one_core: bool = False, environment: dict = {}):
    """A function that waits for an epoch of a loop in a process of its own."""
    command = [sys.executable, __file__, "--epochs-of", loop, str(width), layout, *["one core"] * one_core]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env=os.environ | environment) as process:
        def epoch():
            process.stdin.write("\n")
            process.stdin.flush()
            if process.stdout.readline() != "done\n": raise RuntimeError(f"{' '.join(command)} ended")
        yield epoch
        process.stdin.close()


def serve(loop: str, width: str, layout: str, one_core: str = "") -> None:
    """An epoch for every line of standard input."""
    if one_core: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    data = random_images(1280)
    config = Config(depth=10, width=int(width), init="he", lr=0.01, batch_size=128,
                    channels_last=layout == "channels last")
    trainer = Trainer(config, data, torch.device("cpu"))
    batches = DataLoader(Pictures(data), config.batch_size, shuffle=True, num_workers=1)
    for _ in sys.stdin:
        if loop == "ours": run_epoch(trainer)
        else: customary_epoch(trainer.model, trainer.optimizer, batches)
        print("done", flush=True)


def customary(rounds: int):
    """How many times longer the customary loop takes, one thread each and a worker for it."""
    for width in (1, 2):
        for layout, one_core in (("channels last", False), ("contiguous", False), ("channels last", True)):
            with elsewhere("customary", width, layout, one_core, AS_IT_COMES) as theirs, \
                 elsewhere("ours", width, layout, one_core) as ours:
                where = ", on one core with its worker" if one_core else ""
                yield f"customary loop / ours, 32x32, k={width}, {layout}{where}", in_turns(theirs, ours, rounds)


def kept(rounds: int):
    """What it costs to hand freed memory back to the system."""
    for width in (1, 2):
        with elsewhere("ours", width, "channels last", environment=AS_IT_COMES) as handed_back, \
             elsewhere("ours", width, "channels last") as ours:
            yield f"freed memory handed back / kept, an epoch of 32x32, k={width}", in_turns(handed_back, ours, rounds)


def step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()


def collapsed(rounds: int):
    """How many times cheaper a step of the quotient is, forward and backward, at the paper's size."""
    wide = ConstNet(16, 10)
    small = quotient(wide)
    for count in (16, 128):  # the recipe's is the second
        x, y = torch.randn(count, 3, 32, 32), torch.arange(count) % 10
        yield (f"wide step / quotient step, ConstNet-16-10, 32x32, batch {count}",
               in_turns(lambda: step(wide, x, y), lambda: step(small, x, y), min(rounds, 3)))


def noisy(rounds: int):
    """What weight gradients cost when two threads add their terms."""
    for name, data, width in (("digits 8x8, k=2", load("digits"), 2), ("32x32, k=1", random_images(1280), 1)):
        plain = Config(depth=7, width=width, batch_size=48, lr=0.05, channels_last=True)
        atomic = replace(plain, reduction="atomic", reduction_chunks=8, threads=2)
        plain, atomic = (Trainer(config, data, torch.device("cpu")) for config in (plain, atomic))
        yield (f"atomic additions / plain, an epoch of {name}",
               in_turns(lambda: run_epoch(atomic), lambda: run_epoch(plain), rounds))


def started(rounds: int):
    """What a start costs, beside importing torch."""
    def runs(*code): return lambda: subprocess.run([sys.executable, *code], check=True, capture_output=True)
    torch_alone = runs("-c", "import torch")
    for name, command in {"import symbreak": ("-c", "import symbreak"), "symbreak --help": ("-m", "symbreak", "--help"),
                          "from symbreak import check": ("-c", "from symbreak import check")}.items():
        yield f"`{name}` / `import torch`", in_turns(runs(*command), torch_alone, rounds)


def measured(rounds: int) -> pd.DataFrame:
    rows = []
    for group in (customary, kept, collapsed, noisy, started):
        for what, ratios in group(rounds):
            rows.append({"ratio": what, "median": f"{statistics.median(ratios):.2f}",
                         "range": f"{min(ratios):.2f} to {max(ratios):.2f}", "rounds": len(ratios)})
            print(*rows[-1].values(), sep="  ", flush=True)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="into benchmarks/README.md")
    parser.add_argument("--epochs-of", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.epochs_of: return serve(*options.epochs_of)
    began = time.perf_counter()
    with cpu_threads(1): table = measured(options.rounds)
    where = provenance(torch.device("cpu"))
    small_print = (f"{where['device_name']}, one thread, torch {where['torch']}, commit {where['commit']}, "
                   f"{time.perf_counter() - began:.0f} s in all.")
    if options.write: write("ratios", table.to_markdown(index=False), small_print)
    print(small_print)


if __name__ == "__main__":
    main()
