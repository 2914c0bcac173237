"""Networks from files with the real host: what is no checkpoint, another backbone, a misspelt normalisation."""

from __future__ import annotations

import pytest
import torch
import yaml

from sdood_plugin.detector.network import ThreeHeadNet, save_network
from sdood_plugin.errors import SdoodError, UsageError
from sdood_plugin.features import Backbone, load_backbone

pytestmark = [pytest.mark.usefixtures("host"), pytest.mark.filterwarnings("ignore")]  # the host's warnings are not ours


@pytest.mark.parametrize(
    ("write", "found"),
    [
        (lambda path: path.write_text("epoch 1\n"), "state dict that loads with weights_only"),
        (lambda path: path.write_bytes(b""), "state dict that loads with weights_only"),
        (lambda path: torch.save({1: torch.zeros(2)}, path), "got dict; expected a state dict, tensors by name"),
        (lambda path: torch.save({"net": {}}, path), "got dict; expected a state dict, tensors by name"),
        (lambda path: None, "checkpoint: got .*best.ckpt; expected a file"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(tmp_path, write, found):
    from sdood_plugin.hosts.openood import load_checkpoint

    write(tmp_path / "best.ckpt")
    with pytest.raises(UsageError, match=found) as caught:
        load_checkpoint(tmp_path / "best.ckpt", 10)
    assert "\n" not in str(caught.value)


def test_a_run_of_another_backbone_than_the_yaml_names_is_refused(tmp_path):
    from openood.utils import Config

    from sdood_plugin.hosts.openood.checkpoints import build_network

    path = tmp_path / "detector.safetensors"
    save_network(path, ThreeHeadNet(Backbone("small_cnn"), 10))
    section = {"normalization_type": "cifar10", "pretrained": True, "checkpoint": path, "num_gpus": 0}
    assert build_network(Config(**section, backbone="small_cnn"), 10).network.backbone.name == "small_cnn"
    with pytest.raises(UsageError, match="network.backbone: got resnet18_cifar; expected small_cnn"):
        build_network(Config(**section, backbone="resnet18_cifar"), 10)


def test_the_yaml_says_weights_pooling_and_input_size(tmp_path):
    from openood.utils import Config

    from sdood_plugin.artifacts import write_tensors
    from sdood_plugin.hosts.openood.checkpoints import build_network
    from sdood_plugin.hosts.openood.yamls import NETWORK

    name, path = "vit_tiny_patch16_224", tmp_path / "weights.safetensors"
    torch.manual_seed(1)
    write_tensors(path, dict(Backbone(name).body.state_dict()))
    section = yaml.safe_load(NETWORK)["network"] | {"normalization_type": "cifar10", "num_gpus": 0, "backbone": name}
    net = build_network(Config(section | {"weights": str(path), "pooling": "mean", "input_size": 32}), 10)
    expected = load_backbone(name, path, pooling="mean", input_size=32)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = net.eval()(images, return_feature=True)[1]
        torch.testing.assert_close(found, expected.eval()(net.unit(images)))
    torch.save(net.state_dict(), tmp_path / "best.ckpt")
    saved = section | {"pretrained": True, "checkpoint": str(tmp_path / "best.ckpt"), "pooling": "mean", "input_size": 32}
    with torch.no_grad():
        again = build_network(Config(saved | {"weights": "no such file"}), 10)  # where training started, no longer of interest
        assert torch.equal(again.eval()(images, return_feature=True)[1], found)
    with pytest.raises(SdoodError, match="no such file"):
        build_network(Config(section | {"weights": "no such file"}), 10)
    with pytest.raises(UsageError, match="pooling"):
        build_network(Config(section | {"backbone": "small_cnn", "pooling": "cls"}), 10)


def test_a_misspelt_normalisation_is_refused():
    from sdood_plugin.hosts.openood.network import HALF, host_normalisation

    assert host_normalisation("cifar10")[0] == (0.4914, 0.4822, 0.4465)
    assert host_normalisation("half") == host_normalisation("mnist") == HALF
    with pytest.raises(UsageError, match="normalisation: got cifar-10; expected one of cifar10"):
        host_normalisation("cifar-10")
