"""What processes must agree on; started by test_processes.py in two of them: two_processes.py FILE."""

from __future__ import annotations

import sys

import torch
from torch import nn

from sdood_plugin.__main__ import leave
from sdood_plugin.clustering.processes import extract_all, mine_neighbours, whole_batch
from sdood_plugin.clustering.simclr import nt_xent
from sdood_plugin.config import RunConfig
from sdood_plugin.training import make_accelerator, share


def find(accelerator) -> dict[str, torch.Tensor]:
    """Neighbours, features and the gradient of a loss over a whole batch; and how many processes there were."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(41, 6, generator=random)
    features[5:30:3] = features[2]  # copies
    images = torch.randint(256, (13, 3, 8, 8), generator=random, dtype=torch.uint8)
    flat, network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), nn.Linear(6, 5)
    for layer, scale in ((flat[1], 0.1), (network, 1.0)):
        with torch.no_grad():
            layer.weight.copy_(scale * torch.randn(layer.weight.shape, generator=random))
            layer.bias.zero_()
    wrapped = accelerator.prepare(network)
    rows = share(torch.arange(12), accelerator)
    views = [whole_batch(wrapped(features[rows] + offset), accelerator) for offset in (0.0, 0.5)]
    accelerator.backward(nt_xent(*views, 0.5) * accelerator.num_processes)
    return {
        "neighbours": mine_neighbours(features, 7, accelerator),
        "features": extract_all(flat, images, accelerator).clone(),
        "gradient": network.weight.grad,
        "processes": torch.tensor(accelerator.num_processes),
    }


if __name__ == "__main__":
    accelerator = make_accelerator(RunConfig(device="cpu"))
    found = find(accelerator)
    if accelerator.is_main_process:
        torch.save(found, sys.argv[1])
    leave(0)
