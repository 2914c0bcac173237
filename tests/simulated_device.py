"""A CUDA device played by the CPU: where tensors live is kept track of and held to torch's rules, the numbers are the CPU's.

The storage of a tensor that was put "on the GPU" carries a mark. A function mode sees every call in this thread, refuses what
CUDA refuses (operands or generators of two devices, `.numpy()`, CUDA indices into a CPU tensor, integer matrix products) and
marks what comes out. It knows nothing of kernels, streams, memory or other threads; what `torch.compile` is given it gives back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
_MOVES = {"to", "cpu", "cuda", "type_as"}
_BETWEEN_DEVICES = {"copy_", "_foreach_copy_", "__set__", "tensor", "as_tensor", "_has_compatible_shallow_copy_type"}
_NO_CPU_SCALARS = {"stack", "cat", "quantile", "nanquantile", "matmul", "mm", "einsum", "linear", "equal", "index_add_"}
_PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "linear", "dot", "mv"}
_FLOAT32 = {  # what autocast computes in float32 on CUDA and not on a CPU
    *("pow", "__pow__", "exp", "log", "log_softmax", "softmax", "norm", "cosine_similarity", "mse_loss", "cross_entropy"),
    *("layer_norm", "group_norm", "sum", "prod", "cumsum", "reciprocal", "rsqrt", "nll_loss", "normalize", "cdist"),
}


class Generator(torch.Generator):
    """A generator that says which device it was made for; its numbers are the CPU's."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, "cpu")

    def __init__(self, device: Any = "cpu") -> None:
        self.place = _device(device)

    @property
    def device(self) -> torch.device:
        return self.place


def _device(said: Any) -> torch.device:
    device = torch.device("cuda", said) if isinstance(said, int) else torch.device(said)
    return CUDA if device.type == "cuda" else device


def _where(tensor: torch.Tensor) -> torch.device:
    marked = tensor.layout == torch.strided and hasattr(tensor.untyped_storage(), "on_gpu")
    return CUDA if marked else tensor.device


def _on_gpu(tensor: torch.Tensor) -> bool:
    return _where(tensor) == CUDA


def _mark(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().on_gpu = True  # type: ignore[attr-defined]
    return tensor


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _share_storage(tensor: torch.Tensor, others: list[torch.Tensor]) -> bool:
    return any(tensor.untyped_storage()._cdata == other.untyped_storage()._cdata for other in others)


def _placed(tensor: torch.Tensor, place: torch.device, given: list[torch.Tensor]) -> torch.Tensor:
    """What was computed of `given`, there; a copy where it is one of them and was elsewhere."""
    if not isinstance(tensor, torch.Tensor) or _where(tensor) == place:
        return tensor
    tensor = tensor.clone() if _share_storage(tensor, given) else tensor
    return _mark(tensor) if place == CUDA else tensor


def _check_operands(name: str, args: Any, kwargs: Any) -> None:
    """All on one device; CPU scalars go with anything where the operation is elementwise, CPU indices into anything."""
    if name in ("__getitem__", "__setitem__"):
        indices = [index for index in _tensors(args[1]) if index.dim()]
        if not _on_gpu(args[0]) and any(map(_on_gpu, indices)):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        args = (args[0], *(args[2:] if indices else ()))  # a slice takes values from anywhere
    found = [tensor for tensor in _tensors((args, kwargs)) if not tensor.is_meta]
    if any(map(_on_gpu, found)):
        if any(not _on_gpu(tensor) and (tensor.dim() or name in _NO_CPU_SCALARS) for tensor in found):
            shapes = ", ".join(f"{_where(tensor)} {tuple(tensor.shape)}" for tensor in found)
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got {shapes}")
        if name in _PRODUCTS and not any(tensor.is_floating_point() for tensor in found):
            raise RuntimeError(f"{name} is not implemented on CUDA for {found[0].dtype}")


def _check_generators(name: str, values: Any, place: torch.device) -> None:
    for leaf in tree_leaves(values):
        if isinstance(leaf, torch._C.Generator) and leaf.device.type != place.type:
            raise RuntimeError(f"{name}: expected a '{place.type}' device type for generator but found '{leaf.device.type}'")


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value


class SimulatedDevice(TorchFunctionMode):
    """Sees every call of torch's Python interface in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0  # that had to do with the GPU

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.__name__, dict(kwargs or {})
        if name == "__get__":
            return self._attribute(func, args[0])
        if name == "pin_memory":
            return args[0]
        if name in _MOVES:
            return self._moved(func, name, args, kwargs)
        return self._computed(func, name, args, kwargs)

    def _computed(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name not in _BETWEEN_DEVICES:
            _check_operands(name, args, kwargs)
        sources = args[:1] if name == "copy_" else (args, kwargs)
        if name in ("tensor", "as_tensor") and not isinstance(args[0], torch.Tensor):
            sources = ()  # values are taken out of a list, wherever they lie
        asked = kwargs.get("device")
        place = CUDA if any(map(_on_gpu, _tensors(sources))) else CPU
        place = place if asked is None else _device(asked)
        _check_generators(name, (args, kwargs), place)
        self.calls += place == CUDA
        if asked is not None and place == CUDA:
            kwargs["device"] = CPU
        if place == CUDA and name in _FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_wide, (args, kwargs))
        given = _tensors((args, kwargs))
        result = func(*args, **kwargs)
        if asked is not None:
            return _placed(result, place, given)
        for tensor in _tensors(result) if place == CUDA else ():
            if not _share_storage(tensor, given):
                _mark(tensor)
        return result

    @staticmethod
    def _attribute(func: Any, tensor: torch.Tensor) -> Any:
        name, value = func.__self__.__name__, func(tensor)
        if not _on_gpu(tensor):
            return value
        if name in ("is_cuda", "is_cpu"):
            return name == "is_cuda"
        return CUDA if name == "device" else _mark(value) if isinstance(value, torch.Tensor) else value

    @staticmethod
    def _moved(func: Any, name: str, args: Any, kwargs: Any) -> Any:
        tensor, *rest = args
        place = {"cpu": CPU, "cuda": CUDA}.get(name, _where(tensor))
        target = rest[0] if rest else kwargs.get("device", kwargs.get("other"))
        if isinstance(target, torch.Tensor):
            place = _where(target)
        elif name == "to" and isinstance(target, (str, torch.device, int)):
            place = _device(target)
            real = CPU if place == CUDA else place
            rest, kwargs = ([real, *rest[1:]], kwargs) if rest else ([], {**kwargs, "device": real})
        made = tensor if name in ("cpu", "cuda") else func(tensor, *rest, **kwargs)
        return _placed(made, place, [tensor])


def _numpy(original: Callable[..., Any]) -> Callable[..., Any]:
    def numpy(self: torch.Tensor, **rest: Any) -> Any:  # a method, so that other threads meet it, too
        if _on_gpu(self):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to host memory first.")
        return original(self, **rest)

    return numpy


def _autocast(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: Any, device_type: str, dtype: Any = None, enabled: bool = True, **rest: Any) -> None:
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype or torch.float16
        original(self, device_type, dtype, enabled, **rest)

    return __init__


@contextmanager
def simulated_cuda() -> Iterator[SimulatedDevice]:
    """Within it torch has one CUDA device; tensors that were put there are of no use outside."""
    import torch._dynamo  # noqa: F401 - it must not see what is put in place of torch's functions
    from accelerate.state import AcceleratorState, PartialState

    def nothing(*_args: Any, **_kwargs: Any) -> None:
        return None

    name, total = "simulated", 139 << 30
    answers: dict[str, Any] = {
        **dict.fromkeys(("is_available", "is_bf16_supported"), lambda *_args, **_kwargs: True),
        **dict.fromkeys(("synchronize", "set_device", "empty_cache", "set_rng_state"), nothing),
        **{"device_count": lambda: 1, "current_device": lambda: 0, "device": lambda *_args: nullcontext()},
        **{"mem_get_info": lambda *_args: (total, total), "get_device_name": lambda *_args: name},
        **{"get_rng_state": lambda *_args: torch.get_rng_state(), "is_current_stream_capturing": lambda: False},
    }
    stream, device = SimpleNamespace(is_capturing=lambda: False), SimulatedDevice()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **answers))
        stack.enter_context(mock.patch.object(torch.accelerator, "current_stream", lambda *_args: stream))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(torch, "compile", lambda module, **_kwargs: module))
        stack.enter_context(mock.patch.object(torch.Tensor, "numpy", _numpy(torch.Tensor.numpy)))
        stack.enter_context(mock.patch.object(torch.autocast, "__init__", _autocast(torch.autocast.__init__)))
        for state in (AcceleratorState, PartialState):
            stack.callback(state._shared_state.update, dict(state._shared_state))  # of those who made theirs before
            state._reset_state()
            stack.callback(state._reset_state)
        yield stack.enter_context(device)
