"""Neighbour search against a loop, and its promises: exact, ties by index, clear errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sdood_plugin.errors import UsageError
from sdood_plugin.neighbours import nearest


def naive(queries, bank, k, exclude_self=False):
    """Every distance by hand in float64, sorted by (distance, index)."""
    distances, indices = [], []
    for row, query in enumerate(queries.double().tolist()):
        found = sorted(
            (sum((a - b) ** 2 for a, b in zip(query, other, strict=True)), column)
            for column, other in enumerate(bank.double().tolist())
            if not (exclude_self and column == row)
        )[:k]
        distances.append([distance for distance, _ in found])
        indices.append([column for _, column in found])
    return torch.tensor(distances, dtype=torch.float64), torch.tensor(indices)


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("k", [1, 3, 19])
@pytest.mark.parametrize("max_elements", [1, 100, 1 << 25])
def test_equals_the_loop_for_every_chunk_size(generator, k, exclude_self, max_elements):
    bank = torch.randn(20, 5, generator=generator)
    queries = bank if exclude_self else torch.randn(7, 5, generator=generator)
    distances, indices = nearest(queries, bank, k, exclude_self=exclude_self, max_elements=max_elements)
    expected, order = naive(queries, bank, k, exclude_self)
    assert torch.equal(indices, order)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exclude_self", [False, True])
def test_duplicates_come_in_the_order_of_the_bank(exclude_self):
    bank = torch.tensor([[1.0, 0.0]] * 15 + [[0.0, 0.0]] * 15)
    distances, indices = nearest(bank, bank, 4, exclude_self=exclude_self)
    expected, order = naive(bank, bank, 4, exclude_self)
    assert torch.equal(indices, order)
    assert torch.equal(distances.double(), expected)


@pytest.mark.parametrize(("centre", "spread"), [(100.0, 1e-2), (1e4, 1.0), (1.0, 1e-4)])
def test_exact_where_the_expanded_square_cancels(generator, centre, spread):
    # two tight clusters far from each other: |q|^2 - 2 q.b + |b|^2 in float32 is all rounding here
    noise = spread * torch.randn(120, 6, generator=generator)
    bank = torch.cat([centre + noise[:50], -centre + noise[50:100]])
    queries = centre + noise[100:]
    distances, indices = nearest(queries, bank, 5)
    expected, order = naive(queries, bank, 5)
    assert torch.equal(indices, order)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-5, atol=0)


def test_exact_on_collapsed_unit_features(generator):
    # what a well trained backbone makes of a class: directions that differ in the fourth digit
    means = F.normalize(torch.randn(3, 32, generator=generator), dim=1).repeat(40, 1)
    bank = F.normalize(means + 1e-4 * torch.randn(120, 32, generator=generator), dim=1)
    _, indices = nearest(bank, bank, 5, exclude_self=True)
    assert torch.equal(indices, naive(bank, bank, 5, True)[1])


def test_k_may_be_the_whole_bank(generator):
    bank = torch.randn(6, 3, generator=generator)
    assert torch.equal(nearest(bank, bank, 6)[1].sort(dim=1).values, torch.arange(6).expand(6, 6))


def test_no_queries_give_an_empty_answer(generator):
    distances, indices = nearest(torch.empty(0, 3), torch.randn(6, 3, generator=generator), 2)
    assert distances.shape == indices.shape == (0, 2)


@pytest.mark.parametrize(("k", "exclude_self"), [(0, False), (-1, False), (7, False), (6, True)])
def test_refuses_a_k_that_does_not_fit(generator, k, exclude_self):
    bank = torch.randn(6, 3, generator=generator)
    with pytest.raises(UsageError, match=f"got {k};.*{6 - exclude_self}"):
        nearest(bank, bank, k, exclude_self=exclude_self)


@pytest.mark.parametrize("broken", ["query", "bank"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_values_that_are_not_finite_and_names_the_row(generator, broken, value):
    features = {"query": torch.randn(4, 3, generator=generator), "bank": torch.randn(4, 3, generator=generator)}
    features[broken][2, 1] = value
    with pytest.raises(UsageError, match=f"{broken} features.*row 2"):
        nearest(features["query"], features["bank"], 1)


def test_refuses_features_of_another_width(generator):
    with pytest.raises(UsageError, match="feature width"):
        nearest(torch.zeros(2, 3), torch.randn(4, 5, generator=generator), 1)
