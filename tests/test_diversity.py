"""Distinct features counted through hashes: the same number as by sorting, also where hashes collide; one transfer."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from symbreak import diversity
from symbreak.diversity import distinct_features, effective_width, measure, weight_correlation
from symbreak.nets import ConstNet


def test_hashes_count_what_sorting_counts():
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        n, d, k = (int(torch.randint(1, high, (1,), generator=g)) for high in (40, 30, 8))
        rows = torch.randn(k, d, generator=g)[torch.randint(k, (n,), generator=g)]
        assert distinct_features(rows) == len(rows.unique(dim=0))


def test_one_ulp_and_zeros_of_either_sign():
    rows = torch.tensor([[0., 1.], [-0., 1.], [0., torch.nextafter(torch.tensor(1.), torch.tensor(2.))]])
    assert distinct_features(rows) == 2


@pytest.fixture
def colliding(monkeypatch): monkeypatch.setattr(diversity, "_hashes", lambda rows: torch.zeros(len(rows)).long())


def test_collisions_do_not_hide_a_row(colliding):
    assert distinct_features(torch.tensor([[1., 2.], [3., 4.], [1., 2.], [3., 5.]])) == 3
    assert distinct_features(torch.ones(5, 3)) == 1
    found = measure(ConstNet(7, 1, init="he"), torch.randn(8, 3, 8, 8))
    assert found["distinct"] == [16, 16, 32, 32, 64, 64, None] and found["block_distinct"] == [16, 16, 32, 64]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.complex64,
                                   torch.int32, torch.uint8, torch.uint16, torch.uint64, torch.bool], ids=str)
def test_any_dtype(dtype):
    rows = torch.tensor([[0, 1], [1, 0], [0, 1]]).to(dtype)
    assert distinct_features(rows) == distinct_features(rows.T, dim=1) == distinct_features(rows[:2, 0]) == 2


@pytest.mark.parametrize("dtype", sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str),
                         ids=str)
@pytest.mark.parametrize("atol", [0., 0.1])
@pytest.mark.filterwarnings("ignore")
def test_every_dtype_of_torch_is_counted_or_refused_by_name(dtype, atol):
    names = ("quint8", "qint8", "qint32", "quint4x2", "quint2x4")
    if str(dtype).removeprefix("torch.") in names:
        rows = torch.quantize_per_tensor(torch.tensor([[0., 1.], [1., 0.], [0., 1.]]), 0.5, 0, dtype)
    else: rows = torch.zeros(24 * dtype.itemsize, dtype=torch.uint8).view(dtype).reshape(3, -1)
    try: assert distinct_features(rows, atol=atol) == (2 if rows.is_quantized else 1)
    except ValueError as e: assert str(e).startswith(f"weight_or_activation: {dtype}; allowed: ")
    else: return
    with pytest.raises(NotImplementedError): rows.double()


@pytest.mark.parametrize("kind", ["to_sparse", "to_sparse_csr", "to_sparse_csc", "to_mkldnn"])
@pytest.mark.filterwarnings("ignore")
def test_every_layout_is_counted(kind):
    rows = torch.tensor([[0., 1.], [1., 0.], [0., 1.]])
    assert distinct_features(getattr(rows, kind)()) == 2
    assert distinct_features(getattr(rows, kind)(), dim=1, atol=2.) == 1


@pytest.mark.filterwarnings("ignore")
def test_a_tensor_without_numbers_of_one_shape_is_refused_by_name():
    for x, said in ((torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
                    (torch.ones(3, 2, device="meta"), "on meta")):
        with pytest.raises(ValueError, match=f"weight_or_activation: {said}; allowed: "): distinct_features(x)
        with pytest.raises(ValueError, match=f"weight: {said}; allowed: "): weight_correlation(x)
        with pytest.raises(ValueError, match=f"activations: {said}; allowed: "): effective_width(x)


class Waits(TorchDispatchMode):
    """Notes operations that make the host wait for a device."""
    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if any(name in op.name() for name in ("_local_scalar_dense", "nonzero", "unique", "masked_select")):
            self.heard.append(op.name())
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("init", ["identical", "he"])
def test_nothing_waits_for_the_device_before_all_numbers_leave_together(init, monkeypatch):
    together, waited = diversity._together, []

    def noting(tensors):
        waited.append(list(waits.heard))
        return together(tensors)
    monkeypatch.setattr(diversity, "_together", noting)
    with Waits() as waits:
        torch.ones(3).sum().item()
        assert waits.heard and not waits.heard.clear()  # it is heard at all
        measure(ConstNet(7, 1, init=init), torch.randn(8, 3, 8, 8))
    assert waited == [[]] and set(waits.heard) <= {"aten::_local_scalar_dense"}  # of what has left
