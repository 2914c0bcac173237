"""Every setting that can never work is refused by its name, and the defaults are fine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from sdood_plugin.config import (
    ClusteringConfig,
    CompareConfig,
    DataConfig,
    DetectorConfig,
    DiffusionConfig,
    ImagesConfig,
    InspectionConfig,
    OODConfig,
    OutliersConfig,
    RunConfig,
    ScoringConfig,
    SelectionConfig,
    as_dict,
)
from sdood_plugin.errors import UsageError

NAN, INF = float("nan"), float("inf")
STAGES = {
    "data": DataConfig,
    "clustering": ClusteringConfig,
    "diffusion": DiffusionConfig,
    "outliers": OutliersConfig,
    "detector": DetectorConfig,
    "scoring": ScoringConfig,
}
POSITIVE = {
    "clustering": [
        "pretext_steps",
        "pretext_batch_size",
        "pretext_lr",
        "temperature",
        "neighbours",
        "heads",
        "head_epochs",
        "head_lr",
        "head_batch_size",
    ],
    "diffusion": ["timesteps", "steps", "batch_size", "lr", "gradient_clip"],
    "outliers": ["sampling_steps", "per_source", "batch_size"],
    "detector": ["epochs", "batch_size", "lr"],
    "scoring": ["k_distance", "k_vote"],
}
BAD = (
    [(stage, name, value) for stage, names in POSITIVE.items() for name in names for value in (0, -1)]
    + [
        (stage, name, value)
        for stage, name in (("clustering", "pretext_lr"), ("diffusion", "lr"), ("detector", "lr"), ("clustering", "temperature"))
        for value in (NAN, INF)
    ]
    + [
        ("data", "image_size", 4),
        ("data", "image_size", 2048),
        ("data", "image_size", 0),
        *(("data", "heldout_fraction", value) for value in (0.0, 1.0, -0.1, 1.5, NAN)),
        *(("data", "demo_rho", value) for value in (-0.1, 1.1, NAN)),
        ("data", "demo_renders", 0),
        ("data", "demo_left_out", 6),
        ("data", "demo_left_out", -1),
        ("clustering", "clusters", 1),
        ("clustering", "clusters", 0),
        *(("clustering", "entropy_weight", value) for value in (-1.0, NAN, INF)),
        ("clustering", "labels", "file.csv"),
        ("diffusion", "size", "huge"),
        *(("diffusion", "min_snr_gamma", value) for value in (0.0, -1.0, NAN, INF)),
        *(("diffusion", "max_start_fraction", value) for value in (0.0, 1.01, -0.2, NAN)),
        *(("diffusion", "condition_dropout", value) for value in (0.0, 1.0, NAN)),
        *(("diffusion", "ema_decay", value) for value in (-0.1, 1.0, NAN)),
        *(("outliers", "guidance_weight", value) for value in (-1.01, NAN, INF)),
        *(("outliers", "start_fraction", value) for value in (0.0, -0.2, 1.01, NAN)),
        *(("outliers", "start_fraction", value) for value in ([0.0, 0.2], [0.3, 0.2], [0.1, NAN], [0.1], [], [0.1, 0.2, 0.3])),
        *(("outliers", "guidance_weight", value) for value in ([-1.01, 2.0], [2.0, 1.0], [0.0, INF], [1.0])),
        ("outliers", "sources", 0),
        *(("outliers", "guidance_interval", value) for value in ([0.5, 1.0], [0.21, 1.0], [0.1], [0.3, 0.1], [-0.1, 1.0])),
        *(
            ("detector", name, value)
            for name in ("outlier_ratio", "control_ratio", "lambda_out", "weight_decay")
            for value in (-0.1, NAN, INF)
        ),
        *(("scoring", "alpha", value) for value in (-0.1, NAN, INF)),
        ("scoring", "alphas", []),
        ("scoring", "alphas", [0.1, -1.0]),
        ("scoring", "alphas", [NAN]),
        ("scoring", "alphas", [INF]),
        *(("scoring", "false_alarm_rate", value) for value in (0.0, 1.0, NAN)),
    ]
)


@pytest.mark.parametrize(("stage", "name", "value"), BAD, ids=[f"{stage}.{name}={value}" for stage, name, value in BAD])
def test_a_bad_value_is_refused_by_name(stage, name, value):
    with pytest.raises(UsageError) as caught:
        STAGES[stage](**{name: value})
    assert str(caught.value).startswith(f"{stage}.{name}: got ") and "\n" not in str(caught.value)
    assert str(value) in str(caught.value)


GOOD = [
    ("data", "image_size", None),
    ("data", "image_size", 8),
    ("data", "image_size", 1024),
    ("data", "demo_rho", 0.0),
    ("data", "demo_rho", 1.0),
    ("clustering", "clusters", 2),
    ("clustering", "entropy_weight", 0.0),
    ("diffusion", "max_start_fraction", 1.0),
    ("diffusion", "ema_decay", 0.0),
    ("diffusion", "size", "cifar"),
    ("diffusion", "min_snr_gamma", 5.0),
    ("outliers", "guidance_weight", -1.0),
    ("outliers", "start_fraction", 1.0),
    ("outliers", "start_fraction", [0.1, 0.2]),
    ("outliers", "guidance_weight", [-1.0, 4.0]),
    ("outliers", "sources", 1),
    ("outliers", "guidance_interval", [0.19, 0.2]),
    ("detector", "outlier_ratio", 0.0),
    ("detector", "lambda_out", 0.0),
    ("scoring", "alpha", 0.0),
    ("scoring", "alphas", [0.0]),
]


@pytest.mark.parametrize(("stage", "name", "value"), GOOD, ids=[f"{stage}.{name}={value}" for stage, name, value in GOOD])
def test_the_ends_of_a_range_are_allowed(stage, name, value):
    assert getattr(STAGES[stage](**{name: value}), name) == value


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: DetectorConfig(optimizer="adam"), "detector.optimizer: got 'adam'; expected sgd or adamw;"),
        (lambda: DetectorConfig(pooling="max"), "detector.pooling: got 'max'; expected own, cls or mean;"),
        (lambda: DetectorConfig(augmentation="x"), "detector.augmentation: got 'x'; expected digits, natural or none;"),
        (lambda: DetectorConfig(epochs=1.5), "detector.epochs: got 1.5; expected a whole number;"),
        (lambda: DetectorConfig(batch_size=True), "detector.batch_size: got True; expected a whole number;"),
        (lambda: DetectorConfig(lr="0.1"), "detector.lr: got '0.1'; expected a number;"),
        (lambda: DetectorConfig(lr=True), "detector.lr: got True; expected a number;"),
        (lambda: DetectorConfig(compile=1), "detector.compile: got 1; expected true or false;"),
        (lambda: DetectorConfig(frozen_blocks=1.5), "detector.frozen_blocks: got 1.5; expected a whole number or all;"),
        (lambda: DetectorConfig(frozen_blocks="most"), "detector.frozen_blocks: got 'most'; expected a whole number or all;"),
        (lambda: DetectorConfig(weights=Path("w")), r"detector.weights: got PosixPath\('w'\); expected text or null;"),
        (lambda: ScoringConfig(k_vote=2.5), "scoring.k_vote: got 2.5; expected a whole number;"),
        (lambda: ScoringConfig(normalise="no"), "scoring.normalise: got 'no'; expected true or false;"),
        (lambda: ScoringConfig(alphas=[0.1, "1"]), "scoring.alphas: .*expected a list, each a number;"),
        (lambda: ScoringConfig(backend="annoy"), "scoring.backend: got 'annoy'; expected auto, torch or faiss;"),
        (lambda: ClusteringConfig(method="dbscan"), "clustering.method: .*expected scan, kmeans, gmm or given;"),
        (lambda: DiffusionConfig(schedule="sigmoid"), "diffusion.schedule: .*expected linear or cosine;"),
        (lambda: OutliersConfig(guidance_weight="3"), "outliers.guidance_weight: .*a number or a list, each a number;"),
        (lambda: SelectionConfig(keep=["good"]), "selection.keep: .*expected a list, each stay, flip or ambiguous;"),
        (lambda: InspectionConfig(neighbours=0.5), "inspection.neighbours: .*expected a whole number;"),
        (lambda: CompareConfig(fake_it_frozen_blocks="some"), "compare.fake_it_frozen_blocks: .*whole number, all or null;"),
        (lambda: ImagesConfig("x", split="val"), "split of an image set: got 'val'; expected train, test,"),
        (lambda: OODConfig("x", "middle", ImagesConfig("x")), "group in data.ood: got 'middle'; expected near or far;"),
        (lambda: DataConfig(train="x"), "data.train: got 'x'; expected ImagesConfig;"),
        (lambda: RunConfig(seed=0.5), "^seed: got 0.5; expected a whole number;"),
    ],
)
def test_a_value_of_another_type_is_refused_from_python_too(made, message):
    with pytest.raises(UsageError, match=message):
        made()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": ""}, "path of an image set"),
        ({"path": "x", "limit": 0}, "limit of an image set"),
        ({"path": "x", "limit": -3}, "limit of an image set"),
    ],
)
def test_image_sets(values, message):
    with pytest.raises(UsageError, match=message):
        ImagesConfig(**values)


@pytest.mark.parametrize("name", ["", "id", "a/b", "../a", ".hidden", "a b"])
def test_the_name_of_an_ood_set_must_do_as_a_file_name(name):
    with pytest.raises(UsageError, match="name in data.ood"):
        OODConfig(name, "near", ImagesConfig("x"))


def test_ood_sets_have_different_names():
    one = OODConfig("a", "near", ImagesConfig("x"))
    with pytest.raises(UsageError, match="names in data.ood"):
        DataConfig(ood=[one, one])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": -1}, "seed: got -1"),
        ({"checkpoint_seconds": -1.0}, "checkpoint_seconds"),
        ({"checkpoint_seconds": NAN}, "checkpoint_seconds"),
        ({"data": DataConfig(image_size=30)}, "data.image_size: got 30; expected a multiple of 4"),
        ({"outliers": OutliersConfig(start_fraction=0.4)}, "outliers.start_fraction: got 0.4.*max_start_fraction = 0.3"),
        ({"outliers": OutliersConfig(start_fraction=0.05, sampling_steps=51)}, "outliers.sampling_steps: got 51.*at most 50"),
        (
            {"outliers": OutliersConfig(start_fraction=[0.1, 0.2]), "diffusion": DiffusionConfig(timesteps=50)},
            "sampling_steps: got 6.*at most 5: the steps from S = 0.1 T",
        ),
        ({"outliers": OutliersConfig(start_fraction=[0.1, 0.4])}, "outliers.start_fraction: got .0.1, 0.4.*max_start_fraction"),
    ],
)
def test_whole_runs(values, message):
    with pytest.raises(UsageError, match=message):
        RunConfig(**values)


def test_settings_are_frozen_plain_and_round_trip():
    config = RunConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    plain = json.loads(json.dumps(as_dict(config)))
    stages = {
        "clustering": ClusteringConfig,
        "diffusion": DiffusionConfig,
        "outliers": OutliersConfig,
        "detector": DetectorConfig,
        "scoring": ScoringConfig,
        "compare": CompareConfig,
    }
    for name, stage in stages.items():
        assert stage(**plain[name]) == getattr(config, name)


def test_an_unknown_setting_is_refused():
    with pytest.raises(TypeError, match="epoch"):
        DetectorConfig(epoch=3)
