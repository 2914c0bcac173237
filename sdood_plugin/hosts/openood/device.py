"""OpenOOD on any device: its hard-coded `.cuda()` goes where it is told while a block runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def _is_cuda(value: Any) -> bool:
    return (isinstance(value, str) and value.split(":")[0] == "cuda") or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


class _Redirect(TorchFunctionMode):
    """Within it `tensor.cuda()`, `module.cuda()` and `device='cuda'` mean one given device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.cuda:
            return args[0].to(self.device)
        kwargs = {name: self.device if _is_cuda(value) else value for name, value in (kwargs or {}).items()}
        return function(*(self.device if _is_cuda(value) else value for value in args), **kwargs)


class _FloatTensor:
    """`torch.cuda.FloatTensor(values)`, a constructor that exists only where CUDA does."""

    device = torch.device("cpu")

    def __new__(cls, values: Any) -> torch.Tensor:  # type: ignore[misc]
        return torch.tensor(values, dtype=torch.float32, device=cls.device)


def _faiss_as_the_host_knows_it() -> dict[str, Any]:
    """What the host's UDG trainer calls in faiss: GPU classes that a CPU build lacks, and a keyword newer builds lost."""
    import faiss

    pca = faiss.PCAMatrix
    changed: dict[str, Any] = {"PCAMatrix": lambda width, kept, eigen_power=0.0: pca(width, kept, eigen_power)}
    if not hasattr(faiss, "StandardGpuResources"):
        changed["StandardGpuResources"] = lambda: None
        changed["GpuIndexFlatConfig"] = lambda: type("Config", (), {})()
        changed["GpuIndexFlatL2"] = lambda resources, width, config: faiss.IndexFlatL2(width)
    return changed


@contextlib.contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Attributes of `owner` with other values while the block runs; those it did not have are removed again."""
    nothing = object()
    before = {name: vars(owner).get(name, nothing) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is nothing:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


@contextlib.contextmanager
def on_device(device: torch.device | str) -> Iterator[None]:
    """Run the host's code on `device`; on a GPU its own `.cuda()` is left as it is and only the GPU is chosen.

    Elsewhere `Tensor.cuda`, `Module.cuda` and `device='cuda'` give that device for this thread, and what only a CUDA
    build of torch or faiss has gets a stand-in; all of it ends with the block.
    """
    import faiss

    device = torch.device(device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(faiss, **_faiss_as_the_host_knows_it()))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        else:
            stack.enter_context(replaced(torch.cuda, FloatTensor=type("FloatTensor", (_FloatTensor,), {"device": device})))
            stack.enter_context(_Redirect(device))
        yield
