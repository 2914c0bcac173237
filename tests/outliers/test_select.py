"""Kinds of outliers, and which a selection keeps, beside a loop over the manifest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdood_plugin.config import KINDS, SelectionConfig
from sdood_plugin.errors import RunError, UsageError
from sdood_plugin.outliers.select import choose, kinds, read_verdicts


def a_manifest(count=200, seed=0):
    random = np.random.default_rng(seed)
    return [
        {
            "source_label": str(random.integers(3)),
            "predicted_after": str(random.integers(3)),
            "confidence_after": f"{random.choice([0.4, 0.9, 0.95, 0.899999]):.6f}",
            "nearest_train_distance": f"{random.choice([0.0, 0.02, 0.019, 0.3]):.6f}",
        }
        for _ in range(count)
    ]


def naive_kind(row, threshold):
    if row["predicted_after"] == row["source_label"]:
        return "stay"
    return "flip" if float(row["confidence_after"]) > threshold else "ambiguous"


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_kinds_equal_the_loop(threshold):
    manifest = a_manifest()
    found = [KINDS[number] for number in kinds(read_verdicts(manifest, "here"), threshold).tolist()]
    assert found == [naive_kind(row, threshold) for row in manifest]
    assert set(found) == set(KINDS)


@pytest.mark.parametrize("keep", [["stay"], ["flip"], ["ambiguous"], ["ambiguous", "flip"], list(KINDS)])
@pytest.mark.parametrize("near", [None, 0.02])
def test_a_selection_equals_the_loop_and_says_what_it_dropped(keep, near):
    manifest = a_manifest(seed=1)
    expected, dropped = [], {name: 0 for name in KINDS if name not in keep} | ({} if near is None else {"duplicate": 0})
    for row in manifest:
        kind, duplicate = naive_kind(row, 0.9), near is not None and float(row["nearest_train_distance"]) < near
        expected.append(kind in keep and not duplicate)
        if kind not in keep:
            dropped[kind] += 1
        elif duplicate:
            dropped["duplicate"] += 1
    found = choose(read_verdicts(manifest, "here"), SelectionConfig(keep, duplicate_distance=near))
    assert found.kept.tolist() == expected and found.dropped == dropped
    assert sum(dropped.values()) == len(manifest) - sum(expected)


def test_the_default_keeps_everything():
    assert SelectionConfig().keeps_all
    assert not SelectionConfig(["stay", "flip"]).keeps_all and not SelectionConfig(duplicate_distance=0.1).keeps_all
    found = choose(read_verdicts(a_manifest(), "here"), SelectionConfig())
    assert found.kept.all() and found.dropped == {}


@pytest.mark.parametrize("change", [{"predicted_after": ""}, {"confidence_after": None}, {"nearest_train_distance": "far"}])
def test_a_manifest_without_verdicts_is_named(change):
    rows = a_manifest(3)
    rows[1] |= change
    with pytest.raises(RunError, match="some-folder.*reference classifier"):
        read_verdicts(rows, "some-folder")
    del rows[0]["predicted_after"]
    with pytest.raises(RunError, match="predicted_after"):
        read_verdicts(rows, "some-folder")


def test_no_outliers_have_no_kinds():
    assert torch.equal(kinds(read_verdicts([], "here"), 0.9), torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep": []},
        {"keep": ["stay", "stay"]},
        {"keep": ["gone"]},
        {"flip_confidence": 1.0},
        {"flip_confidence": -0.1},
        {"duplicate_distance": 0.0},
        {"duplicate_distance": float("inf")},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(UsageError, match=f"selection.{next(iter(wrong))}"):
        SelectionConfig(**wrong)
