"""The settings: one frozen dataclass a stage, checked when made; a run's configuration is their sum.

Fractions lie in [0, 1]; `steps` are optimiser steps; names follow the paper (C clusters, T timesteps, w, S, k, alpha).
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import UsageError

Group = Literal["near", "far"]
Mode = Literal["other", "same", "away", "blend"]


def _require(ok: bool, name: str, value: object, expected: str, remedy: str = "change this setting") -> None:
    if not ok:
        raise UsageError(name, value, expected, remedy)


def _require_positive(stage: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(math.isfinite(value) and value > 0, f"{stage}.{name}", value, "a number above 0")


@dataclass(frozen=True)
class ImagesConfig:
    """Where a set of images is.

    Args:
        path: A folder of images (one subfolder a class if there are subfolders), an OpenOOD imglist (.txt), a folder
            of CIFAR-10 / CIFAR-100 python batches, an .npz with `images` uint8 (N, H, W, 3) and optionally `labels`,
            or `demo`, the embedded data (a folder of that name is `./demo`).
        root: Folder the paths of an imglist are relative to.
        split: Which part of CIFAR batches or of the embedded data (`train`, `test`, `near`, `fields`, `noise`).
        limit: Use this many images at most, spread evenly over the set.
    """

    path: str
    root: str | None = None
    split: Literal["train", "test", "near", "fields", "noise"] = "train"
    limit: int | None = None

    def __post_init__(self) -> None:
        _require(bool(self.path), "path of an image set", repr(self.path), "a folder, an imglist, CIFAR batches or an .npz")
        _require(self.limit is None or self.limit > 0, "limit of an image set", self.limit, "a number above 0, or null for all")


@dataclass(frozen=True)
class OODConfig:
    """One out-of-distribution test set.

    Args:
        name: Its name in tables.
        group: `near` (shares the look of ID) or `far`.
        images: Where it is.
    """

    name: str
    group: Group
    images: ImagesConfig

    def __post_init__(self) -> None:
        _require(
            self.name != "id" and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", self.name) is not None,
            "name in data.ood",
            repr(self.name),
            "letters, digits and . _ + -, not `id`: it names files",
        )


@dataclass(frozen=True)
class DataConfig:
    """The images of a run.

    Args:
        train: Unlabelled in-distribution images.
        test: In-distribution test images; null holds a fifth of `train` out for testing when there are OOD sets.
        ood: OOD test sets; they are only ever scored.
        image_size: Side in pixels all images are resized and centre-cropped to; null keeps the images' own size,
            which must then be one and the same.
        heldout_fraction: Share of `train` kept from the diffusion model's and the detector's training, for alpha and the
            threshold; the clustering sees all of `train`.
        demo_rho: Embedded data only: how strongly background colour goes with class (0 independent, 1 always).
        demo_renders: Embedded data only: pictures drawn from each scan.
        demo_left_out: Embedded data only: this ID digit (0 to 5) becomes the near OOD set and no test scan is used, for
            choosing settings.
    """

    train: ImagesConfig = ImagesConfig("demo")
    test: ImagesConfig | None = None
    ood: list[OODConfig] = field(default_factory=list)
    image_size: int | None = 32
    heldout_fraction: float = 0.1
    demo_rho: float = 0.95
    demo_renders: int = 4
    demo_left_out: int | None = None

    def __post_init__(self) -> None:
        _require(
            self.image_size is None or 8 <= self.image_size <= 1024, "data.image_size", self.image_size, "8 to 1024, or null"
        )
        _require(0 < self.heldout_fraction < 1, "data.heldout_fraction", self.heldout_fraction, "a fraction above 0 and below 1")
        _require(0 <= self.demo_rho <= 1, "data.demo_rho", self.demo_rho, "0 to 1")
        _require(self.demo_renders > 0, "data.demo_renders", self.demo_renders, "a number above 0")
        _require(
            self.demo_left_out is None or 0 <= self.demo_left_out <= 5,
            "data.demo_left_out",
            self.demo_left_out,
            "0 to 5, or null",
        )
        names = [ood.name for ood in self.ood]
        _require(len(set(names)) == len(names), "names in data.ood", names, "a different name for each set")


@dataclass(frozen=True)
class ClusteringConfig:
    """Pseudo-labels.

    Args:
        method: `scan` (SCAN head on frozen features), `kmeans` on the same features, or `given`: labels from `labels`,
            or, where that is null, the images' own (class folders, imglist, batches).
        clusters: C, the number of clusters; with given labels it is read from them.
        labels: CSV with columns `path` (or `index`) and `label`, for `given`.
        backbone: `small_cnn`, `resnet18_cifar`, or the name of any timm model.
        weights: safetensors file for the backbone; null trains it here with SimCLR.
        pretext_steps: SimCLR steps.
        pretext_batch_size: Images a SimCLR step; each is seen twice.
        pretext_lr: Peak learning rate of SimCLR (Adam, cosine to 0).
        temperature: NT-Xent temperature.
        augmentation: Views for SimCLR: `digits` (shift, scale, turn, colour mixing; no flips) or `natural` (crops,
            flips, colour jitter, grey).
        neighbours: K nearest neighbours of each image for SCAN.
        entropy_weight: Weight of SCAN's term that keeps clusters from emptying.
        heads: SCAN heads trained together; the one of lowest loss is kept.
        head_epochs: Epochs of the SCAN heads.
        head_lr: Learning rate of the SCAN heads (Adam).
        head_batch_size: Images a SCAN step.
    """

    method: Literal["scan", "kmeans", "given"] = "scan"
    clusters: int = 10
    labels: str | None = None
    backbone: str = "small_cnn"
    weights: str | None = None
    pretext_steps: int = 600
    pretext_batch_size: int = 256
    pretext_lr: float = 2e-3
    temperature: float = 0.3
    augmentation: Literal["digits", "natural"] = "natural"
    neighbours: int = 20
    entropy_weight: float = 5.0
    heads: int = 10
    head_epochs: int = 60
    head_lr: float = 1e-3
    head_batch_size: int = 512

    def __post_init__(self) -> None:
        _require(
            self.clusters >= 2,
            "clustering.clusters",
            self.clusters,
            "2 or more: a wrong class must exist",
            "raise it; with one class there is nothing to be discrepant from",
        )
        _require_positive(
            "clustering",
            self,
            "pretext_steps",
            "pretext_batch_size",
            "pretext_lr",
            "temperature",
            "neighbours",
            "heads",
            "head_epochs",
            "head_lr",
            "head_batch_size",
        )
        _require(0 <= self.entropy_weight < math.inf, "clustering.entropy_weight", self.entropy_weight, "0 or more")
        _require(
            self.labels is None or self.method == "given",
            "clustering.labels",
            self.labels,
            "method `given` with it",
            "add --clustering.method given",
        )


@dataclass(frozen=True)
class DiffusionConfig:
    """The class-conditional diffusion model.

    Args:
        channels: U-Net channels at each resolution; the side halves between them.
        layers_per_block: Residual blocks a resolution.
        attention: Self-attention at the lowest resolution.
        timesteps: T.
        schedule: Noise schedule of diffusers: `linear` or `cosine`.
        prediction: What the U-Net predicts: `epsilon` or `v`.
        max_start_fraction: S_max / T: noise levels above it are never trained (1 = all T).
        condition_dropout: p_uncond, how often the class is replaced by the null class.
        steps: Training steps.
        batch_size: Images a step, over all processes.
        lr: Peak learning rate (AdamW, short warm-up, cosine to 0).
        ema_decay: Decay of the averaged weights that are sampled from.
        flips: Mirror images at random.
        gradient_clip: Largest gradient norm.
    """

    channels: list[int] = field(default_factory=lambda: [32, 64, 64])
    layers_per_block: int = 1
    attention: bool = True
    timesteps: int = 1000
    schedule: Literal["linear", "cosine"] = "linear"
    prediction: Literal["epsilon", "v"] = "epsilon"
    max_start_fraction: float = 0.3
    condition_dropout: float = 0.1
    steps: int = 1500
    batch_size: int = 64
    lr: float = 1e-3
    ema_decay: float = 0.995
    flips: bool = True
    gradient_clip: float = 1.0

    def __post_init__(self) -> None:
        _require(
            bool(self.channels) and all(c > 0 and c % 16 == 0 for c in self.channels),
            "diffusion.channels",
            self.channels,
            "one or more multiples of 16",
        )
        _require_positive("diffusion", self, "layers_per_block", "timesteps", "steps", "batch_size", "lr", "gradient_clip")
        _require(0 < self.max_start_fraction <= 1, "diffusion.max_start_fraction", self.max_start_fraction, "above 0, at most 1")
        _require(
            0 < self.condition_dropout < 1,
            "diffusion.condition_dropout",
            self.condition_dropout,
            "above 0 and below 1: guidance needs the null class",
        )
        _require(0 <= self.ema_decay < 1, "diffusion.ema_decay", self.ema_decay, "0 or more and below 1")


@dataclass(frozen=True)
class OutliersConfig:
    """The semantic-discrepant outliers and their same-class controls.

    Args:
        mode: What guidance points to: `other` (the paper: one wrong class), `away` (from the own class), `blend` (between
            two wrong classes), `same` (the own class).
        guidance_weight: w; diffusers' guidance_scale is 1 + w. Unused by `same`.
        start_fraction: S / T, how far an image is noised before it is denoised.
        sampler: `ddpm` (ancestral, the paper), `ddim`, or `dpm` (DPM-Solver++ 2M).
        sampling_steps: Denoising steps from S to 0.
        per_source: Outliers made of each image.
        sources: Use this many images as sources, spread evenly; null for all.
        controls: Make a same-class control of every source too.
        batch_size: Images denoised at once; the last batch is padded.
    """

    mode: Mode = "away"
    guidance_weight: float = 3.0
    start_fraction: float = 0.2
    sampler: Literal["ddpm", "ddim", "dpm"] = "dpm"
    sampling_steps: int = 6
    per_source: int = 1
    sources: int | None = None
    controls: bool = True
    batch_size: int = 128

    def __post_init__(self) -> None:
        _require(
            math.isfinite(self.guidance_weight) and self.guidance_weight >= -1,
            "outliers.guidance_weight",
            self.guidance_weight,
            "w >= -1",
        )
        _require(0 < self.start_fraction <= 1, "outliers.start_fraction", self.start_fraction, "S / T above 0, at most 1")
        _require_positive("outliers", self, "sampling_steps", "per_source", "batch_size")
        _require(self.sources is None or self.sources > 0, "outliers.sources", self.sources, "a number above 0, or null for all")


@dataclass(frozen=True)
class DetectorConfig:
    """The three-head detector.

    Args:
        backbone: `small_cnn`, `resnet18_cifar`, or the name of any timm model.
        weights: safetensors file for the backbone; null starts from random weights.
        epochs: Passes over the in-distribution training images.
        batch_size: In-distribution images a step, over all processes.
        outlier_ratio: Outliers a step, as a share of `batch_size`.
        control_ratio: Same-class controls a step, used as in-distribution, as a share of `batch_size`.
        lambda_out: lambda, weight of the outliers' own classification loss.
        optimizer: `sgd` (Nesterov momentum 0.9) or `adamw`.
        lr: Peak learning rate (short warm-up, cosine to 0).
        weight_decay: Weight decay.
        augmentation: `digits` (small shifts), `natural` (shifts and flips) or `none`; the same for every origin.
    """

    backbone: str = "small_cnn"
    weights: str | None = None
    epochs: int = 25
    batch_size: int = 128
    outlier_ratio: float = 0.5
    control_ratio: float = 0.5
    lambda_out: float = 1.0
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = 2e-3
    weight_decay: float = 5e-4
    augmentation: Literal["digits", "natural", "none"] = "natural"

    def __post_init__(self) -> None:
        _require_positive("detector", self, "epochs", "batch_size", "lr")
        _require(0 <= self.outlier_ratio < math.inf, "detector.outlier_ratio", self.outlier_ratio, "0 (no outliers) or more")
        _require(0 <= self.control_ratio < math.inf, "detector.control_ratio", self.control_ratio, "0 (no controls) or more")
        _require(0 <= self.lambda_out < math.inf, "detector.lambda_out", self.lambda_out, "0 or more")
        _require(0 <= self.weight_decay < math.inf, "detector.weight_decay", self.weight_decay, "0 or more")


@dataclass(frozen=True)
class ScoringConfig:
    """The distance + voting score.

    Args:
        k_distance: Neighbours among in-distribution images whose squared distances are summed.
        k_vote: Neighbours among in-distribution images and outliers that vote.
        normalise: Scale features to unit length.
        alpha: Weight of the votes against the distance in units of its held-out median; null chooses it from `alphas`
            on held-out images and held-out outliers.
        alphas: Candidates for alpha.
        false_alarm_rate: Share of in-distribution images the decision threshold may reject.
    """

    k_distance: int = 2
    k_vote: int = 5
    normalise: bool = True
    alpha: float | None = None
    alphas: list[float] = field(default_factory=lambda: [0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0])
    false_alarm_rate: float = 0.05

    def __post_init__(self) -> None:
        _require_positive("scoring", self, "k_distance", "k_vote")
        _require(self.alpha is None or 0 <= self.alpha < math.inf, "scoring.alpha", self.alpha, "0 or more, or null to choose it")
        _require(
            bool(self.alphas) and all(0 <= alpha < math.inf for alpha in self.alphas),
            "scoring.alphas",
            self.alphas,
            "numbers of 0 or more",
        )
        _require(0 < self.false_alarm_rate < 1, "scoring.false_alarm_rate", self.false_alarm_rate, "above 0 and below 1")


Comparator = Literal["distance", "msp", "energy", "knn", "mahalanobis", "vim", "oe-noise"]


@dataclass(frozen=True)
class CompareConfig:
    """The comparators, trained on the same images with the same backbone.

    Args:
        methods: On a network trained by cross-entropy alone: `distance` (our distance term), `msp`, `energy`, `knn`,
            `mahalanobis`, `vim`; and `oe-noise`, outlier exposure with uniform noise.
    """

    methods: list[Comparator] = field(
        default_factory=lambda: ["distance", "msp", "energy", "knn", "mahalanobis", "vim", "oe-noise"]
    )


@dataclass(frozen=True)
class RunConfig:
    """Everything a run needs.

    Args:
        seed: Root seed every other seed is derived from.
        device: `auto` takes a GPU where there is one.
        precision: `auto` is bf16 on a GPU and float32 on a CPU.
        checkpoint_seconds: How often a training writes a checkpoint it can resume from.
        report: Draw figures and write report.html.
        data: The images.
        clustering: Pseudo-labels.
        diffusion: The diffusion model.
        outliers: The outlier set.
        detector: The detector.
        scoring: The score.
        compare: The comparators.
    """

    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bf16"] = "auto"
    checkpoint_seconds: float = 30.0
    report: bool = True
    data: DataConfig = field(default_factory=DataConfig)
    clustering: ClusteringConfig = field(default_factory=ClusteringConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    outliers: OutliersConfig = field(default_factory=OutliersConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)

    def __post_init__(self) -> None:
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        _require(self.checkpoint_seconds >= 0, "checkpoint_seconds", self.checkpoint_seconds, "0 (every step) or more")
        size, factor = self.data.image_size, 2 ** (len(self.diffusion.channels) - 1)
        _require(
            size is None or size % factor == 0,
            "data.image_size",
            size,
            f"a multiple of {factor}, for the {len(self.diffusion.channels)} resolutions of diffusion.channels",
        )
        _require(
            self.outliers.start_fraction <= self.diffusion.max_start_fraction,
            "outliers.start_fraction",
            self.outliers.start_fraction,
            f"at most diffusion.max_start_fraction = {self.diffusion.max_start_fraction}",
            "raise --diffusion.max_start_fraction too: the model never saw more noise than that",
        )


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested plain values."""
    return dataclasses.asdict(config)
