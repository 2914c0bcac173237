"""The outlier set of a run made in parts, and looked at before it is made, through the command line."""

from __future__ import annotations

import dataclasses
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from sdood_plugin.artifacts import write_json
from sdood_plugin.cli import main
from sdood_plugin.config import OutliersConfig, as_dict
from sdood_plugin.context import Context
from sdood_plugin.errors import RunError
from sdood_plugin.generation import as_begun, recipes
from sdood_plugin.outliers import generate
from sdood_plugin.outliers.dataset import OutlierSet
from sdood_plugin.run import run

from .test_run import artefacts, tiny_config

OUTLIERS = OutliersConfig(sampling_steps=1, sources=20, batch_size=8, start_fraction=[0.1, 0.3], guidance_weight=[0.0, 4.0])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder in which all that `generate` needs is there."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    config = dataclasses.replace(tiny_config(), outliers=OUTLIERS)
    for stage in ("train-reference", "train-diffusion"):
        run(config, folder, stage)
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def test_a_preview_draws_triplets_in_batches_of_one_shape_and_touches_no_set(folder, monkeypatch, capsys):
    shapes, sample_batch = set(), generate.sample_batch

    def recording(unet, images, *args, **settings):
        shapes.add(len(images))
        return sample_batch(unet, images, *args, **settings)

    monkeypatch.setattr(generate, "sample_batch", recording)
    assert main(["generate", "--out", str(folder), "--preview", "12"]) == 0
    assert len(shapes) == 1 and 1 < min(shapes) < 8
    assert capsys.readouterr().out.strip().endswith("preview.png")
    with Image.open(folder / "preview.png") as figure:
        assert figure.size == (12 * 66 + 2, 3 * 66 + 2)
    assert not (folder / "outliers").exists() and not (folder / "controls").exists()
    assert main(["generate", "--out", str(folder), "--preview", "0"]) == 2


def test_outliers_are_made_in_the_precision_of_the_run(trained):
    config = dataclasses.replace(tiny_config(), outliers=OUTLIERS)
    for precision, expected in (("auto", "float32"), ("float32", "float32"), ("bf16", "bf16")):
        context = Context(dataclasses.replace(config, precision=precision), trained)
        context.__dict__["accelerator"] = SimpleNamespace(device=torch.device("cpu"))  # accelerate knows one precision a process
        assert [recipe.precision for recipe in recipes(context).values()] == [expected] * 2


def test_a_set_is_finished_in_the_precision_it_was_begun_in(trained, tmp_path):
    config = dataclasses.replace(tiny_config(), outliers=OUTLIERS)
    for precision, expected in (("auto", "bf16"), ("float32", "float32")):
        context = Context(dataclasses.replace(config, precision=precision), trained)
        context.__dict__["accelerator"] = SimpleNamespace(device=torch.device("cpu"))
        recipe = recipes(context)["outliers"]
        assert as_begun(recipe, context, [tmp_path / "no set"]) is recipe
        for name in ("meta.json", "in-progress.json"):
            begun = tmp_path / precision / name
            write_json(begun / name, {**dataclasses.replace(recipe, precision="bf16").meta, "manifest_sha256": "0" * 64})
            assert as_begun(recipe, context, [tmp_path / "no set", begun]).precision == expected
            write_json(begun / name, {**recipe.meta, "manifest_sha256": "0" * 64})
            assert as_begun(recipe, context, [begun]).precision == "float32"


def test_the_mode_is_given_by_its_short_name(folder):
    assert main(["generate", "--out", str(folder), "--mode", "other", "--outliers.controls", "false"]) == 0
    assert {row["mode"] for row in OutlierSet(folder / "outliers").manifest} == {"other"}


def test_shards_merge_to_the_set_of_one_call(folder, tmp_path, capsys):
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    assert main(["generate", "--out", str(whole)]) == 0
    assert main(["generate", "--out", str(folder), "--shard", "1/2"]) == 0
    assert main(["generate", "--out", str(folder), "--merge"]) == 1
    assert "make the missing shard" in capsys.readouterr().err
    assert main(["generate", "--out", str(folder), "--shard", "2/2"]) == 0
    assert main(["generate", "--out", str(folder), "--merge"]) == 0
    for name in ("outliers", "controls"):
        assert artefacts(folder / name) == artefacts(whole / name)
        OutlierSet(folder / name).verify()
    rows = list(OutlierSet(folder / "outliers").manifest)
    assert len({row["start_fraction"] for row in rows}) > 4 and len({row["guidance_weight"] for row in rows}) == 20
    assert all(row["predicted_after"] and row["reference"] for row in rows)
    controls = {row["source_index"]: row for row in OutlierSet(folder / "controls").manifest}
    assert all(controls[row["source_index"]]["start_fraction"] == row["start_fraction"] for row in rows)
    capsys.readouterr()
    assert main(["generate", "--out", str(folder)]) == 0  # nothing is left to do
    assert main(["export-outliers", str(folder / "outliers"), "--to", str(tmp_path / "set.npz")]) == 0
    assert "20 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shard", "3/2"], "--shard: got 3/2"),
        (["--shard", "1"], "--shard: got 1"),
        (["--shard", "0/2"], "--shard: got 0/2"),
        (["--merge"], "no shards in"),
        (["--merge", "--shard", "1/2"], "one at a time"),
        (["--shard", "1/2", "--diffusion.steps", "7"], "no result of `train-diffusion` with these settings"),
        (["--preview", "2", "--detector.epochs", "7"], "no result of `train-reference` with these settings"),
        (["--outliers.start_fraction", "[0.1,0.4]"], "diffusion.max_start_fraction"),
    ],
)
def test_wrong_usage_is_one_line(folder, arguments, said, capsys):
    before = artefacts(folder)
    assert main(["generate", "--out", str(folder), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sdood: error: ") and said in error
    assert artefacts(folder) == before


def test_a_folder_in_the_place_of_the_set_is_left_alone(folder, capsys):
    (folder / "outliers").mkdir()
    (folder / "outliers" / "thesis.tex").write_text("years of work")
    assert main(["generate", "--out", str(folder)]) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert [path.name for path in (folder / "outliers").iterdir()] == ["thesis.tex"]


def test_another_reference_network_makes_no_image_again(folder):
    config = dataclasses.replace(tiny_config(), outliers=OUTLIERS)
    run(config, folder, "generate")
    images = {file: file.stat().st_mtime_ns for file in (folder / "outliers" / "images").rglob("*.png")}
    before = list(OutlierSet(folder / "outliers").manifest)
    run(dataclasses.replace(config, detector=dataclasses.replace(config.detector, epochs=3)), folder, "generate")
    after = list(OutlierSet(folder / "outliers").manifest)
    assert {file: file.stat().st_mtime_ns for file in images} == images
    assert [row["file"] for row in after] == [row["file"] for row in before]
    assert all(a["reference"] != b["reference"] for a, b in zip(after, before, strict=True))


def test_generate_mends_a_finished_set_and_keeps_what_is_whole(folder, capsys):
    assert main(["generate", "--out", str(folder)]) == 0
    before, images = artefacts(folder), sorted((folder / "outliers" / "images").rglob("*.png"))
    first, second, last = images[0], images[1], OutlierSet(folder / "outliers").manifest[-1]["file"]
    time = (folder / "outliers" / last).stat().st_mtime_ns
    first.write_bytes(second.read_bytes())
    with pytest.raises(RunError, match="generate the set again"):
        OutlierSet(folder / "outliers").verify()
    assert main(["generate", "--out", str(folder)]) == 0
    assert artefacts(folder) == before and (folder / "outliers" / last).stat().st_mtime_ns == time


def test_a_merge_that_must_fail_touches_no_set(folder, capsys):
    assert main(["generate", "--out", str(folder)]) == 0
    before, settings = artefacts(folder), ["--outliers.sampler", "ddim"]
    assert main(["generate", "--out", str(folder), "--shard", "1/1", *settings]) == 0
    shutil.rmtree(folder / "shards" / "1-of-1" / "outliers")  # as a kill between controls and outliers leaves it
    assert main(["generate", "--out", str(folder), "--merge", *settings]) == 1
    assert "one that was not begun" in capsys.readouterr().err
    shutil.rmtree(folder / "shards")
    assert artefacts(folder) == before


def test_controls_that_are_not_wanted_any_more_go(folder):
    config = dataclasses.replace(tiny_config(), outliers=OUTLIERS)
    run(config, folder, "generate")
    assert (folder / "controls" / "meta.json").exists()
    run(dataclasses.replace(config, outliers=dataclasses.replace(OUTLIERS, controls=False)), folder, "generate")
    assert not (folder / "controls").exists() and len(OutlierSet(folder / "outliers")) == 20


def test_ranges_survive_the_configuration_file(tmp_path):
    from sdood_plugin.cli import read_config

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(as_dict(dataclasses.replace(tiny_config(), outliers=OUTLIERS))))
    assert read_config(tmp_path / "config.yaml").outliers == OUTLIERS
