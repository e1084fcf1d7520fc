"""Distinct features counted through hashes, as on a GPU: the same number as by sorting, also where hashes collide."""
import pytest
import torch

from symbreak import diversity
from symbreak.diversity import _different_hashed, _different_sorted, distinct_features


def test_hashes_count_what_sorting_counts():
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        n, d, k = (int(torch.randint(1, high, (1,), generator=g)) for high in (40, 30, 8))
        rows = torch.randn(k, d, generator=g)[torch.randint(k, (n,), generator=g)]
        assert _different_hashed(rows) == _different_sorted(rows) == len(rows.unique(dim=0))


def test_one_ulp_and_zeros_of_either_sign():
    rows = torch.tensor([[0., 1.], [-0., 1.], [0., torch.nextafter(torch.tensor(1.), torch.tensor(2.))]])
    assert _different_hashed(rows) == distinct_features(rows) == 2


def test_collisions_do_not_hide_a_row(monkeypatch):
    monkeypatch.setattr(diversity, "_hashes", lambda rows: torch.zeros(len(rows), dtype=torch.int64))
    assert _different_hashed(torch.tensor([[1., 2.], [3., 4.], [1., 2.], [3., 5.]])) == 3
    assert _different_hashed(torch.ones(5, 3)) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.complex64,
                                   torch.int32, torch.uint8, torch.bool], ids=str)
def test_any_dtype(dtype):
    rows = torch.tensor([[0, 1], [1, 0], [0, 1]]).to(dtype)
    assert distinct_features(rows) == 2
