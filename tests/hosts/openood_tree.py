"""What the OpenOOD tests share: the real host, a small data tree in its layout, a run on it and its network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdood_plugin.config import (
    ClusteringConfig,
    DataConfig,
    DetectorConfig,
    DiffusionConfig,
    ImagesConfig,
    OODConfig,
    OutliersConfig,
    RunConfig,
)

REPOSITORY = Path(__file__).resolve().parents[2]
COUNTS = {"test_cifar10": 60, "val_cifar10": 40, "test_cifar100": 40, "test_tin": 40, "val_tin": 40}
TRAIN_IMAGES = 240


@pytest.fixture(scope="session")
def host():
    """The real OpenOOD; absent, the tests that need it skip and say why."""
    if not os.environ.get("OPENOOD_ROOT"):
        pytest.skip("OPENOOD_ROOT is not set: no OpenOOD checkout to test against")
    from sdood_plugin.hosts.openood.host import diagnosis, require_host

    reason = diagnosis()
    if reason:
        pytest.skip(f"OpenOOD cannot be imported: {reason}")
    return require_host()


@pytest.fixture(scope="session")
def configs(host) -> Path:
    """The host's own YAMLs."""
    return Path(os.environ["OPENOOD_ROOT"]) / "configs"


@pytest.fixture(scope="session")
def tree(host, tmp_path_factory) -> Path:
    """CIFAR-10 test, CIFAR-100 and Tiny-ImageNet in the host's layout, lists shortened; training images are other test images."""
    data = Path(os.environ.get("SDOOD_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (data / "load.py").is_file():
        pytest.skip(f"no image data at {data}: set SDOOD_DATA")
    root = tmp_path_factory.mktemp("openood")
    subprocess.run(
        [sys.executable, "load.py", "export", str(root), "cifar10_test", "cifar100_test", "tin_val"],
        cwd=data,
        check=True,
        capture_output=True,
    )
    lists = root / "benchmark_imglist" / "cifar10"
    whole = (lists / "test_cifar10.txt").read_text().splitlines(keepends=True)
    for name, count in COUNTS.items():
        lines = (lists / f"{name}.txt").read_text().splitlines(keepends=True)
        (lists / f"{name}.txt").write_text("".join(lines[row * len(lines) // count] for row in range(count)))
    train = [whole[row * len(whole) // TRAIN_IMAGES + 7] for row in range(TRAIN_IMAGES)]
    assert not {*train} & {*(lists / "test_cifar10.txt").read_text().splitlines(keepends=True)}
    (lists / "train_cifar10.txt").write_text("".join(train))
    return root


def run_settings(tree: Path) -> RunConfig:
    """A whole run on 160 images that takes seconds: the point is its files, not its quality."""

    def listed(name: str, limit: int) -> ImagesConfig:
        return ImagesConfig(
            str(tree / "benchmark_imglist" / "cifar10" / f"{name}.txt"), root=str(tree / "images_classic"), limit=limit
        )

    data = DataConfig(
        train=listed("train_cifar10", 160),
        test=listed("test_cifar10", 20),
        heldout_fraction=0.2,
        ood=[OODConfig("cifar100", "near", listed("test_cifar100", 20)), OODConfig("tin", "far", listed("test_tin", 20))],
    )
    return RunConfig(
        device="cpu",
        report=False,
        data=data,
        clustering=ClusteringConfig(method="given"),
        diffusion=DiffusionConfig(size="tiny", steps=2, batch_size=8, timesteps=50),
        outliers=OutliersConfig(sampling_steps=1, batch_size=32),
        detector=DetectorConfig(epochs=2, batch_size=32),
    )


@pytest.fixture(scope="session")
def run_folder(tree, tmp_path_factory) -> Path:
    """A finished run on CIFAR-10 images of the tree."""
    from sdood_plugin.run import run

    folder = tmp_path_factory.mktemp("runs") / "cifar"
    run(run_settings(tree), folder, "calibrate")
    return folder


@pytest.fixture(scope="session")
def net(run_folder):
    """The run's network for loaders normalised as the host does for CIFAR-10."""
    from sdood_plugin.hosts.openood import load_detector

    return load_detector(run_folder, "cifar10")


@pytest.fixture(scope="session")
def loaders(net, tree):
    """The host's own loaders of the tree, as its evaluator makes them."""
    from sdood_plugin.hosts.openood import Evaluator, SDOODPostprocessor

    return Evaluator(net, "cifar10", postprocessor=SDOODPostprocessor(), **common(tree)).dataloader_dict


def common(tree: Path) -> dict:
    """Evaluator arguments all tests use."""
    return {"data_root": str(tree), "batch_size": 50, "num_workers": 0, "skip_absent": True}


def all_images(loader) -> torch.Tensor:
    """A loader's images as the host hands them to a network."""
    return torch.cat([batch["data"] for batch in loader])
