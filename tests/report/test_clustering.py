"""The figures of the pseudo-labels come from files alone."""

from __future__ import annotations

import pytest
import torch

from sdood_plugin.artifacts import write_csv, write_tensors

pytest.importorskip("matplotlib", reason="the `report` extra is not installed")

from sdood_plugin.report.clustering import cluster_grid, label_figure  # noqa: E402


def test_an_empty_folder_has_no_figures(tmp_path):
    assert label_figure(tmp_path) is None and cluster_grid(tmp_path) is None


def test_sizes_and_confidences_are_those_of_the_file(tmp_path):
    rows = [(i, f"{i}.png", [0, 2, 2, 1, 2][i], [0.1, 0.99, 0.5, 0.51, 1.0][i]) for i in range(5)]
    write_csv(tmp_path / "labels.csv", ("index", "path", "label", "confidence"), rows)
    left, right = label_figure(tmp_path).axes
    assert [bar.get_height() for bar in left.patches] == [1, 1, 3]
    heights = [bar.get_height() for bar in right.patches]
    assert len(heights) == 40 and sum(heights) == 5 and heights[-1] == 2 and heights[4] == 1


def test_each_cluster_has_its_row_of_images(tmp_path):
    shades = {"0-most": [10, 20], "0-least": [20], "1-most": [30], "1-least": [40], "10-most": [50], "10-least": [60]}
    images = {
        name: torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4) for name, values in shades.items()
    }
    write_tensors(tmp_path / "clustering" / "examples.safetensors", images)
    most, least = cluster_grid(tmp_path).axes
    shown = most.get_images()[0].get_array()
    assert shown.shape == (12, 8, 3)
    assert shown[::4, ::4, 0].tolist() == [[10, 20], [30, 255], [50, 255]]  # clusters in the order of numbers, gaps white
    assert least.get_images()[0].get_array()[::4, ::4, 0].tolist() == [[20], [40], [60]]
    assert [label.get_text() for label in most.get_yticklabels()] == ["0", "1", "10"]
