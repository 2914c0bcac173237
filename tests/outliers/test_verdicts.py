"""The nearest training image is found, whichever it is."""

from __future__ import annotations

import pytest
import torch

from sdood_plugin.data.images import to_unit
from sdood_plugin.outliers.verdicts import VERDICTS, Referee

from .making import judge, spread_images

CPU = torch.device("cpu")


@pytest.mark.parametrize("side", [8, 32])
def test_the_nearest_image_need_not_be_the_source(side):
    train = spread_images(20, side)
    made = train[[3, 17, 5]].clone()
    made[1, :, 0, 0] ^= 1  # a copy but for one pixel
    columns = Referee(train, None, CPU)(made, torch.tensor([0, 1, 5]), torch.tensor([0, 0, 0]))
    assert columns["nearest_train_index"] == ["3", "17", "5"]
    far = (to_unit(made).double() - to_unit(train[[3, 17, 5]]).double()).square().mean(dim=(1, 2, 3)).sqrt()
    own = (to_unit(made).double() - to_unit(train[[0, 1, 5]]).double()).square().mean(dim=(1, 2, 3)).sqrt()
    assert [float(value) for value in columns["nearest_train_distance"]] == pytest.approx(far.tolist(), abs=1e-6)
    assert [float(value) for value in columns["distance_to_source"]] == pytest.approx(own.tolist(), abs=1e-6)
    assert 0 < far[1] < 0.02 < own[1]


def test_confidences_are_those_of_the_source_and_of_the_outlier():
    train = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    train[0, 1] = 130  # class 1
    made = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    made[0, 2] = 130  # class 2
    columns = Referee(train, judge, CPU)(made, torch.tensor([0]), torch.tensor([1]))
    assert tuple(columns) == VERDICTS and columns["predicted_after"] == ["2"]
    before, after, most = (
        float(columns[f"{name}"][0]) for name in ("own_confidence_before", "own_confidence_after", "confidence_after")
    )
    sure, rest = float(judge(train[:1])[1][0, 1]), float(judge(made)[1][0, 1])
    assert (before, after, most) == pytest.approx((sure, rest, sure), abs=1e-6) and before > 0.9 > after
