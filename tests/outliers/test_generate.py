"""The set on disk agrees with itself; killed, split or damaged, it comes to the same bytes."""

from __future__ import annotations

import dataclasses
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from sdood_plugin.artifacts import file_hash, read_csv, read_json, write_json
from sdood_plugin.data.images import ImageSet, to_unit
from sdood_plugin.diffusion.guidance import wrong_classes
from sdood_plugin.errors import RunError
from sdood_plugin.outliers import writer
from sdood_plugin.outliers.blocks import file_name, guidance_weights, jobs, start_fractions
from sdood_plugin.outliers.dataset import OutlierSet
from sdood_plugin.outliers.manifest import COLUMNS, MEANINGS
from sdood_plugin.outliers.storage import prepare

from ..resuming import Killed
from .making import CONFIG, RANGES, Share, a_recipe, contents, idle, judge, spread_images, write, write_by_processes

WEBP = dataclasses.replace(CONFIG, format="webp")


@pytest.fixture(scope="module")
def reference(tmp_path_factory, unet, tiny, pictures, accelerator):
    folder = tmp_path_factory.mktemp("sets") / "set"
    return folder, write(folder, unet, a_recipe(pictures, tiny, reference="a judge"), accelerator, judge=judge)


@pytest.fixture
def recipe(pictures, tiny):
    return a_recipe(pictures, tiny, reference="a judge")


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, per_source=2, sources=5, mode="blend"),
        dataclasses.replace(CONFIG, mode="blend-own"),
        dataclasses.replace(CONFIG, mode="away"),
        dataclasses.replace(CONFIG, mode="same", sampler="ddpm"),
        RANGES,
        WEBP,
    ],
    ids=["other", "blend", "blend-own", "away", "same", "ranges", "webp"],
)
def test_manifest_imglist_and_images_agree(tmp_path, unet, tiny, pictures, accelerator, config):
    labels = (pictures.labels + 1) % 3  # pseudo-labels that are not the true ones
    files = write(tmp_path, unet, a_recipe(pictures, tiny, config, labels=labels), accelerator, judge=judge)
    rows, made = read_csv(tmp_path / "manifest.csv"), OutlierSet(tmp_path)
    assert tuple(rows[0]) == COLUMNS and MEANINGS.keys() == set(COLUMNS)
    assert sorted(row["file"] for row in rows) == sorted(name for name in files if name.startswith("images/"))
    assert len({row["file"] for row in rows}) == len(rows) == len(made) == len(jobs(12, config))
    assert read_json(tmp_path / "meta.json")["count"] == len(rows)
    assert (tmp_path / "imglist.txt").read_text().splitlines() == [f"{row['file']} {row['source_label']}" for row in rows]
    made.verify()
    pixels = to_unit(pictures.images).double()
    for row, image in zip(rows, made.images, strict=True):
        source, copy = int(row["source_index"]), int(row["copy"])
        own, index = int(labels[source]), torch.tensor([source + copy * 2**32])
        assert (row["source"], int(row["source_label"])) == (pictures.names[source], own)
        wrong = wrong_classes(labels[[source]], 3, seed=9, index=index)[0].tolist()
        targets = {"other": (wrong[0], ""), "away": ("", ""), "same": (own, "")}
        targets |= {"blend": (wrong[0], wrong[1]), "blend-own": (wrong[0], own)}
        assert (row["target"], row["target2"]) == tuple(map(str, targets[config.mode]))
        assert float(row["guidance_weight"]) == pytest.approx(
            float(torch.as_tensor(guidance_weights(config, 9, index))), rel=1e-5
        )
        assert float(row["start_fraction"]) == pytest.approx(float(start_fractions(config, 9, index)), rel=1e-5)
        with Image.open(tmp_path / row["file"]) as opened:
            assert opened.format == config.format.upper()
            assert torch.equal(torch.from_numpy(np.asarray(opened).copy()).permute(2, 0, 1), image)
        distances = (pixels - to_unit(image).double()).square().mean(dim=(1, 2, 3)).sqrt()
        assert float(row["distance_to_source"]) == pytest.approx(float(distances[source]), abs=2e-6)
        assert int(row["nearest_train_index"]) == int(distances.argmin())
        assert float(row["nearest_train_distance"]) == pytest.approx(float(distances.min()), abs=2e-6)
        before, after = judge(pictures.images[[source]])[1][0], judge(image[None])[1][0]
        assert float(row["own_confidence_before"]) == pytest.approx(float(before[own]), abs=2e-6)
        assert float(row["own_confidence_after"]) == pytest.approx(float(after[own]), abs=2e-6)
        assert int(row["predicted_after"]) == int(after.argmax())
        assert float(row["confidence_after"]) == pytest.approx(float(after.max()), abs=2e-6)


def test_without_a_judge_its_columns_are_empty(tmp_path, unet, tiny, pictures, accelerator):
    write(tmp_path, unet, a_recipe(pictures, tiny), accelerator)
    for row in read_csv(tmp_path / "manifest.csv"):
        assert not any(row[name] for name in ("reference", "own_confidence_before", "predicted_after", "confidence_after"))
        assert float(row["nearest_train_distance"]) <= float(row["distance_to_source"]) + 1e-6


def test_the_meta_says_what_the_set_was_made_with(reference, pictures):
    meta = read_json(reference[0] / "meta.json")
    assert (meta["unet_sha256"], meta["reference_sha256"], meta["seed"], meta["classes"]) == ("a tiny U-Net", "a judge", 9, 3)
    assert meta["sources_sha256"] == pictures.fingerprint()
    assert meta["config"]["guidance_weight"] == 2.0 and meta["diffusion"]["size"] == "tiny" and "torch" in meta["versions"]


def test_the_data_card_says_what_the_set_is(tmp_path, unet, tiny, pictures, accelerator, reference):
    card = (reference[0] / "README.md").read_text()
    stay = sum(row["predicted_after"] == row["source_label"] == "1" for row in read_csv(reference[0] / "manifest.csv"))
    assert "# 12 semantic-discrepant outliers" in card and f"| 1 | 4 | {stay} |" in card
    assert "licence and the terms of the SOURCE images" in card and "top to bottom: source, outlier." in card
    assert r"| P(source_label \| source) |" in card and all(
        line.count(" | ") in (1, 5) for line in card.splitlines() if line[:1] == "|"
    )
    assert "| T | 100 |" in card and "Yoon et al." in card and "sdood generate --config config.yaml" in card
    assert "| reference classifier | `a judge`" in card and "was not recorded" in card and "training images only" not in card
    with Image.open(reference[0] / "examples.png") as figure:
        assert figure.size == (12 * 66 + 2, 2 * 66 + 2)
    same = dataclasses.replace(CONFIG, mode="same")
    write(tmp_path / "controls", unet, a_recipe(pictures, tiny, same), accelerator)
    write(tmp_path / "outliers", unet, a_recipe(pictures, tiny), accelerator, controls=tmp_path / "controls")
    assert "# 12 same-class controls" in (tmp_path / "controls" / "README.md").read_text()
    assert "source, same-class control, outlier" in (tmp_path / "outliers" / "README.md").read_text()
    with Image.open(tmp_path / "outliers" / "examples.png") as figure:
        assert figure.size == (12 * 66 + 2, 3 * 66 + 2)


@pytest.mark.parametrize(
    ("origin", "said", "unsaid"),
    [
        (
            {"label_source": "given", "reference_backbone": "vit", "reference_weights": "0123456789abcdef"},
            ["SOURCE image (a given label)", "vit fine-tuned on training images from pre-trained weights `0123456789ab`"],
            ["training images only", "pseudo-label"],
        ),
        (
            {
                "label_source": "scan",
                "label_backbone": "vit",
                "label_weights": "hub",
                "reference_weights": "random",
                "commit": "c0ffee",
            },
            [
                "SOURCE image (a pseudo-label: its cluster by scan)",
                "by scan on features of vit fine-tuned on training images from pre-trained weights of timm",
                "a network trained on training images only",
                "commit c0ffee",
            ],
            ["given label", "not recorded."],
        ),
    ],
)
def test_the_data_card_says_where_labels_and_reference_come_from(
    tmp_path, unet, tiny, pictures, accelerator, origin, said, unsaid
):
    heldout = torch.arange(12) % 4 == 1
    plain = a_recipe(pictures, tiny, reference="a judge")
    recipe = dataclasses.replace(plain, heldout=heldout, origin={"data": "pictures", **origin})
    assert recipe.key == plain.key  # what is only told makes no other images
    write(tmp_path, unet, recipe, accelerator, judge=judge)
    card, meta = (tmp_path / "README.md").read_text(), read_json(tmp_path / "meta.json")
    assert [name for name in said if name not in card] == [] and [name for name in unsaid if name in card] == []
    assert "3 of the 12 training images were held out" in card and "source images (pictures)" in card
    assert meta.items() >= {**origin, "data": "pictures", "training_images": 12, "heldout_images": 3}.items()
    rows = read_csv(tmp_path / "manifest.csv")
    assert [row["heldout"] for row in rows] == [str(int(heldout[int(row["source_index"])])) for row in rows]


def test_a_set_that_is_mended_keeps_its_commit(tmp_path, unet, accelerator, recipe):
    first, later = (dataclasses.replace(recipe, origin={"commit": commit}) for commit in ("c0ffee", "decade"))
    made = write(tmp_path, unet, first, accelerator, judge=judge)
    (tmp_path / file_name(0, 0)).unlink()
    assert write(tmp_path, unet, later, accelerator, judge=judge) == made


def test_a_set_without_a_newer_column_opens_and_is_made_whole_again(tmp_path, unet, accelerator, recipe, reference):
    folder = copied(reference, tmp_path)
    place = COLUMNS.index("heldout")
    rows = [line.split(",") for line in (folder / "manifest.csv").read_text().splitlines()]
    (folder / "manifest.csv").write_text("".join(",".join(row[:place] + row[place + 1 :]) + "\n" for row in rows))
    meta = read_json(folder / "meta.json")
    write_json(folder / "meta.json", {**meta, "manifest_sha256": file_hash(folder / "manifest.csv")})
    old = OutlierSet(folder)
    old.verify()
    assert "heldout" not in old.manifest.columns and len(old.images) == 12
    assert write(folder, unet, recipe, accelerator, judge=judge) == reference[1]


@pytest.mark.parametrize("config", [CONFIG, RANGES], ids=["values", "ranges"])
def test_processes_and_shards_come_to_the_same_bytes(tmp_path, unet, tiny, pictures, accelerator, config):
    recipe = a_recipe(pictures, tiny, config, reference="a judge")
    whole = write(tmp_path / "whole", unet, recipe, accelerator, judge=judge)
    assert write_by_processes(tmp_path / "processes", 3, unet, recipe, accelerator, judge=judge) == whole
    shards = [tmp_path / f"{i}-of-2" for i in (1, 2)]
    for i, folder in enumerate(shards, 1):
        write_by_processes(folder, 2, unet, recipe, accelerator, judge=judge, shard=(i, 2))
        with pytest.raises(RunError, match="meta.json"):
            OutlierSet(folder)
    assert write(tmp_path / "merged", idle, recipe, accelerator, judge=judge, shards=shards) == whole


@pytest.mark.parametrize("shard", [None, (2, 2)])
def test_a_process_makes_its_share_and_no_other(tmp_path, unet, accelerator, recipe, shard):
    prepare(tmp_path, recipe.meta)
    made = write(tmp_path, unet, recipe, Share(accelerator, 1, 2), judge=judge, shard=shard)
    expected = [file_name(source, 0) for source in range(4, 8)] if shard is None else []  # three blocks of four
    assert [name for name in made if name.startswith("images/")] == expected


def test_a_merge_refuses_what_is_not_whole(tmp_path, unet, tiny, pictures, accelerator, recipe):
    one, two, merged = tmp_path / "1", tmp_path / "2", tmp_path / "merged"
    write(one, unet, recipe, accelerator, judge=judge, shard=(1, 2))
    with pytest.raises(RunError, match=r"no block 1 .*make the missing shard"):
        write(merged, idle, recipe, accelerator, shards=[one])
    write(two, unet, a_recipe(pictures, tiny, unet_sha256="another"), accelerator, shard=(2, 2))
    with pytest.raises(RunError, match="made with other settings, images or models"):
        write(merged, idle, recipe, accelerator, shards=[one, two])
    write(two, unet, recipe, accelerator, judge=judge, shard=(2, 2))
    damaged = two / file_name(5, 0)
    damaged.write_bytes(damaged.read_bytes()[:50])
    with pytest.raises(RunError, match="absent or not what they were"):
        write(merged, idle, recipe, accelerator, shards=[one, two])
    write(two, unet, recipe, accelerator, judge=judge, shard=(2, 2))  # the same command again mends it
    write(merged, idle, recipe, accelerator, judge=judge, shards=[one, two])
    OutlierSet(merged).verify()


def test_a_merge_that_must_fail_leaves_the_set_that_is_there(tmp_path, unet, tiny, pictures, accelerator, recipe):
    folder, shards = tmp_path / "set", [tmp_path / f"{i}-of-2" for i in (1, 2)]
    before = write(folder, unet, a_recipe(pictures, tiny, unet_sha256="another"), accelerator)

    def refused(message):
        with pytest.raises(RunError, match=message):
            write(folder, idle, recipe, accelerator, shards=shards)
        assert contents(folder) == before

    write(shards[0], unet, recipe, accelerator, judge=judge, shard=(1, 2))
    refused("one that was not begun.*give that shard's command again")
    shards[1].mkdir()
    prepare(shards[1], recipe.meta)
    refused("no block 1")
    write(shards[1], unet, recipe, accelerator, judge=judge, shard=(2, 2))
    (shards[1] / file_name(5, 0)).unlink()
    refused("absent or not what they were")


def test_killed_at_ten_random_moments_it_comes_to_the_same_bytes(
    tmp_path, unet, tiny, pictures, accelerator, recipe, reference, monkeypatch
):
    """Every file that is opened, every forward and every list is a moment; half-written files are among what is left."""
    moments, chosen = [], random.Random(0)
    original, encode = writer.store, writer.encode

    def dying(work, leave=None):
        def attempt(*args, **kwargs):
            moments.append(1)
            if len(moments) >= limit:
                if leave is not None:
                    leave(*args)
                raise Killed
            return work(*args, **kwargs)

        return attempt

    def half(folder, name, data):
        (folder / name).write_bytes(data[: len(data) // 2])

    limit = 10**9
    monkeypatch.setattr(writer, "store", dying(original, half))
    monkeypatch.setattr(writer, "encode", dying(encode))
    monkeypatch.setattr(writer, "write_csv", dying(writer.write_csv))
    write(tmp_path / "counted", dying(unet), recipe, accelerator, judge=judge)
    total = len(moments)
    for number, limit in enumerate(sorted(chosen.sample(range(1, total + 1), 10))):
        moments.clear()
        folder = tmp_path / str(number)
        with pytest.raises(Killed):
            write(folder, dying(unet), recipe, accelerator, judge=judge)
        limit = 10**9
        assert write(folder, unet, recipe, accelerator, judge=judge) == reference[1]


@pytest.mark.parametrize("step", ["write_lists", "write_card", "finished"])
def test_killed_while_finishing_it_comes_to_the_same_bytes(tmp_path, unet, accelerator, recipe, reference, monkeypatch, step):
    def dying(*args):
        raise Killed

    monkeypatch.setattr(f"sdood_plugin.outliers.generate.{step}", dying)
    with pytest.raises(Killed):
        write(tmp_path, unet, recipe, accelerator, judge=judge)
    monkeypatch.undo()
    assert write(tmp_path, idle, recipe, accelerator, judge=judge) == reference[1]


def test_whole_blocks_are_kept_and_nothing_else(tmp_path, unet, accelerator, recipe, reference):
    calls = []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise Killed
        return unet(*args, **kwargs)

    with pytest.raises(Killed):
        write(tmp_path, dying, recipe, accelerator, judge=judge)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in contents(tmp_path) if name.startswith("images/")}
    assert len(before) == 4 and not (tmp_path / "meta.json").exists()
    with pytest.raises(RunError, match="meta.json"):
        OutlierSet(tmp_path)  # half a set is none
    assert write(tmp_path, unet, recipe, accelerator, judge=judge) == reference[1]
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in before.items())


def copied(reference, tmp_path):
    shutil.copytree(reference[0], tmp_path / "set")
    return tmp_path / "set"


@pytest.mark.parametrize("what", ["lost", "halved", "swapped", "linked", "a folder"])
def test_a_finished_set_mends_what_is_lost_halved_or_swapped(tmp_path, unet, accelerator, recipe, reference, what):
    folder = copied(reference, tmp_path)
    first, second, kept = (folder / file_name(source, 0) for source in (0, 5, 8))
    data, time = first.read_bytes(), kept.stat().st_mtime_ns
    first.unlink()
    if what == "halved":
        first.write_bytes(data[:40])
    if what == "swapped":
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)
    if what == "linked":
        (tmp_path / "elsewhere").write_bytes(data)
        first.symlink_to(tmp_path / "elsewhere")
    if what == "a folder":
        first.mkdir()
        with pytest.raises(RunError, match=r"writing .*free space and give the same command again"):
            write(folder, unet, recipe, accelerator, judge=judge)
        first.rmdir()
    assert write(folder, unet, recipe, accelerator, judge=judge) == reference[1]
    assert kept.stat().st_mtime_ns == time and not first.is_symlink()


def test_a_manifest_that_was_changed_vouches_for_nothing(tmp_path, unet, accelerator, recipe, reference):
    folder = copied(reference, tmp_path)
    (folder / "manifest.csv").write_text((folder / "manifest.csv").read_text().replace("other", "away"))
    assert write(folder, unet, recipe, accelerator, judge=judge) == reference[1]


def test_a_whole_set_is_not_made_again(tmp_path, accelerator, recipe, reference):
    assert write(copied(reference, tmp_path), idle, recipe, accelerator, judge=judge) == reference[1]


def test_another_judge_judges_the_images_that_are_there(tmp_path, unet, tiny, pictures, accelerator, reference):
    folder = copied(reference, tmp_path)
    other = a_recipe(pictures, tiny, reference="another judge")

    def contrary(images):
        features, probabilities = judge(images)
        return features, probabilities.flip(1)

    made = write(folder, idle, other, accelerator, judge=contrary)
    assert made == write(tmp_path / "fresh", unet, other, accelerator, judge=contrary)
    assert made["manifest.csv"] != reference[1]["manifest.csv"] and made["imglist.txt"] == reference[1]["imglist.txt"]


def test_every_batch_has_the_same_shape(tmp_path, unet, tiny, pictures, accelerator):
    # other shapes may take other kernels, which round differently: five images in batches of four are padded
    shapes, judged = set(), set()

    def recording(x, *args, **kwargs):
        shapes.add(tuple(x.shape))
        return unet(x, *args, **kwargs)

    def seeing(images):
        judged.add(tuple(images.shape))
        return judge(images)

    config = dataclasses.replace(CONFIG, sources=5)
    write(tmp_path, recording, a_recipe(pictures, tiny, config, reference="x"), accelerator, judge=seeing)
    assert shapes == {(8, 3, 8, 8)} and judged == {(4, 3, 8, 8)}  # two conditions of four images


def test_under_a_range_of_s_a_batch_is_padded_to_the_largest(tmp_path, unet, tiny, pictures, accelerator):
    shapes = set()

    def recording(x, *args, **kwargs):
        shapes.add(len(x))
        return unet(x, *args, **kwargs)

    config = dataclasses.replace(RANGES, guidance_weight=2.0, batch_size=1024)
    recipe = a_recipe(pictures, tiny, config)
    largest = max(len(block.jobs) for block in recipe.blocks)
    write(tmp_path, recording, recipe, accelerator)
    assert shapes == {2 * largest} and 1 < largest < 12
    assert a_recipe(pictures, tiny, dataclasses.replace(RANGES, batch_size=1)).batch_size == 1
    assert a_recipe(pictures, tiny, dataclasses.replace(CONFIG, batch_size=1024)).batch_size == 1024


def test_a_set_is_made_in_one_precision(tmp_path, unet, tiny, pictures, accelerator, reference):
    folder, single = copied(reference, tmp_path), a_recipe(pictures, tiny, reference="a judge")
    assert "precision" not in single.meta  # sets made before it was recorded keep their key
    half = dataclasses.replace(single, precision="bf16")
    assert half.key != single.key and half.meta["precision"] == "bf16"
    (folder / file_name(0, 0)).unlink()
    mended = write(folder, unet, half, accelerator, judge=judge)
    assert mended == write(tmp_path / "fresh", unet, half, accelerator, judge=judge)
    assert all(mended[name] != data for name, data in reference[1].items() if name.startswith("images/"))


def test_another_recipe_starts_over(tmp_path, unet, tiny, pictures, accelerator, caplog):
    write(tmp_path, unet, a_recipe(pictures, tiny, unet_sha256="old"), accelerator)
    other = a_recipe(pictures, tiny, dataclasses.replace(CONFIG, mode="away", sources=4))

    def dead(*args, **kwargs):
        raise Killed

    with pytest.raises(Killed), caplog.at_level("INFO", logger="sdood_plugin"):
        write(tmp_path, dead, other, accelerator)
    removed = [record.message for record in caplog.records if "another set is removed" in record.message]
    assert len(removed) == 1 and "config.mode changed from other to away" in removed[0] and "unet_sha256 changed" in removed[0]
    assert set(contents(tmp_path)) == {"in-progress.json"}  # nothing of the old set can be taken for the new one
    made = write(tmp_path, unet, other, accelerator)
    assert sum(name.startswith("images/") for name in made) == 4
    assert made == write(tmp_path.with_name("fresh"), unet, other, accelerator)


def test_whether_controls_are_wanted_or_the_unet_is_compiled_makes_no_other_set(pictures, tiny):
    wanted, unwanted = (a_recipe(pictures, tiny, dataclasses.replace(CONFIG, controls=value)) for value in (True, False))
    assert wanted.key == unwanted.key != a_recipe(pictures, tiny, WEBP).key
    assert a_recipe(pictures, dataclasses.replace(tiny, compile=True)).key == wanted.key


def test_more_copies_keep_the_first_ones(tmp_path, unet, tiny, pictures, accelerator, reference):
    two = write(tmp_path, unet, a_recipe(pictures, tiny, dataclasses.replace(CONFIG, per_source=2)), accelerator)
    first = {name: data for name, data in reference[1].items() if name.startswith("images/")}
    assert {name: two[name] for name in first} == first
    second = [data for name, data in two.items() if name.endswith("_1.png")]
    assert len(second) == 12 and not set(second) & set(first.values())


def test_a_set_of_one_source_with_an_odd_name(tmp_path, unet, tiny, pictures, accelerator):
    one = ImageSet(pictures.images[:1], ['a,"b"\nc.png'])
    write(tmp_path, unet, dataclasses.replace(a_recipe(pictures, tiny), sources=one, labels=torch.tensor([2])), accelerator)
    made = OutlierSet(tmp_path)
    assert len(made) == 1 and made.manifest[0]["source"] == 'a,"b"\nc.png'


def test_a_set_in_many_folders(tmp_path, unet, tiny, accelerator):
    many = ImageSet(spread_images(1001), [f"{i}.png" for i in range(1001)])
    config = dataclasses.replace(CONFIG, sampling_steps=1, batch_size=512, mode="same")
    recipe = dataclasses.replace(a_recipe(many, tiny, config, labels=torch.zeros(1001, dtype=torch.int64)))
    files = write(tmp_path, unet, recipe, accelerator)
    assert {name.split("/")[1] for name in files if name.startswith("images/")} == {"0000", "0001"}
