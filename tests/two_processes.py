"""The command line in two processes; started by test_run.py in each of them: two_processes.py ARGUMENT ..."""

from __future__ import annotations

import sys

from sdood_plugin import cli
from sdood_plugin.__main__ import leave
from sdood_plugin.config import RunConfig
from sdood_plugin.training import make_accelerator

if __name__ == "__main__":
    assert make_accelerator(RunConfig(device="cpu")).num_processes == 2
    leave(cli.main(sys.argv[1:]))
