"""One loop for every training: progress with ETA, checkpoints, exact resume, an error on a loss that is not finite."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from .artifacts import atomic_path
from .config import RunConfig
from .errors import RunError, UsageError
from .progress import progress_bar
from .randomness import step_generator

if TYPE_CHECKING:
    from accelerate import Accelerator


Module = TypeVar("Module", bound=torch.nn.Module)


class Stateful(Protocol):
    """Anything a checkpoint can hold: modules, optimisers, schedules, averages."""

    def state_dict(self) -> Mapping[str, Any]:
        """The state as plain values and tensors."""

    def load_state_dict(self, state: Any) -> Any:
        """Take a state of `state_dict`."""


@dataclass(frozen=True)
class Job:
    """What every training is given besides its data and settings.

    Args:
        accelerator: Device, precision and processes.
        folder: Where checkpoints go.
        seed: Seed of this training.
        key: What the training depends on; a checkpoint of another key is not resumed.
        checkpoint_seconds: How often to write a checkpoint; the default is never.
    """

    accelerator: Accelerator
    folder: Path
    seed: int = 0
    key: str = ""
    checkpoint_seconds: float = math.inf

    @property
    def device(self) -> torch.device:
        """The accelerator's device."""
        return self.accelerator.device

    def generator(self, name: str, step: int) -> torch.Generator:
        """The generator on the device of one step's random numbers of a name."""
        return step_generator(self.seed, name, step, self.device)


def resolve_precision(precision: str, on_gpu: bool) -> str:
    """`float32` or `bf16`, which `auto` is on a GPU."""
    return ("bf16" if on_gpu else "float32") if precision == "auto" else precision


def make_accelerator(config: RunConfig) -> Accelerator:
    """The device, precision and processes of a run.

    Raises:
        UsageError: `device: cuda` on a machine without one.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device", "cuda", "a CUDA device", "use --device cpu or auto")
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    bf16 = resolve_precision(config.precision, on_gpu) == "bf16"
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # heads a loss leaves out get no gradient
    return Accelerator(cpu=not on_gpu, mixed_precision="bf16" if bf16 else "no", kwargs_handlers=[unused])


def unet_format(device: torch.device) -> torch.memory_format:
    """The layout a U-Net is fastest in: channels last on a GPU, contiguous on a CPU; backbones want channels last on both."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def place(module: Module, device: torch.device, layout: torch.memory_format = torch.channels_last) -> Module:
    """The module on the device, in a layout."""
    return module.to(device).to(memory_format=layout)  # type: ignore[call-overload]


def share(indices: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """This process's part of a batch that every process drew alike: the same images train whatever their number."""
    return indices[accelerator.process_index :: accelerator.num_processes]


def initialised(make: Callable[[], Module], seed: int) -> Module:
    """What `make` builds on the CPU with its random weights drawn from `seed`; global generators are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed reseeds the GPUs, too
        return make()


def warmup_cosine(
    optimizer: torch.optim.Optimizer, steps: int, warmup_fraction: float = 0.05
) -> torch.optim.lr_scheduler.LambdaLR:
    """Each group's learning rate: linear over the first share of the steps, then a half cosine to 0."""
    warm = max(1, int(warmup_fraction * steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Descent:
    """One optimiser step after the other: backward, optimiser, schedule; and the module as the accelerator wants it called.

    Args:
        module: What is trained, on the accelerator's device.
        optimizer: Of its parameters.
        steps: How many there will be.
        accelerator: Device, precision and processes.
        warmup_fraction: Share of the steps over which the learning rate rises.
        gradient_clip: Largest norm of the whole gradient; None leaves it.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int,
        accelerator: Accelerator,
        *,
        warmup_fraction: float = 0.05,
        gradient_clip: float | None = None,
    ) -> None:
        self._module, self._optimizer, self._accelerator, self._clip = module, optimizer, accelerator, gradient_clip
        self._schedule = warmup_cosine(optimizer, steps, warmup_fraction)
        self.wrapped = accelerator.prepare(module)

    def __call__(self, loss: torch.Tensor) -> None:
        """Follow the gradient of a scalar loss."""
        self._optimizer.zero_grad(set_to_none=True)
        self._accelerator.backward(loss)
        if self._clip is not None:
            self._accelerator.clip_grad_norm_(self._module.parameters(), self._clip)
        self._optimizer.step()
        self._schedule.step()

    @property
    def state(self) -> dict[str, Stateful]:
        """What a checkpoint must hold of it."""
        return {"module": self._module, "optimizer": self._optimizer, "schedule": self._schedule}


def train_steps(
    step: Callable[[int], Mapping[str, torch.Tensor]],  # does one optimiser step, returns scalar losses, `loss` among them
    steps: int,
    state: Mapping[str, Stateful],  # what a checkpoint must hold
    job: Job,
    *,
    name: str,
    checkpoint: str = "checkpoint.pt",
) -> dict[str, list[float]]:
    """Run `step` for 0 .. steps - 1, resuming from the job's checkpoint of that file name where there is one.

    A checkpoint is written after steps whose losses were looked at: each on a CPU, every 25th on a GPU.

    Returns:
        The losses by name, one value a step, the mean over processes.

    Raises:
        RunError: A loss is NaN or infinite in any process, which stops all of them; the step is named.
    """
    path = job.folder / checkpoint
    first, history = _resume(path, job.key, state)
    recent: list[dict[str, torch.Tensor]] = []
    check_every = 1 if job.device.type == "cpu" else 25
    saved = time.monotonic()

    def flush(done: int) -> None:
        for offset, losses in enumerate(_over_processes(recent, job.accelerator)):
            for loss_name, value in losses.items():
                number = float(value)
                if not math.isfinite(number):
                    raise RunError(
                        f"{name} {loss_name} at step {done - len(recent) + offset}",
                        number,
                        "a finite number",
                        "lower the learning rate or look for broken images; the last checkpoint is kept",
                    )
                history.setdefault(loss_name, []).append(number)
        recent.clear()

    with progress_bar(name, steps, "step", done=first) as bar:
        for index in range(first, steps):
            recent.append({loss_name: value.detach() for loss_name, value in step(index).items()})
            if len(recent) >= check_every or index + 1 == steps:
                flush(index + 1)
                bar.set_postfix(loss=f"{history['loss'][-1]:.4f}", refresh=False)
            bar.update()
            if not recent and time.monotonic() - saved >= job.checkpoint_seconds and index + 1 < steps:
                if job.accelerator.is_main_process:
                    _save(path, job.key, index + 1, history, state)
                saved = time.monotonic()
    return history


def _over_processes(losses: list[dict[str, torch.Tensor]], accelerator: Accelerator) -> list[dict[str, torch.Tensor]]:
    """The losses of steps, scalars by name, as their means over the processes: together these hold the whole batch."""
    if accelerator.num_processes == 1:
        return losses
    values = torch.stack([torch.stack([value.to(accelerator.device).float() for value in step.values()]) for step in losses])
    means = accelerator.reduce(values, reduction="mean").cpu()
    return [dict(zip(step, row, strict=True)) for step, row in zip(losses, means, strict=True)]


def _save(path: Path, key: str, step: int, history: dict[str, list[float]], state: Mapping[str, Stateful]) -> None:
    content = {"key": key, "step": step, "history": history, "state": {name: item.state_dict() for name, item in state.items()}}
    with atomic_path(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # how a full disk shows here
            raise OSError(str(error)) from error


def _resume(path: Path, key: str, state: Mapping[str, Stateful]) -> tuple[int, dict[str, list[float]]]:
    if not path.exists():
        return 0, {}
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, UnpicklingError) as error:
        said = str(error).splitlines()[0] if str(error) else "an empty file"
        raise RunError(f"file {path}", said, "a whole checkpoint", "delete it: the training starts again") from error
    if content["key"] != key:
        return 0, {}
    for name, item in state.items():
        item.load_state_dict(content["state"][name])
    return content["step"], content["history"]
