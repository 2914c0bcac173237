"""Which parts of OpenOOD can be imported here, and what to type where they cannot."""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from ...errors import UsageError
from .compat import importing_host

VARIABLE = "OPENOOD_ROOT"
REPOSITORY = "https://github.com/Jingkang50/OpenOOD"
PACKAGES = {  # what `import openood.evaluation_api` and the training pipelines import, by name: what pip calls it
    "cv2": "opencv-python-headless",
    "diffdist": "diffdist",
    "faiss": "faiss-cpu",
    "foolbox": "foolbox",
    "gdown": "gdown",
    "imgaug": "imgaug",
    "libmr": "libmr",
    "pandas": "pandas",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "statsmodels": "statsmodels",
    "timm": "timm",
    "torchvision": "torchvision",
    "yaml": "PyYAML",
}
UNDECLARED = ("foolbox", "libmr", "statsmodels", "timm")  # the host imports these and its setup.py does not name them
PARTS = ("evaluation_api", "networks", "postprocessors", "datasets", "trainers", "evaluators", "recorders", "pipelines", "utils")


def absent_packages() -> list[str]:
    """Import names of the packages the host needs and does not find."""
    return [name for name in PACKAGES if find_spec(name) is None]


def pip_line(absent: list[str]) -> str:
    """The command that gets them; libmr has no wheel and its build needs numpy and Cython at hand."""
    wheels = [PACKAGES[name] for name in absent if name != "libmr"]
    steps = [f"pip install {' '.join(wheels)}"] if wheels else []
    if "libmr" in absent:
        steps += ["pip install Cython setuptools wheel", "pip install --no-build-isolation libmr"]
    return " && ".join(steps)


def _put_on_path() -> None:
    """Append the checkout that OPENOOD_ROOT names, so that loader processes find it too; its `tests` and `scripts` come last."""
    root = os.environ.get(VARIABLE)
    if root and (Path(root) / "openood").is_dir() and root not in sys.path:
        sys.path.append(root)


def diagnosis() -> str | None:
    """Why the host cannot be imported and what to do, as one line; None where it can."""
    _put_on_path()
    root = os.environ.get(VARIABLE)
    if root and not (Path(root) / "openood" / "__init__.py").is_file():
        return f"{VARIABLE} is {root}, which holds no openood package; set it to a checkout of {REPOSITORY}"
    if find_spec("openood") is None:
        absent = absent_packages()
        more = f", and the packages it needs: {pip_line(absent)}" if absent else ""
        return (
            f"openood is not installed and {VARIABLE} is not set; git clone {REPOSITORY} and set {VARIABLE} to the checkout "
            f"(or pip install git+{REPOSITORY}){more}"
        )
    absent = absent_packages()
    if absent:
        return f"openood is there, but not {', '.join(absent)}; {pip_line(absent)}"
    return None


@lru_cache(maxsize=1)
def _import_all() -> ModuleType:
    with importing_host():
        for part in PARTS:
            import_module(f"openood.{part}")
    return import_module("openood")


def require_host() -> ModuleType:
    """The host's package with all parts imported.

    Raises:
        UsageError: It cannot be imported; the message is `doctor`'s.
    """
    text = diagnosis()
    if text is not None:
        raise UsageError("OpenOOD", "no importable host", "OpenOOD and the packages it imports", text)
    try:
        return _import_all()
    except Exception as error:  # a torchvision or numpy of another build raises RuntimeError or ValueError
        raise UsageError("OpenOOD", _said(error), "an importable host", "see `sdood doctor`") from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def doctor() -> str:
    """What of the host is importable, what is missing and the line that gets it."""
    text = diagnosis()
    lines = []
    for name in PACKAGES:
        note = "   (needed by the host, not declared by it)" if name in UNDECLARED else ""
        lines.append(f"{name:12s} {'found' if find_spec(name) else 'MISSING'}{note}")
    if text is None:
        for part in PARTS:
            try:
                with importing_host():
                    import_module(f"openood.{part}")
                lines.append(f"openood.{part:15s} imports")
            except Exception as error:  # noqa: BLE001 - whatever a host's module raises at import is the finding
                lines.append(f"openood.{part:15s} FAILS: {_said(error)}")
                text = text or f"openood.{part} does not import: {_said(error)}"
        lines.append(f"openood is {Path(str(find_spec('openood').origin)).parent}")  # type: ignore[union-attr]
    return "\n".join([f"OpenOOD: {text or 'can be used'}", *lines])
