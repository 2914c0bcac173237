"""Counter-based noise: its distribution, and that a row depends on its index alone."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from sdood_plugin.randomness import derive_seed, normal, random_bits, step_generator, uniform

MASK = (1 << 64) - 1


def splitmix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


@pytest.mark.parametrize("seed", [0, 12345, 2**63 - 1])
@pytest.mark.parametrize("draw", [0, 1, 2, 3, 50, 1001])
def test_bits_are_splitmix64_in_unsigned_integers(seed, draw):
    index = [0, 1, 7, (1 << 32) + 5]
    golden = 0x9E3779B97F4A7C15
    expected = []
    for i in index:
        stream = splitmix((splitmix((i + seed) & MASK) + draw * golden) & MASK)
        expected.append([splitmix((stream + j * golden) & MASK) for j in (1, 2, 3)])
    found = random_bits(seed, torch.tensor(index), draw, 3)
    assert [[value & MASK for value in row] for row in found.tolist()] == expected


def test_normal_is_standard_normal():
    values = normal(3, torch.arange(400), 1, (3, 8, 8)).double().flatten()
    assert abs(values.mean()) < 5 / len(values) ** 0.5
    assert abs(values.std() - 1) < 5 / (2 * len(values)) ** 0.5
    assert stats.kstest(values.numpy(), "norm").pvalue > 1e-3
    assert values.abs().max() > 4  # the tails are there


def test_uniform_is_uniform_and_never_reaches_its_ends():
    values = uniform(5, torch.arange(1000), 0, 50).flatten()
    assert 0 < values.min() and values.max() < 1
    assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: normal(0, torch.arange(300), 2, (100,)), id="another draw"),
        pytest.param(lambda: normal(1, torch.arange(300), 1, (100,)), id="another seed"),
        pytest.param(lambda: normal(0, torch.arange(300) + 1, 1, (100,)), id="the next index"),
        pytest.param(lambda: normal(0, torch.arange(300) + (1 << 32), 1, (100,)), id="the next copy"),
    ],
)
def test_draws_seeds_and_indices_are_independent(other):
    first, second = normal(0, torch.arange(300), 1, (100,)), other()
    assert not torch.equal(first, second)
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
    assert abs(correlation) < 5 / first.numel() ** 0.5


def test_the_two_halves_of_box_muller_are_uncorrelated():
    values = normal(0, torch.arange(20000), 1, (2,))
    assert abs(torch.corrcoef(values.T)[0, 1]) < 5 / 20000**0.5
    assert abs(torch.corrcoef(values.square().T)[0, 1]) < 5 / 20000**0.5


def test_a_row_depends_on_its_index_only():
    index = torch.tensor([4, 0, 9, 4])
    together = normal(7, index, 2, (3, 5, 5))
    for row, i in enumerate(index.tolist()):
        assert torch.equal(together[row], normal(7, torch.tensor([i]), 2, (3, 5, 5))[0])
    assert torch.equal(together[0], together[3])


def test_an_odd_number_of_elements_starts_like_the_even_one():
    assert normal(0, torch.arange(2), 1, (3, 1, 1)).shape == (2, 3, 1, 1)


def test_step_generators_are_reproducible_and_differ_by_seed_name_and_step():
    def draw(*key):
        return torch.rand(8, generator=step_generator(*key))

    assert torch.equal(draw(0, "a", 3), draw(0, "a", 3))
    values = [draw(*key) for key in ((0, "a", 3), (0, "a", 4), (0, "b", 3), (1, "a", 3))]
    assert len({tuple(value.tolist()) for value in values}) == 4


def test_derived_seeds_fit_a_signed_integer_and_differ():
    seeds = {derive_seed(seed, name) for seed in range(20) for name in ("a", "b", ("a", "b"))}
    assert len(seeds) == 60
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "a", "b") != derive_seed(0, "ab")
