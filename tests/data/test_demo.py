"""The embedded data: deterministic, split by scan, and correlated as much as rho says."""

from __future__ import annotations

import colorsys

import pytest
import torch

from sdood_plugin.config import DataConfig, ImagesConfig
from sdood_plugin.data import demo
from sdood_plugin.data.sources import load_images

SPLITS = ["train", "test", "near", "fields", "noise"]


def draw(split, rho=0.95, renders=1, seed=0, left_out=None):
    return demo.draw(split, rho=rho, renders=renders, seed=seed, left_out=left_out)


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_seed_draws_the_same_pictures(split):
    before = torch.get_rng_state()
    first = draw(split)
    torch.rand(3)
    assert draw(split).fingerprint() == first.fingerprint() != draw(split, seed=1).fingerprint()
    torch.set_rng_state(before)
    assert first.images.shape[1:] == (3, 16, 16) and first.images.dtype == torch.uint8
    assert len(set(first.names)) == len(first)


def test_the_config_reaches_the_data():
    data = DataConfig(demo_rho=0.3, demo_renders=2)
    found = load_images(ImagesConfig("demo", split="train"), data, seed=4)
    assert found.fingerprint() == draw("train", 0.3, 2, 4).fingerprint()
    assert len(load_images(ImagesConfig("demo", split="near", limit=10), data, seed=4)) == 10


def scan_sets(*keys):
    return [{tuple(scan.flatten().tolist()) for scan in scans} for scans, _ in keys]


def test_no_scan_is_in_two_splits():
    train, test, near = scan_sets(*(demo._scans(split) for split in ("train", "test", "near")))
    assert not train & test and not train & near and not test & near
    assert len(train) + len(test) + len(near) == 1797  # all of scikit-learn's scans, none twice
    assert {split: sorted(set(demo._scans(split)[1].tolist())) for split in ("train", "test", "near")} == {
        "train": [0, 1, 2, 3, 4, 5],
        "test": [0, 1, 2, 3, 4, 5],
        "near": [6, 7, 8, 9],
    }


@pytest.mark.parametrize("left_out", [0, 3, 5])
def test_choosing_settings_uses_no_test_scan(left_out):
    train, test, near = scan_sets(*(demo._scans_without(split, left_out) for split in ("train", "test", "near")))
    whole, real_test = scan_sets(demo._scans("train"), demo._scans("test"))
    assert train | test | near == whole and not (train | test | near) & real_test
    assert not train & test and not train & near and not test & near
    assert set(demo._scans_without("near", left_out)[1].tolist()) == {left_out}
    found = draw("train", left_out=left_out)
    assert sorted(set(found.labels.tolist())) == [0, 1, 2, 3, 4]
    assert found.classes == [str(digit) for digit in range(6) if digit != left_out]


@pytest.mark.parametrize("split", SPLITS)
def test_labels(split):
    found = draw(split)
    if split in ("train", "test"):
        assert sorted(set(found.labels.tolist())) == list(range(6)) and found.classes == list("012345")
    elif split == "near":
        assert (found.labels == -1).all()
    else:
        assert found.labels is None


def test_renders_multiply_the_training_set_only():
    assert len(draw("train", renders=3)) == 3 * len(draw("train"))
    assert len(draw("test", renders=3)) == len(draw("test"))


def hue_class(images):
    """The ID class whose hue the corners have: the digit leaves them free more often than not."""
    corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].float().median(dim=2).values / 255
    hues = torch.tensor([colorsys.rgb_to_hsv(*row)[0] for row in corners.tolist()])
    return (hues * 6).round().long() % 6


@pytest.mark.parametrize(("rho", "low", "high"), [(1.0, 0.62, 0.8), (0.5, 0.38, 0.52), (0.0, 0.1, 0.23)])
def test_background_goes_with_class_as_rho_says(rho, low, high):
    found = draw("train", rho=rho)
    assert low <= float((hue_class(found.images) == found.labels).float().mean()) <= high


def test_near_pictures_have_the_fields_of_all_id_classes():
    counts = torch.bincount(hue_class(draw("near").images), minlength=6)
    assert counts.min() > 0.5 * counts.float().mean()


def test_fields_have_no_ink_and_digits_have():
    def roughness(images):
        return (images[..., 1:].float() - images[..., :-1].float()).abs().amax(dim=(1, 2, 3)).median()

    assert roughness(draw("fields").images) < 30 < 60 < roughness(draw("train").images)
    assert draw("noise").images.float().std() > 65  # uniform noise: 255 / sqrt(12)
