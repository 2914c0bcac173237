"""The fitted score on disk: banks as safetensors, settings and calibration as JSON."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ..artifacts import read_json, read_tensors, write_json, write_tensors
from ..config import ScoringConfig
from ..errors import RunError
from .score import Calibration, Score


def save_score(folder: Path, score: Score) -> None:
    """Write bank.safetensors and score.json."""
    write_tensors(folder / "bank.safetensors", {"inside": score.inside, "outliers": score.outliers, "heldout": score.heldout})
    write_json(
        folder / "score.json", {"config": dataclasses.asdict(score.config), "calibration": dataclasses.asdict(score.calibration)}
    )


def load_score(folder: Path, device: torch.device | str = "cpu") -> Score:
    """The score of `save_score`, its banks on `device`.

    Raises:
        RunError: The files are absent, broken or of an earlier version.
    """
    banks, settings = read_tensors(folder / "bank.safetensors"), read_json(folder / "score.json")
    try:
        config, calibration = ScoringConfig(**settings["config"]), Calibration(**settings["calibration"])
        return Score(banks["inside"].to(device), banks["outliers"].to(device), config, calibration, banks["heldout"])
    except (KeyError, TypeError) as error:
        raise RunError(
            f"score in {folder}", error, "the files of this version", "run `sdood train-detector` on that run folder again"
        ) from error
