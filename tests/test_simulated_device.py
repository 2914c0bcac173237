"""The whole run on a simulated GPU: no tensor, index, generator or checkpoint of it is left on another device."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sdood_plugin.artifacts import read_json
from sdood_plugin.clustering.cluster import cluster_images
from sdood_plugin.config import CompareConfig, DetectorConfig, DiffusionConfig, OutliersConfig, RunConfig
from sdood_plugin.decision import Detector
from sdood_plugin.diffusion.training import train_diffusion
from sdood_plugin.run import run
from sdood_plugin.training import Job, make_accelerator

from .clustering.test_cluster import TINY, textures
from .resuming import Dying, Killed
from .simulated_device import CUDA, simulated_cuda
from .test_run import tiny_config

REFUSED = {
    "operands of two devices": lambda there, here: there + here,
    "a network elsewhere": lambda there, here: torch.nn.Linear(3, 1)(there),
    "a scalar where only tensors are taken": lambda there, here: torch.stack([there[0], here[0]]),
    "numpy": lambda there, here: there.numpy(),
    "CUDA indices on the CPU": lambda there, here: here[there.long()],
    "values by index": lambda there, here: there.__setitem__(here.long(), here),
    "a generator of the CPU": lambda there, here: torch.rand(3, device="cuda", generator=torch.Generator()),
    "a generator of the GPU": lambda there, here: torch.randperm(3, generator=torch.Generator("cuda")),
    "integer products": lambda there, here: there.long() @ there.long(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_what_cuda_refuses(name):
    with simulated_cuda(), pytest.raises((RuntimeError, TypeError)):
        REFUSED[name](torch.ones(3, device="cuda"), torch.ones(3))


def test_what_comes_of_a_tensor_lies_where_it_lies():
    with simulated_cuda(), torch.autocast("cuda", torch.bfloat16):
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        network = torch.nn.Linear(3, 2).to("cuda")
        network(there).sum().backward()
        on_gpu = [there * here[0], there[here.long()], here.to(there), torch.as_tensor(here, device="cuda"), there.max(0).indices]
        on_gpu += [network.weight.grad, torch.nn.Parameter(there), there.view(1, 3), network(there), here.cuda()]
        on_cpu = [there.cpu(), there.to(here), torch.as_tensor(there, device="cpu"), torch.tensor([there[0]]), here]
        assert {tensor.device for tensor in on_gpu} == {CUDA} and not any(tensor.is_cuda for tensor in on_cpu)
        assert network(there).dtype == torch.bfloat16 and network(there).softmax(0).dtype == torch.float32
    assert not torch.cuda.is_available() or torch.cuda.get_device_name() != "simulated"


def test_clustering_through_the_backbone_on_a_gpu(tmp_path):
    config = dataclasses.replace(TINY, finetune_epochs=1, self_label_epochs=1, self_label_threshold=0.5)
    with simulated_cuda():
        found = cluster_images(textures(), config, Job(make_accelerator(RunConfig(device="cuda")), tmp_path))
        assert found.backbone.scale.is_cuda and not found.labels.labels.is_cuda
    assert set(found.curves) == {"simclr", "scan", "scan-backbone", "self-label"}


def test_a_run_and_its_detector_on_a_gpu(tmp_path):
    config = tiny_config(
        device="cuda",
        diffusion=DiffusionConfig(size="tiny", steps=3, batch_size=8, min_snr_gamma=5.0),
        outliers=OutliersConfig(sampler="ddpm", guidance_weight=[1.0, 3.0], sampling_steps=2, sources=24, batch_size=10),
        detector=DetectorConfig(epochs=1, batch_size=24, ema_decay=0.9, layer_decay=0.8),
        compare=CompareConfig(["distance", "msp", "oe-noise", "mscl", "fake-it"], fake_it_steps=2),
    )
    with simulated_cuda() as gpu:
        assert set(run(config, tmp_path).values()) == {"ran"}
        assert gpu.calls > 5000
        images = Detector.load(tmp_path).load_images(str(tmp_path / "outliers" / "images")).images
        there, here = (Detector.load(tmp_path, device) for device in ("cuda", "cpu"))
        assert there.fitted.inside.is_cuda and not here.fitted.inside.is_cuda
        torch.testing.assert_close(there.score(images), here.score(images))
    assert read_json(tmp_path / "outliers" / "meta.json")["precision"] == "bf16"


def test_a_training_killed_on_a_gpu_goes_on_there(tmp_path):
    images, labels = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8), torch.arange(8) % 2
    config = DiffusionConfig(size="tiny", steps=27, batch_size=2)
    with simulated_cuda():
        job = Job(make_accelerator(RunConfig(device="cuda")), tmp_path, checkpoint_seconds=0.0)
        with pytest.raises(Killed):
            train_diffusion(images, labels, config, dataclasses.replace(job, accelerator=Dying(job.accelerator, 26)), classes=2)
        assert (tmp_path / "checkpoint.pt").exists()
        unet, history = train_diffusion(images, labels, config, job, classes=2)
        assert unet.device == CUDA and len(history["loss"]) == 27
