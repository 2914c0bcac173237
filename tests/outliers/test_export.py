"""A set in other containers holds the same images, labels and rows."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from sdood_plugin.config import DataConfig, ImagesConfig
from sdood_plugin.data.sources import load_images
from sdood_plugin.errors import RunError, UsageError
from sdood_plugin.outliers import export
from sdood_plugin.outliers.blocks import file_name
from sdood_plugin.outliers.dataset import OutlierSet
from sdood_plugin.outliers.export import export_set
from sdood_plugin.outliers.manifest import COLUMNS

from .making import a_recipe, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory, unet, tiny, pictures, accelerator):
    folder = tmp_path_factory.mktemp("sets") / "set"
    write(folder, unet, a_recipe(pictures, tiny), accelerator)
    return folder


def test_arrays_hold_the_set_and_can_be_read_as_images(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_CHUNK", 5)
    made, path = OutlierSet(folder), tmp_path / "set.npz"
    assert "12 images" in export_set(folder, path)
    with np.load(path, allow_pickle=False) as arrays:
        assert np.array_equal(arrays["images"], made.images.permute(0, 2, 3, 1).numpy())
        assert np.array_equal(arrays["labels"], made.labels.numpy()) and np.array_equal(arrays["sources"], made.sources.numpy())
    assert torch.equal(load_images(ImagesConfig(str(path)), DataConfig(image_size=None), 0).images, made.images)
    with np.load(path, allow_pickle=False) as arrays:
        for row, values in enumerate(zip(*(arrays[name] for name in COLUMNS), strict=True)):
            for name, value in zip(COLUMNS, values, strict=True):
                said = made.manifest[row][name]
                if said:
                    assert type(value)(said) == value, name
                else:
                    assert value in ("", -1) or value != value, name
        assert arrays["seed"].dtype == np.int64 and arrays["guidance_weight"].dtype == np.float64
        assert str(arrays["card"]) == (folder / "README.md").read_text() and json.loads(str(arrays["meta"])) == made.meta
    export_set(folder, tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()


def test_tar_files_hold_the_set(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SAMPLES_A_TAR", 5)
    made = OutlierSet(folder)
    assert "3 tar files" in export_set(folder, tmp_path / "tars")
    samples = {}
    assert (tmp_path / "tars" / "README.md").read_bytes() == (folder / "README.md").read_bytes()
    assert json.loads((tmp_path / "tars" / "meta.json").read_text()) == made.meta
    for path in sorted((tmp_path / "tars").glob("*.tar")):
        with tarfile.open(path) as archive:
            for entry in archive:
                key, suffix = entry.name.split(".")
                samples.setdefault(key, {})[suffix] = archive.extractfile(entry).read()
    assert len(samples) == 12
    for (image, label, _), row, sample in zip(made, made.manifest, samples.values(), strict=True):
        assert sample["png"] == (folder / row["file"]).read_bytes() and int(sample["cls"]) == label
        assert json.loads(sample["json"]) == row
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["png"]))), image.permute(1, 2, 0).numpy())


def test_nothing_is_overwritten_and_a_damaged_set_is_not_passed_on(folder, tmp_path):
    import shutil

    for taken in (tmp_path / "taken.npz", tmp_path / "taken"):
        taken.write_text("mine")
        with pytest.raises(UsageError, match="nothing was written"):
            export_set(folder, taken)
        assert taken.read_text() == "mine"
    before = sorted(folder.rglob("*"))
    for dest, expected in (
        (folder / "images" / "inside.npz", "outside the outlier set"),
        (tmp_path / "x.tar", r"x\.npz, or a new"),
    ):
        with pytest.raises(UsageError, match=expected):
            export_set(folder, dest)
    assert sorted(folder.rglob("*")) == before and not (tmp_path / "x.tar").exists()
    shutil.copytree(folder, tmp_path / "set")
    first = tmp_path / "set" / file_name(0, 0)
    first.write_bytes((tmp_path / "set" / file_name(1, 0)).read_bytes())
    for dest in (tmp_path / "x.npz", tmp_path / "x"):
        with pytest.raises(RunError, match="0000000_0.png"):
            export_set(tmp_path / "set", dest)
    assert not (tmp_path / "x.npz").exists() and not list((tmp_path / "x").iterdir())
