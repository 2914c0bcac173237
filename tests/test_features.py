"""Backbones behind one interface, and features that depend neither on the batch nor on the mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sdood_plugin.artifacts import write_tensors
from sdood_plugin.data.images import to_unit
from sdood_plugin.errors import UsageError
from sdood_plugin.features import Backbone, evaluating, extract, load_backbone

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backbone():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Backbone("small_cnn")


@pytest.mark.parametrize("batch_size", [1, 5, 12, 100])
def test_features_do_not_depend_on_the_batch_size(backbone, pictures, batch_size):
    found = extract(backbone, pictures.images, device=CPU, batch_size=batch_size)
    assert found.shape == (12, 128) and found.dtype == torch.float32
    one = torch.cat([extract(backbone, image[None], device=CPU) for image in pictures.images])
    torch.testing.assert_close(found, one, atol=1e-5, rtol=1e-4)


def test_extracting_leaves_weights_modes_and_statistics(backbone, pictures):
    backbone.train()
    backbone.body.layers[1].eval()  # a layer with a mode of its own
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    extract(backbone, pictures.images, device=CPU)
    assert backbone.training and not backbone.body.layers[1].training and backbone.body.layers[4].training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_modes_are_restored_after_a_failure(backbone):
    backbone.train()
    with pytest.raises(ZeroDivisionError), evaluating(backbone):
        assert not backbone.training and not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert backbone.training and torch.is_grad_enabled()


@pytest.mark.parametrize("prefix", ["", "body."])
def test_weights_are_taken_with_or_without_prefix(tmp_path, backbone, pictures, prefix):
    write_tensors(tmp_path / "w.safetensors", {prefix + name: value for name, value in backbone.body.state_dict().items()})
    loaded = load_backbone("small_cnn", tmp_path / "w.safetensors")
    assert torch.equal(extract(loaded, pictures.images, device=CPU), extract(backbone, pictures.images, device=CPU))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("layers.0.weight"), "no layers.0.weight"),
        (lambda state: state.update({"layers.0.weight": torch.zeros(2, 2)}), r"layers.0.weight of shape \(2, 2\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, backbone, change, message):
    state = dict(backbone.body.state_dict())
    change(state)
    write_tensors(tmp_path / "w.safetensors", state)
    with pytest.raises(UsageError, match=message):
        load_backbone("small_cnn", tmp_path / "w.safetensors")


def test_an_unknown_backbone_is_refused_with_near_names():
    with pytest.raises(UsageError, match="resnet_18_cifr.*resnet"):
        Backbone("resnet_18_cifr")


def test_timm_models_get_their_own_size_mean_and_deviation(pictures):
    with torch.random.fork_rng():
        model = Backbone("test_resnet.r160_in1k").eval()
    mean, std = (torch.tensor(model.body.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    images = pictures.images[:2]
    resized = F.interpolate(to_unit(images), size=(model.input_size,) * 2, mode="bicubic", align_corners=False, antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(model(to_unit(images)), model.body((resized / 2 + 0.5 - mean) / std), atol=1e-4, rtol=1e-3)
    assert model.feature_size == model.body.num_features and model.input_size == 160


def test_the_cifar_resnet_keeps_the_resolution():
    with torch.random.fork_rng():
        model = Backbone("resnet18_cifar").eval()
    assert isinstance(model.body.maxpool, nn.Identity) and model.body.conv1.stride == (1, 1)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 512)
