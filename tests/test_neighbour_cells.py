"""Search by cells: the answers of a flat search whatever the division, and no look at cells that are too far away."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sdood_plugin.neighbours import Bank
from sdood_plugin.neighbours.cells import Cells, tight_cells
from sdood_plugin.neighbours.flat import FlatBank


def classes(count, width, spread, generator):
    """Unit rows of eight classes."""
    means = torch.randn(8, width, generator=torch.Generator().manual_seed(1))
    return F.normalize(means[torch.arange(count) % 8] + spread * torch.randn(count, width, generator=generator), dim=1)


@pytest.fixture
def compared(monkeypatch):
    """Pairs of a query and a row that flat searches compared, a list."""
    pairs, original = [], FlatBank.search
    monkeypatch.setattr(
        FlatBank, "search", lambda self, queries, *rest: pairs.append(len(queries) * len(self)) or original(self, queries, *rest)
    )
    return pairs


@pytest.mark.parametrize("spread", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("division", ["by class", "at random", "one row, none, the rest"])
@pytest.mark.parametrize("k", [1, 6, 200])
def test_any_division_gives_the_answers_of_a_flat_search(generator, spread, division, k):
    features = classes(400, 12, spread, generator)
    features[200:230] = features[:30]  # copies, in other cells where the division is at random
    cell = {
        "by class": torch.arange(400) % 8,
        "at random": torch.randint(3, (400,), generator=generator),
        "one row, none, the rest": torch.full((400,), 2).index_fill(0, torch.tensor([7]), 0),
    }[division]
    flat = FlatBank(features, "torch")
    centres = torch.stack([(features[cell == number].double() - flat.centre).sum(dim=0) for number in range(int(cell.max()) + 1)])
    queries = torch.cat([features[:40], classes(40, 12, spread, generator), 5 * torch.randn(20, 12, generator=generator)])
    found, expected = Cells(flat, centres / 50, cell).search(queries, k), flat.search(queries, k)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_bounds_are_below_every_distance_and_near_the_least(generator, scale):
    features, cell = scale * classes(400, 12, 0.2, generator).double(), torch.arange(400) % 8
    flat = FlatBank(features, "torch")
    centres = torch.stack([features[cell == number].mean(dim=0) for number in range(8)]) - flat.centre
    queries = torch.cat([features[:50], scale * torch.randn(50, 12, generator=generator).double(), 1e6 * features[:5]])
    _, bounds = Cells(flat, centres, cell).bounds(queries)
    distances = torch.cdist(queries, features, compute_mode="donot_use_mm_for_euclid_dist")
    least = torch.stack([distances[:, cell == number].amin(dim=1) for number in range(8)], dim=1)
    assert (bounds <= least).all()
    assert (bounds[:50] > 0.6 * least[:50])[least[:50] > 0.5 * scale].double().mean() > 0.9, "and says something"


def test_thin_cells_side_by_side_are_told_apart(generator):
    side = torch.arange(200) % 2
    features = torch.stack([side + 0.01 * torch.rand(200, generator=generator), 50 * torch.rand(200, generator=generator)], dim=1)
    flat = FlatBank(features, "torch")
    centres = torch.tensor([[0.0, 25], [1, 25]]).double() - flat.centre
    own, bounds = Cells(flat, centres, side).bounds(features)
    assert torch.equal(own, side)
    assert (bounds[torch.arange(200), 1 - side] > 0.95).all()


def test_only_cells_within_reach_are_searched(generator, compared):
    features, queries = classes(20_000, 24, 0.05, generator), classes(400, 24, 0.05, generator)
    bank = Bank(features)
    compared.clear()
    _, rows = bank.nearest(queries, 5)
    assert 0 < sum(compared) < 0.2 * 400 * 20_000
    assert torch.equal(rows, FlatBank(features, "torch").search(queries, 5)[1])


def test_queries_as_far_from_all_cells_ask_the_flat_bank_once(generator, compared):
    features, queries = classes(20_000, 24, 0.05, generator), 1e-3 * torch.randn(40, 24, generator=generator)
    bank = Bank(features)
    compared.clear()
    _, rows = bank.nearest(queries, 5)
    assert max(compared) > 0.8 * 40 * 20_000 and sum(compared) < 1.5 * 40 * 20_000
    assert torch.equal(rows, FlatBank(features, "torch").search(queries, 5)[1])


@pytest.mark.parametrize(("kind", "falls"), [("tight", True), ("loose", False), ("constant", False), ("few", False)])
def test_cells_are_made_of_banks_that_fall_into_them(generator, recwarn, kind, falls):
    features = {
        "tight": classes(20_000, 24, 0.05, generator),
        "loose": torch.randn(20_000, 24, generator=generator),
        "constant": torch.ones(20_000, 24),
        "few": classes(2_000, 24, 0.05, generator),
    }[kind]
    assert (tight_cells(features) is not None) == falls
    assert isinstance(Bank(features)._index, Cells if falls else FlatBank)
    assert not len(recwarn)


def test_faiss_searches_all_rows(generator):
    pytest.importorskip("faiss")
    assert isinstance(Bank(classes(20_000, 24, 0.05, generator), backend="faiss")._index, FlatBank)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("width", [24, 25])
def test_a_gpu_gives_the_answers_of_the_processor(generator, width):
    features, queries = classes(20_000, width, 0.05, generator), classes(400, width, 0.05, generator)
    features[10_000:10_200] = features[:200]  # copies, whose order sums of another layout would turn
    queries = torch.cat([queries, features[:200]])
    there, here = (Bank(features.to(device)).nearest(queries.to(device), 5) for device in ("cuda", "cpu"))
    assert torch.equal(there[1].cpu(), here[1])
    torch.testing.assert_close(there[0].cpu(), here[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("dtype", "far"), [(torch.float64, 1e4), (torch.float32, 1e13)])
def test_queries_far_from_cells_of_copies(generator, dtype, far):
    copies = F.normalize(torch.randn(8, 16, generator=generator).to(dtype), dim=1).repeat_interleave(8190, 0)
    bank = Bank(copies, backend="torch")
    assert isinstance(bank._index, Cells)
    distances, rows = bank.nearest(far * copies[:1], 2)
    assert rows.tolist() == [[0, 1]]
    torch.testing.assert_close(distances, torch.full((1, 2), (far - 1) ** 2).double(), rtol=1e-5, atol=0)


def test_a_bank_in_the_order_of_its_classes_or_any_other_is_seen_alike(generator):
    features = classes(16_384, 24, 0.05, generator)
    for order in (torch.arange(16_384), features[:, 0].argsort()):
        assert tight_cells(features[order]) is not None


def test_a_bank_whose_sums_overflow_is_flat(generator):
    assert tight_cells(1e37 * classes(20_000, 24, 0.05, generator)) is None
