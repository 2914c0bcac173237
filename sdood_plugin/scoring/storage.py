"""The fitted score on disk: banks as safetensors, settings and calibration as JSON."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ..artifacts import read_json, read_tensors, write_json, write_tensors
from ..config import ScoringConfig
from ..errors import RunError
from .score import Calibration, Score
from .terms import Terms


def save_score(folder: Path, score: Score) -> None:
    """Write bank.safetensors, with the terms of held-out images, and score.json, with the threshold they make for readers."""
    heldout = {f"heldout_{name}": term for name, term in score.heldout._asdict().items()}
    write_tensors(folder / "bank.safetensors", {"inside": score.inside, "outliers": score.outliers, **heldout})
    said = score.threshold
    threshold = {
        "threshold": said.value,
        "false_alarm_rate": said.false_alarm_rate,
        "false_alarm_interval": [said.low, said.high],
    }
    calibration = {**dataclasses.asdict(score.calibration), **threshold}
    write_json(folder / "score.json", {"config": dataclasses.asdict(score.config), "calibration": calibration})


def load_score(folder: Path, device: torch.device | str = "cpu") -> Score:
    """The score of `save_score`, its banks on `device`.

    Raises:
        RunError: The files are absent, broken or of an earlier version.
    """
    banks, settings = read_tensors(folder / "bank.safetensors"), read_json(folder / "score.json")
    try:
        config, fields = ScoringConfig(**settings["config"]), dataclasses.fields(Calibration)
        calibration = Calibration(**{field.name: settings["calibration"][field.name] for field in fields})
        heldout = Terms(banks["heldout_distance"], banks["heldout_votes"])
        return Score(banks["inside"].to(device), banks["outliers"].to(device), config, calibration, heldout)
    except (KeyError, TypeError) as error:
        raise RunError(
            f"score in {folder}",
            error,
            "the files of this version",
            "delete score.json and run `sdood train-detector` on that run folder",
        ) from error
