"""What the tests of the pytorch-ood plug-ins share: one tiny finished run, and features that are easy to tell apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdood_plugin.run import run

from ..test_run import tiny_config

_made: dict[str, Path] = {}


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """A run of the whole pipeline on the embedded data, made once for all files that import this."""
    if "run" not in _made:
        _made["run"] = tmp_path_factory.mktemp("pytorch-ood") / "run"
        run(tiny_config(), _made["run"], only="evaluate")
    return _made["run"]


def blobs(inside: int = 120, outliers: int = 40, width: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and targets: ID around two centres, outliers (target -1) around a third that is near to them."""
    centres = 0.75 * torch.randn(3, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(inside) % 2
    means = torch.cat([centres[labels], centres[2].expand(outliers, width)])
    x = means + torch.randn(means.shape, generator=generator)
    return x, torch.cat([labels, torch.full((outliers,), -1)])
