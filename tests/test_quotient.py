"""The quotient follows the wide network: float64, SGD with momentum and weight decay, batch norm in training mode.

ConstNet and the toy net are followed at a learning rate of 0.05. LeakyNet's own dynamics are unstable there (two runs
that differ by one rounding part company, wide or small), so its paths are compared at 0.001, and at 0.05 its gradients
are compared point by point along a path.
"""
import copy

import pytest
import torch
from torch.nn import functional as F

from symbreak.nets import ConstNet, LeakyNet, UniqueFeatureMLP, blocks, layer_outputs
from symbreak.quotient import QuotientBatchNorm2d, QuotientConv2d, QuotientLinear, expand, quotient

RTOL, STEPS, BATCH = 1e-12, 50, 16
SGD = dict(momentum=0.9, weight_decay=5e-4)
NETS = {
    "const": (lambda: ConstNet(10, 2), 0.05),
    "const-rectified": (lambda: ConstNet(10, 2, skip="rectified"), 0.05),
    "const-width-3": (lambda: ConstNet(7, 3), 0.05),
    "mlp": (lambda: UniqueFeatureMLP(3 * 12 * 12, 18, distinct=4), 0.05),
} | {letters: (lambda letters=letters: LeakyNet(letters, 10, 2), 0.001)
     for letters in ("1_ii_ii_ii", "1_11_11_11", "1_ii_11_ii", "i_ii_ii_ii")}
each_net = pytest.mark.parametrize("name", NETS)
each_leaky_net = pytest.mark.parametrize("name", [name for name in NETS if "_" in name])


def make(name, seed=0):
    torch.manual_seed(seed)
    return NETS[name][0]().double()


def batches(steps=STEPS, seed=1):
    "Noisy copies of ten pictures, a new batch each step"
    g = torch.Generator().manual_seed(seed)
    pictures = torch.randn(10, 3, 12, 12, generator=g, dtype=torch.float64)
    for _ in range(steps):
        labels = torch.randint(10, (BATCH,), generator=g)
        noise = torch.randn(BATCH, 3, 12, 12, generator=g, dtype=torch.float64)
        yield pictures[labels] + noise, labels


def backward(model, x, y):
    model.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss.item()


def tensors(model): return {k: v for k, v in model.state_dict().items() if v.is_floating_point()}


def same_bits(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for k in a: assert a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]), k


def whole(named): return torch.cat([v.flatten() for v in named.values()])


def relative(a, b): return ((whole(a) - whole(b)).norm() / whole(b).norm()).item()


def follow(wide, lr, steps=STEPS, optimiser=None, tamper=lambda q: None):
    "Train both; return both, their losses, and the largest norm that each wide tensor reached"
    q, losses, peak = quotient(wide), [], {}
    tamper(q)
    optimiser = optimiser or (lambda p: torch.optim.SGD(p, lr=lr, **SGD))
    optimisers = [optimiser(m.parameters()) for m in (wide, q)]
    for batch in batches(steps):
        losses.append([backward(m, *batch) for m in (wide, q)])
        for o in optimisers: o.step()
        peak = {k: max(peak.get(k, 0.), v.norm().item()) for k, v in tensors(wide).items()}
    return wide, q, torch.tensor(losses, dtype=torch.float64), peak


@each_net
def test_sgd_on_the_quotient_follows_the_wide_net(name):
    start = tensors(make(name))
    wide, q, losses, peak = follow(make(name), NETS[name][1])
    again = tensors(expand(q))
    assert ((losses[:, 1] - losses[:, 0]).abs() <= RTOL * losses[:, 0]).all()
    assert relative(again, tensors(wide)) <= RTOL
    for k, v in tensors(wide).items():  # tensor by tensor, for the small ones
        assert (again[k] - v).norm() <= RTOL * peak[k], k
    assert relative(tensors(wide), start) > 1e-3  # they went somewhere
    assert expand(q).state_dict().keys() == wide.state_dict().keys()
    for k, v in wide.state_dict().items():
        if not v.is_floating_point(): assert torch.equal(expand(q).state_dict()[k], v)


@each_net
def test_features_and_evaluation_agree(name):
    wide, q, *_ = follow(make(name), NETS[name][1], steps=5)
    x, _ = next(batches(1, seed=7))
    with torch.no_grad():
        torch.testing.assert_close(q.eval()(x), wide.eval()(x), rtol=1e-12, atol=1e-14)
        small, big = layer_outputs(q, x), layer_outputs(wide, x)
    groups = [m.group if isinstance(m, QuotientBatchNorm2d) else m.out_group for m in
              ([q.hidden] if hasattr(q, "hidden") else [q.stem, *(b.conv for b in blocks(q))])]
    for key, group in zip(small, groups, strict=True):
        assert (small[key][:, group] - big[key]).norm() <= 1e-12 * big[key].norm(), key


@each_leaky_net
def test_gradients_agree_along_a_trajectory_at_the_usual_learning_rate(name):
    "At each of 50 points of the quotient's path, its gradients are those of the wide network there"
    q = quotient(make(name))
    sgd = torch.optim.SGD(q.parameters(), lr=0.05, **SGD)
    for batch in batches():
        wide, gradient = expand(q), copy.deepcopy(q)
        losses = [backward(m, *batch) for m in (wide, q)]
        assert losses[1] == pytest.approx(losses[0], rel=RTOL, abs=0)
        for p, trained in zip(gradient.parameters(), q.parameters(), strict=True): p.data.copy_(trained.grad)
        expected = {k: p.grad for k, p in wide.named_parameters()}
        assert relative(dict(expand(gradient).named_parameters()), expected) <= RTOL
        sgd.step()


@each_net
def test_there_and_back(name):
    wide = make(name)
    same_bits(expand(quotient(wide)), wide)
    _, q, *_ = follow(wide, NETS[name][1], steps=5)
    same_bits(quotient(expand(q)), q)
    plain = {type(m) for m in expand(q).modules()}
    assert not plain & {QuotientConv2d, QuotientLinear, QuotientBatchNorm2d}
    assert [type(m) for m in expand(q).modules()] == [type(m) for m in wide.modules()]
    assert [str(m) for m in expand(q).modules()] == [str(m) for m in wide.modules()]


@each_net
def test_expanding_and_going_on_is_the_same_as_going_on(name):
    "Without momentum, which the wide network would not inherit"
    lr = NETS[name][1]
    _, q, *_ = follow(make(name), lr, steps=5)
    wide, q, *_ = follow(expand(q), lr, steps=5, optimiser=lambda p: torch.optim.SGD(p, lr=lr))
    assert relative(tensors(expand(q)), tensors(wide)) <= RTOL


@pytest.mark.parametrize("name", ["const", "i_ii_ii_ii", "mlp"])
def test_a_wrong_count_is_seen(name):
    def tamper(q):
        layer = q.hidden if hasattr(q, "hidden") else blocks(q)[2].conv
        layer.n_out += 1
    wide, q, *_ = follow(make(name), NETS[name][1], steps=20, tamper=tamper)
    assert relative(tensors(expand(q)), tensors(wide)) > 1e-8


def test_optimisers_that_work_number_by_number_follow_too():
    adam = lambda p: torch.optim.Adam(p, lr=1e-3, eps=1e-3)  # a smaller eps would blow rounding noise up to full steps
    wide, q, *_ = follow(make("const"), None, steps=20, optimiser=adam)
    assert relative(tensors(expand(q)), tensors(wide)) <= RTOL


def test_copies_checkpoints_and_random_state():
    torch.manual_seed(0)
    wide = LeakyNet("1_ii_11_ii", 10, 2)
    state = torch.get_rng_state()
    q = quotient(wide)
    expand(q)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn
    x, y = next(batches(1))
    other = copy.deepcopy(q)
    fresh = quotient(LeakyNet("1_ii_11_ii", 10, 2))
    backward(q, x.float(), y)
    torch.optim.SGD(q.parameters(), lr=0.1).step()
    fresh.load_state_dict(q.state_dict())
    same_bits(fresh, q)
    for m in (other, fresh):
        m.zero_grad()
        backward(m, x.float(), y)
    assert all(p.grad is not None for p in other.parameters())
    assert q.stem.weight.dtype == torch.float32


def test_mode_is_kept():
    wide = ConstNet(7, 1).eval()
    assert not any(m.training for m in quotient(wide).modules())
    assert not any(m.training for m in expand(quotient(wide)).modules())
    assert all(m.training for m in quotient(wide.train()).modules())


def test_the_wide_model_is_left_alone():
    wide = make("const")
    before = copy.deepcopy(wide)
    q = quotient(wide)
    backward(q, *next(batches(1)))
    torch.optim.SGD(q.parameters(), lr=1.).step()
    same_bits(wide, before)
    frozen = copy.deepcopy(q)
    backward(expand(q), *next(batches(1)))
    same_bits(q, frozen)


def test_memory_does_not_grow_with_width():
    sizes = {sum(p.numel() for p in quotient(ConstNet(10, k)).parameters()) for k in (2, 5)}
    assert len(sizes) == 1
    for net in (lambda k: ConstNet(10, k), lambda k: LeakyNet("1_ii_ii_ii", 10, k)):
        states = [quotient(net(k)).state_dict().values() for k in (2, 4)]
        floats, whole_numbers = ([sum(v.numel() for v in state if v.is_floating_point() == kind) for state in states]
                                 for kind in (True, False))
        assert floats[0] == floats[1]
        assert whole_numbers[1] <= 2 * whole_numbers[0]  # group numbers: linear in width


def test_an_almost_symmetric_network_is_not_collapsed():
    wide = ConstNet(10, 1)
    with torch.no_grad(): wide.head.weight[0, 0] = 1e-30
    with pytest.raises(ValueError, match="head cannot be collapsed"): quotient(wide)


def test_batch_norm_can_part_features():
    "One of 16 copies scaled differently: two groups before the first skip, which averages them, and one after it"
    wide = make("const")
    with torch.no_grad(): wide.stages[0][0].bn.weight[0] = 2.
    wide, q, *_ = follow(wide, 0.05, steps=20)
    assert q.stem.n_out.flatten().tolist() == [1, 15]
    assert q.stages[0][0].conv.weight.shape[:2] == (1, 2)
    assert relative(tensors(expand(q)), tensors(wide)) <= RTOL
