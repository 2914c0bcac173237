"""Neighbour search against a loop, and its promises: exact by every way it can take, ties by index, clear errors."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdood_plugin.errors import UsageError
from sdood_plugin.neighbours import Bank, bank, candidates, cells, flat, nearest

needs_faiss = pytest.mark.skipif(find_spec("faiss") is None, reason="faiss is not installed")


@pytest.fixture(params=["bfloat16", "float32", pytest.param("faiss", marks=needs_faiss), "cells"], autouse=True)
def way(request, monkeypatch):
    """Every test here takes each way once: candidates of bfloat16 and of float32 products, and of faiss; a search by cells."""
    monkeypatch.setattr(flat, "multiplies_bfloat16", lambda device: request.param == "bfloat16")
    monkeypatch.setattr(flat, "_MANY", 1 if request.param == "faiss" else 10**9)
    if request.param == "cells":
        for name, value in (("_FEWEST", 4), ("_CELLS", 4), ("_WORTH", 1.0), ("_TIGHT", 1.0)):
            monkeypatch.setattr(cells, name, value)
    return request.param


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
@pytest.mark.parametrize("query_chunk", [1, 3, None])
def test_equals_the_loop_for_every_chunk_size(generator, k, exclude_self, query_chunk):
    bank = torch.randn(20, 5, generator=generator)
    queries = bank if exclude_self else torch.randn(7, 5, generator=generator)
    distances, indices = nearest(queries, bank, k, exclude_self=exclude_self, query_chunk=query_chunk)
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


@pytest.mark.parametrize(("block", "group"), [(4, 1), (4, 3), (16, 2), (7, 4)])
@pytest.mark.parametrize("fold", [1, 2, 8])
@pytest.mark.parametrize(("spare", "most"), [(0, 0), (3, 5), (24, 512)])
def test_block_sizes_and_numbers_of_candidates_change_nothing(generator, monkeypatch, block, group, fold, spare, most):
    for name, value in (("BLOCK", block), ("GROUP", group), ("FOLD", fold), ("SPARE", spare), ("MOST", most)):
        monkeypatch.setattr(candidates, name, value)
    features, queries = torch.randn(101, 6, generator=generator), torch.randn(9, 6, generator=generator)
    features[50:60] = features[:10]
    distances, rows = nearest(queries, features, 4)
    expected, order = naive(queries, features, 4)
    assert torch.equal(rows, order)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-6, atol=0)


def test_what_is_searched_together_changes_nothing(generator):
    features, queries = torch.randn(5000, 24, generator=generator), torch.randn(600, 24, generator=generator)
    whole, alone = nearest(queries, features, 5), [nearest(part, features, 5) for part in queries.split(70)]
    assert torch.equal(whole[1], torch.cat([rows for _, rows in alone]))
    assert torch.equal(nearest(queries, features, 5, query_chunk=33)[1], whole[1])
    assert torch.equal(whole[0], torch.cat([distances for distances, _ in alone]))
    bank = Bank(features)
    together = bank.nearest(queries[:9], 5)[0]
    assert torch.equal(together, torch.cat([bank.nearest(query[None], 5)[0] for query in queries[:9]])), "to the last bit"
    shuffled = torch.randperm(5000, generator=generator)
    assert torch.equal(shuffled[nearest(queries, features[shuffled], 5)[1]], whole[1])


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_any_scale_and_dtype(generator, scale, dtype):
    if dtype == torch.float16 and scale != 1.0:
        pytest.skip("outside the format")
    features = (scale * torch.randn(300, 8, generator=generator)).to(dtype)
    queries = (scale * torch.randn(20, 8, generator=generator)).to(dtype)
    distances, rows = nearest(queries, features, 3)
    assert torch.equal(rows, naive(queries, features, 3)[1])
    assert distances.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def in_numpy(queries, bank, k):
    """Squared distances and rows in numpy's float64."""
    distances = np.square(queries.double().numpy()[:, None] - bank.double().numpy()[None]).sum(axis=2)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, axis=1), order


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e4, 1e19, 1e25, 1e38, 1e-30, 1e-44])
@pytest.mark.parametrize("kind", ["all", "two places", "half of the bank", "one row", "queries"])
def test_numbers_of_any_size_that_float32_holds(generator, kind, size, dtype):
    """Where their squares are none in float32, and their sums not either."""
    bank, queries = (
        3 * torch.rand(count, 8, generator=generator) * torch.randn(count, 8, generator=generator).sign() for count in (300, 20)
    )
    if kind == "two places":
        bank = torch.cat([size + min(1, size) * bank[:150], -size + min(1, size) * bank[150:]])
    else:
        bank[{"all": slice(300), "half of the bank": slice(150), "one row": slice(1), "queries": slice(0)}[kind]] *= size
    queries = torch.cat([size * queries, 1.1 * bank[:3], bank[-3:]])
    distances, rows = Bank(bank.to(dtype)).nearest(queries.to(dtype), 3)
    expected, order = in_numpy(queries, bank, 3)
    assert np.array_equal(rows, order)
    np.testing.assert_allclose(distances, expected, rtol=1e-12)


@pytest.mark.parametrize("size", [1e150, 1e200, -1e300])
def test_numbers_whose_squares_are_none_in_float64_are_refused(generator, size):
    bank = torch.randn(300, 8, generator=generator).double()
    bank[7, 2] = size
    for given in ((bank[:5], bank), (bank, bank[:5])):
        with pytest.raises(UsageError, match=r"features: got NaN, infinity or beyond 1e\+150 in row 7; expected finite numbers"):
            nearest(*given, 1)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4, 1e19, 1e25, 1e38, 1e-30])
def test_constant_features_are_all_ties(value):
    features = torch.full((200, 8), value)
    distances, rows = nearest(features[:5], features, 4)
    assert torch.equal(rows, torch.arange(4).expand(5, 4)) and (distances == 0).all()
    _, others = nearest(features, features, 4, exclude_self=True)
    assert others[2].tolist() == [0, 1, 3, 4] and others[150].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("spread", [1.0, 1e-2])
def test_the_error_of_candidates_is_within_its_bound(generator, way, spread):
    features = F.normalize(torch.randn(1, 64, generator=generator) + spread * torch.randn(700, 64, generator=generator), dim=1)
    queries = 1.5 * features[:40].flip(1)
    if way == "faiss":
        finder = candidates.FaissFinder(features)
        values, rows = (torch.from_numpy(part) for part in finder.index.search(queries.numpy(), 700))
        error, relative = candidates.summing_error(queries).double(), 2.0**-22
    else:
        precision = torch.bfloat16 if way == "bfloat16" else torch.float32
        finder = candidates.ProductFinder(lambda start, stop: features[start:stop], 700, precision)
        values, rows = finder.products(finder.extended_queries(queries), 0)[0, :, :700], torch.arange(700).expand(40, 700)
        error, relative = finder.error(queries).double(), finder.relative
    true = (queries.double()[:, None] - features[rows]).square().sum(dim=2)
    approximate, error = values.double(), error[:, None]
    assert (true <= approximate.clamp(min=0) / (1 - relative) + error).all()
    assert (true >= approximate.clamp(min=0) / (1 + relative) - error).all()
    worst = ((true - approximate).abs() / (error + relative * true)).max()
    assert 0 < worst < 1  # and the bound is one that this comes near, not infinity
    assert float(error.max()) < (0.05 if way == "bfloat16" else 1e-4)


def test_tight_clusters_are_told_apart_by_products_in_float64(generator, monkeypatch):
    # within a class the squared distances differ by less than float32 sums of unit rows may be off by
    monkeypatch.setattr(flat.FlatBank, "_by_definition", lambda *_: pytest.fail("without a product"))
    means = F.normalize(torch.randn(3, 64, generator=generator), dim=1).repeat(300, 1)
    features = F.normalize(means + 1e-3 * torch.randn(900, 64, generator=generator), dim=1)
    distances, rows = Bank(features).nearest(features[:40], 3)
    expected, order = naive(features[:40], features, 3)
    assert torch.equal(rows, order)
    torch.testing.assert_close(distances, expected, rtol=1e-12, atol=0)


def test_a_query_that_candidates_do_not_settle_is_searched_by_the_definition(generator, monkeypatch):
    asked = []
    original = flat.FlatBank._by_definition
    monkeypatch.setattr(flat.FlatBank, "_by_definition", lambda self, q, *rest: asked.append(len(q)) or original(self, q, *rest))
    features = torch.randn(900, 8, generator=generator)
    nearest(features[:50], features, 3)
    assert not asked
    tight = torch.cat([features, 100 + 1e-7 * features])
    assert torch.equal(nearest(tight[900:910], tight, 3)[1], naive(tight[900:910], tight, 3)[1])
    assert sum(asked) == 10


def set_everywhere(precision):
    torch.backends.fp32_precision = precision


def set_for_processors(precision):
    torch.backends.mkldnn.matmul.fp32_precision = precision


def set_for_gpus(precision):
    torch.backends.cuda.matmul.fp32_precision = precision


BY_BACKEND = pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="torch < 2.9 has one precision for all")


@pytest.fixture
def products_in(request):
    """The test's products in the precision that a user may have set; afterwards in torch's own."""
    setter, precision = request.param
    setter(precision)
    yield
    torch.set_float32_matmul_precision("highest")
    for again in (set_everywhere, set_for_processors, set_for_gpus) if hasattr(torch.backends.mkldnn, "matmul") else ():
        again("none")
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    "products_in",
    [
        (torch.set_float32_matmul_precision, "medium"),
        pytest.param((set_everywhere, "bf16"), marks=BY_BACKEND),
        pytest.param((set_for_processors, "bf16"), marks=BY_BACKEND),
    ],
    indirect=True,
)
def test_products_of_less_precision_are_allowed_for(generator, monkeypatch, products_in):
    exactly = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: out.copy_(exactly(a.bfloat16().float(), b.bfloat16().float())))
    features = F.normalize(torch.randn(200, 64, generator=generator), dim=1)
    finder = candidates.ProductFinder(lambda start, stop: features[start:stop], 200, torch.float32)
    found = finder.products(finder.extended_queries(features[:20]), 0)[0]
    off = ((features[:20, None] - features).square().sum(dim=2) - found).abs().amax(dim=1)
    assert (off < finder.error(features[:20])).all() and (off > candidates.summing_error(features[:20])).any()
    assert torch.equal(nearest(features[:20], features, 3)[1], naive(features[:20], features, 3)[1])


@BY_BACKEND
@pytest.mark.parametrize("products_in", [(set_for_gpus, "tf32")], indirect=True)
def test_each_device_has_its_own_precision(generator, products_in):
    assert [candidates._matmul_rounding(torch.device(name)) for name in ("cuda", "cpu")] == [2.0**-10, 0.0]
    features = torch.randn(200, 64, generator=generator)
    assert torch.equal(nearest(features[:5], features, 3)[1], naive(features[:5], features, 3)[1])


@pytest.mark.parametrize("allowed", [True, False])
def test_gpus_add_up_in_float32_and_are_left_as_they_were(monkeypatch, allowed):
    class Setting:
        allow_bf16_reduced_precision_reduction = allowed

    monkeypatch.setattr(torch.backends.cuda, "matmul", Setting)
    with pytest.raises(KeyError), candidates._added_in_float32(torch.device("cuda")):
        assert not Setting.allow_bf16_reduced_precision_reduction
        raise KeyError
    assert Setting.allow_bf16_reduced_precision_reduction == allowed
    with candidates._added_in_float32(torch.device("cpu")):
        assert Setting.allow_bf16_reduced_precision_reduction == allowed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: partial sums in bfloat16 are made there")
@pytest.mark.parametrize(("queries", "rows", "width"), [(8, 700, 16384), (64, 256, 8192), (512, 4096, 512)])
def test_the_bound_holds_for_long_sums_on_a_gpu(generator, queries, rows, width):
    # few results of long sums: products are split along the sum, and what the parts sum to may be rounded
    means = F.normalize(torch.randn(1, width, generator=generator), dim=1)
    features = F.normalize(means + 1e-3 * torch.randn(rows, width, generator=generator), dim=1).cuda()
    asked = features[:queries].flip(1)
    finder = candidates.ProductFinder(lambda start, stop: features[start:stop], rows, torch.bfloat16)
    found = finder.products(finder.extended_queries(asked), 0)[0, :, :rows].double()
    true = torch.stack([(one.double() - features).square().sum(dim=1) for one in asked])
    assert ((true - found).abs() <= finder.error(asked).double()[:, None] + 2 * finder.relative * true).all()
    assert torch.equal(nearest(asked, features, 5)[1].cpu(), nearest(asked.cpu(), features.cpu(), 5)[1])


def test_no_row_beyond_the_reach_can_be_nearer():
    # the k-th is truly at 1.1 at most, and what looks like 1.2 may truly be at 1.1; 5 % each way make that 1.155 and 1.318
    def reached(relative, limit=None):
        return float(candidates.reach(torch.tensor([1.0]), torch.tensor([0.1]), relative, limit))

    assert reached(0.0) == pytest.approx(1.2)
    assert reached(0.05) == pytest.approx(((1 / 0.95) + 0.2) * 1.05)
    assert reached(0.0, torch.tensor([0.5])) == pytest.approx(0.6)
    assert reached(0.0, torch.tensor([torch.inf])) == pytest.approx(1.2)


def test_backends_answer_alike(generator, way):
    features, queries = torch.randn(900, 16, generator=generator), torch.randn(30, 16, generator=generator)
    by_way, by_torch = (
        Bank(features, backend=name).nearest(queries, 5) for name in ("faiss" if way == "faiss" else "auto", "torch")
    )
    assert torch.equal(by_way[1], naive(queries, features, 5)[1])
    assert torch.equal(by_way[0], by_torch[0]) and torch.equal(by_way[1], by_torch[1])


def test_faiss_that_is_absent_is_named(monkeypatch):
    monkeypatch.setattr(bank, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"faiss-cpu.*sdood_plugin\[faiss\]"):
        Bank(torch.zeros(2, 3), backend="faiss")
    assert nearest(torch.ones(1, 3), torch.zeros(2, 3), 1)[0].tolist() == [[3.0]]


def test_preparing_a_flat_bank_makes_no_copy_of_it(generator, way):
    if way == "cells":
        pytest.skip("each cell has its rows")
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), settings=None):
            found = function(*arguments, **(settings or {}))
            made = [one for one in tree_leaves(found) if isinstance(one, torch.Tensor)]
            sizes.extend(one.nbytes for one in made if not one._is_view() and function is not torch.ops.aten.detach.default)
            return found

    features = torch.randn(1 << 17, 32, generator=generator)
    with Sizes():
        Bank(features)
    assert sizes and max(sizes) <= features.nbytes / 2  # 65,536 rows at a time


def test_an_empty_bank_is_refused():
    with pytest.raises(UsageError, match="bank: got no rows"):
        Bank(torch.empty(0, 3))
