"""`check` on networks as people build them: each case of the field as a small model, and the right words for it."""
import copy
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from symbreak import symmetry
from symbreak.cache import import_torchvision
from symbreak.calls import recorded
from symbreak.checking import make_model
from symbreak.cli import main, parse
from symbreak.nets import ConstNet, LeakyNet
from symbreak.probing import sizes
from symbreak.processes import in_new_processes
from symbreak.symmetry import COLUMNS, check
from symbreak.provenance import device_name


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def states(model, batch, steps=20, **options):
    found = check(model, batch, steps=steps, **options)
    return dict(zip(found.table.layer, found.table.state)), found


def says(found, *parts):
    """Whether one of the findings has all these words."""
    return any(all(part in said for part in parts) for said in found.findings)


def x(*shape): return torch.randn(*shape)


def exact(*shape):
    """Numbers of few binary digits: sums of their products with powers of two are not rounded by any machine."""
    return torch.randint(-4, 5, shape) / 4


def mlp(): return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))


# Identical features


def widened(net, times=4):
    """Every hidden unit replicated, weights behind it divided: the same function, without noise."""
    wide = nn.Sequential(nn.Linear(6, 12 * times), nn.ReLU(), nn.Linear(12 * times, 3))
    with torch.no_grad():
        wide[0].weight.copy_(net[0].weight.repeat(times, 1))
        wide[0].bias.copy_(net[0].bias.repeat(times))
        wide[2].weight.copy_(net[2].weight.repeat(1, times) / times)
        wide[2].bias.copy_(net[2].bias)
    return wide


def test_units_replicated_without_noise_stay_copies_on_this_machine_or_are_parted_by_rounding_only():
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    wide, batch = widened(net), (x(32, 6), torch.randint(3, (32,)))
    torch.testing.assert_close(wide(batch[0]), net(batch[0]), rtol=1e-4, atol=1e-6)
    state, found = states(wide, batch)
    assert found.table.distinct_weights[0] == 12 and state["2"] == "diverse"
    assert says(found, "nothing will part them: 0 (48 features, 12 distinct)") or says(found, "rounding noise", "0 (48")


def test_the_noise_that_replication_lacked_makes_them_diverse():
    wide = widened(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)))
    with torch.no_grad(): wide[0].weight.mul_(1 + 1e-6 * torch.randn_like(wide[0].weight))
    assert states(wide, x(32, 6))[0]["0"] == "diverse"


def test_constant_weights():
    net = mlp()
    for p in net.parameters(): nn.init.constant_(p, 0.125)
    state, found = states(net, (exact(32, 6), torch.randint(3, (32,))))
    assert all(state[n] == "identical" or by == "rounding noise" for n, by in zip("02", found.table.parted_by))
    assert says(found, "parted by the targets: 4") and found.table.distinct_activations[:2].tolist() == [1, 1]


def test_one_backward_pass_says_that_it_is_one():
    net = mlp()
    for p in net.parameters(): nn.init.constant_(p, 0.125)
    found = check(net, exact(32, 6), loss=lambda out: (out * torch.tensor([1, 2, -1])).sum())
    assert found.table.state[0] == "identical"
    assert says(found, "nothing in this backward pass parts them", "steps=20 looks further")


def test_other_weights_behind_copies_part_them():
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    nn.init.constant_(net[0].weight, 0.1), nn.init.zeros_(net[0].bias)
    for steps in (0, 20):
        state, found = states(net, x(32, 6), steps)
        assert state["0"] == "parted" and says(found, "parted by what is behind them, such as different weights: 0")


class FunctionalDropout(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x): return F.dropout(x, self.p, self.training)


@pytest.mark.parametrize("dropout", [nn.Dropout(0.3), FunctionalDropout(0.3)], ids=["module", "function"])
def test_dropout_parts_copies_and_is_off_in_evaluation_mode(dropout):
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), dropout, nn.Linear(12, 3))
    for p in net.parameters(): nn.init.constant_(p, 0.05)
    state, found = states(net, x(32, 6), steps=0)
    assert state["0"] == "parted" and says(found, "parted by dropout: 0 (12 features, 1 distinct)")
    state, found = states(net.eval(), x(32, 6))
    assert state["0"] in ("identical", "parted") and not says(found, "parted by dropout")
    assert says(found, "evaluation mode", "dropout")


class Noise(nn.Module):
    def forward(self, x): return x * torch.randn_like(x)


def test_random_numbers_that_are_not_dropout_are_not_guessed_at():
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), Noise(), nn.Linear(12, 3))
    for p in net.parameters(): nn.init.constant_(p, 0.05)
    _, found = states(net, x(32, 6), steps=0)
    assert says(found, "parted by what is behind them, such as different weights, or random numbers that the model "
                       "draws")
    assert says(found, "draws random numbers", "cannot tell")


def test_a_model_that_does_not_run_in_float64_leaves_the_cause_unknown():
    class Fixed(nn.Module):
        def forward(self, x): return x @ torch.arange(36.).view(12, 3)
    net = nn.Sequential(nn.Linear(6, 12), Fixed())
    nn.init.constant_(net[0].weight, 0.1), nn.init.zeros_(net[0].bias)
    _, found = states(net, x(8, 6), steps=0)
    assert says(found, "parted by not known: 0") and says(found, "Rounding cannot be told", "float64")


class Uneven(nn.Module):
    """Scales copies differently by a few parts in ten million, as a kernel with a tile may, and less in float64."""

    def forward(self, x): return x * (1 + torch.finfo(x.dtype).eps * torch.arange(x.shape[-1], dtype=x.dtype))


def uneven(*behind):
    net = nn.Sequential(nn.Linear(6, 12), Uneven(), nn.Tanh(), *behind, nn.Linear(12, 3))
    for p in net.parameters(): nn.init.constant_(p, 0.25)
    return net


def test_rounding_is_named_by_the_probe_and_its_end_is_not_guessed_at():
    net, batch = uneven(), (exact(16, 6), exact(16, 3))
    found = check(net, batch, steps=2)
    assert found.table.parted_by[0] == "rounding noise" and found.rounding.asked == 7
    assert says(found, "probe") and says(found, "broken the symmetry is not known", found.rounding.why)
    assert ("identical ConstNet only" if len(found.rounding.table) else "no operation makes any") in found.rounding.why
    assert json.loads(json.dumps(found.to_dict()))["rounding"]["asked"] == 7
    without = check(net, batch, steps=2, probe=False)
    assert without.rounding is None and not says(without, "probe") and len(without.findings) < len(found.findings)


def test_what_the_probe_cannot_ask_is_said():
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.rest = nn.GRU(6, 6, batch_first=True), uneven()

        def forward(self, x): return self.rest(self.body(x)[0])
    assert says(check(Read(), x(4, 5, 6)), "Called, but not asked: gru")


def test_no_probe_without_rounding(monkeypatch):
    monkeypatch.setattr(symmetry, "rounding", lambda *_: pytest.fail("asked for nothing"))
    assert check(mlp(), x(8, 6), steps=2).rounding is None
    net = mlp()
    nn.init.constant_(net[0].weight, 0.1), nn.init.zeros_(net[0].bias)
    check(net, exact(8, 6))


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="float64 on x86")
def test_sums_in_float64_part_copies_by_rounding_at_the_size_of_the_probe():
    """On AMD the products of matrices do, on Intel the gradients of biases."""
    wide = nn.Sequential(nn.Linear(20, 37), nn.Tanh(), nn.Linear(37, 10)).double()
    with torch.no_grad():
        for p in (*wide[0].parameters(), wide[2].weight.T): p.copy_(p[:1].expand_as(p).clone())
    found = check(wide, x(16, 20).double(), steps=5)
    assert found.table.parted_by[0] == "rounding noise" and says(found, "copies come out as", "eps", "float64")
    known = {"linear", "head, input gradient"}
    if "AMD" not in device_name(torch.device("cpu")): known.add("linear, bias gradient")
    assert known & set(found.rounding.table.op)
    assert (found.rounding.table.channel_size > 0).all() and found.rounding.steps is None


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="oneDNN's AVX2 kernels")
def test_an_identical_constnet_is_told_when_rounding_will_have_broken_it():
    torch.manual_seed(2)
    batch = x(32, 3, 8, 8), torch.randint(10, (32,))
    found, = in_new_processes(check, ConstNet(10, 2), batch, None, 20, 0.1, ONEDNN_MAX_CPU_ISA="AVX2")
    assert set(found.rounding.table.op) == {"conv2d, weight gradient"} and found.rounding.table.distinct.eq(2).all()
    assert says(found, "rounding noise on this machine", "stages.2.1.conv") and 100 < found.rounding.steps < 1000
    assert says(found, f"after about {found.rounding.steps:.0f} steps of SGD at 0.1", "growth")


def test_networks_of_this_package():
    _, found = states(ConstNet(7, 1), (x(8, 3, 8, 8), torch.randint(10, (8,))), lr=0.1)
    assert set(found.having("identical", "parted", "zero")) >= {"stem", "stages.0.0.conv", "head"}
    assert not found.having("stuck") and says(found, "Zero but alive", "head")
    _, found = states(ConstNet(7, 1, init="he"), (x(8, 3, 8, 8), torch.randint(10, (8,))))
    assert not found.having("identical", "parted", "stuck")
    _, found = states(LeakyNet("1_iii", 7, 1), (x(8, 3, 8, 8), torch.randint(10, (8,))))
    assert "stem" in found.having("identical", "parted")
    assert says(found, "Alike on this batch, though their weights differ")


# Zero, alive and stuck


class ZeroConvs(nn.Module):
    """A branch of zero convolutions beside a trained path."""

    def __init__(self, count, bias=True):
        super().__init__()
        self.path = nn.Conv2d(3, 8, 3, padding=1)
        self.zeros = nn.Sequential(*(nn.Conv2d(8, 8, 1, bias=bias) for _ in range(count)))
        self.out = nn.Conv2d(8, 3, 1)
        for p in self.zeros.parameters(): nn.init.zeros_(p)

    def forward(self, x):
        h = F.relu(self.path(x))
        return self.out(h + self.zeros(h))


def test_one_zero_convolution_learns():
    for steps in (0, 20):
        state, found = states(ZeroConvs(1), x(4, 3, 8, 8), steps)
        assert state["zeros.0"] == "zero" and says(found, "Zero but alive: zeros.0")


@pytest.mark.parametrize("bias", [False, True])
def test_two_zero_convolutions_in_a_row_are_stuck_for_ever(bias):
    state, found = states(ZeroConvs(2, bias), x(4, 3, 8, 8), steps=0)
    assert state["zeros.0"] == state["zeros.1"] == "waiting"
    assert says(found, "Zero, and without a gradient yet", "not known")
    state, found = states(ZeroConvs(2, bias), x(4, 3, 8, 8))
    assert set(found.having("stuck")) == {"zeros.0", "zeros.1"} and found.having("diverse") == ["path", "out"]
    assert says(found, "Stuck: zeros.0", "Weights and gradient are zero, now and after 20 steps")


def test_zero_init_residual():
    net = import_torchvision().models.resnet18(zero_init_residual=True, num_classes=4)
    state, found = states(net, (x(4, 3, 32, 32), torch.randint(4, (4,))), steps=1)
    zero = [name for name in state if state[name] == "zero"]
    assert zero == [f"layer{s}.{b}.bn2" for s in (1, 2, 3, 4) for b in (0, 1)]
    assert state["layer1.0.conv1"] == "diverse" and says(found, "Late: layer1.0.conv1")
    assert not found.having("stuck", "identical", "parted")
    waiting = check(net, (x(4, 3, 32, 32), torch.randint(4, (4,)))).having("waiting")
    assert "layer1.0.conv2" in waiting and "conv1" not in waiting


class Adapted(nn.Module):
    """A low-rank adapter of two raw parameters beside a frozen layer."""

    def __init__(self, both_zero):
        super().__init__()
        self.base = nn.Linear(6, 8).requires_grad_(False)
        self.down = nn.Parameter(torch.zeros(2, 6) if both_zero else torch.randn(2, 6))
        self.up = nn.Parameter(torch.zeros(8, 2))

    def forward(self, x): return self.base(x) + x @ self.down.T @ self.up.T


def test_adapter_with_one_factor_zero_learns_and_with_both_is_stuck():
    state, found = states(Adapted(False), x(16, 6))
    assert state == {"base": "frozen", "down": "unknown", "up": "zero"}
    assert says(found, "Late: down") and says(found, "Not known: down") and says(found, "Not trained: base")
    state, found = states(Adapted(True), x(16, 6))
    assert (state["down"], state["up"]) == ("stuck", "stuck")


def test_frozen_copies_are_parted_by_nothing():
    net = mlp()
    nn.init.constant_(net[0].weight, 0.1), nn.init.zeros_(net[0].bias)
    net[0].requires_grad_(False)
    state, found = states(net, x(8, 6))
    assert state["0"] == "identical" and says(found, "Identical and not trained", "0 (12 features, 1 distinct)")
    state, found = states(mlp().requires_grad_(False), x(8, 6))
    assert set(state.values()) == {"frozen"}


def test_dead_features():
    net = mlp()
    net[0].bias.data[:5] = -100.
    state, found = states(net, x(32, 6))
    assert found.table.dead.tolist()[0] == 5 and says(found, "Partly dead: 0 (5 of 12)") and "0" in found.having("dead")
    nn.init.constant_(net[0].bias, -100.)
    state, found = states(net, x(32, 6))
    assert state["0"] == "dead" and found.table.constant.tolist()[1] == 12


def test_batch_norm_is_what_dies_between_a_convolution_and_its_rectifier():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(288, 2))
    net[1].bias.data[:3] = -100.
    _, found = states(net, x(4, 3, 8, 8))
    assert found.table.dead.isna().tolist() == [True, False, True] and found.table.dead[1] == 3


# Modules that are copies


class Experts(nn.Module):
    """Copies of one dense layer behind a router: a weighted sum of all, or the best one for each token."""

    def __init__(self, zero_router, hard=False, count=4):
        super().__init__()
        dense = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
        self.experts = nn.ModuleList(copy.deepcopy(dense) for _ in range(count))
        self.router, self.hard = nn.Linear(6, count), hard
        if zero_router: nn.init.zeros_(self.router.weight), nn.init.zeros_(self.router.bias)

    def forward(self, x):
        shares = self.router(x).softmax(-1)
        if not self.hard: return sum(shares[:, i, None] * expert(x) for i, expert in enumerate(self.experts))
        best, out = shares.argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mine = (best == i).nonzero().squeeze(1)
            if len(mine): out = out.index_add(0, mine, shares[mine, i, None] * expert(x[mine]))
        return out


def test_experts_cut_from_one_layer_are_parted_by_their_router():
    _, found = states(Experts(zero_router=False), x(32, 6))
    assert found.modules.state.tolist() == ["parted"] and found.modules.features[0] == 4
    assert says(found, "parted by what is made of their outputs: a router")
    _, found = states(Experts(zero_router=False, hard=True), x(32, 6))
    assert says(found, "parted by their inputs: a router's choice: copies of Sequential (experts.0, experts.1")


def test_experts_behind_a_zero_router_are_never_parted_and_the_router_is_stuck_but_for_rounding():
    found = check(Experts(zero_router=True), x(32, 6), steps=20)
    assert found.modules.state[0] == "identical" or found.modules.parted_by[0] == "rounding noise"
    assert found.modules.gap[0] < 1e-5
    assert found.table.gradient_norm[found.table.layer == "router"].item() < 1e-6


def test_layers_of_a_transformer_are_copies_at_first_and_see_other_inputs():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0., batch_first=True)
    _, found = states(nn.TransformerEncoder(layer, 3), x(4, 5, 8))
    assert says(found, "parted by their inputs: copies of TransformerEncoderLayer (layers.0, layers.1, layers.2)")


# Kinds of layers


class Vision(nn.Module):
    """A small vision transformer, whose heads may be copies of one head."""

    def __init__(self, same_heads, same_behind):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.place = nn.Parameter(0.02 * torch.randn(1, 4, 16))
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 5)
        with torch.no_grad():
            if same_heads:
                for third in self.attention.in_proj_weight.chunk(3): third.copy_(third[:4].repeat(4, 1))
            if same_behind:
                out = self.attention.out_proj.weight
                out.copy_(out[:, :4].repeat(1, 4))

    def forward(self, x):
        h = self.patches(x).flatten(2).transpose(1, 2) + self.place
        h = self.norm(h)
        h = h + self.attention(h, h, h)[0]
        return {"logits": self.head(h.mean(1)), "name": "vision"}


def test_heads_of_a_vision_transformer():
    images = x(8, 3, 8, 8)
    state, found = states(Vision(False, False), images)
    assert set(state.values()) == {"diverse", "unknown"} and says(found, "Not known: place")
    row = found.table.set_index("layer").loc["attention"]
    assert (row.features, row.distinct_weights) == (4, 4)
    state, found = states(Vision(True, False), images)
    assert says(found, "parted by what is behind them, such as different weights: attention (4 features, 1 distinct)")
    _, found = states(Vision(True, True), images)
    row = found.table.set_index("layer").loc["attention"]
    assert row.state == "identical" or row.parted_by == "rounding noise"


def test_features_of_a_transformer_are_counted_along_the_last_axis():
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    found = check(net, x(4, 5, 6))
    assert found.table.distinct_activations.tolist() == [8, 8, 3] and found.table.state.tolist() == ["diverse"] * 3
    nn.init.constant_(net[0].weight, 0.25), nn.init.zeros_(net[0].bias)
    assert check(net, exact(4, 5, 6)).table.distinct_activations.tolist()[0] == 1


class Recurrent(nn.Module):
    def __init__(self, kind, constant):
        super().__init__()
        self.body, self.head = kind(4, 6, 2, batch_first=True), nn.Linear(6, 3)
        if constant:
            for p in self.parameters(): nn.init.constant_(p, 0.1)

    def forward(self, x): return self.head(self.body(x)[0])


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent(kind):
    state, _ = states(Recurrent(kind, False), x(5, 7, 4))
    assert state == {"body.l0": "diverse", "body.l1": "diverse", "head": "diverse"}
    state, found = states(Recurrent(kind, True), x(5, 7, 4))
    assert found.table.distinct_weights.tolist() == [1, 1, 1]
    assert all(state[layer] == "identical" or by == "rounding noise"
               for layer, by in zip(("body.l0", "body.l1"), found.table.parted_by))


@pytest.mark.parametrize("layer, shape", [
    (nn.Conv1d(4, 6, 3), (3, 4, 9)), (nn.Conv3d(4, 6, 3), (3, 4, 5, 5, 5)), (nn.ConvTranspose2d(4, 6, 3), (3, 4, 5, 5)),
    (nn.ConvTranspose1d(4, 6, 3, groups=2), (3, 4, 5)), (nn.Conv2d(4, 6, 3, groups=2), (3, 4, 5, 5))], ids=str)
def test_convolutions(layer, shape):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = copy.deepcopy(layer), nn.Linear(6, 2)

        def forward(self, x): return self.head(self.layer(x).tanh().flatten(2).mean(2))
    net = Net()
    state, found = states(net, x(*shape))
    assert state["layer"] == "diverse" and found.table.features[0] == 6
    nn.init.constant_(net.layer.weight, 0.25), nn.init.zeros_(net.layer.bias)
    state, found = states(net, exact(*shape))
    assert state["layer"] == "parted" and found.table.distinct_activations[0] == layer.groups
    assert says(found, f"layer (6 features, {layer.groups} distinct)")


def test_channels_of_a_depthwise_convolution_see_their_own_inputs():
    net = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Flatten(), nn.Linear(108, 2))
    nn.init.constant_(net[0].weight, 0.1), nn.init.zeros_(net[0].bias)
    found = check(net, x(4, 3, 8, 8))
    assert found.table.distinct_weights[0] == 1 and found.table.state[0] == "diverse"


def test_embedding_tables_and_a_head_that_shares_their_weight():
    class Language(nn.Module):
        def __init__(self, sparse=False):
            super().__init__()
            self.table, self.head = nn.Embedding(11, 6, sparse=sparse), nn.Linear(6, 11, bias=False)
            if not sparse: self.head.weight = self.table.weight

        def forward(self, tokens): return self.head(self.table(tokens).tanh())
    tokens = torch.randint(11, (4, 7))
    state, found = states(Language(), tokens)
    assert state["table"] == "diverse" and found.table.features[0] == 6
    assert says(found, "table.weight and head.weight are one parameter")
    net = Language(sparse=True)
    with torch.no_grad(): net.table.weight.copy_(net.table.weight[:, :1].repeat(1, 6))
    assert states(net, tokens)[0]["table"] == "parted"


def test_a_module_in_two_places_is_judged_by_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x): return self.head(self.shared(self.shared(x).tanh()).tanh())
    state, found = states(Twice(), x(8, 6))
    assert list(state) == ["shared", "head"] and says(found, "Called more than once", "shared (2 times)")


def test_a_norm_of_a_tiny_batch_makes_no_copies():
    """Of two numbers a batch norm makes 1 and -1, whatever they are."""
    net = nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 3))
    state, found = states(net, 1e3 * x(2, 6), steps=0)
    assert state["1"] == "diverse" and found.table.distinct_activations[1] < 40


def test_what_plays_no_part_is_said_to():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x): return self.used(x)
    state, found = states(Part(), x(8, 6))
    assert state == {"used": "diverse", "unused": "unused"} and says(found, "Without any part in the loss", "unused")


def test_a_layer_whose_class_is_not_known():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(6))

        def forward(self, x): return x * self.gain
    state, found = states(nn.Sequential(Gate(), nn.Linear(6, 2)), x(8, 6))
    assert state["0.gain"] == "unknown" and says(found, "Not known: 0.gain") and found.table.features.isna()[0]


def test_a_norm_over_channels_in_last_place_of_another_class():
    class ChannelNorm(nn.LayerNorm):
        def forward(self, x): return super().forward(x.movedim(1, -1)).movedim(-1, 1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), ChannelNorm(8), nn.Flatten(), nn.Linear(8 * 64, 2))
    state, _ = states(net, x(4, 3, 10, 10))
    assert state["1"] == "unknown"  # 8 channels on maps of 8 columns: the last axis would look right


# Modes, precisions, losses and batches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    net = mlp().to(dtype)
    for p in net.parameters(): nn.init.constant_(p, 0.05)
    _, found = states(net, x(8, 6).to(dtype))
    assert found.table.distinct_weights.tolist() == [1, 1, 1] and str(dtype)[6:] in found.about
    assert all(s == "identical" or by == "rounding noise"
               for s, by in zip(found.table.state[:2], found.table.parted_by[:2]))
    assert not states(mlp().to(dtype), x(8, 6).to(dtype))[1].having("identical", "parted")


def test_losses_and_batches():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, inputs, labels): return {"loss": F.cross_entropy(self.body(inputs), labels)}
    labels = torch.randint(3, (8,))
    assert "the model's own" in check(Named(), dict(inputs=x(8, 6), labels=labels)).about
    assert "cross-entropy" in check(mlp(), (x(8, 6), labels)).about
    assert "to the targets" in check(mlp(), (x(8, 6), x(8, 3))).about
    assert "random targets" in check(mlp(), x(8, 6)).about
    own = check(mlp(), (x(8, 6), labels), loss=lambda out, target: out[:, 0].square().mean())
    assert "the caller's" in own.about and own.table.distinct_gradients.tolist()[-1] == 2  # two outputs without any
    with pytest.raises(ValueError, match="batch: a tuple of 3; allowed"): check(mlp(), (1, 2, 3))


# The patient is not touched


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.2)
        self.lstm, self.head = nn.LSTM(8, 4, 2, dropout=0.1, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        x.add_(0.)  # in place on the batch
        h = self.drop(F.relu(self.norm(self.conv(x)), inplace=True))
        return self.head(self.lstm(h.flatten(2).transpose(1, 2))[0][:, -1])


@pytest.mark.parametrize("steps", [0, 3])
def test_nothing_of_the_model_or_of_the_process_changes(steps):
    net, images = Everything(), x(4, 3, 8, 8)
    net.norm.eval(), net.conv.requires_grad_(False)
    net(images.clone()).sum().backward()
    def everything():
        tensors = {n: t.clone() for n, t in net.state_dict().items()}
        grads = {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
        flags = [m.training for m in net.modules()] + [p.requires_grad for p in net.parameters()]
        drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()
        return tensors, grads, hooks, flags, *drawn, images.clone()
    before = everything()
    pointers = [p.data_ptr() for p in net.parameters()]
    with torch.no_grad(): check(net, images, steps=steps)
    after = everything()
    for old, new in zip(before[:2], after[:2]):
        assert old.keys() == new.keys()
        for name in old: assert (old[name] is None and new[name] is None) or torch.equal(old[name], new[name]), name
    assert before[2:4] == after[2:4] and before[5] == after[5]
    assert torch.equal(before[4], after[4]) and (before[6][1] == after[6][1]).all() and before[6][2] == after[6][2]
    assert torch.equal(before[7], after[7]) and pointers == [p.data_ptr() for p in net.parameters()]


def test_same_answer_twice():
    net, images = Everything(), x(4, 3, 8, 8)
    one, other = (check(net, images, steps=2).to_dict() for _ in range(2))
    assert one == other


def test_to_dict_is_json_and_table_has_its_columns():
    found = check(mlp(), x(8, 6))
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert tuple(found.table.columns) == COLUMNS and len(found.modules) == 0
    assert "Diverse: 0, 2, 4" in str(found) and "state features" in str(found)


def test_pandas_is_imported_for_the_table_only():
    code = ("import sys, torch\nfrom symbreak import check, asymmetry\n"
            "found = check(torch.nn.Linear(3, 4), torch.randn(5, 3), steps=1)\nfound.findings, found.to_dict()\n"
            "print(*{'pandas', 'matplotlib'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# The verb, and the page that shows it


def verb(capsys, *argv):
    code = main(["check", *map(str, argv)])
    return code, capsys.readouterr()


@pytest.fixture
def makers(tmp_path, monkeypatch):
    """A module of the user's own in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_networks_for_check.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def copies(width=8):\n    net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))\n"
        "    for p in net.parameters(): nn.init.constant_(p, 0.25)\n    return net\n"
        "class Tokens(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)\n"
        "    def forward(self, x): return self.head(self.table(x))\nready = nn.Linear(4, 3)\n")
    return "my_networks_for_check"


def test_verb_prints_text_or_json_and_fails_on_what_it_is_told_to(capsys, makers, tmp_path):
    torch.save((exact(16, 4), exact(16, 2)), tmp_path / "batch.pt")
    code, printed = verb(capsys, f"{makers}:copies", "--batch", "batch.pt", "--options", "width=6",
                         "--fail-on", "identical,parted")
    assert code == 1 and "(6 features, 1 distinct)" in printed.out and "symbreak: identical,parted: 0" in printed.err
    code, printed = verb(capsys, f"{makers}:Tokens", "--input", "5", "--tokens", "9", "--steps", "2", "--json",
                         "--fail-on", "identical,dead,stuck")
    assert code == 0 and [row["state"] for row in json.loads(printed.out)["layers"]] == ["diverse", "diverse"]
    code, printed = verb(capsys, f"{makers}:ready", "--input", "4", "--batch-size", "3")
    assert code == 0 and "batch 3x4" in printed.out


@pytest.mark.parametrize("argv, says", [
    (["nowhere:net", "--input", "3"], "model: 'nowhere:net' is not found"),
    (["net", "--input", "3"], "allowed: MODULE:NAME"),
    (["torch.nn:Identity"], "input, batch: allowed: one of them"),
    (["torch.nn:Identity", "--input", "3"], "model: has no parameters"),
    (["torch.nn:Linear", "--input", "3", "--fail-on", "bad"], "fail_on: 'bad'; allowed: identical"),
    (["torch.nn:Linear", "--batch", "missing.pt"], "missing.pt"), (["torch.nn:Linear", "--input", "3"], "in_features"),
    (["torch.nn:GRUCell", "--input", "3", "--options", "input_size=4", "hidden_size=2"], "model: does not run"),
    (["symbreak.nets:ConstNet", "--input", "4x8x8"], "allowed: (n, 3, height, width)")], ids=str)
def test_what_cannot_be_checked_is_said_in_one_line(capsys, argv, says):
    code, printed = verb(capsys, *argv)
    assert code == 2 and says in printed.err and len(printed.err.strip().splitlines()) == 1


PAGE = (Path(__file__).resolve().parents[1] / "docs" / "howto" / "check.md").read_text()


def findings(text): return [re.sub(r"[\d.]+", "#", line) for line in text.splitlines() if line.startswith("- ")]


def shown(kind):
    """The commands of the page in a language, each with the findings that the page shows below it."""
    return [(code, findings(output)) for code, output in
            re.findall(rf"```{kind}\n([^`]*)\n```\n\n```text\n(.*?)\n```", PAGE, re.DOTALL)]


@pytest.mark.parametrize("command, expected", [pair for pair in shown("sh") if pair[0].startswith("symbreak check")])
def test_the_page_shows_what_the_command_finds(capsys, command, expected):
    """On small images and with fewer steps, which find the same."""
    small = command.replace("3x224x224", "3x32x32").replace("--steps 20", "--steps 1").split()[2:]
    assert expected and findings(verb(capsys, *small, "--batch-size", 4)[1].out) == expected


def probes():
    """The commands of the page that probe a network, each with what the page shows below it."""
    return re.findall(r"```sh\nsymbreak (probe --from-model [^`]*)\n```\n\n```text\n(.*?)\n```", PAGE, re.DOTALL)


@pytest.mark.parametrize("command, output", probes())
def test_the_page_shows_what_the_probe_asks(command, output):
    """All operations of the network, whatever a machine says of them, and that there was load."""
    verb, *argv = command.replace("3x224x224", "3x32x32").split()
    asked = parse(verb, argv)
    heard = recorded(make_model(asked.from_model, asked.options), sizes(asked.input, "input"), (3, 2))
    said = " ".join(output.split())
    for name in {o.name for o in heard}: assert name in said
    assert "kept all cores busy" in said and "float32" in said


def test_the_page_probes_the_networks_that_it_checks():
    assert [command.split()[2] for command, _ in probes()] == list(dict.fromkeys(
        command.split()[2] for command, _ in shown("sh") if command.startswith("symbreak check")))


def test_the_page_shows_what_its_python_finds(capsys):
    (code, expected), = shown("python")
    exec(code, {})
    assert expected and findings(capsys.readouterr().out) == expected


class Captured(nn.Module):
    """Its copy still runs the layers of the original."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
        self.run = lambda inputs: self.head(torch.relu(self.body(inputs)))

    def forward(self, inputs): return self.run(inputs)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("make, says", [
    (Captured, "model: its copy computes with body.weight of the original"),
    (lambda: torch.jit.script(mlp()), "model: is a RecursiveScriptModule; allowed: what it was made from"),
    (lambda: nn.Sequential(torch.jit.trace(mlp(), x(4, 6))), "model: 0 is a TopLevelTracedModule"),
])
def test_a_model_whose_copy_computes_with_the_original_is_refused_and_left_alone(make, says):
    model = make()
    for p in model.parameters(): p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=says): check(model, x(4, 6), steps=2)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


def test_a_weight_that_is_computed_is_not_judged_by_what_is_left():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 3))
    nn.init.normal_(model[0].bias)
    state, _ = states(model, x(8, 6))
    assert "0" not in state and state["0.bias"] == state["0.parametrizations.weight.original1"] == "unknown"


def test_targets_part_the_classes_of_a_last_layer_whatever_is_made_of_them():
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5), nn.Sigmoid())
    nn.init.constant_(model[2].weight, 0.1), nn.init.zeros_(model[2].bias)
    assert says(check(model, x(16, 6), steps=3), "parted by the targets: 2")


class Copied(nn.Module):
    """Two layers, each of equal features."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
        for layer in (self.body, self.head): nn.init.constant_(layer.weight, 0.1), nn.init.zeros_(layer.bias)


@pytest.mark.parametrize("drawn", [lambda h: torch.from_numpy(np.random.randn(*h.shape)).to(h),
                                   lambda h: torch.tensor([random.gauss(0, 1) for _ in range(h.shape[1])]).to(h)])
def test_random_numbers_of_other_libraries_are_noticed(drawn):
    class Noisy(Copied):
        def forward(self, inputs):
            hidden = self.body(inputs)
            return self.head(hidden * drawn(hidden))

    assert says(check(Noisy(), x(16, 6)), "or random numbers that the model draws: body")


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_in_what_is_computed_twice(reentrant):
    class Twice(Copied):
        def forward(self, inputs):
            hidden = self.body(inputs)
            return checkpoint(lambda h: self.head(F.dropout(h, 0.5, self.training)), hidden, use_reentrant=reentrant)

    found = check(Twice(), (x(16, 6), x(16, 1).expand(16, 3)), steps=2)
    assert says(found, "parted by not known: body") and says(found, "Causes cannot be told: the model")


def test_biases_that_alone_are_trained():
    model = mlp()
    nn.init.constant_(model[0].weight, 0.1), nn.init.zeros_(model[0].bias)
    for p in (model[0].weight, model[2].weight): p.requires_grad_(False)
    state, _ = states(model, x(16, 6))
    assert (state["0"], state["2"], state["4"]) == ("parted", "diverse", "diverse")


def test_features_below_zero_that_something_else_reads_are_not_dead():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 5), nn.Linear(10, 3)
            nn.init.constant_(self.body.bias, -50.)

        def forward(self, inputs):
            hidden = self.body(inputs)
            return self.head(torch.cat([F.relu(hidden), F.relu(-hidden)], 1))

    found = check(Both(), x(16, 6))
    assert not found.having("dead") and found.table.dead[0] == 0


def test_copies_inside_copies_are_named():
    model = Branches()
    found = check(model, x(8, 6))
    assert {row["layer"] for row in found.copies} == {"pairs.0, pairs.1", "pairs.0.0, pairs.0.1, pairs.1.0, pairs.1.1"}


class Branches(nn.Module):
    """Two pairs of layers, all four the same."""

    def __init__(self):
        super().__init__()
        self.pairs = nn.ModuleList([nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4)]) for _ in range(2)])
        for pair in self.pairs:
            for layer in pair: layer.load_state_dict(self.pairs[0][0].state_dict())

    def forward(self, inputs): return sum(layer(inputs) for pair in self.pairs for layer in pair)


def test_a_teacher_that_is_not_trained_parts_from_its_student():
    class Distilled(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = nn.Linear(6, 5)
            self.teacher = copy.deepcopy(self.student).requires_grad_(False)

        def forward(self, inputs): return self.student(inputs) - 2 * self.teacher(inputs)

    assert says(check(Distilled(), x(8, 6), steps=3), "parted by training, which only some of them get")


def test_units_of_a_single_head():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 1, batch_first=True), nn.Linear(8, 3)
            for p in self.attention.parameters(): nn.init.constant_(p, 0.1)

        def forward(self, inputs): return self.head(self.attention(inputs, inputs, inputs, need_weights=False)[0])

    found = check(Attends(), x(4, 5, 8))
    assert found.table.set_index("layer").features["attention"] == 8
    assert found.rows[0]["state"] in ("identical", "parted")


@pytest.mark.parametrize("model, batch, says", [
    (nn.Linear(6, 1), (torch.zeros(4, 6), torch.zeros(4)), r"batch: a target of shape \(4,\) for an output of \(4, 1"),
    (nn.Linear(6, 2), (torch.zeros(4, 6), torch.tensor([0, 1, 2, 0])), "model: does not run on this batch"),
    (nn.Linear(6, 2), torch.zeros(4, 7), "model: does not run on this batch"),
    (nn.Linear(6, 2, dtype=torch.complex64), torch.zeros(4, 6), "model: weight has complex numbers"),
])
def test_what_cannot_be_run_is_said_in_one_line(model, batch, says):
    with pytest.raises(ValueError, match=says): check(model, batch)


def test_a_model_that_keeps_to_its_own_precision_leaves_small_differences_unknown():
    class Converts(nn.Linear):
        def forward(self, inputs): return F.linear(inputs.float(), self.weight.float(), self.bias.float())

    def network(behind):
        model = nn.Sequential(Converts(6, 5), Uneven(), Converts(5, 3))
        nn.init.constant_(model[0].weight, 0.1), nn.init.zeros_(model[0].bias)
        if behind == "equal": nn.init.constant_(model[2].weight, 0.1), nn.init.zeros_(model[2].bias)
        return model

    found = check(network("equal"), (x(16, 6), x(16, 1).expand(16, 3)), probe=False)
    assert says(found, "parted by not known: 0") and says(found, "compute in a precision of their own")
    assert says(check(network("random"), x(16, 6), probe=False), "parted by what is behind them")
