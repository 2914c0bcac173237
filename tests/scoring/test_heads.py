"""The heads' own scores against their formulas in Python floats."""

from __future__ import annotations

import math

import pytest
import torch

from sdood_plugin.scoring.heads import head_scores


def test_equal_the_formulas(generator):
    binary, inside = torch.randn(5, 2, generator=generator), 3 * torch.randn(5, 4, generator=generator)
    outside = 2 * torch.randn(5, 4, generator=generator)
    found = head_scores(binary, inside, outside)
    assert list(found) == ["g_bin", "msp", "energy", "g_out"]
    for row in range(5):
        first, second = (math.exp(value) for value in binary[row].tolist())
        powers = [math.exp(value) for value in inside[row].tolist()]
        assert float(found["g_bin"][row]) == pytest.approx(second / (first + second), rel=1e-5)
        assert float(found["msp"][row]) == pytest.approx(-max(powers) / sum(powers), rel=1e-5)
        assert float(found["energy"][row]) == pytest.approx(-math.log(sum(powers)), rel=1e-5)
        assert float(found["g_out"][row]) == pytest.approx(-math.log(sum(map(math.exp, outside[row].tolist()))), rel=1e-5)


def test_large_logits_stay_finite():
    found = head_scores(torch.tensor([[-1e4, 1e4]]), torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, -2e4, -3e4]]))
    assert [round(float(value), 3) for value in found.values()] == [1.0, -1.0, -1e4, 1e4]
