"""The image set, its fingerprint, and the one place where pixels change range."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from sdood_plugin.data.images import ImageSet, save_png, spread, to_uint8, to_unit


def test_ranges_round_trip_for_every_grey_level():
    levels = torch.arange(256, dtype=torch.uint8)
    unit = to_unit(levels)
    assert unit.min() == -1 and unit.max() == 1 and unit.dtype == torch.float32
    torch.testing.assert_close(unit.double(), levels.double() / 255 * 2 - 1, atol=1e-6, rtol=0)
    assert torch.equal(to_uint8(unit), levels)
    assert to_uint8(torch.tensor([-9.0, 9.0, 0.9 / 127.5, 0.1 / 127.5])).tolist() == [0, 255, 128, 128]


def test_fingerprints_see_pixels_names_and_order_but_no_labels(pictures):
    base = pictures.fingerprint()
    assert ImageSet(pictures.images.clone(), list(pictures.names), None).fingerprint() == base
    changed = pictures.images.clone()
    changed[3, 1, 2, 2] ^= 1
    others = [
        ImageSet(changed, pictures.names),
        ImageSet(pictures.images, [*pictures.names[:-1], "z.png"]),
        pictures.subset(torch.arange(12).flip(0)),
        pictures.subset(torch.arange(11)),
        ImageSet(pictures.images.reshape(12, 3, 4, 16), pictures.names),
    ]
    assert len({base, *(other.fingerprint() for other in others)}) == 6


def test_a_subset_keeps_images_names_and_labels_together(pictures):
    found = pictures.subset(torch.tensor([7, 2]))
    assert (
        torch.equal(found.images, pictures.images[[7, 2]])
        and found.names == ["7.png", "2.png"]
        and found.labels.tolist() == [1, 2]
    )
    assert pictures.limited(None) is pictures and pictures.limited(99) is pictures
    assert pictures.limited(4).names == ["0.png", "3.png", "6.png", "9.png"]


def test_spread_is_even_and_without_repetition():
    for total in (1, 7, 100):
        for count in range(1, total + 1):
            places = spread(total, count)
            assert places[0] == 0 and places[-1] < total and len(places.unique()) == count
            gaps = torch.cat([places, torch.tensor([total])]).diff()
            assert gaps.max() - gaps.min() <= 1


def test_pngs_keep_every_pixel(tmp_path, pictures):
    save_png(tmp_path / "x.png", pictures.images[0])
    with Image.open(tmp_path / "x.png") as opened:
        assert opened.mode == "RGB"
        assert np.array_equal(np.asarray(opened), pictures.images[0].permute(1, 2, 0).numpy())
