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
from torch.multiprocessing import ProcessRaisedException

from ... import errors
from ...errors import SdoodError, UsageError


def read_config(arguments: Sequence[str]) -> Any:
    """The host's config of a command line.

    Raises:
        UsageError: A file or a key that is not there, or a value that does not fit its key.
    """
    from .device import replaced
    from .host import require_host

    require_host()
    from openood.utils import setup_config

    try:
        with replaced(sys, argv=["sdood_plugin.hosts.openood", *arguments]):
            config = setup_config()
    except Exception as error:  # the host has no exceptions of its own
        raise _misread(arguments, error) from error
    missing = [key for key in ("pipeline", "dataset", "network") if not config.get(key)]
    if missing:
        raise UsageError("config", f"no section {missing[0]}", "pipeline, dataset and network", "give the file that has it")
    config.num_gpus, config.num_machines = config.num_gpus or 0, config.num_machines or 1
    return config


def _misread(arguments: Sequence[str], error: Exception) -> UsageError:
    """What the host's reading of YAMLs and command line stumbled over."""
    if isinstance(error, OSError):
        return UsageError(f"config {error.filename}", error.strerror, "a YAML file", "check the path")
    if isinstance(error, AssertionError):
        return UsageError("command line", error, "--config FILES and then --key value pairs", "see the host's main.py")
    if isinstance(error, KeyError) and error.args[0] in {word.partition("=")[2] or word for word in arguments}:
        return UsageError("command line", error, "True or False, as in the YAML", "mend that value")
    if isinstance(error, KeyError):
        expected, remedy = "a key that the YAML files set", "check the spelling, or give the file that has it"
        return UsageError("command line or YAML", f"{error} ", expected, remedy)
    return UsageError(
        "command line or YAML",
        f"{type(error).__name__}: {error}",
        "YAML files named *.yml, and values of the type they have there",
        "mend it; a key that is null in the YAML takes its type after a colon, as 3:int",
    )


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

        from .checks import check_config
        from .pipeline import run_pipeline

        check_devices(config.num_gpus)
        if config.num_gpus > 1:
            check_config(config)  # here too, before processes are started
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
    except ProcessRaisedException as error:  # its text is the process's traceback
        name, _, text = str(error).rstrip().splitlines()[-1].partition(": ")
        kind = getattr(errors, name.removeprefix(f"{errors.__name__}."), None)
        if kind is None:
            raise
        print(f"sdood: error: {text}", file=sys.stderr)
        return kind.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
