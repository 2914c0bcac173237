"""The command line in two processes; started by test_run.py in each of them: two_processes.py ARGUMENT ..."""

from __future__ import annotations

import sys

import torch

from sdood_plugin import cli
from sdood_plugin.config import RunConfig
from sdood_plugin.training import make_accelerator

if __name__ == "__main__":
    assert make_accelerator(RunConfig(device="cpu")).num_processes == 2
    code = cli.main(sys.argv[1:])
    torch.distributed.destroy_process_group()
    sys.exit(code)
