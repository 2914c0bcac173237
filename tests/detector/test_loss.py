"""The three-head loss against its formula; masked terms have no gradient at all."""

from __future__ import annotations

import math

import pytest
import torch

from sdood_plugin.detector.loss import three_head_loss
from sdood_plugin.detector.network import Heads


def cross_entropy(logits, target, smoothing=0.0):
    log = [value - math.log(sum(math.exp(other) for other in logits)) for value in logits]
    return -(1 - smoothing) * log[target] - smoothing * sum(log) / len(log)


def naive(heads, labels, flags, weight, smoothing=0.0):
    """METHOD section 4, image by image: L = CE(g_bin, I) + (1 - I) CE(g_in, y) + I lambda CE(g_out, y)."""
    total = 0.0
    for b in range(len(labels)):
        one, y = int(flags[b]), int(labels[b])
        total += cross_entropy(heads.binary[b].tolist(), one)
        total += (1 - one) * cross_entropy(heads.inside[b].tolist(), y, smoothing)
        total += one * weight * cross_entropy(heads.outside[b].tolist(), y, smoothing)
    return total / len(labels)


def make_heads(generator, count=9, classes=4):
    widths = (6, 2, classes, classes)
    return Heads(*(torch.randn(count, width, generator=generator, dtype=torch.float64).requires_grad_() for width in widths))


FLAGS = {
    "both": torch.arange(9) % 3 == 0,
    "no outliers": torch.zeros(9, dtype=torch.bool),
    "all outliers": torch.ones(9, dtype=torch.bool),
}


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("case", FLAGS)
def test_loss_equals_the_formula_to_double_precision(generator, case, weight, classes):
    heads, labels = make_heads(generator, classes=classes), torch.arange(9) % classes
    found = {name: value.item() for name, value in three_head_loss(heads, labels, FLAGS[case], weight).items()}
    assert found["loss"] == pytest.approx(naive(heads, labels, FLAGS[case], weight), rel=1e-12)
    assert found["loss"] == pytest.approx(found["binary"] + found["inside"] + weight * found["outside"], rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_smoothing_spreads_class_labels_and_leaves_the_origin_sure(generator, smoothing):
    heads, labels, flags = make_heads(generator), torch.arange(9) % 4, FLAGS["both"]
    found = three_head_loss(heads, labels, flags, 2.0, smoothing)
    assert float(found["loss"].detach()) == pytest.approx(naive(heads, labels, flags, 2.0, smoothing), rel=1e-12)
    assert torch.equal(found["binary"], three_head_loss(heads, labels, flags, 2.0)["binary"])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("case", FLAGS)
def test_masked_terms_have_exactly_no_gradient(generator, case, weight, smoothing):
    heads, labels, flags = make_heads(generator), torch.arange(9) % 4, FLAGS[case]
    three_head_loss(heads, labels, flags, weight, smoothing)["loss"].backward()
    assert (heads.inside.grad[flags] == 0).all()
    assert (heads.outside.grad[~flags] == 0).all()
    assert (heads.inside.grad[~flags] != 0).all()
    assert (heads.binary.grad != 0).all()
    assert (heads.outside.grad[flags] != 0).all() if weight else (heads.outside.grad == 0).all()


def test_what_a_masked_head_says_does_not_matter(generator):
    heads, labels, flags = make_heads(generator), torch.arange(9) % 4, FLAGS["both"]
    wild = Heads(heads.features, heads.binary, heads.inside.detach().clone(), heads.outside.detach().clone())
    wild.inside[flags], wild.outside[~flags] = torch.inf, torch.nan
    assert torch.equal(three_head_loss(wild, labels, flags, 1.0)["loss"], three_head_loss(heads, labels, flags, 1.0)["loss"])


def test_the_loss_of_a_batch_is_the_mean_of_its_parts(generator):
    heads, labels, flags = make_heads(generator, count=8), torch.arange(8) % 4, torch.arange(8) % 3 == 0
    whole = three_head_loss(heads, labels, flags, 1.5)["loss"]
    parts = [
        three_head_loss(Heads(*(value[own] for value in heads)), labels[own], flags[own], 1.5)["loss"]
        for own in torch.arange(8).chunk(4)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-12, atol=0)


def test_half_precision_is_summed_in_float32(generator):
    heads = Heads(*(value.detach().bfloat16() for value in make_heads(generator)))
    found = three_head_loss(heads, torch.arange(9) % 4, FLAGS["both"], 1.0)["loss"]
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(naive(heads, torch.arange(9) % 4, FLAGS["both"], 1.0), rel=1e-5)


def test_sure_heads_have_no_loss():
    labels, flags = torch.tensor([0, 1]), torch.tensor([False, True])
    heads = Heads(torch.zeros(2, 3), 90 * torch.eye(2), 90 * torch.eye(2), 90 * torch.eye(2))
    assert float(three_head_loss(heads, labels, flags, 1.0)["loss"]) == pytest.approx(0, abs=1e-6)
    swapped = three_head_loss(heads, labels, ~flags, 1.0)  # class 1 of g_bin is outlier
    assert float(swapped["binary"]) == pytest.approx(90)
