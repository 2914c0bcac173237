"""An outlier of a batch depends on its own image and identity alone."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from sdood_plugin.data.images import to_uint8, to_unit
from sdood_plugin.diffusion.guidance import guidance_terms, wrong_classes
from sdood_plugin.diffusion.sampling import guided_partial_sample
from sdood_plugin.errors import RunError
from sdood_plugin.outliers.blocks import guidance_weights, start_fractions
from sdood_plugin.outliers.sample import sample_batch
from sdood_plugin.randomness import normal

from .making import CONFIG, RANGES

SETTINGS = [(mode, sampler) for mode in ("other", "away", "blend", "blend-own", "same") for sampler in ("ddpm", "ddim", "dpm")]


def make(unet, tiny, pictures, rows, config=CONFIG):
    rows = torch.tensor(rows)
    return sample_batch(unet, pictures.images[rows], pictures.labels[rows], rows, config, tiny, classes=3, seed=9)


def assert_nearly_equal(made, expected):
    """Within one grey level, in at most 0.1 % of the values: what rounding in another place or batch may do."""
    difference = (made.int() - expected.int()).abs()
    assert difference.max() <= 1 and (difference > 0).double().mean() <= 0.001


@pytest.mark.parametrize(("mode", "sampler"), SETTINGS)
def test_a_row_depends_neither_on_its_place_nor_on_its_companions(unet, tiny, pictures, mode, sampler):
    config = dataclasses.replace(CONFIG, mode=mode, sampler=sampler)
    rows = [[0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [0, 11, 10, 9, 8], [7, 7, 7, 7, 0], [1, 1, 2, 3, 4]]
    alone = {row: make(unet, tiny, pictures, [row], config)[0] for row in range(12)}
    made = torch.cat([make(unet, tiny, pictures, chosen, config) for chosen in rows])
    assert_nearly_equal(made, torch.stack([alone[row] for chosen in rows for row in chosen]))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_another_batch_size_changes_next_to_nothing(unet, tiny, pictures, batch_size):
    parts = [make(unet, tiny, pictures, list(range(start, min(start + batch_size, 12)))) for start in range(0, 12, batch_size)]
    assert_nearly_equal(torch.cat(parts), make(unet, tiny, pictures, range(12)))


def test_the_images_are_outliers_of_the_sampler(unet, tiny, pictures):
    rows = torch.arange(5)
    labels = pictures.labels[:5]
    wrong = wrong_classes(labels, 3, seed=9, index=rows)
    expected = guided_partial_sample(
        lambda x, t, c: unet(x, t, class_labels=c, return_dict=False)[0],
        to_unit(pictures.images[:5]),
        *guidance_terms("other", 2.0, labels, wrong, 3),
        lambda draw: normal(9, rows, draw, (3, 8, 8)),
        tiny,
        start_fraction=0.4,
        sampler="dpm",
        steps=3,
    )
    made = make(unet, tiny, pictures, range(5))
    assert_nearly_equal(made, to_uint8(expected))
    assert (made != pictures.images[:5]).float().mean() > 0.5


@pytest.mark.parametrize("sampler", ["ddpm", "dpm"])
def test_seed_identity_mode_and_weight_all_matter(unet, tiny, pictures, sampler):
    config = dataclasses.replace(CONFIG, sampler=sampler)
    made = [
        sample_batch(unet, pictures.images[:4], pictures.labels[:4], torch.arange(4) + shift, used, tiny, classes=3, seed=seed)
        for seed, shift, used in (
            (0, 0, config),
            (1, 0, config),
            (0, 1 << 32, config),
            (0, 0, dataclasses.replace(config, mode="same")),
            (0, 0, dataclasses.replace(config, guidance_weight=40.0)),
            (0, 0, dataclasses.replace(config, start_fraction=0.5)),
        )
    ]
    for first, second in itertools.combinations(made, 2):
        assert not torch.equal(first, second)


def test_pixels_that_are_not_finite_are_an_error(tiny, pictures):
    def broken(x, t, class_labels, return_dict):
        return (x * float("nan"),)

    with pytest.raises(RunError, match="NaN or infinite pixels"):
        make(broken, tiny, pictures, range(3))


def test_drawn_weights_are_those_of_the_sampler(unet, tiny, pictures):
    identity = torch.arange(2000)
    starts = start_fractions(RANGES, 9, identity)
    rows = identity[(starts == starts[0]) & (identity < 2000)][:6]
    made = sample_batch(unet, pictures.images[:6], pictures.labels[:6], rows, RANGES, tiny, classes=3, seed=9)
    wrong = wrong_classes(pictures.labels[:6], 3, seed=9, index=rows)
    for row, w in enumerate(guidance_weights(RANGES, 9, rows).tolist()):
        one = slice(row, row + 1)
        expected = guided_partial_sample(
            lambda x, t, c: unet(x, t, class_labels=c, return_dict=False)[0],
            to_unit(pictures.images[one]),
            *guidance_terms("other", w, pictures.labels[one], wrong[one], 3),
            lambda draw, one=one: normal(9, rows[one], draw, (3, 8, 8)),
            tiny,
            start_fraction=float(starts[0]),
            steps=2,
        )
        assert_nearly_equal(made[one], to_uint8(expected))


def test_the_precision_is_the_one_that_is_asked_for(unet, tiny, pictures):
    made = {
        precision: sample_batch(
            unet, pictures.images, pictures.labels, torch.arange(12), CONFIG, tiny, classes=3, seed=9, precision=precision
        )
        for precision in ("auto", "float32", "bf16")
    }
    assert torch.equal(made["auto"], made["float32"]) and not torch.equal(made["bf16"], made["float32"])
    assert (made["bf16"].int() - made["float32"].int()).abs().float().mean() < 4


def test_guidance_acts_within_its_interval(unet, tiny, pictures):
    whole, never, plain = (
        make(unet, tiny, pictures, range(4), dataclasses.replace(CONFIG, **changes))
        for changes in ({}, {"guidance_interval": [0.3, 0.35]}, {"guidance_weight": 0.0})
    )
    assert torch.equal(never, plain) and not torch.equal(whole, plain)
