"""How fast outliers are made, beside two things a user would write with diffusers and the same weights.

python -m benchmarks.sampling_speed RUN --images 512 --ours dpm 6 0 1 6.0 --ours dpm 5 0.05 1 6.5
RUN is a folder of `sdood inspect`: it has the diffusion model, the pseudo-labels and the reference classifier.

naive: DDPMScheduler, every step from S, two forwards for condition and null, float32.
informed: DPM-Solver++ with 20 steps, condition and null in one batch, the device's default precision.
Between them lies the batched forward alone. All methods denoise the same batches from the same x_S, one
method after the other within a batch, so a ratio compares neighbours in time; the figures of what they made are over all
batches. A method is `equal` to a baseline where its flip rate is within 2 points and its Frechet distance within 5 %.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from benchmarks.record import write_result
from sdood_plugin.cli import read_config
from sdood_plugin.config import OutliersConfig, RunConfig, as_dict
from sdood_plugin.context import Context
from sdood_plugin.data.images import spread, to_uint8, to_unit
from sdood_plugin.detector.network import load_network
from sdood_plugin.diffusion.guidance import guidance_terms, wrong_classes
from sdood_plugin.diffusion.sampling import start_step
from sdood_plugin.diffusion.training import add_noise
from sdood_plugin.diffusion.unet import SCHEDULES, alphas_bar, load_unet
from sdood_plugin.features import evaluating, extract
from sdood_plugin.outliers.sample import sample_batch
from sdood_plugin.randomness import normal
from sdood_plugin.training import place, unet_format

SEED = 0
BASELINES = ("naive", "informed")
FLIP_POINTS, DISTANCE_SHARE = 2.0, 0.05


class Batch(NamedTuple):
    """Sources: uint8 (B, 3, H, W), pseudo-labels int64 (B,) and identities int64 (B,), on the device."""

    images: torch.Tensor
    labels: torch.Tensor
    identity: torch.Tensor


@dataclass
class Setting:
    """What all methods share."""

    unet: UNet2DModel
    run: RunConfig
    outliers: OutliersConfig
    classes: int
    device: torch.device


@dataclass
class Method:
    """A way to make outliers, and what it made so far."""

    name: str
    make: Callable[[Setting, Batch], torch.Tensor]
    seconds: list[float] = field(default_factory=list)
    made: list[torch.Tensor] = field(default_factory=list)


def noised(setting: Setting, batch: Batch) -> torch.Tensor:
    """x_S, as ours draws it."""
    start = start_step(setting.outliers.start_fraction, setting.run.diffusion.timesteps)
    noise = normal(SEED, batch.identity, 1, tuple(batch.images.shape[1:]))
    return add_noise(to_unit(batch.images), noise, alphas_bar(setting.run.diffusion)[start].float())


def terms(setting: Setting, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The conditions and weights of the mode."""
    wrong = wrong_classes(batch.labels, setting.classes, seed=SEED, index=batch.identity)
    return guidance_terms(setting.outliers.mode, setting.outliers.guidance_weight, batch.labels, wrong, setting.classes)


@torch.no_grad()
def naive(setting: Setting, batch: Batch, batched: bool = False) -> torch.Tensor:
    """Ancestral sampling with every step from S; one forward a condition unless `batched`."""
    diffusion = setting.run.diffusion
    scheduler = DDPMScheduler(
        num_train_timesteps=diffusion.timesteps,
        beta_schedule=SCHEDULES[diffusion.schedule],
        variance_type="fixed_small",
        clip_sample=False,
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[diffusion.prediction],
    )
    scheduler.set_timesteps(diffusion.timesteps)
    conditions, weights = terms(setting, batch)
    generator = torch.Generator(setting.device).manual_seed(SEED + int(batch.identity[0]))
    x = noised(setting, batch)
    for t in scheduler.timesteps[-(start_step(setting.outliers.start_fraction, diffusion.timesteps) + 1) :]:
        if batched:
            predicted = _mixed(setting, x, t, conditions, weights)
        else:
            predicted = sum(weight * setting.unet(x, t, class_labels=conditions[:, m]).sample for m, weight in enumerate(weights))
        x = scheduler.step(predicted, t, x, generator=generator).prev_sample
    return to_uint8(x)


@torch.no_grad()
def informed(setting: Setting, batch: Batch, steps: int = 20) -> torch.Tensor:
    """DPM-Solver++ from S with condition and null in one batch, bf16 on a GPU."""
    diffusion = setting.run.diffusion
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=diffusion.timesteps,
        beta_schedule=SCHEDULES[diffusion.schedule],
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[diffusion.prediction],
    )
    start = start_step(setting.outliers.start_fraction, diffusion.timesteps)
    scheduler.set_timesteps(timesteps=torch.linspace(start, 0, steps + 1).round().long().tolist()[:-1], device=setting.device)
    conditions, weights = terms(setting, batch)
    x = noised(setting, batch)
    with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.device.type == "cuda"):
        for t in scheduler.timesteps:
            x = scheduler.step(_mixed(setting, x, t, conditions, weights), t, x).prev_sample
    return to_uint8(x)


def _mixed(setting: Setting, x: torch.Tensor, t: torch.Tensor, conditions: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    count = conditions.shape[1]
    said = setting.unet(torch.cat([x] * count), t, class_labels=conditions.T.reshape(-1)).sample
    return sum(weight * part for weight, part in zip(weights, said.float().chunk(count), strict=True))


def ours(setting: Setting, batch: Batch, **changes: Any) -> torch.Tensor:
    """`sample_batch`, what `sdood generate` calls, with changed settings."""
    return sample_batch(
        setting.unet,
        *batch,
        replace(setting.outliers, **changes),
        setting.run.diffusion,
        classes=setting.classes,
        seed=SEED,
    )


def methods(compiled: Setting | None, options: argparse.Namespace) -> list[Method]:
    """The baselines with one saving after the other, then every setting of ours."""
    found = [
        Method("naive", naive),
        Method("naive, batched forward", lambda s, b: naive(s, b, batched=True)),
        Method("informed", informed),
    ]
    for sampler, steps, *numbers in options.ours:
        low, high, weight = map(float, numbers)
        changes = {"sampler": sampler, "sampling_steps": int(steps), "guidance_interval": [low, high], "guidance_weight": weight}
        interval = f", guided from {low:g} to {high:g} T" if (low, high) != (0, 1) else ""
        name = f"ours: {sampler}, {steps} steps, w = {weight:g}{interval}"
        found.append(Method(name, lambda s, b, changes=changes: ours(s, b, **changes)))
        if compiled is not None:
            found.append(Method(f"{name}, compiled", lambda s, b, changes=changes: ours(compiled, b, **changes)))
    return found


def measure(method: Method, setting: Setting, batch: Batch) -> None:
    """Make a batch and note the seconds."""
    _synchronise(setting.device)
    begin = time.perf_counter()
    made = method.make(setting, batch)
    _synchronise(setting.device)
    method.seconds.append(time.perf_counter() - begin)
    method.made.append(made.cpu())


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Judge:
    """The run's reference classifier, trained on real images only: flips, stays and the Frechet distance to the real images."""

    def __init__(self, context: Context, device: torch.device) -> None:
        self.network = load_network(context.folder / "reference" / "reference.safetensors").to(device)
        self.device = device
        self.name = f"reference network ({self.network.backbone.name})"
        self.real = fid_features_to_statistics(self._features(context.train.images).cpu().double())

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return extract(self.network.backbone, images, device=self.device)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Figures of uint8 (N, 3, H, W) images made of sources with pseudo-labels int64 (N,)."""
        features = self._features(images)
        with evaluating(self.network):
            confidence, said = self.network.g_in(features).softmax(dim=1).cpu().max(dim=1)
        distance = fid_statistics_to_metric(fid_features_to_statistics(features.cpu().double()), self.real, verbose=False)
        return {
            "flip_rate": 100 * float(((said != labels) & (confidence > 0.9)).float().mean()),
            "stay_rate": 100 * float((said == labels).float().mean()),
            "fd": float(distance[KEY_METRIC_FID]),
        }


def summarise(found: list[Method], judge: Judge, labels: torch.Tensor, batch_size: int) -> list[dict[str, Any]]:
    """One row for each method and baseline: what it made, how fast, and how it stands to the baseline."""
    figures = {}
    for method in found:
        made = torch.cat(method.made)
        speed = batch_size / statistics.median(method.seconds)
        figures[method.name] = {"images": len(made), "images_per_s": speed, **judge(made, labels[: len(made)])}
    rows = []
    for baseline in (method for method in found if method.name in BASELINES):
        for method in found:
            own, theirs = figures[method.name], figures[baseline.name]
            ratio = statistics.median(other / mine for other, mine in zip(baseline.seconds, method.seconds, strict=True))
            flips, distance = own["flip_rate"] - theirs["flip_rate"], own["fd"] / theirs["fd"] - 1
            equal = abs(flips) <= FLIP_POINTS and abs(distance) <= DISTANCE_SHARE
            row = {"baseline": baseline.name, "method": method.name, "ratio": ratio, **own}
            rows.append(row | {"flips_above": flips, "fd_above_percent": 100 * distance, "equal": equal})
    return rows


def main() -> None:
    """Measure batch after batch and write results/sampling_speed[-suffix].json after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--images", type=int, default=512, help="sources, spread over the training images")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--mode", default=None, help="the run's own if not given; so are w and S")
    parser.add_argument("--weight", type=float, default=None)
    parser.add_argument("--start", type=float, default=None, help="S / T")
    parser.add_argument(
        "--ours",
        nargs=5,
        action="append",
        metavar=("SAMPLER", "STEPS", "LOW", "HIGH", "W"),
        required=True,
        help="interval of guidance as fractions of T; few steps may need another w for as many flips; repeatable",
    )
    parser.add_argument("--compile", action="store_true", help="also torch.compile (a minute or more for each batch shape)")
    parser.add_argument("--only", nargs="+", help="names of methods, to try things out")
    parser.add_argument("--note", help="a sentence to stand in the result")
    parser.add_argument("--suffix", default="")
    options = parser.parse_args()
    context = Context(read_config(options.run / "config.yaml"), options.run)
    setting, compiled = _settings(context, options)
    judge = Judge(context, setting.device)
    found = [m for m in methods(compiled, options) if not options.only or m.name in options.only]
    chosen = spread(len(context.train), options.images)
    labels = context.labels.labels[chosen]
    counts = {"train": len(context.train), "sources": len(chosen) // options.batch_size * options.batch_size}
    facts = {"data": counts, **({"note": options.note} if options.note else {})}
    facts |= {"features": judge.name, "outliers": as_dict(setting.outliers), "batch_size": options.batch_size}
    warm = _batch(context, chosen[: options.batch_size], setting.device)
    for method in found:
        if not method.name.startswith("naive"):  # kernels, caches, compilation
            method.make(setting, warm)
    for rows in chosen.split(options.batch_size):
        if len(rows) < options.batch_size:
            break
        batch = _batch(context, rows, setting.device)
        for method in found:
            measure(method, setting, batch)
        rows_so_far = summarise(found, judge, labels, options.batch_size)
        config = context.config
        write_result(f"sampling_speed{options.suffix}", as_dict(config), [SEED], rows_so_far, facts, device=config.device)
    for row in rows_so_far:
        print({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})


def _settings(context: Context, options: argparse.Namespace) -> tuple[Setting, Setting | None]:
    device, config = context.accelerator.device, context.config
    changes = {"mode": options.mode, "guidance_weight": options.weight, "start_fraction": options.start}
    outliers = replace(config.outliers, **{name: value for name, value in changes.items() if value is not None})

    def setting(compiled: bool) -> Setting:
        unet = load_unet(
            context.folder / "diffusion" / "unet.safetensors",
            replace(config.diffusion, compile=compiled),
            classes=context.labels.classes,
            image_size=context.train.images.shape[-1],
        )
        return Setting(place(unet, device, unet_format(device)), config, outliers, context.labels.classes, device)

    return setting(False), setting(True) if options.compile else None


def _batch(context: Context, rows: torch.Tensor, device: torch.device) -> Batch:
    return Batch(context.train.images[rows].to(device), context.labels.labels[rows].to(device), rows.to(device))


if __name__ == "__main__":
    main()
