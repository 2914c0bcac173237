"""The scoring ablation on a finished run: its rows are the run's own, and alpha is chosen in every way that it names."""

from __future__ import annotations

import pytest

from benchmarks import scoring
from sdood_plugin import stages
from sdood_plugin.artifacts import read_json
from sdood_plugin.detector.network import load_network
from sdood_plugin.run import run as run_stages
from sdood_plugin.scoring.score import fit_score

from ..test_run import tiny_config


def test_the_ablation_scores_the_run_and_chooses_alpha_in_four_ways(tmp_path, monkeypatch):
    run_stages(tiny_config(), tmp_path / "run", "evaluate")
    run, tests = scoring.opened(tmp_path / "run")
    own = {row["ood"]: row["auroc"] for row in read_json(run.folder / "evaluation" / "rows.json") if row["method"] == "sdood"}
    rows, by_class = scoring.ablation(run, tests)
    assert {row["ood"]: row["auroc"] for row in rows if row["method"] == "both"} == pytest.approx(own)
    assert {row["method"] for row in by_class} == {"both", "distance", "vote"}
    told = []
    monkeypatch.setattr(scoring, "fit_score", lambda **given: told.append(given.keys() - {"config"}) or fit_score(**given))
    rows, found = scoring.alphas(run, tests)
    everything = stages.score_features(run, load_network(run.folder / "detector" / "detector.safetensors")).keys()
    kinds = {"outlier_classes", "heldout_classes"}
    assert told == [everything - kinds - {"heldout_controls"}, everything - {"heldout_controls"}, everything - kinds, everything]
    last = f"both, alpha by {list(found)[-1]}"
    assert {row["ood"]: row["auroc"] for row in rows if row["method"] == last} == pytest.approx(own)
    assert found["classes and controls"] == read_json(run.folder / "detector" / "score.json")["calibration"]["alpha"]
