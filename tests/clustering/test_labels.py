"""Pseudo-labels on disk, and every way in which they cannot be used."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdood_plugin.clustering.labels import (
    PseudoLabels,
    check_labels,
    example_rows,
    given_labels,
    read_labels,
    write_imglist,
    write_labels,
)
from sdood_plugin.data.images import ImageSet
from sdood_plugin.errors import RunError, UsageError


def test_labels_survive_the_disk(tmp_path, pictures):
    write_labels(tmp_path / "labels.csv", pictures, pictures.labels, torch.linspace(0, 1, 12))
    found = read_labels(tmp_path / "labels.csv", pictures)
    assert torch.equal(found.labels, pictures.labels) and found.classes == 3
    torch.testing.assert_close(found.confidence, torch.linspace(0, 1, 12), atol=1e-4, rtol=0)


def test_rows_may_come_in_any_order_and_by_index(tmp_path, pictures):
    file = tmp_path / "labels.csv"
    file.write_text("label,path\n" + "".join(f"{i % 3},{i}.png\n" for i in reversed(range(12))))
    assert torch.equal(read_labels(file, pictures).labels, pictures.labels)
    file.write_text("index,label\n" + "".join(f"{i},{i % 3}\n" for i in reversed(range(12))))
    found = read_labels(file, pictures)
    assert torch.equal(found.labels, pictures.labels) and (found.confidence == 1).all()


GOOD = [f"{i}.png,{i % 3}" for i in range(12)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["path,class", *GOOD], "`label` and `path` or `index`"),
        (["name,label", *GOOD], "`label` and `path` or `index`"),
        (["path,label"], "`label` and `path` or `index`"),
        (["path,label", *GOOD[:-1]], "no row for '11.png'"),
        (["path,label", *GOOD, "12.png,0"], "1 rows for images that are not there"),
        (["path,label", *GOOD, GOOD[3]], "line 14.*each image once"),
        (["path,label", *GOOD[:-1], "11.png,two"], "integer labels"),
        (["path,label", *GOOD[:-1], "11.png,1.5"], "integer labels"),
        (["path,label", *GOOD[:-1], "11.png"], "integer labels"),
        (["path,label", *GOOD[:-1], "11.png,-1"], "-1 to 2"),
        (["path,label", *GOOD[:-1], "11.png,4"], "no image of class 3"),
        (["path,label", *(f"{i}.png,0" for i in range(12))], "a wrong class must exist"),
    ],
)
def test_refuses_a_file_that_does_not_fit(tmp_path, pictures, lines, message):
    file = tmp_path / "labels.csv"
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(RunError, match=message):
        read_labels(file, pictures)


def test_refuses_what_is_no_text(tmp_path, pictures):
    file = tmp_path / "labels.csv"
    file.write_bytes(b"\xff\xfe\x00\x81" * 10)
    with pytest.raises(RunError, match="labels.csv"):
        read_labels(file, pictures)
    with pytest.raises(RunError, match="nothing there"):
        read_labels(tmp_path / "absent.csv", pictures)


def test_given_labels_are_the_images_own_or_a_files(tmp_path, pictures):
    assert torch.equal(given_labels(pictures, None).labels, pictures.labels)
    other = (pictures.labels + 1) % 3
    write_labels(tmp_path / "l.csv", pictures, other, torch.ones(12))
    assert torch.equal(given_labels(pictures, str(tmp_path / "l.csv")).labels, other)
    with pytest.raises(UsageError, match="clustering.method.*no labels"):
        given_labels(ImageSet(pictures.images, pictures.names), None)


def test_a_cluster_without_images_is_an_error():
    assert check_labels(torch.tensor([0, 1, 2]), "x", 3) == 3
    with pytest.raises(RunError, match="no image of class 2.*1 classes of 4"):
        check_labels(torch.tensor([0, 1, 3]), "x", 4)


def test_an_imglist_and_an_npy_are_labels_too(tmp_path, pictures):
    write_imglist(tmp_path / "l.txt", pictures, pictures.labels)
    assert (tmp_path / "l.txt").read_text().splitlines()[:2] == ["0.png 0", "1.png 1"]
    np.save(tmp_path / "l.npy", pictures.labels.numpy().astype(np.uint8))
    for name in ("l.txt", "l.npy"):
        found = read_labels(tmp_path / name, pictures)
        assert torch.equal(found.labels, pictures.labels) and found.classes == 3 and (found.confidence == 1).all()


def test_a_name_with_a_blank_makes_no_imglist(tmp_path, pictures):
    write_imglist(tmp_path / "l.txt", ImageSet(pictures.images, ["my cat.png", *pictures.names[1:]]), pictures.labels)
    assert not (tmp_path / "l.txt").exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.arange(11) % 3, r"int64 \(11,\); expected integers \(12,\)"),
        (np.arange(12) % 3 / 1.0, r"float64 \(12,\)"),
        (np.eye(12, dtype=int), r"int64 \(12, 12\)"),
        (np.array([{}] * 12), "pickle"),
        (np.arange(12) % 3 - 1, "-1 to 1"),
    ],
)
def test_refuses_an_array_that_does_not_fit(tmp_path, pictures, array, message):
    np.save(tmp_path / "l.npy", array)
    with pytest.raises(RunError, match=message):
        read_labels(tmp_path / "l.npy", pictures)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.png 0\n" * 2, "line 2.*each image once"),
        ("0.png 0\n", "no row for '1.png'"),
        ("0.png\n", "no row for '0.png'|each image once"),
        ("".join(f"{i}.png x\n" for i in range(12)), "integer labels"),
    ],
)
def test_refuses_an_imglist_that_does_not_fit(tmp_path, pictures, text, message):
    (tmp_path / "l.txt").write_text(text)
    with pytest.raises(RunError, match=message):
        read_labels(tmp_path / "l.txt", pictures)


@pytest.mark.parametrize("name", ["l.txt", "l.npy"])
def test_a_file_that_is_not_there_or_is_garbage(tmp_path, pictures, name):
    with pytest.raises(RunError, match="nothing there"):
        read_labels(tmp_path / name, pictures)
    (tmp_path / name).write_bytes(b"\xff\xfe\x00\x81" * 10)
    with pytest.raises(RunError, match=name):
        read_labels(tmp_path / name, pictures)


def test_examples_are_the_most_and_the_least_confident_of_each_cluster():
    labels = PseudoLabels(torch.tensor([0, 1, 0, 0, 1]), torch.tensor([0.1, 0.9, 0.8, 0.5, 0.2]), 2)
    rows = {name: found.tolist() for name, found in example_rows(labels, count=2).items()}
    assert rows == {"0-most": [2, 3], "0-least": [3, 0], "1-most": [1, 4], "1-least": [1, 4]}
    assert set(example_rows(labels, clusters=1)) == {"0-most", "0-least"}
