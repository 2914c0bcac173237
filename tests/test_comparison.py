"""The comparators' stages: what they train, that they start from the same weights, and that no test image is near."""

from __future__ import annotations

import csv
import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from sdood_plugin.artifacts import read_json, read_tensors, write_tensors
from sdood_plugin.cli import expand_shortcuts, main
from sdood_plugin.comparison import Comparators
from sdood_plugin.config import ClusteringConfig, CompareConfig, DetectorConfig
from sdood_plugin.context import Context
from sdood_plugin.detector.batches import Labelled
from sdood_plugin.errors import UsageError
from sdood_plugin.features import Backbone
from sdood_plugin.run import run

from .test_run import tiny_config

NEW = ["dn2", "mscl", "multi-class", "fake-it"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "run"
    config = tiny_config(compare=CompareConfig(["distance", "msp", *NEW], mscl_lr=0.01, fake_it_steps=2))
    run(config, folder, "compare")
    return config, folder


def test_every_comparator_has_its_rows_and_every_image_its_scores(compared):
    config, folder = compared
    rows = read_json(folder / "comparison" / "rows.json")
    methods = ["distance", "msp", "dn2", "dn2-cosine", "mscl", "multi-class", "multi-class-cosine", "fake-it", "fake-it-cosine"]
    assert [row["method"] for row in rows if row["ood"] == "noise"] == methods
    for name, count in (("id", 30), ("digits", 20), ("noise", 20)):
        with (folder / "comparison" / f"scores-{name}.csv").open() as stream:
            lines = list(csv.DictReader(stream))
        assert len(lines) == count and list(lines[0]) == ["path", *methods]
    quality = read_json(folder / "comparators" / "fake-it" / "fakes.json")
    kept = int((~Context(config, folder).heldout).sum())
    assert quality["steps"] == 2 and quality["count"] == kept
    assert len(read_tensors(folder / "comparators" / "fake-it" / "fakes.safetensors")["images"]) == kept


def test_frozen_and_fine_tuned_features_start_from_the_pretext(compared):
    config, folder = compared
    pretext = read_tensors(folder / "clustering" / "backbone.safetensors")
    comparators = Comparators(Context(config, folder), folder / "comparators")
    assert comparators._pretrained == str(folder / "clustering" / "backbone.safetensors")
    mscl = read_tensors(folder / "comparators" / "mscl" / "backbone.safetensors")
    assert torch.equal(mscl["body.layers.0.weight"], pretext["body.layers.0.weight"])  # frozen half


def test_trained_comparators_are_not_trained_again(compared, monkeypatch):
    config, folder = compared

    def refuse(*_args, **_kwargs):
        raise AssertionError("trained again")

    for name in ("train_detector", "train_mscl", "train_simclr", "train_diffusion"):
        monkeypatch.setattr(f"sdood_plugin.comparison.{name}", refuse)
    fewer = dataclasses.replace(config, scoring=dataclasses.replace(config.scoring, normalise=False))
    assert run(fewer, folder, "compare")["train-comparators"] == "done"
    for methods in (["dn2"], ["multi-class"], config.compare.methods):  # one after the other, and all again
        alone = dataclasses.replace(config, compare=dataclasses.replace(config.compare, methods=methods))
        assert run(alone, folder, "compare")["train-comparators"] == "ran"


def test_what_is_not_scored_is_not_embedded(compared, monkeypatch):
    config, folder = compared
    monkeypatch.setattr(Comparators, "_features", lambda *_: pytest.fail("features"))
    assert len(Comparators(Context(config, folder), folder / "comparators").fit(config.compare.methods)) == 6


@pytest.mark.parametrize(
    ("change", "trained"),
    [
        ({"fake_it_lr": 0.5}, ["fake-it"]),
        ({"fake_it_steps": 1}, ["fake-it-diffusion", "fake-it"]),
        ({"multi_class_lr": 0.5}, ["multi-class"]),
        ({"mscl_angular": 0.0}, ["mscl"]),
    ],
)
def test_a_setting_of_one_comparator_trains_that_one_again(compared, tmp_path, monkeypatch, change, trained):
    config, folder = compared
    shutil.copytree(folder, tmp_path / "run")
    seen, job = [], Comparators._job
    monkeypatch.setattr(Comparators, "_job", lambda own, name, key: (seen.append(name), job(own, name, key))[1])
    run(dataclasses.replace(config, compare=dataclasses.replace(config.compare, **change)), tmp_path / "run", "compare")
    assert seen == trained


def test_training_the_comparators_reads_no_test_image(tmp_path, monkeypatch):
    config = tiny_config(compare=CompareConfig([*NEW, "oe-noise"], fake_it_steps=1))
    run(config, tmp_path / "run", "train-reference")

    def refuse(_self):
        raise AssertionError("test images")

    monkeypatch.setattr(Context, "ood", property(refuse))
    monkeypatch.setattr(Context, "test", property(refuse))
    monkeypatch.setattr("sdood_plugin.run.check_input", lambda _context, _chosen: None)
    assert run(config, tmp_path / "run", "train-comparators")["train-comparators"] == "ran"
    with pytest.raises(AssertionError, match="test images"):
        run(config, tmp_path / "run", "compare")


def test_weights_that_a_handover_rounds_are_the_same_start(compared, tmp_path):
    config, folder = compared
    shutil.copytree(folder, tmp_path / "run")
    comparators = Comparators(Context(config, tmp_path / "run"), tmp_path / "run" / "comparators")
    weights = Path(comparators._pretrained)
    before = comparators._settings(config.detector, comparators._pretrained)
    write_tensors(weights, {name: value.bfloat16().to(value.dtype) for name, value in read_tensors(weights).items()})
    assert comparators._settings(config.detector, comparators._pretrained) == before
    weights.with_suffix(".key").unlink()
    assert comparators._settings(config.detector, comparators._pretrained) != before  # a file without one is what it holds


def test_mscl_on_a_frozen_backbone_is_refused_before_anything_is_trained(tmp_path):
    config = tiny_config(compare=CompareConfig(["mscl"]))
    config = dataclasses.replace(config, detector=dataclasses.replace(config.detector, frozen_blocks="all"))
    for only in (None, "compare"):
        with pytest.raises(UsageError, match="mscl.*leave it out"):
            run(config, tmp_path / "run", only)
    assert not (tmp_path / "run").exists()
    assert run(config, tmp_path / "run", "cluster") == {"cluster": "ran"}


def test_mscl_at_another_input_size_than_the_model_s_is_read_back_as_it_was_trained(tmp_path):
    weights, images = tmp_path / "vit.safetensors", torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8)
    write_tensors(weights, Backbone("test_vit").state_dict())
    detector = DetectorConfig(backbone="test_vit", input_size=32, weights=str(weights), epochs=1)
    config, scores = tiny_config(compare=CompareConfig(["mscl"]), detector=detector), []
    for _ in range(2):
        comparators = Comparators(Context(config, tmp_path), tmp_path)
        comparators._train = Labelled(images, torch.zeros(12, dtype=torch.int64))
        scores.append(comparators.fit(["mscl"])[0]([images])["mscl"][0])
    torch.testing.assert_close(*scores)


def test_fake_it_cannot_freeze_more_blocks_than_there_are(tmp_path):
    config = tiny_config(compare=CompareConfig(["fake-it"], fake_it_frozen_blocks=9))
    with pytest.raises(UsageError, match="frozen_blocks.*got 9"):
        run(config, tmp_path / "run", "compare")
    assert not (tmp_path / "run").exists()


def test_weights_of_the_hub_are_a_name_and_no_file(compared, tmp_path):
    config = dataclasses.replace(compared[0], detector=DetectorConfig(weights="hub"))
    comparators = Comparators(Context(config, tmp_path), tmp_path)
    assert comparators._pretrained == "hub"
    assert comparators._settings(config.detector, "hub")["weights"] == "hub"


def test_given_labels_have_no_pretext_so_the_comparators_train_one(tmp_path):
    clustering = ClusteringConfig(method="given", pretext_steps=2, pretext_batch_size=16, augmentation="digits")
    run(tiny_config(clustering=clustering, compare=CompareConfig(["dn2"])), tmp_path / "run", "compare")
    assert (tmp_path / "run" / "comparators" / "pretext" / "pretext.safetensors").exists()


def test_method_is_a_shortcut_for_the_list_of_methods(tmp_path, capsys):
    spelt = expand_shortcuts(["compare", "--out", "run", "--method", "dn2", "--method=fake-it"])
    assert spelt[:3] == ["compare", "--compare.methods", "[dn2,fake-it]"]
    assert main(["compare", "--out", str(tmp_path), "--method", "dn3"]) == 2
    assert "dn3" in capsys.readouterr().err
