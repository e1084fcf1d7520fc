"""Sources of symmetry breaking: what they change, what they leave alone, and that the loop need not know a new one."""
import itertools
import math
import pickle
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from symbreak import breaking
from symbreak import train as training
from symbreak.breaking import Breaker, breaker_names, breakers, hooks, input_noise, perturb_, ulp_noise_
from symbreak.config import Config
from symbreak.data import load
from symbreak.diversity import distinct_features
from symbreak.nets import ConstNet, LeakyNet, weight_layers
from symbreak.numerics import numerics
from symbreak.provenance import weights_digest
from symbreak.reduction import (GRANULARITIES, RandomReductionConv2d, atomic_reduction_, random_reduction_,
                                sum_atomically, sum_in_random_order)

NULL = [(4, "global"), (3, "global"), (2, "element"), (2, "row"), (2, "tile"), (1, "element")]
BREAKING = [(s, g) for s in (3, 4, 8) for g in ("element", "row", "tile")]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def symmetric(weight):
    "Are all features of the layer, seen from both sides, the same bits?"
    return torch.equal(weight, weight[:1, :1].expand_as(weight))


# noise

def test_weight_noise_is_seeded_relative_and_the_same_for_every_dtype():
    nets = [perturb_(LeakyNet("i_iiii_iiii_iiii", width=1).to(dtype), 1e-3, seeded())
            for dtype in (torch.float32, torch.float64)]
    plain = LeakyNet("i_iiii_iiii_iiii", width=1).double()
    for single, double, p in zip(nets[0].parameters(), nets[1].parameters(), plain.parameters()):
        assert single.dtype == torch.float32 and double.dtype == torch.float64
        assert torch.equal(double == 0, p == 0)
        assert ((double - p).abs() <= 6e-3 * p.abs()).all()
        assert torch.equal(single, double.float())  # one rounding, at the end


def test_weight_noise_below_half_an_ulp_does_nothing_in_float32_and_something_in_float64():
    noisy, plain = perturb_(ConstNet(7, 1), 1e-9, seeded()), ConstNet(7, 1)
    assert all(torch.equal(a, b) for a, b in zip(noisy.parameters(), plain.parameters()))
    noisy, plain = perturb_(ConstNet(7, 1).double(), 1e-15, seeded()), ConstNet(7, 1).double()
    change = (noisy.stem.weight - plain.stem.weight)[:, :, 1, 1] / plain.stem.weight[:, :, 1, 1]
    assert (change != 0).double().mean() > 0.8 and change.abs().max() < 1e-14


def test_no_noise_changes_nothing():
    net = ConstNet(7, 1, init="he")
    old = deepcopy(net.state_dict())
    perturb_(net, 0.)
    assert all(torch.equal(v, old[k]) for k, v in net.state_dict().items())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(input_noise(x, 0.), x)


def test_input_noise_is_seeded_and_has_its_standard_deviation():
    x = torch.randn(64, 3, 16, 16)
    noise = input_noise(x, 0.5, seeded()) - x
    assert torch.equal(input_noise(x, 0.5, seeded()), input_noise(x, 0.5, seeded()))
    assert abs(noise.var().item() / 0.25 - 1) < 5 * math.sqrt(2 / noise.numel())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ulps", [1, 3])
def test_ulp_noise_moves_by_whole_ulps_and_no_further(dtype, ulps):
    p = torch.zeros(32, 16, 3, 3, dtype=dtype, requires_grad=True)
    grad = torch.randn(p.shape, generator=seeded(), dtype=torch.float64).to(dtype).to(memory_format=torch.channels_last)
    grad[0] = 0
    p.grad = grad.clone()
    ulp_noise_([p], seeded(1), ulps)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[grad.element_size()]
    moved = p.grad.view(integer).long() - grad.view(integer).long()
    assert torch.equal(p.grad[0], grad[0]) and not moved[0].any()
    assert moved[1:].unique().tolist() == list(range(-ulps, ulps + 1))


def test_ulp_noise_skips_parameters_without_gradient_and_is_seeded():
    def noisy():
        p = torch.zeros(100, requires_grad=True)
        p.grad = torch.ones(100)
        ulp_noise_([torch.zeros(3, requires_grad=True), p], seeded(3))
        return p.grad
    assert torch.equal(noisy(), noisy()) and len(noisy().unique()) == 3


@pytest.mark.parametrize("call, message", [
    (lambda: perturb_(ConstNet(7, 1), -1.), "eps: -1.0; allowed: >= 0"),
    (lambda: perturb_(ConstNet(7, 1), math.nan), "eps: nan"),
    (lambda: input_noise(torch.zeros(1), -1.), "std: -1.0; allowed: >= 0"),
    (lambda: ulp_noise_([], ulps=0), "ulps: 0; allowed: a whole number >= 1"),
    (lambda: ulp_noise_([], ulps=0.5), "ulps: 0.5"),
    (lambda: sum_in_random_order(torch.zeros(3, 4, 4), "warp"), "'warp'; allowed: element, row, tile, global"),
    (lambda: sum_in_random_order(torch.zeros(9, 4, 4)), "chunks: 9; allowed: a whole number from 1 to 8"),
    (lambda: random_reduction_(ConstNet(7, 1), 0), "chunks: 0; allowed: a whole number from 1 to 8"),
    (lambda: random_reduction_(ConstNet(7, 1), 2.), "chunks: 2.0"),
    (lambda: random_reduction_(ConstNet(7, 1), granularity="warp"), "granularity: 'warp'"),
    (lambda: random_reduction_(nn.Linear(2, 2)), "model: Linear has no convolution"),
    (lambda: random_reduction_(nn.Sequential(nn.Conv2d(1, 1, 3, padding="same"))), "model: 0 pads 'same' by 'zeros'"),
    (lambda: random_reduction_(nn.Conv2d(1, 1, 3, padding_mode="reflect")), "pads (0, 0) by 'reflect'"),
])
def test_bad_arguments_name_themselves(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


# the sum

def equal_partials(terms, dtype=torch.float32):
    "Exact copies along both feature axes, by construction: no kernel of this machine is involved"
    return torch.randn(terms, 1, 1, 3, 3, generator=seeded(), dtype=dtype).expand(terms, 40, 40, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunks, granularity", NULL)
def test_null_controls_of_the_sum_keep_symmetry(chunks, granularity, dtype):
    for seed in range(20):
        assert symmetric(sum_in_random_order(equal_partials(chunks, dtype), granularity, seeded(seed)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunks, granularity", BREAKING)
def test_the_sum_breaks_symmetry_from_three_terms_on(chunks, granularity, dtype):
    assert not symmetric(sum_in_random_order(equal_partials(chunks, dtype), granularity, seeded()))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_sum_is_a_left_fold_in_some_order_shared_as_named(granularity):
    partials = torch.randn(4, 40, 20, 3, generator=seeded())
    total = sum_in_random_order(partials, granularity, seeded(1))
    folds = torch.stack([((a + b) + c) + d for a, b, c, d in itertools.permutations(partials)])
    fits = folds == total
    assert total.shape == partials.shape[1:] and fits.any(0).all()
    tiles = [tile for rows in fits.split(16, 1) for tile in rows.split(16, 2)]
    groups = {"element": [], "row": fits.unbind(1), "global": [fits], "tile": tiles}
    assert all(group.flatten(1).all(1).any() for group in groups[granularity])  # one order explains a whole group


def test_all_orders_are_equally_likely():
    values = torch.tensor([-3., -1.7, 0.9])  # three different sums in float32, by which term comes last
    partials = values.view(3, 1, 1).expand(3, 300, 200)
    total = sum_in_random_order(partials, "element", seeded())
    pairs = {}
    for order in itertools.permutations(range(3)):
        a, b, c = values[list(order)]
        pairs.setdefault(((a + b) + c).item(), []).append(order)
    n = total.numel()
    assert len(pairs) == 3 and set(total.unique().tolist()) == set(pairs)
    for value, orders in pairs.items():  # binomial with p = orders / 6: five standard deviations
        p = len(orders) / 6
        assert abs((total == value).sum().item() - n * p) < 5 * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("terms", [1, 2, 5, 8])
def test_the_sum_is_within_its_error_bound(terms):
    partials = torch.randn(terms, 30, 20, generator=seeded())
    error = (sum_in_random_order(partials, generator=seeded()).double() - partials.double().sum(0)).abs()
    assert (error <= (terms - 1) * torch.finfo(torch.float32).eps * partials.double().abs().sum(0)).all()


def test_zeros_stay_zero():
    partials = torch.randn(4, 20, 20, generator=seeded())
    partials[:, 3] = 0
    assert not sum_in_random_order(partials, generator=seeded())[3].any()


# the convolution

def exact_gradient(chunks, granularity, seed=0):
    """Weight gradient of one convolution whose chunk gradients are exact on any machine, whatever the kernel's order of
    summation, since they are small integers. The power of two between chunks makes only the sum over chunks round."""
    conv = nn.Conv2d(40, 40, 3, padding=1, bias=False)
    random_reduction_(conv, chunks, granularity, seeded(seed))
    nn.init.zeros_(conv.weight)
    x, grad = (torch.randint(-4, 5, (chunks * 2, 1, 6, 6), generator=seeded(s)).float().expand(-1, 40, -1, -1)
               for s in (1, 2))
    scale = torch.tensor([2.**22] + [1.] * (chunks - 1)).repeat_interleave(2).view(-1, 1, 1, 1)
    return torch.autograd.grad(conv(x), conv.weight, grad * scale)[0]


@pytest.mark.parametrize("chunks, granularity", NULL)
def test_null_controls_of_the_convolution_keep_symmetry(chunks, granularity):
    assert all(symmetric(exact_gradient(chunks, granularity, seed)) for seed in range(5))


@pytest.mark.parametrize("chunks, granularity", BREAKING)
def test_the_convolution_breaks_symmetry_from_three_chunks_on(chunks, granularity):
    assert not symmetric(exact_gradient(chunks, granularity))


def train(model, steps=4):
    optimizer, images = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), seeded(1)
    for _ in range(steps):
        x, y = torch.randn(16, 3, 16, 16, generator=images), torch.randint(10, (16,), generator=images)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def features(model):
    "Most distinct features of any layer"
    return max(distinct_features(layer.module.weight) for layer in weight_layers(model) if layer.out_features)


@pytest.mark.parametrize("chunks, granularity", NULL)
def test_null_controls_are_as_symmetric_as_the_machine_with_the_same_chunks(chunks, granularity, monkeypatch):
    "A fixed order shows whether the kernels of this machine keep symmetry; where they do, so must the null controls"
    ours = features(train(random_reduction_(ConstNet(7, 2), chunks, granularity, seeded())))
    monkeypatch.setattr("symbreak.reduction.sum_in_random_order", lambda partials, *_: sum(partials.unbind()))
    fixed = features(train(random_reduction_(ConstNet(7, 2), chunks)))
    assert ours == 1 or fixed > 1


def test_element_order_breaks_a_network_the_same_way_each_time():
    first, second = (train(random_reduction_(ConstNet(7, 2), 4, "element", seeded())) for _ in range(2))
    assert features(first) > 1
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_the_callers_generator_is_the_whole_state():
    generator = seeded()
    model = train(random_reduction_(ConstNet(7, 2), 4, "element", generator), steps=2)
    weights, state = deepcopy(model.state_dict()), generator.get_state()
    end = train(model).state_dict()
    again = random_reduction_(ConstNet(7, 2), 4, "element", generator)
    again.load_state_dict(weights)
    generator.set_state(state)
    assert all(torch.equal(v, end[k]) for k, v in train(again).state_dict().items())


@pytest.mark.parametrize("kwargs", [dict(), dict(stride=2), dict(groups=4), dict(bias=True), dict(kernel_size=1),
                                    dict(dilation=2, padding=2)])
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_any_convolution_gets_the_gradient_it_had(kwargs, batch):
    plain = nn.Conv2d(8, 12, **{"kernel_size": 3, "bias": False, **kwargs}).double()
    ours = random_reduction_(nn.Sequential(deepcopy(plain)), 5, "element", seeded())[0]
    x = torch.randn(batch, 8, 9, 9, dtype=torch.float64).to(memory_format=torch.channels_last)
    grads = []
    for conv in (plain, ours):
        inputs = x.clone().requires_grad_()
        out = conv(inputs)
        grads.append((out, *torch.autograd.grad(out.square().sum(), [inputs, *conv.parameters()])))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])
    assert all((a - b).norm() <= 1e-13 * a.norm() for a, b in zip(grads[0][2:], grads[1][2:]))


def test_what_follows_or_surrounds_a_convolution_does_not_matter():
    conv = nn.Conv2d(3, 8, 3, bias=False)
    model = random_reduction_(nn.Sequential(conv, nn.ReLU(inplace=True), nn.BatchNorm2d(8)), generator=seeded())
    assert type(conv) is RandomReductionConv2d and model[0] is conv
    x = torch.randn(8, 3, 8, 8)
    model(x).square().sum().backward()
    assert conv.weight.grad.isfinite().all() and conv.weight.grad.any()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().sum()
    loss.backward()
    assert conv.weight.grad.dtype == torch.float32
    conv.weight.requires_grad_(False)
    model(x.requires_grad_()).square().sum().backward()
    assert x.grad.any()
    with torch.no_grad():
        assert not model.eval()(x).requires_grad


def test_keys_parameters_letters_and_copies_stay():
    plain = LeakyNet(width=1)
    parameters = list(plain.parameters())
    ours = random_reduction_(plain, 3, "row", seeded())
    assert ours is plain and all(a is b for a, b in zip(parameters, ours.parameters()))
    assert [layer.letter for layer in weight_layers(ours)][:3] == ["1", "i", "i"]
    LeakyNet(width=1).load_state_dict(ours.state_dict())
    twin = pickle.loads(pickle.dumps(deepcopy(ours)))
    assert twin.stem.generator is not ours.stem.generator and twin.stem.generator is twin.stages[0][0].conv.generator
    for a, b in zip(train(ours, 2).parameters(), train(twin, 2).parameters()):
        assert torch.equal(a, b)
    random_reduction_(ours, 2, "global")  # again: new settings, nothing nested
    assert ours.stem.chunks == 2 and ours.stem.granularity == "global" and ours.stem.generator is None


# sources as data

MOMENTS = ("on_weights", "on_network", "on_batch", "on_gradients", "after_step")


@dataclass(frozen=True)
class Drifting(Config):
    "A configuration with one more source of symmetry breaking"
    drift: float = 0.
    drift_from: int = 0


TINY = Drifting(depth=7, width=1, epochs=2, train_size=200, test_size=100, batch_size=64, lr=0.05, device="cpu")


@pytest.fixture
def toy(monkeypatch):
    "Weights that never stand still, put into the registry; the moments at which the loop called its hooks"
    seen = {moment: [] for moment in MOMENTS}

    def batch(images, config, generator):
        seen["on_batch"].append(len(images))
        return images

    def weights(model, config, generator):
        perturb_(model, config.drift, generator)
        seen["on_weights"].append(features(model))

    def drift(model, config, generator, step):
        seen["after_step"].append(step)
        if step > config.drift_from: perturb_(model, config.drift, generator)

    def network(model, config, generator):
        seen["on_network"].append(features(model))

    def gradients(model, config, generator):
        seen["on_gradients"].append(model.head.weight.grad is not None)

    new = Breaker("drifting weights", lambda c: getattr(c, "drift", 0) > 0, on_weights=weights, on_network=network,
                  on_batch=batch, on_gradients=gradients, after_step=drift)
    monkeypatch.setattr(breaking, "BREAKERS", (*breaking.BREAKERS, new))
    return seen


def test_a_new_source_trains_without_a_word_in_the_loop(toy):
    run = training.train(replace(TINY, drift=1e-3))
    assert toy == dict(on_weights=[64], on_network=[64], on_batch=[64, 64, 64, 8] * 2, on_gradients=[True] * 8,
                       after_step=[1, 2, 3, 4, 5, 6, 7, 8])
    assert weights_digest(run.model) == weights_digest(training.train(replace(TINY, drift=1e-3)).model)
    assert weights_digest(run.model) != weights_digest(training.train(TINY).model)
    assert breaker_names(replace(TINY, drift=1e-3, dropout=0.1)) == "dropout + drifting weights"


def test_a_new_source_resumes_to_the_same_bits(toy, tmp_path, monkeypatch):
    for room in ("records", "outcome"):  # who reads the configuration of a folder
        monkeypatch.setattr(f"symbreak.{room}.Config", Drifting)
    config = replace(TINY, drift=1e-3, drift_from=3)
    while (resumed := training.train(config, tmp_path / "run", stop=lambda: True)).record["status"] == "paused":
        pass
    assert weights_digest(resumed.model) == weights_digest(training.train(config).model)


def test_a_new_field_that_is_off_changes_nothing():
    plain = Config(**TINY.changed)
    assert plain.hash == TINY.hash
    assert weights_digest(training.train(plain).model) == weights_digest(training.train(TINY).model)


def test_absent_sources_have_no_hooks():
    assert breakers(Config()) == () and breaker_names(Config()) == "arithmetic"
    assert {hooks(Config(), moment) for moment in MOMENTS} == {()}
    assert hooks(Config(dropout=0.1), "on_gradients") == ()
    with pytest.raises(AttributeError, match="on_monday"):
        hooks(Config(dropout=0.1), "on_monday")


@pytest.mark.parametrize("changes, names, moments", [
    (dict(weight_noise=1e-6), "weight noise", ("on_weights",)),
    (dict(dropout=0.01), "dropout", ()),
    (dict(input_noise=0.1), "input noise", ("on_batch",)),
    (dict(gradient_ulps=1), "one-ulp gradient noise", ("on_gradients",)),
    (dict(reduction="row"), "random reduction", ("on_network",)),
    (dict(ulp_layer="stem", ulp_step=3), "one ulp in one layer", ("on_network", "after_step")),
    (dict(dropout=0.01, gradient_ulps=1), "dropout + one-ulp gradient noise", ("on_gradients",)),
    (dict(quotient=True), "none", ()),
    (dict(quotient=True, weight_noise=1e-6), "none", ("on_weights",)),
], ids=str)
def test_each_field_has_its_source_and_its_moments(changes, names, moments):
    config = Config(**changes)
    assert breaker_names(config) == names
    assert {moment for moment in MOMENTS if hooks(config, moment)} == set(moments)


def test_the_loop_knows_no_source_by_name():
    code = Path(training.__file__).read_text().replace("dropout=config.dropout", "")  # an argument of the networks
    for word in ("noise_", "_noise", "ulp", "reduction", "perturb", "next_float", "dropout"):
        assert word not in code, word


# real atomic additions: what they do without the switch is a matter of threads, and is measured, never asserted

@pytest.mark.parametrize("threads", [1, 2])
def test_atomic_additions_lose_nothing_and_the_switch_puts_them_in_order(threads):
    whole, terms = torch.randint(100, (8, 64, 64, 3, 3), generator=seeded()).float(), torch.randn(8, 64, 64, 3, 3)
    same = terms[:, :1, :1].expand_as(terms)
    assert torch.equal(sum_atomically(whole, threads), whole.sum(0))
    with numerics(deterministic=True):
        total = sum_atomically(terms, threads)
        assert torch.equal(total, sum_atomically(terms, threads))
        assert torch.equal(total, sum(terms[1:].unbind(), terms[0]))
        assert symmetric(sum_atomically(same, threads))


def test_two_terms_commute():
    terms = torch.randn(2, 64, 64, 5, 5)
    assert torch.equal(sum_atomically(terms), terms[0] + terms[1])


def test_atomic_training_made_deterministic_keeps_one_feature_and_repeats_itself():
    config = Config(depth=7, width=2, epochs=2, train_size=300, test_size=100, batch_size=48, lr=0.05, threads=2,
                    reduction="atomic", reduction_chunks=8, deterministic=True, device="cpu")
    data = load("digits", train_size=300, test_size=100)
    one, other = (training.train(config, data=data) for _ in range(2))
    assert weights_digest(one.model) == weights_digest(other.model)
    plain = training.train(replace(config, reduction="hardware", reduction_chunks=4, threads=1), data=data)
    if plain.history.asymmetry.max() == 0:  # where this processor's other kernels are symmetric
        assert list(one.history.distinct_features) == [1] * 3 and list(one.history.asymmetry) == [0] * 3
    assert one.record["threads"] == 2


def test_atomic_training_draws_no_random_number():
    config = Config(depth=7, width=2, threads=2, reduction="atomic", device="cpu")
    trainer = training.Trainer(config, load("digits", train_size=300, test_size=100), torch.device("cpu"))
    states = trainer.noise.get_state(), torch.get_rng_state()
    training.learn(trainer, *next(iter(trainer.train_data)))
    assert torch.equal(trainer.noise.get_state(), states[0]) and torch.equal(torch.get_rng_state(), states[1])


@pytest.mark.parametrize("changes, reason", [
    (dict(threads=1), "threads: 1 with reduction='atomic', but one thread adds"),
    (dict(threads=2, precision="float64"), "precision: 'float64' with reduction='atomic'"),
])
def test_atomic_additions_that_would_be_made_in_order_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        training.train(Config(reduction="atomic", device="cpu", **changes))


@pytest.mark.parametrize("changes", [dict(quotient=True), dict(compile=True)])
def test_what_does_not_go_with_atomic_additions(changes):
    with pytest.raises(ValueError, match="'atomic'"): Config(reduction="atomic", threads=2, **changes)


def test_a_convolution_that_adds_up_in_another_way_forgets_the_first():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3))
    [conv], fresh = model, torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3))
    conv.mine = "kept"
    random_reduction_(model, 3, "row", torch.Generator())
    atomic_reduction_(model)
    atomic_reduction_(fresh)
    assert vars(conv).keys() - vars(fresh[0]).keys() == {"mine"}
    random_reduction_(model, 5)
    assert (conv.chunks, conv.granularity, conv.generator, conv.mine) == (5, "element", None, "kept")
    assert not hasattr(conv, "threads")
