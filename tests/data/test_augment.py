"""Augmentation keeps shapes, depends on its generator alone and treats each image for itself."""

from __future__ import annotations

import pytest
import torch

from sdood_plugin.data import augment

VIEWS = {
    **{
        f"contrastive {kind}": lambda images, generator, kind=kind: augment.contrastive_view(images, generator, kind)
        for kind in ("digits", "natural")
    },
    **{
        f"training {kind}": lambda images, generator, kind=kind: augment.training_view(images, generator, kind)
        for kind in ("digits", "natural", "none")
    },
}


@pytest.fixture
def images(generator):
    return torch.rand(8, 3, 16, 16, generator=generator) * 2 - 1


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", VIEWS)
def test_views_keep_the_shape_and_replay(images, name):
    before = torch.get_rng_state()
    first, copy = VIEWS[name](images, seeded(1)), images.clone()
    assert first.shape == images.shape and first.dtype == images.dtype and torch.isfinite(first).all()
    assert torch.equal(first, VIEWS[name](images, seeded(1)))
    assert torch.equal(images, copy) and torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, VIEWS[name](images, seeded(2))) == (name == "training none")


@pytest.mark.parametrize("name", [name for name in VIEWS if name != "training none"])
def test_each_image_has_its_own_draw(images, name):
    views = VIEWS[name](images[:1].expand(8, -1, -1, -1), seeded(1))
    assert len({tuple(view.flatten().tolist()) for view in views}) >= 7


def test_none_leaves_the_images(images):
    assert augment.training_view(images, seeded(0), "none") is images


def test_flips_mirror_about_half_of_the_images_and_no_more(generator):
    images = torch.rand(1000, 3, 4, 4, generator=generator)
    found = augment.flip(images, generator)
    same, mirrored = ((found == other).flatten(1).all(1) for other in (images, images.flip(3)))
    assert (same ^ mirrored).all() and 430 < int(mirrored.sum()) < 570


@pytest.mark.parametrize("kind", ["digits"])
def test_digits_are_never_mirrored(kind):
    # a ramp from left to right keeps its direction through shift, scale and a small turn
    ramp = torch.linspace(-1, 1, 16).expand(64, 3, 16, 16)
    for view in (
        augment.training_view(ramp, seeded(0), kind),
        augment.affine(ramp, seeded(0), shift=0.12, scale=(0.75, 1.25), turn=0.3),
    ):
        assert (view[..., 12:].mean((1, 2, 3)) > view[..., :4].mean((1, 2, 3))).all()


def test_affine_without_movement_is_the_identity(images):
    torch.testing.assert_close(
        augment.affine(images, seeded(0), shift=0.0, scale=(1.0, 1.0), turn=0.0), images, atol=1e-5, rtol=0
    )


def test_affine_moves_no_further_than_asked():
    point = torch.zeros(500, 3, 33, 33)
    point[:, :, 16, 16] = 1
    moved = augment.affine(point, seeded(0), shift=0.125, scale=(1.0, 1.0), turn=0.0)
    mass = moved[:, 0] / moved[:, 0].sum((1, 2), keepdim=True)
    places = torch.arange(33.0) - 16
    shift = torch.stack([(mass.sum(1) * places).sum(1), (mass.sum(2) * places).sum(1)])
    assert shift.abs().max() <= 0.125 * 33 + 0.01 and shift.abs().max() > 0.1 * 33
    assert abs(float(shift.mean())) < 0.3


def test_grey_is_the_luma_at_its_rate(generator):
    images = torch.rand(2000, 3, 2, 2, generator=generator)
    found = augment.grey(images, generator, 0.2)
    luma = (0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2])[:, None].expand_as(images)
    same, turned = ((found - other).abs().flatten(1).amax(1) < 1e-6 for other in (images, luma))
    assert (same | turned).all() and 0.16 < float(turned.float().mean()) < 0.24


def test_mixing_of_strength_zero_is_the_identity(images):
    torch.testing.assert_close(augment.mix_colours(images, seeded(0), strength=0.0), images)
    mixed = augment.mix_colours(images, seeded(0), strength=0.7)
    # every picture is an affine map of its own channels: four numbers a channel explain it all
    for image, other in zip(images, mixed, strict=True):
        basis = torch.cat([image.flatten(1), torch.ones(1, 256)]).T.double()
        solution = torch.linalg.lstsq(basis, other.flatten(1).T.double()).solution
        torch.testing.assert_close(basis @ solution, other.flatten(1).T.double(), atol=1e-4, rtol=0)


def test_jitter_of_strength_zero_is_the_identity_and_stays_in_range(images):
    torch.testing.assert_close(augment.jitter(images, seeded(0), brightness=0, contrast=0, colour=0), images)
    assert augment.jitter(images, seeded(0), brightness=0.9, contrast=0.9, colour=0.9).abs().max() <= 1
