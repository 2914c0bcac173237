"""An outlier depends on its own image and identity alone; the set on disk agrees with itself and resumes."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from sdood_plugin.artifacts import read_csv, read_json
from sdood_plugin.config import OutliersConfig
from sdood_plugin.data.images import ImageSet, to_uint8, to_unit
from sdood_plugin.diffusion.guidance import guidance_terms, wrong_classes
from sdood_plugin.diffusion.sampling import guided_partial_sample
from sdood_plugin.errors import RunError
from sdood_plugin.outliers.dataset import OutlierSet
from sdood_plugin.outliers.generate import blocks, file_name, generate, jobs, sample_batch
from sdood_plugin.randomness import normal

from ..resuming import Killed

CONFIG = OutliersConfig(mode="other", guidance_weight=2.0, start_fraction=0.4, sampler="dpm", sampling_steps=3, batch_size=4)
SETTINGS = [(mode, sampler) for mode in ("other", "away", "blend", "same") for sampler in ("ddpm", "ddim", "dpm")]


def make(unet, tiny, pictures, rows, config=CONFIG):
    rows = torch.tensor(rows)
    return sample_batch(unet, pictures.images[rows], pictures.labels[rows], rows, config, tiny, classes=3, seed=9)


def nearly_equal(made, expected):
    """Within one grey level, in at most 0.1 % of the values: what rounding in another place or batch may do."""
    difference = (made.int() - expected.int()).abs()
    assert difference.max() <= 1 and (difference > 0).double().mean() <= 0.001


@pytest.mark.parametrize(("mode", "sampler"), SETTINGS)
def test_a_row_depends_neither_on_its_place_nor_on_its_companions(unet, tiny, pictures, mode, sampler):
    config = dataclasses.replace(CONFIG, mode=mode, sampler=sampler)
    rows = [[0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [0, 11, 10, 9, 8], [7, 7, 7, 7, 0], [1, 1, 2, 3, 4]]
    alone = {row: make(unet, tiny, pictures, [row], config)[0] for row in range(12)}
    made = torch.cat([make(unet, tiny, pictures, chosen, config) for chosen in rows])
    nearly_equal(made, torch.stack([alone[row] for chosen in rows for row in chosen]))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_another_batch_size_changes_next_to_nothing(unet, tiny, pictures, batch_size):
    parts = [make(unet, tiny, pictures, list(range(start, min(start + batch_size, 12)))) for start in range(0, 12, batch_size)]
    nearly_equal(torch.cat(parts), make(unet, tiny, pictures, range(12)))


def test_a_job_has_one_block_and_one_place_in_it():
    config = dataclasses.replace(CONFIG, per_source=3, sources=10)
    made = blocks(25, config)
    assert torch.equal(torch.cat(made), jobs(25, config)) and max(map(len, made)) == config.batch_size
    fewer = blocks(25, dataclasses.replace(config, per_source=2))  # more copies leave the blocks of the first ones alone
    assert all(torch.equal(a, b) for a, b in zip(fewer, made, strict=False))


def test_the_images_are_outliers_of_the_sampler(unet, tiny, pictures):
    rows = torch.arange(5)
    labels = pictures.labels[:5]
    wrong = wrong_classes(labels, 3, seed=9, index=rows)
    expected = guided_partial_sample(
        lambda x, t, c: unet(x, t, class_labels=c, return_dict=False)[0],
        to_unit(pictures.images[:5]),
        *guidance_terms("other", 2.0, labels, wrong, 3),
        lambda draw: normal(9, rows, draw, (3, 8, 8)),
        tiny,
        start_fraction=0.4,
        sampler="dpm",
        steps=3,
    )
    made = make(unet, tiny, pictures, range(5))
    nearly_equal(made, to_uint8(expected))
    assert (made != pictures.images[:5]).float().mean() > 0.5


@pytest.mark.parametrize("sampler", ["ddpm", "dpm"])
def test_seed_identity_mode_and_weight_all_matter(unet, tiny, pictures, sampler):
    config = dataclasses.replace(CONFIG, sampler=sampler)
    made = [
        sample_batch(unet, pictures.images[:4], pictures.labels[:4], torch.arange(4) + shift, used, tiny, classes=3, seed=seed)
        for seed, shift, used in (
            (0, 0, config),
            (1, 0, config),
            (0, 1 << 32, config),
            (0, 0, dataclasses.replace(config, mode="same")),
            (0, 0, dataclasses.replace(config, guidance_weight=40.0)),
            (0, 0, dataclasses.replace(config, start_fraction=0.5)),
        )
    ]
    for first, second in itertools.combinations(made, 2):
        assert not torch.equal(first, second)


def test_pixels_that_are_not_finite_are_an_error(tiny, pictures):
    def broken(x, t, class_labels, return_dict):
        return (x * float("nan"),)

    with pytest.raises(RunError, match="NaN or infinite pixels"):
        make(broken, tiny, pictures, range(3))


def test_jobs_are_spread_over_the_sources():
    assert jobs(3, dataclasses.replace(CONFIG, per_source=2)).tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]
    assert jobs(10, dataclasses.replace(CONFIG, sources=5)).tolist() == [[0, 0], [2, 0], [4, 0], [6, 0], [8, 0]]
    assert len(jobs(4, dataclasses.replace(CONFIG, sources=9))) == 4
    names = {file_name(source, copy) for source in (0, 7, 999, 1000, 1_234_567) for copy in (0, 1)}
    assert len(names) == 10 and "images/0001/0001000_0.png" in names


class Share:
    """One of several processes that work one after the other."""

    def __init__(self, accelerator, index, count):
        self.device, self.process_index, self.num_processes, self.is_main_process = accelerator.device, index, count, index == 0

    def wait_for_everyone(self):
        pass


def write(folder, unet, tiny, pictures, accelerator, config=CONFIG, key="k", labels=None):
    labels = pictures.labels if labels is None else labels
    generate(unet, pictures, labels, config, tiny, classes=3, accelerator=accelerator, seed=9, folder=folder, key=key)
    return contents(folder)


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, unet, tiny, pictures, accelerator):
    folder = tmp_path_factory.mktemp("set")
    return folder, write(folder, unet, tiny, pictures, accelerator)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, per_source=2, sources=5, mode="blend"),
        dataclasses.replace(CONFIG, mode="away"),
        dataclasses.replace(CONFIG, mode="same", sampler="ddpm"),
    ],
    ids=["other", "blend", "away", "same"],
)
def test_manifest_imglist_and_images_agree(tmp_path, unet, tiny, pictures, accelerator, config):
    labels = (pictures.labels + 1) % 3  # pseudo-labels that are not the true ones
    files = write(tmp_path, unet, tiny, pictures, accelerator, config, labels=labels)
    rows = read_csv(tmp_path / "manifest.csv")
    made = OutlierSet(tmp_path)
    assert sorted(row["file"] for row in rows) == sorted(name for name in files if name.endswith(".png"))
    assert len({row["file"] for row in rows}) == len(rows) == len(made) == len(jobs(12, config))
    assert read_json(tmp_path / "meta.json")["count"] == len(rows)
    assert (tmp_path / "imglist.txt").read_text().splitlines() == [f"{row['file']} {row['source_label']}" for row in rows]
    for row, image in zip(rows, made.images, strict=True):
        source, copy = int(row["source_index"]), int(row["copy"])
        assert row["source"] == pictures.names[source]
        assert int(row["source_label"]) == int(labels[source])
        index = torch.tensor([source + copy * 2**32])
        wrong = wrong_classes(labels[[source]], 3, seed=9, index=index)[0].tolist()
        targets = {
            "other": (str(wrong[0]), ""),
            "blend": (str(wrong[0]), str(wrong[1])),
            "away": ("", ""),
            "same": (row["source_label"], ""),
        }
        assert (row["target"], row["target2"]) == targets[config.mode]
        with Image.open(tmp_path / row["file"]) as opened:
            assert torch.equal(torch.from_numpy(np.asarray(opened).copy()).permute(2, 0, 1), image)
        distance = (to_unit(image).double() - to_unit(pictures.images[source]).double()).square().mean().sqrt()
        assert float(row["distance_to_source"]) == pytest.approx(float(distance), abs=2e-6)
        # the same image comes out of a batch of its own, padded with itself
        made_alone = sample_batch(
            unet, pictures.images[[source] * 4], labels[[source] * 4], index.expand(4), config, tiny, classes=3, seed=9
        )
        nearly_equal(made_alone[0], image)
    assert torch.equal(made.labels, labels[made.sources])
    image, label, source = made[1]
    assert torch.equal(image, made.images[1]) and label == made.labels[1] and source == made.sources[1]


@pytest.mark.parametrize("processes", [2, 3])
def test_the_set_does_not_depend_on_the_number_of_processes(tmp_path, unet, tiny, pictures, accelerator, reference, processes):
    for index in reversed(range(processes)):  # the main one last: it writes the lists
        if index == processes - 1:
            (tmp_path / "in-progress.json").write_text('{"key": "k"}')
        write(tmp_path, unet, tiny, pictures, Share(accelerator, index, processes))
    assert contents(tmp_path) == reference[1]


def test_a_killed_generation_resumes_to_the_same_bytes(tmp_path, unet, tiny, pictures, accelerator, reference):
    calls = []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise Killed
        return unet(*args, **kwargs)

    with pytest.raises(Killed):
        write(tmp_path, dying, tiny, pictures, accelerator)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in contents(tmp_path) if name.endswith(".png")}
    assert len(before) == 4 and not (tmp_path / "meta.json").exists()
    with pytest.raises(RunError, match="meta.json"):
        OutlierSet(tmp_path)  # half a set is none
    assert write(tmp_path, unet, tiny, pictures, accelerator) == reference[1]
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in before.items())  # kept, not made again


def test_lost_files_are_made_again(tmp_path, unet, tiny, pictures, accelerator, reference):
    write(tmp_path, unet, tiny, pictures, accelerator)
    for lost in (0, 5, 11):
        (tmp_path / file_name(lost, 0)).unlink()
    kept = tmp_path / file_name(3, 0)
    time = kept.stat().st_mtime_ns
    assert write(tmp_path, unet, tiny, pictures, accelerator) == reference[1]
    assert kept.stat().st_mtime_ns == time


def test_killed_after_the_last_image(tmp_path, unet, tiny, pictures, accelerator, reference):
    write(tmp_path, unet, tiny, pictures, accelerator)
    for name in ("meta.json", "manifest.csv", "imglist.txt"):
        (tmp_path / name).unlink()
    (tmp_path / "in-progress.json").write_text('{"key": "k"}')

    def idle(*args, **kwargs):
        raise AssertionError("there is nothing left to make")

    assert write(tmp_path, idle, tiny, pictures, accelerator) == reference[1]


def test_every_batch_has_the_same_shape(tmp_path, unet, tiny, pictures, accelerator):
    # other shapes may take other kernels, which round differently: five images in batches of four are padded
    shapes = set()

    def recording(x, *args, **kwargs):
        shapes.add(tuple(x.shape))
        return unet(x, *args, **kwargs)

    write(tmp_path, recording, tiny, pictures, accelerator, dataclasses.replace(CONFIG, sources=5))
    assert shapes == {(8, 3, 8, 8)}  # two conditions of four images


def test_another_key_starts_over(tmp_path, unet, tiny, pictures, accelerator):
    write(tmp_path, unet, tiny, pictures, accelerator, key="old")
    other = dataclasses.replace(CONFIG, mode="away", sources=4)

    def dead(*args, **kwargs):
        raise Killed

    with pytest.raises(Killed):
        write(tmp_path, dead, tiny, pictures, accelerator, config=other, key="new")
    assert set(contents(tmp_path)) == {"in-progress.json"}  # nothing of the old set can be taken for the new one
    made = write(tmp_path, unet, tiny, pictures, accelerator, config=other, key="new")
    assert sum(name.endswith(".png") for name in made) == 4
    assert made == write(tmp_path / "fresh", unet, tiny, pictures, accelerator, config=other, key="new")


def test_more_copies_keep_the_first_ones(tmp_path, unet, tiny, pictures, accelerator, reference):
    two = write(tmp_path, unet, tiny, pictures, accelerator, dataclasses.replace(CONFIG, per_source=2))
    first = {name: data for name, data in reference[1].items() if name.endswith(".png")}
    assert {name: two[name] for name in first} == first
    second = [data for name, data in two.items() if name.endswith("_1.png")]
    assert len(second) == 12 and not set(second) & set(first.values())


def tampered(folder, what):
    manifest = folder / "manifest.csv"
    first = folder / file_name(0, 0)
    if what == "a row less":
        manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]))
    if what == "an image less":
        first.unlink()
    if what == "half an image":
        first.write_bytes(first.read_bytes()[:60])
    if what == "another size":
        Image.new("RGB", (9, 9)).save(first)
    if what == "no image":
        first.write_bytes(b"hello")
    if what == "a way out":
        manifest.write_text(manifest.read_text().replace("images/0000/0000000_0.png", "../../etc/passwd.png"))
    if what == "a path from the root":
        manifest.write_text(manifest.read_text().replace("images/0000/0000000_0.png", "/etc/passwd.png"))
    if what == "no manifest":
        manifest.unlink()
    if what == "no meta":
        (folder / "meta.json").unlink()
    if what == "half a meta":
        (folder / "meta.json").write_text("{")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a row less", "11 rows.*12 as in meta.json"),
        ("an image less", "0000000_0.png"),
        ("half an image", "0000000_0.png"),
        ("another size", "another size"),
        ("no image", "0000000_0.png"),
        ("a way out", "inside the folder"),
        ("a path from the root", "inside the folder"),
        ("no manifest", "manifest.csv"),
        ("no meta", "meta.json"),
        ("half a meta", "meta.json"),
    ],
)
def test_a_set_that_disagrees_with_itself_is_refused(tmp_path, reference, what, message):
    import shutil

    folder = tmp_path / "set"
    shutil.copytree(reference[0], folder)
    assert len(OutlierSet(folder)) == 12
    tampered(folder, what)
    with pytest.raises(RunError, match=message):
        OutlierSet(folder)


def test_a_set_of_one_source(tmp_path, unet, tiny, pictures, accelerator):
    one = ImageSet(pictures.images[:1], pictures.names[:1])
    generate(unet, one, torch.tensor([2]), CONFIG, tiny, classes=3, accelerator=accelerator, seed=9, folder=tmp_path, key="")
    assert len(OutlierSet(tmp_path)) == 1
