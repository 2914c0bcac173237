"""`python -m sdood_plugin` is `sdood`, also as one of several processes of a launcher."""

import os
import sys
from contextlib import suppress
from typing import NoReturn

from .cli import main


def leave(code: int) -> NoReturn:
    """Exit with a code; one of several processes does so after the others' last words and without Python's own end.

    Threads of gloo's outlive their process group, and what they still hold of Python aborts a process that is ending
    (https://github.com/pytorch/pytorch/pull/179291).
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        sys.exit(code)
    if code == 0:
        distributed.barrier()
        distributed.destroy_process_group()
    with suppress(OSError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def start() -> NoReturn:
    """What the command `sdood` is."""
    leave(main())


if __name__ == "__main__":
    start()
