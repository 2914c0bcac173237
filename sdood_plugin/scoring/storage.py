"""The fitted score on disk: banks as safetensors, settings and calibration as JSON."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ..artifacts import read_json, read_tensors, write_json, write_tensors
from ..config import ScoringConfig
from .score import Calibration, Score


def save_score(folder: Path, score: Score) -> None:
    """Write bank.safetensors and score.json."""
    write_tensors(folder / "bank.safetensors", {"inside": score.inside, "outliers": score.outliers})
    write_json(
        folder / "score.json", {"config": dataclasses.asdict(score.config), "calibration": dataclasses.asdict(score.calibration)}
    )


def load_score(folder: Path, device: torch.device | str = "cpu") -> Score:
    """The score of `save_score`, its banks on `device`."""
    banks, settings = read_tensors(folder / "bank.safetensors"), read_json(folder / "score.json")
    return Score(
        banks["inside"].to(device),
        banks["outliers"].to(device),
        ScoringConfig(**settings["config"]),
        Calibration(**settings["calibration"]),
    )
