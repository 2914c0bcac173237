"""What training only the noise levels that sampling visits gives: t from [0, S_max] beside t from [0, T], same budget, same S.

python -m benchmarks.start_limit --out runs/start_limit
The embedded data with its true labels. Each seed has one reference classifier, trained on real images only, and two U-Nets
with the same first weights and batches. Rows: the prediction's loss on held-out images, the mean over ten levels up to S;
and what each U-Net makes of sources with the same noise: flip rate, stay rate and Frechet distance in the classifier's features.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.experiment import with_given_labels
from benchmarks.record import write_result
from benchmarks.sampling_speed import Batch, Judge, Setting, ours
from sdood_plugin.cli import read_config
from sdood_plugin.config import DiffusionConfig, OutliersConfig, as_dict
from sdood_plugin.context import Context
from sdood_plugin.data.images import spread
from sdood_plugin.diffusion.training import loss_by_noise_level, train_diffusion
from sdood_plugin.run import run

ROOT = Path(__file__).parent.parent


def compare(context: Context, limits: list[float], outliers: list[OutliersConfig], sources: int) -> list[dict[str, Any]]:
    """One row for each limit and each outlier setting, of one seed."""
    run(context.config, context.folder, "train-reference")
    judge = Judge(context, context.accelerator.device)
    rows = []
    for limit in limits:
        diffusion = replace(context.config.diffusion, max_start_fraction=limit)
        folder = context.folder / f"limit-{limit:g}"
        folder.mkdir(exist_ok=True)
        kept, labels = ~context.heldout, context.labels
        unet, _ = train_diffusion(
            context.train.images[kept],
            labels.labels[kept],
            diffusion,
            context.job(folder, str(as_dict(diffusion)), "diffusion"),
            classes=labels.classes,
        )
        for config in outliers:
            chosen = spread(len(context.train), sources)
            device = context.accelerator.device
            setting = Setting(unet, replace(context.config, diffusion=diffusion), config, labels.classes, device)
            batch = Batch(*(values[chosen].to(device) for values in (context.train.images, labels.labels)), chosen.to(device))
            made = ours(setting, batch).cpu()
            row = {"limit": limit, "mode": config.mode, "w": config.guidance_weight, "start_fraction": config.start_fraction}
            row |= {"seed": context.config.seed, "loss": _loss(context, unet, diffusion, config.start_fraction)}
            rows.append(row | judge(made, labels.labels[chosen]))
    return rows


def _loss(context: Context, unet: Any, diffusion: DiffusionConfig, start: float) -> float:
    """The mean held-out loss over the noise levels up to `start`, on the same images and noise for all."""
    held, device = context.heldout, context.accelerator.device
    levels = loss_by_noise_level(
        unet,
        context.train.images[held],
        context.labels.labels[held],
        replace(diffusion, max_start_fraction=start),
        device=device,
        seed=0,
    )
    return statistics.fmean(row["loss"] for row in levels)


def main() -> None:
    """Run the seeds one after the other and write results/start_limit[-suffix].json after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.yml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="training steps of each U-Net")
    parser.add_argument("--limit", type=float, default=0.3, help="S_max / T")
    parser.add_argument("--starts", type=float, nargs="+", default=[0.2, 0.3], help="S / T")
    parser.add_argument("--sources", type=int, default=300)
    parser.add_argument("--reference-epochs", type=int, default=8)
    parser.add_argument("--suffix", default="")
    options = parser.parse_args()
    base = with_given_labels(read_config(options.config))
    base = replace(
        base,
        report=False,
        diffusion=replace(base.diffusion, steps=options.steps),
        detector=replace(base.detector, epochs=options.reference_epochs),
    )
    modes = [replace(base.outliers, start_fraction=s, mode=m) for s in options.starts for m in ("other", "away")]
    modes = [replace(outliers, guidance_weight=2.0) if outliers.mode == "other" else outliers for outliers in modes]
    rows: list[dict[str, Any]] = []
    for number, seed in enumerate(options.seeds, 1):
        context = Context(replace(base, seed=seed), options.out / f"seed-{seed}")
        rows += compare(context, [options.limit, 1.0], modes, options.sources)
        facts = {"data": {"train": len(context.train)}}
        write_result(f"start_limit{options.suffix}", as_dict(base), options.seeds[:number], rows, facts, device=base.device)
    for row in rows:
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()})


if __name__ == "__main__":
    main()
