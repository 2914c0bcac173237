"""Comparators that train on outliers: losses against the papers' formulas, scores, and a run on its own outliers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from sdood_plugin.artifacts import read_json, read_tensors
from sdood_plugin.baselines.outlier_exposure import EXPOSED, exposed_scores
from sdood_plugin.config import CompareConfig
from sdood_plugin.detector.network import Heads
from sdood_plugin.run import run

from ..test_run import tiny_config


@pytest.fixture
def batch(generator):
    heads = Heads(*(torch.randn(12, width, generator=generator, dtype=torch.float64) for width in (5, 2, 4, 4)))
    return heads, torch.arange(12) % 4, torch.arange(12) % 3 == 0


def formula(method, heads, labels, outlier):
    inside, logits = ~outlier, heads.inside
    if method == "background":
        joint = torch.cat([logits, heads.binary[:, 1:]], dim=1)
        return F.cross_entropy(joint, torch.where(outlier, 4, labels))
    loss = F.cross_entropy(logits[inside], labels[inside])
    if method == "oe":  # Hendrycks et al., equation 1: cross-entropy to uniform, weight 0.5
        return loss - 0.5 * logits[outlier].log_softmax(1).mean()
    energy = -logits.logsumexp(1)  # Liu et al., equation 7: margins -25 and -7, weight 0.1
    bounds = (energy[inside] + 25).relu().square().mean() + (-7 - energy[outlier]).relu().square().mean()
    return loss + 0.1 * bounds


@pytest.mark.parametrize("method", EXPOSED)
def test_losses_follow_the_papers(batch, method):
    found = EXPOSED[method](*batch)["loss"]
    torch.testing.assert_close(found.double(), formula(method, *batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", EXPOSED)
def test_a_batch_without_outliers_has_a_finite_loss(batch, method):
    heads, labels, outlier = batch
    assert torch.isfinite(EXPOSED[method](heads, labels, torch.zeros_like(outlier))["loss"])


@pytest.mark.parametrize("method", [*EXPOSED, "oe-noise"])
def test_training_on_outliers_raises_their_score(generator, method):
    loss = EXPOSED.get(method, EXPOSED["oe"])
    labels, outlier = torch.arange(40) % 4, torch.arange(40) >= 20
    features = 3 * F.one_hot(torch.where(outlier, 4, labels), 5).float()
    weights = [torch.zeros(5, width, requires_grad=True) for width in (2, 4)]
    optimizer = torch.optim.SGD(weights, lr=0.05)

    def heads():
        binary, inside = (features @ weight for weight in weights)
        return Heads(features, binary, inside, inside)

    for _ in range(100):
        optimizer.zero_grad()
        loss(heads(), labels, outlier)["loss"].backward()
        optimizer.step()
    scores = exposed_scores(method, heads()).detach()
    assert scores.shape == (40,) and scores[outlier].min() > scores[~outlier].max()


def test_a_run_compares_losses_on_its_own_outliers(tmp_path):
    config = tiny_config(compare=CompareConfig(list(EXPOSED)))
    run(config, tmp_path / "run", "compare")
    rows = read_json(tmp_path / "run" / "comparison" / "rows.json")
    assert {row["method"] for row in rows} == set(EXPOSED) and len(rows) == 2 * len(EXPOSED)
    weights = [read_tensors(tmp_path / "run" / "exposed" / name / "network.safetensors")["g_in.weight"] for name in EXPOSED]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    made = dataclasses.replace(config, outliers=dataclasses.replace(config.outliers, guidance_weight=0.5))
    outcome = run(made, tmp_path / "run", "compare")
    assert {name for name, what in outcome.items() if what == "ran"} == {"generate", "train-exposed", "compare"}
