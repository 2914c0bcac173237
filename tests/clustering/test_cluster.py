"""From images to pseudo-labels: both speeds, data that is not kind, and what true labels may not touch."""

from __future__ import annotations

import dataclasses
import shutil
import warnings

import numpy as np
import pytest
import torch

from sdood_plugin.clustering import cluster
from sdood_plugin.clustering.cluster import cluster_images
from sdood_plugin.clustering.finetune import scan_through_backbone, self_label_through_backbone
from sdood_plugin.clustering.scan import ClusterHead
from sdood_plugin.config import ClusteringConfig, DataConfig, ImagesConfig, RunConfig
from sdood_plugin.context import Context
from sdood_plugin.data.images import ImageSet, save_png
from sdood_plugin.errors import RunError
from sdood_plugin.metrics import clustering_metrics
from sdood_plugin.run import run
from sdood_plugin.stages import label_quality
from sdood_plugin.training import Job

from ..resuming import assert_resumes, assert_same

TINY = ClusteringConfig(
    clusters=2,
    pretext_steps=40,  # until the running means of its batch norms are what they should be
    pretext_batch_size=16,
    augmentation="digits",
    neighbours=5,
    heads=3,
    head_epochs=20,
    head_lr=0.02,
    finetune_batch_size=16,
    finetune_lr=1e-4,
    self_label_threshold=0.6,
)


def textures(count=40, seed=0) -> ImageSet:
    """Checks and plain grey in turns, with noise: two classes that any network tells apart."""
    true = torch.arange(count) % 2
    noise = torch.randint(40, (count, 3, 8, 8), generator=torch.Generator().manual_seed(seed))
    checks = 200 * (torch.arange(8)[:, None] // 2 % 2 ^ torch.arange(8) // 2 % 2)
    images = (torch.where(true.bool()[:, None, None, None], checks, 100) + noise).clamp(0, 255).to(torch.uint8)
    return ImageSet(images, [str(i) for i in range(count)], true)


def clustered(images, accelerator, folder, **changes):
    config = dataclasses.replace(TINY, **changes)
    return cluster_images(images, config, Job(accelerator, folder))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"self_label_epochs": 2},
        {"finetune_epochs": 1, "self_label_epochs": 2},
        {"method": "kmeans"},
        {"method": "gmm"},
    ],
)
def test_plainly_different_images_are_told_apart(tmp_path, accelerator, changes):
    images = textures()
    labels, backbone, curves, notes = clustered(images, accelerator, tmp_path / "a", **changes)
    assert clustering_metrics(labels.labels, images.labels)["acc"] == 100
    assert labels.classes == 2 and labels.confidence.shape == (40,) and notes == []
    assert 0 <= labels.confidence.min() and labels.confidence.max() <= 1
    assert backbone.feature_size == 128 and len(curves["simclr"]["loss"]) == 40
    expected = {"scan-backbone": "finetune_epochs", "self-label": "self_label_epochs"}
    assert set(curves) - {"simclr", "scan"} == {name for name, setting in expected.items() if setting in changes}
    again = clustered(images, accelerator, tmp_path / "b", **changes)
    assert_same(again.labels._asdict(), labels._asdict())


def test_true_labels_touch_nothing(tmp_path, accelerator):
    images = textures()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5))
    found = []
    for name, true in (("true", images.labels), ("permuted", images.labels[order]), ("none", None)):
        given = ImageSet(images.images, images.names, true)
        made = clustered(given, accelerator, tmp_path / name, finetune_epochs=1, self_label_epochs=1)
        found.append([made.labels._asdict(), made.curves, dict(made.backbone.state_dict())])
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_permuted_true_labels_change_no_byte_of_a_run_but_the_verdict(tmp_path):
    images, verdicts, written = textures(), [], []
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5))
    for name, true in (("true", images.labels), ("permuted", images.labels[order])):
        np.savez(tmp_path / f"{name}.npz", images=images.images.permute(0, 2, 3, 1).numpy(), labels=true.numpy())
        data = DataConfig(ImagesConfig(str(tmp_path / f"{name}.npz")), image_size=None)
        config = RunConfig(device="cpu", data=data, clustering=dataclasses.replace(TINY, self_label_epochs=1))
        folder = tmp_path / name
        run(config, folder, "cluster")
        files = [folder / "labels.csv", *sorted((folder / "clustering").iterdir())]
        written.append({path.name: path.read_bytes() for path in files})
        verdicts.append(label_quality(Context(config, folder)))
    assert len(written[0]) >= 7 and written[0] == written[1]
    assert verdicts[0]["acc"] == 100 > verdicts[1]["acc"]


def test_labels_go_out_and_come_in_again(tmp_path):
    for i, image in enumerate(textures().images):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        save_png(tmp_path / "pictures" / f"{i}.png", image)
    base = RunConfig(device="cpu", data=DataConfig(ImagesConfig(str(tmp_path / "pictures")), image_size=None), clustering=TINY)
    run(base, tmp_path / "found", "cluster")
    found = Context(base, tmp_path / "found").labels
    imglist = ImagesConfig(str(tmp_path / "found" / "clustering" / "imglist.txt"), root=str(tmp_path / "pictures"))
    for name, data, labels in (
        ("csv", base.data, str(tmp_path / "found" / "labels.csv")),
        ("imglist", dataclasses.replace(base.data, train=imglist), None),
    ):
        given = dataclasses.replace(base, data=data, clustering=ClusteringConfig(method="given", labels=labels))
        run(given, tmp_path / name, "cluster")
        assert torch.equal(Context(given, tmp_path / name).labels.labels, found.labels)


METHODS = [{}, {"self_label_epochs": 2}, {"finetune_epochs": 1}, {"method": "kmeans"}, {"method": "gmm"}]


@pytest.mark.parametrize("changes", METHODS)
def test_equal_images_are_a_clear_error(tmp_path, accelerator, changes):
    images = textures()
    same = ImageSet(images.images[:1].expand(40, -1, -1, -1).clone(), images.names)
    with pytest.raises(RunError, match="features of the images: got the same for all 40 images"):
        clustered(same, accelerator, tmp_path, **changes)


@pytest.mark.parametrize("changes", METHODS)
def test_copies_are_clustered_alike(tmp_path, accelerator, changes):
    few = textures(20)
    images = ImageSet(few.images.repeat(3, 1, 1, 1), [str(i) for i in range(60)])
    labels = clustered(images, accelerator, tmp_path, **changes).labels.labels
    assert torch.equal(labels[:20], labels[20:40]) and torch.equal(labels[:20], labels[40:])


@pytest.mark.parametrize("changes", METHODS)
def test_thirty_images_and_more_clusters_than_there_are(tmp_path, accelerator, changes):
    # three clusters of two textures: an answer that splits one of them, or an error that says what to do
    try:
        with warnings.catch_warnings():
            labels = clustered(textures(30), accelerator, tmp_path, clusters=3, **changes).labels
    except RunError as error:
        assert "lower --clustering" in str(error)
    else:
        assert torch.bincount(labels.labels, minlength=3).min() > 0 and len(labels.labels) == 30


@pytest.mark.parametrize(
    ("count", "changes", "message"),
    [
        (12, {}, "12 for 2 clusters.*at least 20"),
        (20, {"neighbours": 20}, "clustering.neighbours: got 20; expected fewer than the 20"),
    ],
)
def test_too_few_images_are_named(tmp_path, accelerator, count, changes, message):
    with pytest.raises(RunError, match=message):
        clustered(textures(count), accelerator, tmp_path, **changes)


def test_a_method_that_loses_a_cluster_is_an_error(tmp_path, accelerator, monkeypatch):
    monkeypatch.setattr(cluster, "k_means", lambda features, clusters, seed: (torch.zeros(40).long(), torch.ones(40)))
    with pytest.raises(RunError, match="kmeans clustering: got no image of class 1"):
        clustered(textures(), accelerator, tmp_path, method="kmeans")


def small_net(images) -> torch.nn.Module:
    """A network with batch norm, small enough to be trained in no time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten())
        width = 4 * 36
        return torch.nn.Sequential(
            body, ClusterHead(torch.zeros(width), torch.ones(width) / width**0.5, torch.randn(width, 2), torch.zeros(2))
        )


@pytest.mark.parametrize("phase", ["scan", "self-label"])
def test_a_killed_training_through_the_backbone_resumes_to_the_same_bits(tmp_path, accelerator, phase):
    images = textures().images
    config = dataclasses.replace(TINY, finetune_epochs=2, self_label_epochs=2, self_label_threshold=0.5)

    def train(job):
        net = small_net(images)
        try:
            if phase == "scan":
                history = scan_through_backbone(net, images, torch.arange(40)[:, None].roll(2, 0), config, job)
            else:
                history, _ = self_label_through_backbone(net, images, config, job)
        finally:
            for written in job.folder.glob("checkpoint-*.pt"):
                shutil.copy(written, job.folder / "checkpoint.pt")  # where `assert_resumes` looks
        return net.state_dict(), history

    train_once = train(Job(accelerator, tmp_path / "once"))
    assert len(train_once[1]["loss"]) == 4
    assert_resumes(train, tmp_path, accelerator, die_at=4)
