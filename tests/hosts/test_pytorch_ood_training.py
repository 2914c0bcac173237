"""The three-head loss and the outlier data set, among the host's own losses and loaders."""

# ruff: noqa: F401, F811 (a fixture that several files share)

from __future__ import annotations

import math
import shutil

import pytest
import torch
from PIL import Image
from pytorch_ood.api import Role
from pytorch_ood.loss import (
    BackgroundClassLoss,
    DeepSADLoss,
    EnergyMarginLoss,
    EnergyRegularizedLoss,
    EntropicOpenSetLoss,
    MCHADLoss,
    ObjectosphereLoss,
    OutlierExposureLoss,
)
from pytorch_ood.utils import is_known, is_unknown
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from sdood_plugin.detector.loss import three_head_loss
from sdood_plugin.detector.network import Heads, ThreeHeadNet
from sdood_plugin.errors import RunError, UsageError
from sdood_plugin.features import Backbone
from sdood_plugin.hosts.pytorch_ood import SDOOD, SDOutliers, ThreeHeadLoss, network_input, outlier_target
from sdood_plugin.outliers.dataset import OutlierSet

from .samples_pytorch_ood import run_folder

CLASSES = 3


def random_heads(count: int = 8) -> Heads:
    generator = torch.Generator().manual_seed(0)
    return Heads(*(torch.randn(count, width, generator=generator, requires_grad=True) for width in (5, 2, CLASSES, CLASSES)))


def test_the_source_class_of_an_outlier_is_in_its_target():
    labels = torch.arange(5)
    targets = outlier_target(labels)
    assert targets.tolist() == [-2, -3, -4, -5, -6] and outlier_target(0) == -2
    assert is_unknown(targets).all() and torch.equal(outlier_target(targets), labels)
    assert -1 not in targets  # that is an outlier whose source nobody knows


def test_the_loss_is_the_core_loss_and_so_are_its_gradients():
    heads, labels = random_heads(), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    outlier = torch.tensor([False] * 4 + [True] * 4)
    target = torch.where(outlier, outlier_target(labels), labels)
    ours = ThreeHeadLoss(lambda_out=0.7)(heads, target)
    core = three_head_loss(heads, labels, outlier, 0.7)["loss"]
    assert torch.equal(ours, core)
    for mine, theirs in zip(torch.autograd.grad(ours, heads[1:]), torch.autograd.grad(core, heads[1:]), strict=True):
        assert torch.equal(mine, theirs)


def test_flat_logits_give_the_closed_form():
    heads = Heads(torch.zeros(4, 5), torch.zeros(4, 2), torch.zeros(4, CLASSES), torch.zeros(4, CLASSES))
    value = ThreeHeadLoss(lambda_out=3.0)(heads, torch.tensor([0, 1, -2, -1]))
    assert float(value) == pytest.approx(math.log(2) + math.log(CLASSES) * (2 + 3.0 * 1) / 4)


@pytest.mark.parametrize("weight", [-1.0, math.nan])
def test_a_weight_below_0_is_refused(weight):
    with pytest.raises(UsageError, match="lambda_out: got .*; expected 0 or more"):
        ThreeHeadLoss(lambda_out=weight)


def test_an_outlier_of_unknown_source_trains_the_binary_head_alone():
    heads = random_heads(4)
    loss = ThreeHeadLoss()(heads, torch.tensor([0, 1, -3, -1]))
    binary, inside, outside = torch.autograd.grad(loss, heads[1:])
    assert (binary.abs().sum(dim=1) > 0).all()
    assert inside.abs().sum(dim=1).gt(0).tolist() == [True, True, False, False]
    assert outside.abs().sum(dim=1).gt(0).tolist() == [False, False, True, False]


@pytest.mark.parametrize("target", [3, outlier_target(3)])
def test_a_class_the_heads_do_not_have_is_one_clear_line(target):
    with pytest.raises(UsageError, match="target: got class 3; expected classes 0 to 2") as caught:
        ThreeHeadLoss()(random_heads(2), torch.tensor([0, target]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("heads", [torch.zeros(2, CLASSES), (torch.zeros(2, CLASSES),) * 4])
def test_outputs_of_another_network_are_one_clear_line(heads):
    with pytest.raises(UsageError, match="heads: got a (Tensor|tuple); expected the outputs of a ThreeHeadNet") as caught:
        ThreeHeadLoss()(heads, torch.tensor([0, -1]))
    assert "\n" not in str(caught.value)


def test_the_outlier_set_is_what_the_manifest_says(run_folder):
    folder = run_folder / "outliers"
    plain, sourced, core = SDOutliers(folder), SDOutliers(folder, source_labels=True), OutlierSet(folder)
    assert Role.AUXILIARY_OUTLIERS in SDOutliers.info.roles and len(plain) == len(core) == 24
    for index, row in enumerate(core.manifest):
        image, target = plain[index]
        assert isinstance(image, Image.Image) and image.mode == "RGB" and target == -1
        assert image.tobytes() == Image.open(folder / row["file"]).tobytes()
        assert outlier_target(sourced[index][1]) == int(row["source_label"])
    assert len(list(plain)) == 24  # iteration ends
    changed = SDOutliers(folder, transform=network_input, target_transform=lambda target: target - 5)
    assert changed[0][0].shape == core.images[0].shape and changed[0][1] == -6
    assert "SDOutliers" in repr(plain)


@pytest.mark.parametrize("damage", ["no image", "other manifest", "unfinished"])
def test_a_damaged_outlier_set_is_one_clear_line(damage, run_folder, tmp_path):
    folder = shutil.copytree(run_folder / "outliers", tmp_path / "outliers")
    if damage == "no image":
        sorted(folder.rglob("*.png"))[3].unlink()
    elif damage == "other manifest":
        lines = (folder / "manifest.csv").read_text().splitlines()
        (folder / "manifest.csv").write_text("\n".join(lines[:-1]) + "\n")
    else:
        (folder / "meta.json").unlink()
    with pytest.raises(RunError) as caught:
        SDOutliers(folder)
    assert "\n" not in str(caught.value)


def mixed(folder, source_labels: bool = False) -> DataLoader:
    """ID images of three noisy colours and the outlier set, in one loader."""
    labels = torch.arange(24) % CLASSES
    side = OutlierSet(folder).images.shape[-1]
    images = 0.1 * torch.randn(24, 3, side, side, generator=torch.Generator().manual_seed(0))
    images[torch.arange(24), labels] += 1.0
    inside = [(image, int(label)) for image, label in TensorDataset(images, labels)]
    outliers = SDOutliers(folder, transform=network_input, source_labels=source_labels)
    return DataLoader(ConcatDataset([inside, outliers]), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def network() -> ThreeHeadNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ThreeHeadNet(Backbone("small_cnn"), CLASSES)


class Margin(nn.Module):
    """EnergyMarginLoss with the logistic regression it wants."""

    def __init__(self) -> None:
        super().__init__()
        self.loss, self.regression = EnergyMarginLoss(full_train_loss=1.0), nn.Linear(1, 2)

    def forward(self, logits, target):
        return self.loss(logits, target, self.regression)


ON_LOGITS = [OutlierExposureLoss, EnergyRegularizedLoss, EntropicOpenSetLoss, Margin]
LOSSES = {
    **{kind.__name__: (kind, lambda criterion, heads, target: criterion(heads.inside, target)) for kind in ON_LOGITS},
    "BackgroundClassLoss": (
        lambda: BackgroundClassLoss(n_classes=CLASSES - 1),
        lambda criterion, heads, target: criterion(heads.inside, target.clamp(max=CLASSES - 2)),
    ),
    "ObjectosphereLoss": (ObjectosphereLoss, lambda criterion, heads, target: criterion(heads.inside, heads.features, target)),
    "DeepSADLoss": (lambda: DeepSADLoss(n_dim=CLASSES), lambda criterion, heads, target: criterion(heads.inside, target)),
    "MCHADLoss": (
        lambda: MCHADLoss(n_classes=CLASSES, n_dim=CLASSES),
        lambda criterion, heads, target: criterion(heads.inside.abs(), target),
    ),
    "ThreeHeadLoss": (ThreeHeadLoss, lambda criterion, heads, target: criterion(heads, target)),
}


@pytest.mark.parametrize("source_labels", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_take_outliers_train_on_the_set(name, source_labels, network, run_folder):
    build, call = LOSSES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        criterion = build()
    optimizer = torch.optim.Adam([*network.parameters(), *criterion.parameters()], lr=2e-3)
    losses = []
    for _ in range(4):
        total = 0.0
        for images, target in mixed(run_folder / "outliers", source_labels):
            assert is_known(target).any() and is_unknown(target).any()
            value = call(criterion, network(images), target)
            optimizer.zero_grad()
            value.mean().backward()
            optimizer.step()
            total += float(value.detach().mean())
        losses.append(total)
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0], losses


def test_a_network_trained_with_the_loss_is_an_encoder_of_the_detector(network, run_folder):
    optimizer, criterion = torch.optim.Adam(network.parameters(), lr=2e-3), ThreeHeadLoss()
    loader = mixed(run_folder / "outliers", source_labels=True)
    for _ in range(3):
        for images, target in loader:
            optimizer.zero_grad()
            criterion(network(images), target).backward()
            optimizer.step()
    detector = SDOOD(network.eval().backbone, k_distance=1, k_vote=3).fit(loader)
    images, target = next(iter(loader))
    scores = detector(images)
    assert scores[is_unknown(target)].mean() > scores[is_known(target)].mean()
    with pytest.raises(UsageError, match="network.backbone"):
        SDOOD(network).fit(loader)
