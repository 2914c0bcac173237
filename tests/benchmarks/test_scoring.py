"""The scoring ablation on a finished run: its rows are the run's own, and alpha is chosen in every way that it names."""

from __future__ import annotations

from functools import partial

import pytest
from PIL import Image

from benchmarks import readme, scoring
from sdood_plugin import stages
from sdood_plugin.artifacts import read_json
from sdood_plugin.detector.network import load_network
from sdood_plugin.run import run as run_stages
from sdood_plugin.scoring.score import fit_score

from ..test_run import tiny_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scoring") / "run"
    run_stages(tiny_config(), folder, "evaluate")
    return folder


def test_the_ablation_scores_the_run_and_chooses_alpha_in_four_ways(finished, monkeypatch):
    run, tests = scoring.opened(finished)
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


def test_the_readme_shows_the_scores_of_the_first_run_and_its_threshold(finished, tmp_path, monkeypatch):
    results = tmp_path / "results"
    for module in (scoring, readme):
        monkeypatch.setattr(module, "RESULTS", results)
    monkeypatch.setattr(scoring, "write_result", partial(scoring.write_result, folder=results))
    monkeypatch.setattr("sys.argv", ["scoring", str(finished), "--suffix=-tiny"])
    scoring.main()
    with Image.open(tmp_path / "figures" / "scoring-tiny-histograms.png") as drawn:
        assert min(drawn.size) > 200
    text = readme.section("scoring-tiny", read_json(results / "scoring-tiny.json"))
    assert "(figures/scoring-tiny-histograms.png)" in text


def test_a_run_that_is_not_evaluated_is_refused_before_anything_is_done(tmp_path, monkeypatch):
    (tmp_path / "detector").mkdir()
    (tmp_path / "detector" / "score.json").touch()
    monkeypatch.setattr("sys.argv", ["scoring", str(tmp_path)])
    with pytest.raises(SystemExit, match="no finished run in"):
        scoring.main()
