"""The detector as one object: decisions, batches, streams, the command line, and no word from test images."""

from __future__ import annotations

import csv
import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sdood_plugin import Detector, decision
from sdood_plugin.cli import main
from sdood_plugin.config import (
    ClusteringConfig,
    DataConfig,
    DetectorConfig,
    DiffusionConfig,
    ImagesConfig,
    OODConfig,
    OutliersConfig,
    RunConfig,
    ScoringConfig,
)
from sdood_plugin.data.images import save_png
from sdood_plugin.detector.network import ThreeHeadNet, save_network
from sdood_plugin.errors import RunError, UsageError
from sdood_plugin.features import Backbone, extract
from sdood_plugin.run import run
from sdood_plugin.scoring.score import fit_score
from sdood_plugin.scoring.storage import save_score

SIZE = 8


def draw(count, seed, dark=0):
    return torch.randint(256 - dark, (count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder that holds a detector: a network with random weights and a score fitted on random images."""
    place = tmp_path_factory.mktemp("run")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ThreeHeadNet(Backbone("small_cnn"), 3, SIZE).eval()
    banks = [
        extract(network.backbone, draw(60, seed, dark), device=torch.device("cpu")) for seed, dark in enumerate((0, 180, 0, 180))
    ]
    score = fit_score(banks[0], banks[1], banks[2], banks[3], ScoringConfig(false_alarm_rate=0.1))
    save_network(place / "detector" / "detector.safetensors", network)
    save_score(place / "detector", score)
    return place


@pytest.fixture(scope="module")
def detector(folder):
    return Detector.load(folder)


def test_a_decision_is_the_score_above_the_threshold(detector):
    inside, dark = draw(50, 2), draw(50, 9, 180)
    scores, flags = detector.decide(inside)
    assert torch.equal(flags, scores > detector.threshold) and 0 < flags.double().mean() <= 0.15
    assert detector.decide(dark)[1].double().mean() > 0.8
    strict, lax = (detector.decide(inside, rate)[1].sum() for rate in (0.02, 0.5))
    assert strict < flags.sum() < lax
    assert detector.threshold_at(0.1).value == detector.threshold
    with pytest.raises(UsageError, match="false_alarm_rate: got 1"):
        detector.threshold_at(1)


def test_verdicts_are_those_of_the_parts(detector):
    images = draw(20, 5)
    verdicts = detector.verdicts(images)
    heads = detector.network(images.float() / 127.5 - 1)
    distance, votes = detector.fitted.terms(heads.features.detach())
    alpha = detector.fitted.calibration.alpha
    torch.testing.assert_close(verdicts.score, distance + alpha * votes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(verdicts.g_bin, heads.binary.softmax(1)[:, 1].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(verdicts.energy, -heads.inside.logsumexp(1).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(verdicts.msp, -heads.inside.softmax(1).max(1).values.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(verdicts.g_out, -heads.outside.logsumexp(1).detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(verdicts.votes, votes) and torch.equal(verdicts.p_value, detector.fitted.p_values(verdicts.score))


def test_one_image_at_a_time_or_a_stream_says_the_same(detector):
    images = draw(23, 6)
    whole = detector.verdicts(images)
    alone = torch.cat([detector.score(image[None]) for image in images])
    torch.testing.assert_close(whole.score, alone, rtol=1e-4, atol=1e-5)
    loader = DataLoader(TensorDataset(images, torch.zeros(23)), batch_size=5)
    for batches in (loader, images.split(7), iter(images.split(23))):
        streamed = torch.cat([verdicts.score for verdicts in detector.stream(batches)])
        torch.testing.assert_close(whole.score, streamed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "images",
    [
        draw(2, 0).float(),
        draw(2, 0)[:, :2],
        draw(2, 0)[:, :, :4],
        draw(2, 0)[0],
        draw(2, 0)[:0],
        draw(2, 0).numpy(),
        "photos",
        {},
    ],
)
def test_images_it_was_not_made_for_are_refused(detector, images):
    with pytest.raises(UsageError, match="expected uint8"):
        detector.score(images)
    with pytest.raises(UsageError, match="expected uint8"):
        next(detector.stream([images]))


def test_an_image_whose_features_are_not_finite_is_named(detector, monkeypatch, tmp_path):
    def broken(model, images, **rest):
        features = extract(model, images, **rest)
        features[2, 5] = torch.nan
        return features

    monkeypatch.setattr(decision, "extract", broken)
    with pytest.raises(RunError, match=r"features of image 2: got NaN or infinity \(1 of 4 images\)"):
        detector.score(draw(4, 0))
    for name, image in zip("abcd", draw(4, 0), strict=True):
        save_png(tmp_path / f"{name}.png", image)
    with pytest.raises(RunError, match="features of image c.png"):
        detector.decide(detector.load_images(tmp_path))


def test_a_folder_without_a_detector_is_named(tmp_path):
    with pytest.raises(RunError, match="no detector"):
        Detector.load(tmp_path)


def test_the_command_writes_a_line_an_image_most_ood_first(folder, detector, tmp_path, capsys):
    images = torch.cat([draw(5, 2), draw(5, 9, 180)])
    for number, image in enumerate(images):
        save_png(tmp_path / "new" / f"{number}.png", image)
    assert main(["score", "--out", str(folder), "--images", str(tmp_path / "new"), "--csv", str(tmp_path / "said.csv")]) == 0
    with (tmp_path / "said.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True) and list(rows[0])[:3] == ["path", "called_ood", "score"]
    expected = dict(zip((f"{number}.png" for number in range(10)), detector.score(images).tolist(), strict=True))
    assert {row["path"]: float(row["score"]) for row in rows} == pytest.approx(expected, rel=1e-4)
    assert all(int(row["called_ood"]) == (float(row["score"]) > detector.threshold) for row in rows)
    said = capsys.readouterr().out
    called = sum(int(row["called_ood"]) for row in rows)
    assert f"{called} of 10 images called OOD" in said and "95 % interval from 60 held-out images" in said
    assert main(["score", "--out", str(folder), "--images", str(tmp_path / "new")]) == 0
    assert (folder / "scores.csv").read_text() == (tmp_path / "said.csv").read_text()


@pytest.mark.parametrize(("arguments", "code", "said"), [([], 2, "out"), (["--images", "no-such"], 2, "no-such")])
def test_the_command_names_what_is_wrong(folder, arguments, code, said, capsys):
    assert main(["score", *(["--out", str(folder)] if arguments else []), *arguments]) == code
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error


def test_test_images_have_no_part_in_the_detector(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("train", 30), ("test", 8), ("test2", 6), ("ood", 7), ("ood2", 9)):
        np.savez(tmp_path / f"{name}.npz", images=rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8))

    def source(name):
        return ImagesConfig(str(tmp_path / f"{name}.npz"))

    config = RunConfig(
        data=DataConfig(train=source("train"), test=source("test"), ood=[OODConfig("a", "near", source("ood"))], image_size=SIZE),
        clustering=ClusteringConfig(clusters=2, pretext_steps=1, pretext_batch_size=8),
        diffusion=DiffusionConfig(steps=1, batch_size=4, size="tiny"),
        outliers=OutliersConfig(sampling_steps=1),
        detector=DetectorConfig(epochs=1, batch_size=16),
        device="cpu",
    )
    other = dataclasses.replace(
        config, data=dataclasses.replace(config.data, test=source("test2"), ood=[OODConfig("b", "far", source("ood2"))])
    )
    detectors, results = [], []
    for name, settings in (("one", config), ("two", other)):
        out = tmp_path / name
        run(settings, out, "evaluate")
        detectors.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (out / "detector").iterdir()})
        results.append((out / "evaluation" / "rows.json").read_text())
    assert detectors[0] == detectors[1] and {"score.json", "bank.safetensors", "detector.safetensors"} <= detectors[0].keys()
    assert results[0] != results[1]
