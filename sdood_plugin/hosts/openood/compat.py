"""What OpenOOD needs of an older numpy, restored while it is imported and taken away again.

`imgaug`, which the host imports for one anomaly-detection preprocessor, reads `numpy.sctypes` at import and never
later; numpy 2.0 removed it. Importing the host also adds warning filters and tells Pillow to accept truncated images
for the whole process; both are put back. Pillow's switch is on again only while the host itself runs (`host_settings`),
so that the host reads exactly the images it reads on its own. `numpy.bool`, which imgaug uses too, is numpy 2's own.

What stays after an import is what the host's dependencies need later: environment variables, as LD_LIBRARY_PATH and
QT_QPA_PLATFORM_PLUGIN_PATH and QT_QPA_FONTDIR of cv2, which started processes inherit, and OPENOOD_ROOT at the end of `sys.path`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import numpy as np


@contextlib.contextmanager
def restored_numpy() -> Iterator[None]:
    """`numpy.sctypes` as numpy 1 had it, while the block runs; nothing changes where numpy still has it."""
    if "sctypes" in vars(np) or np.lib.NumpyVersion(np.__version__) < "2.0.0":
        yield
        return
    np.sctypes = {  # type: ignore[attr-defined]
        "int": [np.int8, np.int16, np.int32, np.int64],
        "uint": [np.uint8, np.uint16, np.uint32, np.uint64],
        "float": [np.float16, np.float32, np.float64],
        "complex": [np.complex64, np.complex128],
        "others": [bool, object, bytes, str, np.void],
    }
    try:
        yield
    finally:
        del np.sctypes  # type: ignore[attr-defined]


@contextlib.contextmanager
def importing_host() -> Iterator[None]:
    """Everything an import of the host needs; afterwards numpy, warning filters and Pillow are as before."""
    from PIL import ImageFile

    truncated = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        with restored_numpy(), warnings.catch_warnings():
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = truncated


@contextlib.contextmanager
def host_settings() -> Iterator[None]:
    """The process-wide settings the host works with, while it works: truncated images, its own print options."""
    from PIL import ImageFile

    truncated = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        with np.printoptions():
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = truncated
