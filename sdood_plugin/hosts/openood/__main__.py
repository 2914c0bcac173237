"""`python -m sdood_plugin.hosts.openood --config a.yml b.yml --a.b value`: the command line of OpenOOD's main.py.

It runs `train_sdood` and the host's own pipelines, which here know the network and the postprocessor `sdood` and run
without a GPU under `--num_gpus 0`. Several processes need several GPUs: the host's launcher asks for CUDA and NCCL.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch

from ...errors import SdoodError, UsageError


def read_config(arguments: Sequence[str]) -> Any:
    """The host's config of a command line.

    Raises:
        UsageError: A file or a key that is not there.
    """
    from .device import replaced
    from .host import require_host

    require_host()
    from openood.utils import setup_config

    try:
        with replaced(sys, argv=["sdood_plugin.hosts.openood", *arguments]):
            config = setup_config()
    except KeyError as error:
        raise UsageError(
            "command line or YAML",
            f"{error} ",
            "a key that the YAML files set",
            "check the spelling, or give the file that has it",
        ) from error
    except AssertionError as error:
        raise UsageError("command line", error, "--config FILES and then --key value pairs", "see the host's main.py") from error
    except OSError as error:
        raise UsageError(f"config {error.filename}", error.strerror, "a YAML file", "check the path") from error
    missing = [key for key in ("pipeline", "dataset", "network") if not config.get(key)]
    if missing:
        raise UsageError("config", f"no section {missing[0]}", "pipeline, dataset and network", "give the file that has it")
    config.num_gpus, config.num_machines = config.num_gpus or 0, config.num_machines or 1
    return config


def check_devices(gpus: int) -> None:
    """The host starts one process a GPU and knows no CPU process group (its launcher asks for CUDA and NCCL).

    Raises:
        UsageError: There are fewer CUDA devices.
    """
    found = torch.cuda.device_count()
    if gpus > found:
        raise UsageError("num_gpus", gpus, f"at most {found}, the CUDA devices here", f"add --num_gpus {found}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 for a failure or 2 for wrong usage."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        config = read_config(list(sys.argv[1:] if arguments is None else arguments))
        from openood.utils import launch

        from .pipeline import check_config, run_pipeline

        check_devices(config.num_gpus)
        if config.num_gpus > 1:
            check_config(config)  # here too, because what a process of the host's launcher raises ends in a traceback
        launch(
            run_pipeline,
            config.num_gpus,
            num_machines=config.num_machines,
            machine_rank=config.machine_rank or 0,
            dist_url="auto",
            args=(config,),
        )
    except SdoodError as error:
        print(f"sdood: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
