"""Every field of a configuration moves something, and the recipe is that of a loop in plain torch, to the bit."""
from dataclasses import fields, replace

import pytest
import torch
from torch.nn import functional as F

from symbreak.config import Config
from symbreak.data import load
from symbreak.nets import ConstNet, LeakyNet, UniqueFeatureMLP
from symbreak.train import Trainer, train

BASE = dict(train_size=64, test_size=40, depth=7, width=1, epochs=2, batch_size=24, device="cpu")


# every field matters: what is looked at, under a configuration

def weights(config): return train(config).record["digests"]
def switches(config): return train(config).record["switches"]
def strides(config): return [p.stride() for p in train(config).model.parameters()]
def compiled(config): return type(Trainer(config, load().subset(64, 40), torch.device("cpu")).forward)


def measures(config):
    run = train(config)
    return run.metrics, run.steps


def threads(config):
    during = []
    train(config, report=lambda *_: during.append(torch.get_num_threads()))
    return during


def outcome(config):
    """Where it was trained, or why it was not: this process may lack a GPU, and has one set of instructions."""
    try: return train(config).record["device"]
    except ValueError as refused: return str(refused).split(",")[0]


LEAKY, MLP = dict(net="LeakyNet"), dict(net="UniqueFeatureMLP", width=8, depth=Config.depth)
CHANGES = {  # field -> another value, what is not the same under it, the rest of the configuration
    "data": (..., weights, {}),  # a folder of images, see below
    "train_size": (48, weights, {}),
    "test_size": (30, measures, {}),
    "augment": ("crop", weights, {}),
    "net": ("LeakyNet", weights, {}),
    "depth": (10, weights, {}),
    "width": (2, weights, {}),
    "init": ("he", weights, {}),
    "skip": ("rectified", weights, {}),
    "slope": (0.1, weights, LEAKY),
    "distinct": (2, weights, MLP),
    "dropout": (0.1, weights, {}),
    "weight_noise": (1e-3, weights, {}),
    "gradient_noise": (1e-3, weights, {}),
    "gradient_ulps": (1, weights, {}),
    "reduction": ("element", weights, dict(init="he")),
    "reduction_chunks": (3, weights, dict(init="he", reduction="element")),
    "ulp_layer": ("stem", weights, {}),
    "ulp_step": (2, weights, dict(ulp_layer="stem")),
    "input_noise": (0.1, weights, {}),
    "quotient": (True, weights, {}),
    "copies": (3, weights, dict(quotient=True, weight_noise=1e-3)),
    "epochs": (3, weights, dict(schedule="constant")),
    "batch_size": (32, weights, {}),
    "lr": (0.02, weights, {}),
    "momentum": (0.8, weights, {}),
    "weight_decay": (0., weights, {}),
    "schedule": ("constant", weights, {}),
    "warmup": (1, weights, {}),
    "device": ("cuda", outcome, {}),
    "precision": ("float64", weights, {}),
    "deterministic": (True, switches, {}),
    "onednn_isa": ("AVX2", outcome, {}),  # what it does there: test_hardware, test_runs
    "channels_last": (True, strides, dict(width=2)),
    "compile": (True, compiled, {}),  # compiled code may round alike; that it trains: test_train
    "benchmark": (True, switches, {}),
    "threads": (2, threads, {}),
    "processes": (3, weights, {}),
    "allreduce": ("ordered", weights, dict(processes=3)),
    "seed": (1, weights, dict(init="he", data_seed=0)),
    "data_seed": (1, weights, {}),
    "rerun": (1, None, {}),  # it is for runs whose arithmetic does not repeat itself, and here it does
    "measure_every": (2, measures, {}),
    "measure_steps": (1, measures, {}),
}


def test_every_field_is_in_the_table():
    assert list(CHANGES) == [field.name for field in fields(Config)]


@pytest.mark.parametrize("name", CHANGES)
def test_every_field_matters(name, pets, monkeypatch):
    monkeypatch.setenv("SYMBREAK_CACHE", str(pets.with_name("pets-cache")))
    value, look, rest = CHANGES[name]
    config = Config(**BASE | rest)
    changed = replace(config, **{name: f"folder:{pets}" if value is ... else value})
    assert changed.hash != config.hash and getattr(changed, name) != getattr(config, name)
    if look is None:
        assert (weights(config), measures(config)) == (weights(changed), measures(changed))
    else:
        assert look(config) == look(config), "what does not repeat itself shows nothing"
        assert look(config) != look(changed)


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """The first digits as a folder of images."""
    from PIL import Image
    root, data = tmp_path_factory.mktemp("pets"), load().subset(100, 50)
    for split, images, labels in (("train", *data.tensors[:2]), ("test", *data.tensors[2:])):
        for i, (image, label) in enumerate(zip(images[:, 0].numpy(), labels.tolist())):
            path = root / split / str(label) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root


# the recipe, written out once more

def lr_of(config, epoch, part):
    """The learning rate as the recipe has it in words."""
    if config.warmup and epoch + part < config.warmup: full = config.lr * (epoch + part) / config.warmup
    else: full = config.lr
    drops = {"scaled": [0.3, 0.6, 0.8], "constnet": [160 / 300, 220 / 300, 260 / 300], "constant": []}
    if config.schedule == "released": at = [config.epochs - 140, config.epochs - 80, config.epochs - 40]
    else: at = [max(1, round(share * config.epochs)) for share in drops[config.schedule]]
    return full * 0.2 ** len([a for a in at if epoch >= a])


def network(config):
    torch.manual_seed((1 << 28) + config.seed)
    if config.net == "UniqueFeatureMLP": return UniqueFeatureMLP(64, config.width, distinct=config.distinct)
    if config.net == "LeakyNet":
        return LeakyNet(config.init, config.depth, config.width, in_channels=1, slope=config.slope,
                        dropout=config.dropout)
    return ConstNet(config.depth, config.width, in_channels=1, init=config.init, skip=config.skip,
                    dropout=config.dropout)


def seen(data, images, dtype):
    """Images as the network gets them."""
    mean, std = (255 * torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    return ((images - mean) / std).to(dtype)


def augmented(config, images, pad, dy, dx, flip):
    """Images, each behind a window of its own: reflected at the edges, moved by up to `pad`, half of them mirrored."""
    if config.augment in ("default", "none"): return images  # digits are not augmented unless one asks for it
    _, _, height, width = images.shape
    padded = F.pad(images.float(), [pad] * 4, mode="reflect").to(torch.uint8)
    windows = [image[:, y:y + height, x:x + width] for image, y, x in zip(padded, dy.tolist(), dx.tolist())]
    if config.augment == "crop_flip": windows = [w.flip(-1) if mirror else w for w, mirror in zip(windows, flip)]
    return torch.stack(windows)


def plain(config):
    """The weights that a loop with nothing of ours but networks and images ends with, and its test accuracies."""
    data, model = load().subset(config.train_size, config.test_size), network(config)
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    test, count, model = seen(data, data.test_images, dtype), len(data.train_labels), model.to(dtype)
    order = torch.Generator().manual_seed(config.seed if config.data_seed is None else config.data_seed)
    noise = torch.Generator().manual_seed((2 << 28) + config.seed)
    velocity, accuracies = {}, []
    for epoch in range(config.epochs):
        model.train()
        drawn = (torch.randperm(count, generator=order), *torch.randint(2 * data.pad + 1, (2, count), generator=order),
                 torch.rand(count, generator=order) < 0.5)
        batches = list(zip(*(t.split(config.batch_size) for t in drawn)))
        for i, (chosen, *window) in enumerate(batches, 1):
            images = seen(data, augmented(config, data.train_images[chosen], data.pad, *window), dtype)
            if config.input_noise:
                images = images + config.input_noise * torch.randn(images.shape, generator=noise, dtype=dtype)
            model.zero_grad()
            F.cross_entropy(model(images), data.train_labels[chosen]).backward()
            for name, p in model.named_parameters():
                with torch.no_grad():
                    step = p.grad.add(p, alpha=config.weight_decay)
                    if name in velocity: step = velocity[name].mul_(config.momentum).add_(step)
                    velocity[name] = step
                    p.add_(step, alpha=-lr_of(config, epoch, i / len(batches)))
        model.eval()
        with torch.no_grad():
            accuracies.append((model(test).argmax(1) == data.test_labels).sum().item() / len(data.test_labels))
    return model.state_dict(), accuracies


@pytest.mark.parametrize("changes", [
    {}, dict(lr=0.1), dict(momentum=0.), dict(momentum=0.5), dict(weight_decay=0.), dict(weight_decay=0.02),
    dict(batch_size=64), dict(batch_size=7), dict(batch_size=1, train_size=20), dict(epochs=0), dict(epochs=1),
    dict(epochs=5, schedule="scaled"), dict(epochs=15, schedule="constnet"), dict(schedule="constant", epochs=5),
    dict(schedule="released", epochs=142, train_size=20), dict(warmup=1), dict(warmup=2, epochs=3), dict(seed=5),
    dict(data_seed=3), dict(input_noise=0.3), dict(dropout=0.2), dict(init="he", skip="rectified"),
    dict(net="LeakyNet"),
    dict(net="LeakyNet", init="h_hhh", slope=0.2, dropout=0.1), dict(MLP, width=9, distinct=4),
    dict(precision="float64", init="he"), dict(train_size=30, test_size=20),
    dict(augment="crop"), dict(augment="crop_flip", data_seed=1)], ids=str)
def test_the_recipe_is_that_of_a_plain_loop(changes):
    config = Config(**BASE | changes)
    run, (state, accuracies) = train(config), plain(config)
    assert list(run.model.state_dict()) == list(state)
    for name, value in run.model.state_dict().items():
        assert value.dtype == state[name].dtype and torch.equal(value, state[name]), name
    assert run.history.test_accuracy.tolist()[1:] == accuracies
