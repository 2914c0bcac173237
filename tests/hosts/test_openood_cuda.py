"""The OpenOOD adapters on a GPU: what they say there is what they say on the CPU.

    OPENOOD_ROOT=CHECKOUT python -m pytest tests/hosts/test_openood_cuda.py

The embedded data is enough. Where there is no CUDA device, the test on the meta device still holds that no tensor is left on
the CPU: a tensor there has a device and no values.
"""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ..test_run import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore")  # the host's warnings are not ours to mend
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def exported(host, tmp_path_factory) -> tuple[Path, Path]:
    """A run on the embedded data and the host's data root made of it."""
    from sdood_plugin.hosts.openood import export_openood
    from sdood_plugin.run import run

    folder = tmp_path_factory.mktemp("cuda")
    run(tiny_config(), folder / "run", "calibrate")
    export_openood(folder / "run", folder / "data")
    return folder / "run", folder / "data"


def command(data: Path, output: Path, gpus: int) -> list[str]:
    files = ["dataset.yml", "networks/sdood_net.yml", "pipelines/train_sdood.yml"]
    settings = f"--num_gpus {gpus} --num_workers 0 --merge_option merge --optimizer.num_epochs 1 --output_dir {output}"
    return ["--config", *(str(data / "sdood" / file) for file in files), *settings.split()]


@pytest.fixture(scope="module")
def loaders(exported, tmp_path_factory) -> dict:
    """The host's own loaders, in order so that a bank is the same twice."""
    from openood.datasets import get_dataloader

    from sdood_plugin.hosts.openood.__main__ import read_config

    config = read_config(command(exported[1], tmp_path_factory.mktemp("none"), 0))
    for split in config.dataset.split_names:
        config.dataset[split].shuffle = False
    return get_dataloader(config)


@needs_cuda
@pytest.mark.parametrize("source", ["run", "run/outliers", None])
def test_cuda_confidences_are_those_of_the_cpu(exported, loaders, source, monkeypatch):
    from sdood_plugin.hosts.openood import SDOODPostprocessor, load_detector

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    outliers = exported[0].parent / source if source else None
    found = {}
    for device in ("cpu", "cuda"):
        net = load_detector(exported[0], "half").to(device)
        post = SDOODPostprocessor(outliers=outliers)
        post.setup(net, loaders, {})
        assert {post.score_.inside.device.type, post.score_.outliers.device.type} == {device}
        first = post.inference(net, loaders["test"], progress=False)
        post.set_hyperparam([3, 4, 0.5, True])
        found[device] = (*first, post.inference(net, loaders["test"], progress=False)[1])
        again = pickle.loads(pickle.dumps(post))
        assert again.score_.inside.device.type == "cpu", "a pickle made on a GPU loads without one"
        assert {post.score_.inside.device.type, post.features["inside"].device.type} == {device}, "and moves nothing"
        np.testing.assert_allclose(again.inference(net, loaders["test"], progress=False)[1], found[device][3], rtol=1e-4)
    for ours, reference in zip(found["cuda"], found["cpu"], strict=True):
        assert np.isclose(ours, reference, rtol=1e-3, atol=1e-3).mean() > 0.97  # a vote may turn at nearly equal distances


@needs_cuda
def test_cuda_training_leaves_a_detector_that_loads_on_the_cpu(exported, loaders, tmp_path, capsys):
    from sdood_plugin.hosts.openood import SDOODPostprocessor, load_detector
    from sdood_plugin.hosts.openood.__main__ import main

    assert main(command(exported[1], tmp_path, 1)) == 0, capsys.readouterr().err
    folder = next(tmp_path.rglob("detector.safetensors")).parent
    net, post = load_detector(folder, "half"), SDOODPostprocessor(outliers=folder)
    post.setup(net, loaders, {})
    assert np.isfinite(post.inference(net, loaders["test"], progress=False)[1]).all()


class FeatureNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(6, 3)

    def forward(self, data, return_feature=False):
        return (self.fc(data), data) if return_feature else self.fc(data)


def test_no_tensor_stays_on_the_cpu_when_the_network_is_elsewhere(host, generator, monkeypatch):
    from sdood_plugin.hosts.openood import SDOODPostprocessor, postprocessor
    from sdood_plugin.scoring.score import Score

    def loader(count):
        parts = torch.randn(count, 6, generator=generator).split(7)
        batches = [{"data": part, "label": torch.zeros(len(part), dtype=torch.int64)} for part in parts]
        return type("Loader", (list,), {"dataset": SimpleNamespace(transform_image=None)})(batches)

    given: list[torch.Tensor] = []
    fitted = SDOODPostprocessor()
    fitted.setup(FeatureNet(), {"train": loader(40), "val": loader(15)})

    def fit(config, **features):
        given.extend(features.values())
        banks = {name: features[name] for name in ("inside", "outliers")}
        return dataclasses.replace(fitted.score_, config=config, **banks)

    def score(self, features):
        given.extend((self.inside, self.outliers, features))
        return features.sum(dim=1)

    monkeypatch.setattr(postprocessor, "fit_score", fit)
    monkeypatch.setattr(Score, "__call__", score)
    far = FeatureNet().to("meta")
    post = SDOODPostprocessor()
    post.setup(far, {"train": loader(40), "val": loader(15)})
    post.set_hyperparam([3, 4, 0.5, True])
    data = torch.empty(5, 6, device="meta")
    for tested in (post, fitted):  # fitted on the other device, and on this one and then moved
        given.extend(tested.postprocess(far, data))
        given.extend(tested.features.values())
    assert len(given) == 26
    assert {tensor.device.type for tensor in given} == {"meta"}
