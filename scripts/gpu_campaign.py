"""The paper's experiments on one GPU, in pieces of minutes: the same command goes on.

    python scripts/gpu_campaign.py --images cifar10-jpeg.tar.xz --minutes 9 --out DIR
    python scripts/gpu_campaign.py --import DIR/results.tar.gz

The first form works through a fixed order: a speed table; every arithmetic twice; the first three of the paper's
curves of fig04 at profile `sprint`; abl03 at profile `paper`; the other curves; the probe; fig07 at `paper`; fig06
and the rest of fig04 at `sprint`. What comes before the paper's curves, and what is only asked beside them, may take
so many seconds and comes back at the end with what it had no time for. After every run it writes results.tar.gz, the
small files of all runs, and STATUS.md, which says what is done and what comes next. Checkpoints stay in runs/: a
machine without them begins anew what was not finished. The second form puts such a file into results/gpu, where
figures, and later campaigns, find what is in it.
Needs this checkout, torch, pandas and Pillow, and nothing to draw with.
"""
import argparse
import json
import math
import re
import shutil
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # nothing need be installed

import torch
from torch.utils.flop_counter import FlopCounterMode

from symbreak import profiles
from symbreak.cache import cache_dir, find_folder
from symbreak.config import Config, resolve_device
from symbreak.data import Dataset, load
from symbreak.experiments import Request, plan
from symbreak.files import home
from symbreak.hardware import probe as ask, save_probe
from symbreak.nets import ConstNet
from symbreak.numerics import numerics
from symbreak.plans import ATOMIC
from symbreak.provenance import provenance
from symbreak.records import RunFiles, is_finished, write_json
from symbreak.runs import Store, copy_small, default_store
from symbreak.train import Trainer, learn, train

DIGEST = "060f3df6f41050d54e8fac7ee0e9cb7ba591e9bb6bc20b1d1784fafbdcba59dc"  # of the tensors that Pillow 12 decodes
LABEL = "CIFAR-10 (JPEG re-encoded)"
CURVES = ("He init", "hardware noise", "deterministic", "dropout 1 %", "hardware noise + dropout")  # fig04's, in order
PEAK = {"H100": dict(tf32=495, bf16=989, float32=67), "H200": dict(tf32=495, bf16=989, float32=67),
        "A100": dict(tf32=156, bf16=312, float32=19.5)}  # dense TFLOP/s, by the maker's data sheets


@dataclass
class Campaign:
    """Where everything is, when to stop, and what has been done and has failed so far."""
    out: Path
    device: torch.device
    deadline: float  # by time.monotonic
    store: Store
    data: Dataset
    where: dict  # versions and hardware, asked for while the device is there
    done: dict[str, str] = field(default_factory=dict)  # task -> what came of it
    failed: dict[str, str] = field(default_factory=dict)  # task, or what else failed -> why

    def spent(self) -> bool: return time.monotonic() >= self.deadline

    def path(self, name: str) -> Path: return self.store.root / "gpu" / name

    def log(self, what: str, error: BaseException) -> None:
        """Keep what went wrong, once."""
        if what in self.failed: return
        self.failed[what] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        with (self.out / "errors.log").open("a") as log: log.write(f"== {what}\n{traceback.format_exc()}\n")


# images

def images_of(archive: Path | None, source: str) -> Dataset:
    """The images of the profiles, unpacked if they are not there yet; others under a label of their own."""
    if archive is not None and not (cache_dir() / "cifar10-jpeg" / "LABEL").exists():
        folder = cache_dir() / "cifar10-jpeg"
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar: tar.extractall(folder, filter="data")
        (folder / "LABEL").write_text(LABEL)
    data = load(source, progress=False)
    if source == "folder:cifar10-jpeg" and data.digest != DIGEST:
        print("These images decode to other pixels than those of the committed results; they get another label.")
        (find_folder(Path("cifar10-jpeg"), cache_dir()) / "LABEL").write_text(f"{LABEL}, digest {data.digest[:8]}")
        data = load(source, progress=False)
    return data


# tasks

class Task(NamedTuple):
    name: str
    do: Callable[[], str]  # does it and says what came of it
    config: Config | None = None  # of the run that it trains


def is_cuda_error(error: BaseException) -> bool:
    """Whether the device is lost to this process."""
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)


def tries(campaign: Campaign) -> dict[str, list[int]]:
    """Of each task, how many processes began it after which epoch and did not come back from it."""
    path = campaign.path("tries")
    return json.loads(path.read_text()) if path.exists() else {}


def attempt(campaign: Campaign, task: Task) -> None:
    """Do it; an error is logged and the next thing begins, unless the device is gone: twice is enough for one task."""
    before, what = tries(campaign), task.name
    epoch = campaign.store.saved_epochs(task.config) if task.config else 0
    times, since = before.get(what, [0, epoch])
    if epoch > since: times = 0  # it came further: somebody else ended that process
    write_json(campaign.path("tries"), before | {what: [times + 1, epoch]})
    try:
        if times >= 2: raise RuntimeError("took the process or the device with it, twice")
        campaign.done[what] = task.do()
        before.pop(what, None)  # it came back
    except KeyboardInterrupt:  # not its fault
        write_json(campaign.path("tries"), before)
        raise
    except Exception as error:
        if is_cuda_error(error): raise
        campaign.log(what, error)
    write_json(campaign.path("tries"), before)
    print(f"{what}: {campaign.done.get(what, 'failed')}", flush=True)
    save(campaign, f"the same command goes on after {what}")


def run_one(campaign: Campaign, config: Config) -> str:
    """Train one configuration as far as the time allows."""
    images = campaign.data.subset(config.train_size, config.test_size)
    if (found := campaign.store.load(config, images)) is None:
        seldom = 120. if config.epochs > 4 else math.inf  # seconds; what is short is soon done again
        found = train(config, campaign.store.folder(config), stop=campaign.spent, data=images,
                      checkpoint_every_s=seldom)
    last = found.history.iloc[-1]
    accuracy = last.get("test_accuracy", float("nan"))
    return f"{found.record['status']}, {found.record['epochs_done']} epochs, {100 * accuracy:.1f} % test accuracy"


def figure(campaign: Campaign, name: str, profile: str, curve: str | None = None) -> Iterator[Task]:
    """The runs of a figure, or of one of its curves, in the order of its plan."""
    planned = [p for p in plan(Request(name, profile, str(campaign.device))) if curve in (None, p.curve)]
    if not planned: raise ValueError(f"curve: {curve!r}, which {name} has not at profile {profile}")
    for p in planned:
        again = ", again" * p.config.rerun
        yield Task(f"{name} at {profile}: {p.curve}, seed {p.config.seed}{again}",
                   lambda c=p.config: run_one(campaign, c), p.config)


# (1) speed

def training_flop(config: Config, data: Dataset) -> float:
    """FLOP of a training image: three times those of its forward pass."""
    net = ConstNet(config.depth, config.width, data.num_classes, data.in_channels).to("meta")
    with FlopCounterMode(display=False) as counter: net(torch.empty(1, *data.train_images.shape[1:], device="meta"))
    return 3. * counter.get_total_flops()


def seconds_per_step(config: Config, data: Dataset, device: torch.device, steps: int) -> float:
    """Time of a training step after as many to warm up."""
    def wait():
        if device.type == "cuda": torch.cuda.synchronize(device)
    with numerics(config.deterministic, config.precision == "tf32", config.benchmark):
        trainer = Trainer(config, data, device)
        batches = iter(trainer.train_data)
        for _ in range(steps): learn(trainer, *next(batches))
        wait()
        began = time.perf_counter()
        for _ in range(steps): learn(trainer, *next(batches))
        wait()
        return (time.perf_counter() - began) / steps


def in_new_process(function: Callable, *arguments):
    """What a function returns where nothing has run before; its errors say nothing of the device here."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        error = (work := pool.submit(function, *arguments)).exception()
    if error: raise RuntimeError(f"a process of its own: {str(error).replace('CUDA error', 'error')}")
    return work.result()


def precisions(device: torch.device) -> tuple[str, ...]:
    return ("tf32", "bf16", "float32") if device.type == "cuda" else ("float32",)


def kinds_of_steps(device: torch.device) -> list[dict]:
    """What a step may be, the most wanted first and what takes long to begin last."""
    formats = [[dict(precision=p, channels_last=last) for p in precisions(device)] for last in (True, False)]
    usual = formats[0][0]
    return [*formats[0], usual | dict(deterministic=True), usual | ATOMIC, *formats[1], usual | dict(dropout=0.01),
            usual | ATOMIC | dict(deterministic=True), usual | dict(quotient=True, precision="float32"),
            *(kind | dict(benchmark=True) for kind in formats[0]), usual | dict(compile=True)]


def speed_table(campaign: Campaign) -> Iterator[Task]:
    """Steps of every kind: one that fails says so now and not in hours."""
    path, base = campaign.path("speed.json"), profiles.PROFILES["sprint"].base
    card = campaign.where["device_name"]
    rows = json.loads(path.read_text()) if path.exists() else []

    def measure(kind: dict) -> str:
        features = {} if "quotient" in kind else dict(init="he")  # products of zeros are quicker than others
        config = replace(base, warmup=0, **features, **kind)
        steps = min(20, len(campaign.data.train_labels) // config.batch_size // 2)
        few = campaign.data.subset(2 * steps * config.batch_size)
        timed = seconds_per_step, config, few, campaign.device, steps
        s = in_new_process(*timed) if config.benchmark else timed[0](*timed[1:])  # cuDNN keeps to its first choice
        wide = 0. if config.quotient else training_flop(config, campaign.data)
        flop = wide * config.batch_size / s / 1e12
        peak = next((p for name, p in PEAK.items() if name in card), {})
        share = flop / peak[config.precision] if config.precision in peak else None
        epoch = s * -(-len(campaign.data.train_labels) // config.batch_size)
        rows.append(dict(card=card, kind=kind, step_s=s, epoch_s=epoch, tflops=flop or None, share_of_peak=share))
        write_json(path, rows)
        return f"{epoch:.1f} s per epoch, {flop:.1f} TFLOP/s" + (f", {100 * share:.0f} % of peak" if share else "")

    for kind in kinds_of_steps(campaign.device):
        if (card, kind) not in [(row["card"], row["kind"]) for row in rows]:
            yield Task(f"speed: {' '.join(f'{k}={v}' for k, v in kind.items())}", lambda k=kind: measure(k))


# (2) every arithmetic twice

def pairs(campaign: Campaign) -> Iterator[Task]:
    """50 steps from one seed, twice: equal bits? one feature left?"""
    base = profiles.PROFILES["sprint"].base
    size = min(50 * base.batch_size, len(campaign.data.train_labels))
    base = replace(base, epochs=1, warmup=0, train_size=size, test_size=min(1000, len(campaign.data.test_labels)),
                   schedule="constant", device=str(campaign.device))

    def compare(kind: dict) -> str:
        runs = []
        for rerun in (0, 1):
            config = replace(base, rerun=rerun, **kind)
            images = campaign.data.subset(config.train_size, config.test_size)
            runs.append(campaign.store.train(config, data=images, checkpoint_every_s=math.inf))
        equal = len({run.record["digests"]["end"] for run in runs}) == 1
        asymmetry = runs[0].history.asymmetry.iloc[-1]
        return f"{'equal' if equal else 'different'} bits, asymmetry {asymmetry:.1e}"

    for more in ({}, ATOMIC):
        for precision in precisions(campaign.device):
            for deterministic in (False, True):
                kind = dict(precision=precision, deterministic=deterministic, **more)
                yield Task(f"twice: {' '.join(f'{k}={v}' for k, v in kind.items())}", lambda k=kind: compare(k))


# (3) the probe

def probe(campaign: Campaign) -> Iterator[Task]:
    """What each operation does at the shapes of the network, as torch comes and under the switch."""
    width, card = profiles.PROFILES["sprint"].base.width, re.sub(r"\W+", "-", campaign.where["device_name"])
    is_gpu = campaign.device.type == "cuda"

    def measure(dtype: str, path: Path) -> str:
        settings = ("default", "deterministic", *(("ieee",) if is_gpu and dtype == "float32" else ()))
        table = ask(str(campaign.device), width=width, dtypes=(dtype,), settings=settings)
        save_probe(table, path)
        return f"{len(table)} rows"

    for dtype in ("float32", "bfloat16") if is_gpu else ("float32",):
        path = campaign.path(f"probe-{card}-{dtype}.json")
        if not path.exists(): yield Task(f"probe: {dtype}", lambda what=(dtype, path): measure(*what))


# what is left behind

def save(campaign: Campaign, ahead: str) -> None:
    """results.tar.gz and STATUS.md."""
    small, packed = campaign.store.root / "small", campaign.store.root / "results.tar.gz"
    for files in map(RunFiles, sorted(campaign.store.root.glob("[0-9a-f]" * 12))):
        try:
            if files.config.exists() and not is_finished(small / files.folder.name): copy_small(files.folder, small)
        except (OSError, ValueError) as error: campaign.log(f"copy of {files.folder.name}", error)
    write_status(campaign, ahead)
    with tarfile.open(packed, "w:gz") as tar:
        if small.exists(): tar.add(small, "runs")
        if campaign.path("").exists(): tar.add(campaign.path(""), "gpu")
        for name in ("STATUS.md", "errors.log"):
            if (campaign.out / name).exists(): tar.add(campaign.out / name, name)
    temporary = campaign.out / ".results.tar.gz"
    shutil.copyfile(packed, temporary)
    temporary.replace(campaign.out / "results.tar.gz")


def measured(campaign: Campaign) -> list[str]:
    """Files with what this and earlier calls have measured, in words."""
    found = {path.name: json.loads(path.read_text()) for path in sorted(campaign.path("").glob("*.json"))}
    return [f"{name}: {len(rows if isinstance(rows, list) else rows['rows'])} rows" for name, rows in found.items()]


def write_status(campaign: Campaign, ahead: str) -> None:
    """What is done, what failed, and what the next call does."""
    where = campaign.where
    lines = ["# GPU campaign", "", f"{where['device_name']}, torch {where['torch']}, CUDA {where['cuda']}, "
             f"cuDNN {where['cudnn']}, driver {where['driver']}, commit {where['commit']}", "",
             *(f"- {what}: {came}" for what, came in campaign.done.items()),
             *(f"- measured, in {name}" for name in measured(campaign)), "",
             *(f"- FAILED {what}: {why}" for what, why in campaign.failed.items()), "",
             f"Next: {ahead}"]
    (campaign.out / "STATUS.md").write_text("\n".join(lines) + "\n")


def parts(campaign: Campaign) -> Iterator[tuple[float, Iterator[Task]]]:
    """All tasks in their order, in parts that may take so many seconds."""
    yield 60, speed_table(campaign)
    yield 90, pairs(campaign)
    for curve in CURVES[:3]: yield math.inf, figure(campaign, "fig04", "sprint", curve)
    yield 180, figure(campaign, "abl03", "paper")
    for curve in CURVES[3:]: yield math.inf, figure(campaign, "fig04", "sprint", curve)
    yield 60, probe(campaign)
    yield 60, figure(campaign, "fig07", "paper")
    for name in ("fig06", "fig04"): yield math.inf, figure(campaign, name, "sprint")


def work_through(campaign: Campaign) -> str:
    """The tasks, first as far as their parts may go, then the rest, until the time is up; what comes next."""
    for is_last in (False, True):
        for seconds, part in parts(campaign):
            until = math.inf if is_last else time.monotonic() + seconds
            for task in part:
                if task.name in campaign.done or task.name in campaign.failed: continue
                if campaign.spent(): return task.name
                if time.monotonic() >= until: break
                attempt(campaign, task)
                if campaign.done.get(task.name, "").startswith("paused"): return task.name
    return "nothing: all is done"


def bring_measurement(path: Path, content: bytes) -> None:
    """Keep a file of measurements; the speed table gains the rows that it has not."""
    rows = json.loads(content)
    if path.name == "speed.json" and path.exists():
        ours = json.loads(path.read_text())
        have = [(row["card"], row["kind"]) for row in ours]
        rows = ours + [row for row in rows if (row["card"], row["kind"]) not in have]
    write_json(path, rows)


def bring_in(archive: Path, target: Path) -> int:
    """Put finished runs and measurements of results.tar.gz into an archive of the repository; how many runs it has."""
    kept = {path.name for path in RunFiles(Path()).kept}
    finished = {path.parent.name for path in target.glob("*/record.json") if is_finished(path.parent)}
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            parts = Path(member.name).parts
            if re.fullmatch(r"gpu/[\w-]+\.json", member.name):
                bring_measurement(target / parts[1], tar.extractfile(member).read())
            if not member.isfile() or len(parts) != 3 or parts[0] != "runs" or parts[2] not in kept: continue
            if not re.fullmatch("[0-9a-f]{12}", parts[1]): raise ValueError(f"{archive}: unexpected {member.name}")
            if parts[1] in finished: continue
            folder = target / parts[1]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / parts[2]).write_bytes(tar.extractfile(member).read())
    folders = sorted(path.parent for path in target.glob("*/config.json"))
    for folder in folders:
        found = Config.from_dict(json.loads(RunFiles(folder).config.read_text())).hash
        if found != folder.name: raise ValueError(f"{folder}: holds the run {found}; delete the folder")
    unfinished = [folder for folder in folders if not RunFiles(folder).record.exists() or not is_finished(folder)]
    for folder in unfinished: shutil.rmtree(folder)
    return len(folders) - len(unfinished)


def rehearse() -> None:
    """Networks of width 1, two epochs, digits: every piece works, on a CPU too, but for TF32 there."""
    small = dict(data="digits", width=1, epochs=2, batch_size=64, precision="float32")
    for name in ("paper", "sprint"):
        profile = profiles.PROFILES[name]
        profiles.PROFILES[name] = replace(profile, base=replace(profile.base, **small, depth=7),
                                          leaky=replace(profile.leaky, **small))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="archive of an image folder with train/CLASS/* and test/CLASS/*")
    parser.add_argument("--minutes", type=float, default=9., help="pause cleanly after that many (default 9)")
    parser.add_argument("--out", type=Path, default=Path("gpu-campaign"), help="where results.tar.gz and STATUS.md go")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--rehearse", action="store_true", help="everything at reduced size, on digits")
    parser.add_argument("--import", dest="bring", type=Path, metavar="results.tar.gz", help="fill results/gpu from it")
    options = parser.parse_args(argv)
    if options.bring is not None:
        print(f"{bring_in(options.bring, home() / 'results' / 'gpu')} finished runs in results/gpu")
        return 0
    device = resolve_device(options.device)
    if options.rehearse: rehearse()
    elif options.device == "auto" and device.type == "cpu":
        parser.error("--device: torch sees no GPU here; allowed: --rehearse, or --device cpu for weeks of work")
    options.out.mkdir(parents=True, exist_ok=True)
    store = default_store()
    if options.rehearse: store = Store(store.root / "rehearsal")
    (store.root / "gpu").mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    for path in [] if options.rehearse else (home() / "results" / "gpu").glob("*.json"):  # measured by earlier ones
        if not (store.root / "gpu" / path.name).exists(): shutil.copy(path, store.root / "gpu")
    data = images_of(options.images, profiles.PROFILES["sprint"].base.data)
    campaign = Campaign(options.out, device, deadline, store, data, provenance(device))
    print(f"{data}; {json.dumps(asdict(profiles.PROFILES['sprint'].base))}", flush=True)
    try: ahead, code = work_through(campaign), 0
    except Exception as error:
        if not is_cuda_error(error): raise
        campaign.log("the device", error)
        ahead, code = "the same command, in a new process: the device was lost", 1
    save(campaign, ahead)
    print(f"Next: {ahead}")
    return code


if __name__ == "__main__":
    sys.exit(main())
