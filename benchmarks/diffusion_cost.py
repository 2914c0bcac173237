"""What the diffusion model costs: training, processes, and sampling against S, steps, image side and U-Net.

python -m benchmarks.diffusion_cost --sizes demo small --batch-size 32
Weights are random: the cost does not depend on them. Rows have a `part`:
training: images/s of whole training steps after the first ones, and their share of the device's bf16 peak (maker's data sheet);
sampling: images/s of the outlier sampler, one setting changed at a time;
processes: `python -m benchmarks.diffusion_cost --part processes` makes the same outliers by one process and by two.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.record import write_result
from sdood_plugin.__main__ import leave
from sdood_plugin.config import DiffusionConfig, OutliersConfig, RunConfig, as_dict
from sdood_plugin.data.images import ImageSet
from sdood_plugin.diffusion.training import train_diffusion
from sdood_plugin.diffusion.unet import build_unet
from sdood_plugin.outliers.generate import generate
from sdood_plugin.outliers.recipe import Recipe
from sdood_plugin.outliers.sample import sample_batch
from sdood_plugin.training import Job, make_accelerator, place, resolve_precision, unet_format

CLASSES, PARTS, SIZES = 10, ["training", "sampling", "processes"], ["demo", "small", "cifar"]
BF16_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165}  # dense, by the makers' data sheets
WARM_STEPS = 5


def pictures(count: int, side: int) -> ImageSet:
    """Random images with labels."""
    images = torch.randint(256, (count, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageSet(images, [f"{i}.png" for i in range(count)], torch.arange(count) % CLASSES)


def step_flops(config: DiffusionConfig, side: int) -> float:
    """Floating point operations of one image in one training step: forward and backward, two for a multiply-add."""
    with torch.device("meta"):
        unet = build_unet(config, classes=CLASSES, image_size=side)
        inputs = torch.randn(1, 3, side, side), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        unet(*inputs, class_labels=inputs[1]).sample.sum().backward()
    return counter.get_total_flops()


@dataclass(frozen=True)
class TimedJob(Job):
    """A job that notes when step WARM_STEPS begins: allocation, choice of kernels and compilation lie before it."""

    began: list[float] = field(default_factory=list)

    def generator(self, name: str, step: int) -> torch.Generator:
        """What a training draws the step's random numbers from, the first thing a step does."""
        if step == WARM_STEPS:
            self.began.append(now(self.device))
        return super().generator(name, step)


def now(device: torch.device) -> float:
    """Seconds of a clock, when the device is done with what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def training(size: str, side: int, batch_size: int, steps: int, compiled: bool) -> dict[str, Any]:
    """The speed of `steps` steps within one training, after WARM_STEPS others."""
    accelerator, images = make_accelerator(RunConfig()), pictures(4 * batch_size, side)
    config = DiffusionConfig(size=size, batch_size=batch_size, steps=WARM_STEPS + steps, compile=compiled)
    with tempfile.TemporaryDirectory() as folder:
        job = TimedJob(accelerator, Path(folder))
        train_diffusion(images.images, images.labels, config, job, classes=CLASSES)
        speed = batch_size * steps / (now(job.device) - job.began[0])
    achieved = speed * step_flops(DiffusionConfig(size=size), side) / 1e12
    row = {"part": "training", "size": size, "side": side, "batch_size": batch_size, "compiled": compiled}
    row |= {"images_per_s": speed, "tflops": achieved}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((value for key, value in BF16_TFLOPS.items() if key in name), None)
    return row | {"bf16_peak_share": 100 * achieved / peak if peak else f"not stated: no bf16 peak known for {name or 'a CPU'}"}


def sampling(size: str, side: int, batch_size: int, outliers: OutliersConfig) -> dict[str, Any]:
    """Seconds of the faster of two batches after one to warm up."""
    device, diffusion = make_accelerator(RunConfig()).device, DiffusionConfig(size=size, max_start_fraction=1.0)
    unet = place(build_unet(diffusion, classes=CLASSES, image_size=side).eval(), device, unet_format(device))
    images = pictures(batch_size, side)
    inputs = images.images.to(device), images.labels.to(device), torch.arange(batch_size, device=device)
    taken = []
    for _ in range(3):
        begin = time.perf_counter()
        sample_batch(unet, *inputs, outliers, diffusion, classes=CLASSES, seed=0).cpu()
        taken.append(time.perf_counter() - begin)
    row = {"part": "sampling", "size": size, "side": side, "batch_size": batch_size, "mode": outliers.mode}
    row |= {"start_fraction": outliers.start_fraction, "steps": outliers.sampling_steps, "sampler": outliers.sampler}
    return row | {"images_per_s": batch_size / min(taken[1:])}


def sampling_rows(sizes: list[str], batch_size: int) -> list[dict[str, Any]]:
    """Around `demo` at 32 px, S = 0.2 T and 6 steps, one thing changed at a time."""
    base = OutliersConfig(mode="other", guidance_weight=2.0, start_fraction=0.2, sampler="dpm", sampling_steps=6)
    rows = [sampling("demo", 32, batch_size, replace(base, start_fraction=s)) for s in (0.05, 0.2, 0.5)]
    rows += [sampling("demo", 32, batch_size, replace(base, sampling_steps=n)) for n in (3, 12, 24)]
    rows += [sampling("demo", side, batch_size, base) for side in (16, 64)]
    return rows + [sampling(size, 32, batch_size, base) for size in sizes if size != "demo"]


def make_set(count: int, batch_size: int, folder: Path, number: int) -> None:
    """What each of `number` processes does: its share of an outlier set; the main one writes the seconds."""
    accelerator = make_accelerator(RunConfig())
    assert accelerator.num_processes == number, f"{accelerator.num_processes} processes, expected {number}"
    diffusion, outliers = DiffusionConfig(), OutliersConfig(batch_size=batch_size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = place(build_unet(diffusion, classes=CLASSES, image_size=32).eval(), accelerator.device)
    images = pictures(count, 32)
    accelerator.wait_for_everyone()
    begin = time.perf_counter()
    precision = resolve_precision("auto", accelerator.device.type == "cuda")
    recipe = Recipe(images, images.labels, CLASSES, outliers, diffusion, 0, "random weights", precision=precision)
    generate(recipe, unet, folder / "outliers", accelerator=accelerator)
    if accelerator.is_main_process:
        (folder / "seconds").write_text(str(time.perf_counter() - begin))


def processes(count: int, batch_size: int) -> list[dict[str, Any]]:
    """One process and two, each with one CPU thread or one GPU, started by torchrun: accelerate starts one on a CPU."""
    rows: list[dict[str, Any]] = []
    if torch.cuda.device_count() == 1:
        return [{"method": "processes", "skipped": "one GPU only"}]
    for number in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
            work = ["-m", "benchmarks.diffusion_cost", "--worker", folder, "--worker-of", str(number)]
            work += ["--images", str(count), "--batch-size", str(batch_size)]
            subprocess.run([sys.executable, *launch, *work], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            speed = count / float((Path(folder) / "seconds").read_text())
        rows.append({"part": "processes", "processes": number, "images_per_s": speed, "ratio": speed})
    for row in rows:
        row["ratio"] /= rows[0]["images_per_s"]
    return rows


def main() -> None:
    """Measure the parts and write results/diffusion_cost[-suffix].json after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--sizes", nargs="+", default=SIZES)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--train-steps", type=int, default=3)
    parser.add_argument("--images", type=int, default=256, help="outliers of the part `processes`")
    parser.add_argument("--compile", action="store_true", help="also train with torch.compile")
    parser.add_argument("--note", help="a sentence to stand in the result")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker-of", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--suffix", default="")
    options = parser.parse_args()
    if options.worker:
        make_set(options.images, options.batch_size, options.worker, options.worker_of)
        leave(0)
    rows: list[dict[str, Any]] = []
    facts = {"data": {}, "note": " ".join(["Random images and weights.", *([options.note] if options.note else [])])}

    def add(more: list[dict[str, Any]]) -> None:
        rows.extend(more)
        write_result(f"diffusion_cost{options.suffix}", as_dict(RunConfig()), [0], rows, facts)

    if "training" in options.part:
        for size in options.sizes:
            for compiled in (False, True) if options.compile else (False,):
                add([training(size, 32, options.batch_size, options.train_steps, compiled)])
    if "sampling" in options.part:
        add(sampling_rows(options.sizes, options.batch_size))
    if "processes" in options.part:
        add(processes(options.images, options.batch_size))
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
