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
        f"strong {kind}": lambda images, generator, kind=kind: augment.strong_view(images, generator, kind)
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


def jittered(images, seed=0, **strengths):
    return augment.jitter(images, seeded(seed), **{"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, **strengths})


def test_jitter_of_strength_zero_is_the_identity_and_stays_in_range(images):
    torch.testing.assert_close(jittered(images), images, atol=1e-5, rtol=0)
    assert jittered(images, brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5).abs().max() <= 1


def test_jitter_changes_what_it_says(images):
    dim = 0.5 * images  # away from the ends, so that nothing is clipped
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    light = ((dim + 1) * luma).sum(1)
    torch.testing.assert_close(((jittered(dim, saturation=0.4, hue=0.02) + 1) * luma).sum(1), light, atol=1e-3, rtol=0)
    factor = (jittered(dim, brightness=0.2) + 1) / (dim + 1)
    torch.testing.assert_close(factor, factor[:, :1, :1, :1].expand_as(factor), atol=1e-4, rtol=0)
    assert 0.8 <= factor.min() < factor.max() <= 1.2
    mean = light.mean((1, 2))[:, None, None, None]
    slope = (jittered(dim, contrast=0.2) + 1 - mean) / (dim + 1 - mean)
    assert ((slope - slope.flatten(1).median(1).values[:, None, None, None]).abs().flatten(1).median(1).values < 1e-3).all()


def test_jitter_leaves_images_at_its_rate():
    images = torch.rand(1000, 3, 2, 2, generator=seeded(3)) - 0.5
    found = augment.jitter(images, seeded(0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, probability=0.8)
    assert 160 < int((found == images).flatten(1).all(1).sum()) < 240


def test_a_resized_crop_is_a_piece_of_the_image():
    ramp = torch.stack(torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij"))
    found = augment.resized_crop(torch.cat([ramp, ramp[:1]]).expand(500, -1, -1, -1), seeded(0), area=(0.25, 1.0))
    height, width = found[:, 0, 8, 0] - found[:, 0, 7, 0], found[:, 1, 0, 8] - found[:, 1, 0, 7]  # 1 were the whole image
    assert height.min() > 0.4 and width.min() > 0.4 and max(float(height.max()), float(width.max())) <= 1.0001
    area, ratio = height * width, height / width
    assert 0.19 < area.min() < 0.3 and area.max() > 0.9 and ratio.max() <= 1.34 and ratio.min() >= 0.74
    assert found[:, 0].min() >= 0 and found[:, 0].max() <= 15
    whole = augment.resized_crop(ramp[None, [0, 1, 1]], seeded(0), area=(1.0, 1.0), ratio=1.0)
    torch.testing.assert_close(whole, ramp[None, [0, 1, 1]], atol=1e-4, rtol=0)


def test_cutout_greys_one_square():
    found = augment.erase(torch.ones(300, 3, 16, 16), seeded(0), side=0.5)
    holes = found == 0
    assert torch.equal(holes[:, 0], holes[:, 2]) and ((found == 0) | (found == 1)).all()
    rows, columns = holes[:, 0].any(2), holes[:, 0].any(1)
    assert torch.equal(holes[:, 0], rows[:, :, None] & columns[:, None, :])
    assert rows.sum(1).max() == 8 and rows.sum(1).min() >= 4  # half a hole at least lies inside
    assert rows.any(0).all() and columns.any(0).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_shifted_images_are_crops_of_the_reflected_image(generator, dtype):
    images = torch.randint(256, (1, 3, 8, 8), generator=generator).to(dtype).expand(400, -1, -1, -1)
    found = augment.shift_and_flip(images, generator, shift=0.125)
    assert found.dtype == dtype
    padded = torch.nn.functional.pad(images[:1].float(), (1, 1, 1, 1), mode="reflect")
    crops = [padded[..., i : i + 8, j : j + 8].to(dtype) for i in range(3) for j in range(3)]
    crops += [crop.flip(3) for crop in crops]
    seen = torch.stack([(found == crop).flatten(1).all(1) for crop in crops])
    assert (seen.sum(0) == 1).all()  # each is one of the 9 x 2 views ...
    assert (seen.sum(1) > 400 / 18 / 3).all()  # ... and all of them occur


def test_shifting_rectangles_keeps_rows_and_columns_apart(generator):
    images = torch.randint(256, (50, 3, 8, 16), generator=generator)
    found = augment.shift_and_flip(images, generator, shift=0.125)
    assert found.shape == images.shape
    assert all(set(one.flatten().tolist()) <= set(whole.flatten().tolist()) for one, whole in zip(found, images, strict=True))
