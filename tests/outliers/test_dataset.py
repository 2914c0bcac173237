"""A set read back: lazily, by hash, in parts; changed folders are refused."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sdood_plugin.artifacts import file_hash, read_csv, write_csv
from sdood_plugin.errors import RunError, UsageError
from sdood_plugin.outliers.blocks import file_name
from sdood_plugin.outliers.dataset import OutlierSet

from .making import CONFIG, a_recipe, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory, unet, tiny, pictures, accelerator):
    folder = tmp_path_factory.mktemp("sets") / "set"
    write(folder, unet, a_recipe(pictures, tiny, dataclasses.replace(CONFIG, per_source=2)), accelerator)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "set")
    return tmp_path / "set"


def test_items_columns_and_tensors_agree(folder):
    made = OutlierSet(folder)
    images, labels, sources = made.tensors("cpu")
    rows = read_csv(folder / "manifest.csv")
    assert images.shape == (24, 3, 8, 8) and images.dtype == torch.uint8
    lazy = OutlierSet(folder)
    for index, (image, label, source) in enumerate(lazy):
        assert torch.equal(image, images[index]) and (label, source) == (int(labels[index]), int(sources[index]))
        assert (rows[index]["source_label"], rows[index]["source_index"]) == (str(label), str(source))
        assert lazy.manifest[index] == rows[index]
    assert "images" not in lazy.__dict__  # nothing was kept
    assert torch.equal(lazy[-1][0], images[-1]) and lazy.manifest[-1] == rows[-1]
    for index in (24, -25):
        for sequence in (made, lazy, lazy.manifest):
            with pytest.raises(IndexError):
                sequence[index]
    assert list(lazy.manifest) == rows and list(lazy.manifest[3:9:2]) == rows[3:9:2]
    chosen = torch.tensor([23, 0, 7, 7])
    assert torch.equal(lazy.read(chosen), images[chosen])


def test_a_data_loader_takes_it_apart_in_other_processes(folder):
    made = OutlierSet(folder)
    batches = list(DataLoader(made, batch_size=10, num_workers=1))
    assert torch.equal(torch.cat([images for images, _, _ in batches]), made.images)
    assert torch.equal(torch.cat([sources for _, _, sources in batches]), made.sources)


def test_a_split_keeps_the_outliers_of_a_source_together(folder, generator):
    made = OutlierSet(folder)
    first, second = made.split(0.75, generator=generator)
    assert (len(first), len(second)) == (18, 6) and not set(first.sources.tolist()) & set(second.sources.tolist())
    for part in (first, second):
        for (image, label, source), row in zip(part, part.manifest, strict=True):
            where = next(i for i, other in enumerate(made.manifest) if other == row)
            assert torch.equal(image, made.images[where]) and (label, source) == made[where][1:]
        part.verify()
    for share in (0.0, 1.0, 0.01):
        with pytest.raises(UsageError, match="share of the sources"):
            made.split(share, generator=generator)


def test_sets_of_one_run_join(folder, tmp_path, unet, tiny, pictures, accelerator, generator):
    write(tmp_path / "away", unet, a_recipe(pictures, tiny, dataclasses.replace(CONFIG, mode="away")), accelerator)
    made, away = OutlierSet(folder), OutlierSet(tmp_path / "away")
    both = made.join(away)
    assert torch.equal(both.images, torch.cat([made.images, away.images])) and len(both) == 36
    assert [row["mode"] for row in both.manifest] == ["other"] * 24 + ["away"] * 12
    shuffled = both.take(torch.randperm(36, generator=generator))
    for (image, _, source), row in zip(shuffled, shuffled.manifest, strict=True):
        whole = away if row["mode"] == "away" else made
        where = next(i for i, other in enumerate(whole.manifest) if other == row)
        assert torch.equal(image, whole.images[where]) and source == int(row["source_index"])
    shuffled.verify()
    other = a_recipe(pictures, tiny, labels=pictures.labels.flip(0))
    write(tmp_path / "other", unet, other, accelerator)
    with pytest.raises(UsageError, match="another labels_sha256"):
        made.join(OutlierSet(tmp_path / "other"))


def trusted(folder):
    """Give the manifest's present hash to meta.json, as a forger would."""
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "manifest_sha256": file_hash(folder / "manifest.csv")}))


def tampered(folder, what):
    manifest, first = folder / "manifest.csv", folder / file_name(0, 0)
    text = manifest.read_text()
    if what == "a row less":
        manifest.write_text("".join(text.splitlines(keepends=True)[:-1]))
    if what == "another label":
        manifest.write_text(text.replace("other", "away", 1))
    if what in ("a way out", "a path from the root"):
        manifest.write_text(text.replace("images/0000/0000000_0.png", "../../p.png" if "out" in what else "/etc/p.png"))
        trusted(folder)
    if what == "columns of another table":
        manifest.write_text(text.replace("source_label", "label", 1))
    if what == "a row cut short":
        manifest.write_text(text.rsplit(",", 3)[0] + "\n")
    if what == "no text":
        manifest.write_bytes(b"\xff\xfe" + manifest.read_bytes())
    if what == "an image less":
        first.unlink()
    if what == "half an image":
        first.write_bytes(first.read_bytes()[:60])
    if what == "another image":
        first.write_bytes((folder / file_name(1, 0)).read_bytes())
    if what == "a link":
        (folder / "there.png").write_bytes(first.read_bytes())
        first.unlink()
        first.symlink_to(folder / "there.png")
    if what == "no manifest":
        manifest.unlink()
    if what == "no meta":
        (folder / "meta.json").unlink()
    if what == "half a meta":
        (folder / "meta.json").write_text("{")
    if what == "a meta of another kind":
        (folder / "meta.json").write_text("[]")
    if what == "one image more":
        shutil.copy(first, folder / "images" / "0000" / "more.png")
    if what == "another imglist":
        (folder / "imglist.txt").write_text("../../etc/passwd 0\n")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a row less", "23 rows.*24 as in meta.json"),
        ("another label", "other bytes than when it was made"),
        ("a way out", "inside the folder"),
        ("a path from the root", "inside the folder"),
        ("columns of another table", "no source_label"),
        ("a row cut short", "values in row 24"),
        ("no text", "UTF-8|no file"),
        ("no manifest", "manifest.csv"),
        ("no meta", "no meta.json.*a finished outlier set"),
        ("a meta of another kind", "meta.json: got list.*an object"),
        ("half a meta", "meta.json"),
    ],
)
def test_changed_lists_are_refused_at_once(copy, what, message):
    assert len(OutlierSet(copy)) == 24
    tampered(copy, what)
    with pytest.raises(RunError, match=message) as caught:
        OutlierSet(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["key", "count", "image_size", "classes", "manifest_sha256", "sources_sha256", "labels_sha256"])
def test_a_meta_without_what_others_rely_on_is_refused(copy, name):
    meta = json.loads((copy / "meta.json").read_text())
    for wrong in ({**meta, name: [1]}, {other: value for other, value in meta.items() if other != name}):
        (copy / "meta.json").write_text(json.dumps(wrong))
        with pytest.raises(RunError, match=f"`{name}` in"):
            OutlierSet(copy)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("source_label", "abc0", "integers from 0 on"),
        ("source_label", "9" * 30, "integers from 0 on"),
        ("source_index", "-1", "integers from 0 on"),
        ("start_fraction", "much", "finite numbers"),
        ("guidance_weight", "nan", "finite numbers"),
        ("sha256", "é" * 64, "64 hex digits"),
        ("file", "images/bär.png", "inside the folder, in ASCII"),
        ("file", file_name(0, 0), "a file twice"),
    ],
)
def test_rows_that_say_what_cannot_be_are_refused_though_their_hashes_fit(copy, column, value, message):
    rows = read_csv(copy / "manifest.csv")
    rows[2][column] = value
    write_csv(copy / "manifest.csv", list(rows[0]), [list(row.values()) for row in rows])
    trusted(copy)
    with pytest.raises(RunError, match=message) as caught:
        OutlierSet(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["images/extra", "images/0000/extra.png", "extra", "payload.sh", "more/images.png"])
def test_verify_refuses_links_and_strangers(copy, name):
    (copy / name).parent.mkdir(exist_ok=True)
    if "extra" in name:
        (copy / name).symlink_to("/etc" if name != "images/0000/extra.png" else copy / file_name(0, 0))
    else:
        (copy / name).write_text("#!/bin/sh")
    with pytest.raises(RunError, match=f"(a link|a file|a folder) {name.split('/i')[0]}"):
        OutlierSet(copy).verify()


def test_images_of_another_size_than_the_meta_says_are_refused(copy):
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps({**meta, "image_size": 9}))
    with pytest.raises(RunError, match="9 x 9 as in meta.json"):
        _ = OutlierSet(copy).images


@pytest.mark.parametrize("what", ["an image less", "half an image", "another image", "a link"])
def test_a_changed_image_is_refused_when_it_is_read_and_by_verify(copy, what):
    tampered(copy, what)
    made = OutlierSet(copy)
    assert len(made.read(torch.arange(1, 24))) == 23
    for work in (lambda: made[0], lambda: made.images, made.verify):
        with pytest.raises(RunError, match="0000000_0.png"):
            work()


@pytest.mark.parametrize(("what", "message"), [("one image more", "more.png"), ("another imglist", "imglist")])
def test_verify_sees_what_no_reading_would(copy, what, message):
    made = OutlierSet(copy)
    made.verify()
    tampered(copy, what)
    with pytest.raises(RunError, match=message):
        made.verify()


def test_images_of_two_sizes_are_refused(copy):
    first = copy / file_name(0, 0)
    before = file_hash(first)
    Image.new("RGB", (9, 9)).save(first)
    (copy / "manifest.csv").write_text((copy / "manifest.csv").read_text().replace(before, file_hash(first)))
    trusted(copy)
    with pytest.raises(RunError, match="another size"):
        _ = OutlierSet(copy).images
