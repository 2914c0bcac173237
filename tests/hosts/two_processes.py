"""`train_sdood` in two processes on a CPU, and a process that fails, started by test_openood_checks.py.

The host's own launcher gives each process a GPU and asks for NCCL; a gloo group takes that place here, and everything after
the launcher is the pipeline's own: the host's loaders, their shares, its recorder and `comm`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def fail(rank: int) -> None:
    """What a process of a run that goes wrong does."""
    from sdood_plugin.errors import RunError

    raise RunError("loss", "nan: at once", "a number", "lower optimizer.lr")


def train(rank: int, folder: str, arguments: list[str]) -> None:
    """One of the two; leaves its weights and the images it trained on in the last epoch in `folder`."""
    from sdood_plugin.artifacts import write_tensors
    from sdood_plugin.hosts.openood import pipeline
    from sdood_plugin.hosts.openood.__main__ import read_config
    from sdood_plugin.hosts.openood.compat import host_settings
    from sdood_plugin.hosts.openood.device import on_device

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", world_size=2, rank=rank)
    pipeline.comm._LOCAL_PROCESS_GROUP = dist.new_group([0, 1])
    made: list[Any] = []

    class Kept(pipeline.SDOODTrainer):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    pipeline.SDOODTrainer = Kept  # type: ignore[misc]
    with host_settings(), on_device("cpu"):
        pipeline.TrainSDOOD(read_config(arguments)).run()
    trainer = made[0]
    assert isinstance(trainer.net, torch.nn.parallel.DistributedDataParallel)
    share = torch.tensor(sorted(trainer.train_loader.sampler))
    write_tensors(Path(folder) / f"{rank}.safetensors", {**dict(trainer.net.module.named_parameters()), "share": share})
    dist.destroy_process_group()
