"""What the training loop costs over bare forward + backward + step on one fixed batch, side by side in one process.

    python benchmarks/loop_overhead.py [--rounds 7] [--write]

Each round times, in turns, the same number of steps (a) on a fixed batch and (b) as an epoch of the loop: shuffled and
augmented batches, loss and accuracy, metrics as JSON lines. It also times (c) one measurement of diversity and (d) one
pass over the test images. `loop` is (b) over (a); `loop + measuring` adds (c), spread over the epochs between
measurements and over the images of a full epoch, and is what must stay below 5 %. Testing is real work on other images,
so it has its own column. The 32x32 images are a fiftieth of CIFAR-10, so there (c) and (d) are scaled to its 50,000
training and 10,000 test images. Medians over rounds.
"""
import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace

import pandas as pd
import torch
from torch.nn import functional as F

from page import write
from symbreak.config import Config
from symbreak.data import Dataset, load
from symbreak.diversity import measure
from symbreak.provenance import provenance
from symbreak.train import Trainer, accuracy, run_epoch


def random_images(train: int = 1024, test: int = 256, size: int = 32) -> Dataset:
    """A stand-in for CIFAR-10: what the pixels show does not change what a step costs."""
    g = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (n, 3, size, size), generator=g, dtype=torch.uint8) for n in (train, test)]
    labels = [torch.arange(n) % 10 for n in (train, test)]
    return Dataset("random", "random images", images[0], labels[0], images[1], labels[1], tuple("0123456789"),
                   (0.5,) * 3, (0.25,) * 3, "crop_flip", 4)


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def bare_steps(trainer: Trainer, batches: list) -> None:
    """The same batch sizes as an epoch, on batches that were made beforehand."""
    trainer.model.train()
    for x, y in batches:
        loss = F.cross_entropy(trainer.model(x), y)
        trainer.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trainer.optimizer.step()


def epoch_and_log(trainer: Trainer, file) -> None:
    file.write(json.dumps(run_epoch(trainer)) + "\n")
    file.flush()


def compare(config: Config, data: Dataset, rounds: int, full_train: int, full_test: int) -> dict:
    """Median seconds of every part, and the overheads in an epoch of `full_train` images."""
    epochs_worth = full_train / len(data.train_labels)
    trainer = Trainer(config, data, torch.device("cpu"))
    loader = trainer.train_data
    x, y = next(iter(loader))
    whole, left = divmod(len(loader.images), config.batch_size)
    batches = [(x[:n], y[:n]) for n in [config.batch_size] * whole + [left] if n]
    times = {"bare": [], "loop": [], "measuring": [], "testing": []}
    with tempfile.TemporaryFile("w") as file:
        for round_ in range(rounds + 1):  # the first one warms up
            row = dict(bare=seconds(lambda: bare_steps(trainer, batches)),
                       loop=seconds(lambda: epoch_and_log(trainer, file)),
                       measuring=seconds(lambda: measure(trainer.model,
                                                         trainer.probe)), testing=seconds(lambda: accuracy(trainer)))
            for name, value in row.items() if round_ else ():
                times[name].append(value)
    bare = times["bare"]
    def overhead(values): return 100 * statistics.median(v / b - 1 for v, b in zip(values, bare))
    measured = [loop + m / config.measure_every / epochs_worth for loop, m in zip(times["loop"], times["measuring"])]
    return dict(steps=len(batches), bare_s=statistics.median(bare), loop=overhead(times["loop"]),
                measured=overhead(measured),
                testing=100 * full_test / len(data.test_labels) / epochs_worth
                * statistics.median(t / b for t, b in zip(times["testing"], bare)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="into benchmarks/README.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = Config(depth=10, width=2, init="he", lr=0.01)
    cases = (("digits 8x8, k=2", replace(base, measure_every=2), load("digits"), 1437, 360),
             ("32x32, k=2", base, random_images(), 50_000, 10_000))
    rows = []
    for name, config, data, full_train, full_test in cases:
        r = compare(config, data, options.rounds, full_train, full_test)
        rows.append({"": name, "steps": r["steps"], "bare": f"{r['bare_s']:.3f} s", "loop": f"{r['loop']:+.1f} %",
                     "loop + measuring (must be at most 5 %)": f"{r['measured']:+.1f} %",
                     "testing, beside it": f"{r['testing']:.1f} %"})
        print(*rows[-1].values(), sep="  ", flush=True)
    where = provenance(torch.device("cpu"))
    small_print = (f"{where['device_name']}, {where['threads']} thread(s), torch {where['torch']}, commit "
                   f"{where['commit']}, median of {options.rounds} rounds.")
    if options.write: write("loop", pd.DataFrame(rows).to_markdown(index=False), small_print)
    print(small_print)


if __name__ == "__main__":
    main()
