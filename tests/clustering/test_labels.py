"""Pseudo-labels on disk, and every way in which they cannot be used."""

from __future__ import annotations

import pytest
import torch

from sdood_plugin.clustering.cluster import cluster_images
from sdood_plugin.clustering.labels import check_labels, given_labels, read_labels, write_labels
from sdood_plugin.config import ClusteringConfig
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


def test_too_few_images_for_the_clusters(tmp_path, accelerator, pictures):
    with pytest.raises(RunError, match="12 for 2 clusters.*at least 20"):
        cluster_images(
            pictures,
            ClusteringConfig(clusters=2),
            accelerator=accelerator,
            seed=0,
            folder=tmp_path,
            key="",
            checkpoint_seconds=1e9,
        )


@pytest.mark.parametrize("method", ["scan", "kmeans"])
def test_clusters_of_plainly_different_images(tmp_path, accelerator, method):
    true = torch.arange(40) % 2
    random = torch.Generator().manual_seed(0)
    noise = torch.randint(40, (40, 3, 8, 8), generator=random)
    checks = 200 * (torch.arange(8)[:, None] // 2 % 2 ^ torch.arange(8) // 2 % 2)
    images = (torch.where(true.bool()[:, None, None, None], checks, 100) + noise).clamp(0, 255).to(torch.uint8)
    config = ClusteringConfig(
        method=method, clusters=2, pretext_steps=3, pretext_batch_size=16, neighbours=5, heads=3, head_epochs=20, head_lr=0.02
    )
    made = [
        cluster_images(
            ImageSet(images, [str(i) for i in range(40)]),
            config,
            accelerator=accelerator,
            seed=0,
            folder=tmp_path / str(i),
            key="",
            checkpoint_seconds=1e9,
        )
        for i in range(2)
    ]
    labels, backbone, curves = made[0]
    assert float((labels.labels == true).float().mean()) in (0.0, 1.0)  # up to the clusters' names
    assert labels.classes == 2 and labels.confidence.shape == (40,)
    assert 0 <= labels.confidence.min() and labels.confidence.max() <= 1
    assert backbone.feature_size == 128 and len(curves["simclr"]["loss"]) == 3
    assert torch.equal(made[1][0].labels, labels.labels) and torch.equal(made[1][0].confidence, labels.confidence)
