"""DN2, MSCL, Multi-class AD and Fake-it against slow transcriptions of their equations, in float64 and loops."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from sdood_plugin.baselines.dn2 import knn_score
from sdood_plugin.baselines.fake_it import (
    BATCH_SIZE,
    SAMPLING_STEPS,
    binary,
    fake_it_loss,
    sample_fakes,
    stop_after,
    unconditional,
)
from sdood_plugin.baselines.mscl import TEMPERATURE, freeze_first_half, mean_shifted_loss, train_mscl
from sdood_plugin.baselines.multi_class_ad import fine_tuning
from sdood_plugin.config import CompareConfig, DetectorConfig, DiffusionConfig
from sdood_plugin.detector.network import Heads
from sdood_plugin.diffusion.sampling import start_step
from sdood_plugin.diffusion.unet import alphas_bar
from sdood_plugin.features import Backbone
from sdood_plugin.randomness import normal
from sdood_plugin.training import Job


@pytest.mark.parametrize("unit_length", [False, True])
def test_dn2_sums_the_squared_distances_to_the_two_nearest(generator, unit_length):
    train, queries = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (40, 15))
    found = knn_score(train.float(), queries.float(), unit_length=unit_length)
    for query, value in zip(queries, found, strict=True):
        squared = []
        for row in train:
            a, b = (query / query.norm(), row / row.norm()) if unit_length else (query, row)
            squared.append(sum(float((x - y) ** 2) for x, y in zip(a, b, strict=True)))
        assert float(value) == pytest.approx(sum(sorted(squared)[:2]), rel=1e-4)


def slow_mscl(first, second, centre, angular):
    """Equations 4 to 6 of the paper, one pair of views at a time."""
    views = [F.normalize(view, dim=0) for view in [*first, *second]]
    c = centre / centre.norm() if angular else centre
    theta = [(view - c) / (view - c).norm() for view in views]
    count, contrastive, pull = len(first), 0.0, 0.0
    for i in range(2 * count):
        partner = (i + count) % (2 * count)
        others = sum(math.exp(float(theta[i] @ theta[m]) / TEMPERATURE) for m in range(2 * count) if m != i)
        contrastive -= math.log(math.exp(float(theta[i] @ theta[partner]) / TEMPERATURE) / others)
    for i in range(count):
        pull += -float(views[i] @ c) - float(views[i + count] @ c)
    return contrastive / (2 * count) + angular * pull / count


@pytest.mark.parametrize("angular", [0.0, 1.0, 2.0])
def test_the_mean_shifted_loss_is_the_papers(generator, angular):
    first, second = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    centre = F.normalize(first, dim=1).mean(dim=0)
    found = float(mean_shifted_loss(first, second, centre.float(), angular)["loss"])
    assert found == pytest.approx(slow_mscl(first, second, centre, angular), rel=1e-5)


def test_half_the_backbone_is_frozen_and_for_a_resnet18_that_is_the_stem_and_two_stages():
    backbone = Backbone("resnet18_cifar")
    trained = {id(tensor) for tensor in freeze_first_half(backbone)}
    for name, tensor in backbone.named_parameters():
        late = "layer3" in name or "layer4" in name
        assert late == tensor.requires_grad == (id(tensor) in trained)


def test_mscl_moves_the_late_layers_and_nothing_else(accelerator, tmp_path):
    images = torch.randint(256, (70, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    torch.manual_seed(0)
    backbone = Backbone("small_cnn")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    config = CompareConfig(mscl_lr=0.1)
    after, history = train_mscl(images, backbone, config, Job(accelerator, tmp_path), epochs=2, augmentation="digits")
    assert len(history["loss"]) == 2  # 70 images are one batch of 64
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, before[name])}
    trainable = {name for name, tensor in after.named_parameters() if tensor.requires_grad}
    assert changed and changed <= trainable  # no running mean of a BatchNorm among them


def test_multi_class_ad_is_cross_entropy_from_pretrained_weights_and_nothing_else_changes(tmp_path):
    config = DetectorConfig(epochs=7, lr=0.01)
    tuned = fine_tuning(config, str(tmp_path), CompareConfig())
    assert (tuned.weights, tuned.outlier_ratio, tuned.control_ratio) == (str(tmp_path), 0, 0)
    assert dataclasses.replace(tuned, weights=None, outlier_ratio=0.5, control_ratio=0.5) == config
    assert fine_tuning(config, str(tmp_path), CompareConfig(multi_class_lr=3.0)).lr == 3.0


def test_fake_it_tells_fakes_from_id_and_knows_no_class(generator):
    logits, flags = torch.randn(10, 2, generator=generator, dtype=torch.float64), torch.arange(10) % 3 == 0
    heads = Heads(logits, logits, logits[:, :1] * float("nan"), logits[:, :1] * float("nan"))
    slow = sum(
        -math.log(math.exp(float(row[int(flag)])) / float(row.exp().sum())) for row, flag in zip(logits, flags, strict=True)
    )
    found = fake_it_loss(heads, torch.zeros(10, dtype=torch.int64), flags)["loss"]
    assert float(found) == pytest.approx(slow / 10, rel=1e-5)
    assert binary(DetectorConfig(frozen_blocks=2), "w", CompareConfig()) == DetectorConfig(
        weights="w", frozen_blocks=2, outlier_ratio=1, control_ratio=0
    )
    own = binary(DetectorConfig(frozen_blocks=2), "w", CompareConfig(fake_it_lr=0.1, fake_it_frozen_blocks=0))
    assert (own.lr, own.frozen_blocks) == (0.1, 0)


def test_fakes_start_from_pure_noise_over_all_noise_levels(generator):
    config = unconditional(DiffusionConfig(max_start_fraction=0.2, steps=30))
    assert (config.prediction, config.max_start_fraction, config.steps) == ("v", 1.0, 30)
    assert [stop_after(config, CompareConfig(fake_it_steps=steps)) for steps in (None, 4, 99)] == [15, 4, 30]
    seen = []

    def denoiser(x, t, condition):
        seen.append((int(t[0]), condition.clone(), x.clone()))
        return torch.zeros_like(x)

    found = sample_fakes(denoiser, 130, 8, config, seed=5, device=torch.device("cpu"))
    assert found.shape == (130, 3, 8, 8) and found.dtype == torch.uint8
    assert seen[0][0] == config.timesteps - 1 and len(seen) == 2 * SAMPLING_STEPS
    assert all((condition == 0).all() for _, condition, _ in seen)
    noise = normal(5, torch.arange(BATCH_SIZE), 1, (3, 8, 8))
    abar = float(alphas_bar(config)[start_step(1.0, config.timesteps)])
    torch.testing.assert_close(seen[0][2], math.sqrt(1 - abar) * noise)  # no image shines through
    assert torch.equal(found[:100], sample_fakes(denoiser, 100, 8, config, seed=5, device=torch.device("cpu")))
