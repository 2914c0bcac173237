"""Training of the detector; without outliers the same code is plain cross-entropy training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from ..config import DetectorConfig
from ..data.augment import training_view
from ..data.images import to_unit
from ..features import Backbone, load_backbone
from ..randomness import derive_seed
from ..training import Descent, Job, Stateful, initialised, place, train_steps
from .batches import Batches, Labelled, Part, frozen_outputs, make_parts, require_even_shares
from .loss import full_precision, three_head_loss
from .network import Heads, ThreeHeadNet

log = logging.getLogger(__name__)
Loss = Callable[[Heads, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]  # (heads, labels, is_outlier) -> losses


def train_detector(
    inside: Labelled,
    outliers: Labelled | None,
    controls: Labelled | None,
    config: DetectorConfig,
    job: Job,
    *,
    classes: int,
    name: str = "detector",
    loss: Loss | None = None,
    stop_after: int | None = None,
) -> tuple[ThreeHeadNet, dict[str, list[float]]]:
    """Train the three heads on batches that hold ID images, controls (as ID) and outliers together.

    Args:
        inside: In-distribution images.
        outliers: Outliers with their sources' labels; None trains g_in alone by cross-entropy.
        controls: Same-class reconstructions that count as ID, so that "was denoised" does not give outliers away.
        config: The detector's settings.
        job: What it runs on, its seed and where it is resumed from.
        classes: C.
        name: Name on the progress bar.
        loss: Replaces the three-head loss.
        stop_after: Epochs to stop after, with the network as the whole training has it then: the schedule stays that of all.

    Returns:
        The network in evaluation mode on the accelerator's device, and each step's losses.

    Raises:
        UsageError: The processes' shares of a step would differ in size.
    """
    there = {"controls": bool(controls and len(controls.images)), "outliers": bool(outliers and len(outliers.images))}
    require_even_shares(config, len(inside.images), job.accelerator.num_processes, **there)
    network = new_network(config, job, classes=classes, image_size=inside.images.shape[-1])
    parts = make_parts(inside, controls, outliers, config.batch_size, (config.control_ratio, config.outlier_ratio))
    cached = _cached(network.backbone, parts, config, job.accelerator)
    return train_parts(network, cached or parts, config, job, half_way=bool(cached), name=name, loss=loss, stop_after=stop_after)


def new_network(config: DetectorConfig, job: Job, *, classes: int, image_size: int) -> ThreeHeadNet:
    """The network a training starts from, on its device; what is random in it is drawn from the job's seed."""

    def build() -> ThreeHeadNet:
        backbone = load_backbone(config.backbone, config.weights, pooling=config.pooling, input_size=config.input_size)
        backbone.freeze(config.frozen_blocks)
        return ThreeHeadNet(backbone, classes, image_size)

    return place(initialised(build, derive_seed(job.seed, "detector-init")), job.device)


def train_parts(
    network: ThreeHeadNet,
    parts: Sequence[Part],
    config: DetectorConfig,
    job: Job,
    *,
    half_way: bool,
    name: str = "detector",
    loss: Loss | None = None,
    stop_after: int | None = None,
) -> tuple[ThreeHeadNet, dict[str, list[float]]]:
    """`train_detector` from the network and its pools on: those of `make_parts`, or `half_way` of `frozen_outputs`."""
    accelerator, device = job.accelerator, job.device
    pools = [part._replace(inputs=part.inputs.to(device), labels=part.labels.to(device)) for part in parts]
    batches = Batches(pools, job.seed, accelerator)
    epoch = len(parts[0].labels) // parts[0].per_batch
    loss = loss or (_three_heads(config) if batches.has_outliers else _cross_entropy(config))
    average = _average(network, config)
    optimizer = make_optimizer(network, config)
    descent = Descent(network, optimizer, config.epochs * epoch, accelerator, warmup_fraction=config.warmup_fraction)
    if config.compile:
        descent.wrapped.compile(dynamic=False)  # in place, as the U-Net

    def step(index: int) -> dict[str, torch.Tensor]:
        inputs, labels, flags = batches.draw(index)
        if not half_way:
            generator = job.generator("detector", index)
            inputs = training_view(inputs, generator, config.augmentation)
            inputs = to_unit(inputs).contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            heads = descent.wrapped(inputs.float(), half_way=half_way)
        values = loss(heads, labels, flags)
        descent(values["loss"])
        if average is not None:
            average.update(network, step=index + 1)
        return values

    state: dict[str, Stateful] = {**descent.state, **({} if average is None else {"average": average})}
    history = train_steps(
        step,
        epoch * (config.epochs if stop_after is None else stop_after),
        state,
        job,
        name=name,
    )
    trained: ThreeHeadNet = network if average is None else average.module
    return trained.eval(), history


def _cached(backbone: Backbone, parts: list[Part], config: DetectorConfig, accelerator: Accelerator) -> list[Part] | None:
    """The frozen blocks' outputs, where every step would compute the same again and there is room."""
    if config.augmentation != "none" or not backbone.frozen:
        return None
    if not backbone.has_frozen_part:
        log.info("frozen blocks: computed in every step: %s is not timm's plain vision transformer", backbone.name)
        return None
    cached = frozen_outputs(backbone, parts, accelerator, limit_gib=config.cache_gib)
    log.info("frozen blocks: %s", "computed once" if cached else "computed in every step: more than detector.cache_gib")
    return cached


def _three_heads(config: DetectorConfig) -> Loss:
    return lambda heads, labels, flags: three_head_loss(heads, labels, flags, config.lambda_out, config.label_smoothing)


def _cross_entropy(config: DetectorConfig) -> Loss:
    def loss(heads: Heads, labels: torch.Tensor, flags: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": F.cross_entropy(full_precision(heads.inside), labels, label_smoothing=config.label_smoothing)}

    return loss


def _average(network: ThreeHeadNet, config: DetectorConfig) -> Any:
    """timm's running average of all weights and statistics, whose memory is short in the first steps; None without one."""
    from timm.utils import ModelEmaV3

    return ModelEmaV3(network, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None


def make_optimizer(network: ThreeHeadNet, config: DetectorConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over what is not frozen, blocks further from the heads with a smaller rate (BEiT, Bao et al. 2022).

    Every parameter decays, as in OpenOOD's trainer.
    """
    body, lr, decay = network.backbone.body, config.lr, config.layer_decay
    layers = network.backbone.layers() if decay < 1 else {}
    groups: dict[int, list[torch.nn.Parameter]] = {}
    for name, parameter in body.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(layers.get(name, 0), []).append(parameter)
    last = max(layers.values(), default=0)
    settings: list[dict[str, Any]] = [
        {"params": parameters, "lr": lr * decay ** (last - layer)} for layer, parameters in sorted(groups.items())
    ]
    heads = [parameter for head in (network.g_bin, network.g_in, network.g_out) for parameter in head.parameters()]
    settings.append({"params": heads, "lr": lr})
    fused = heads[0].device.type == "cuda"
    if config.optimizer == "sgd":
        return torch.optim.SGD(settings, momentum=0.9, nesterov=True, weight_decay=config.weight_decay, fused=fused)
    return torch.optim.AdamW(settings, weight_decay=config.weight_decay, fused=fused)
