"""Images in every accepted form, and each way in which they cannot be used."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from sdood_plugin.config import DataConfig, ImagesConfig
from sdood_plugin.data.sources import load_images
from sdood_plugin.errors import RunError, UsageError

OWN_SIZE = DataConfig(image_size=None)


def load(path, size=None, **settings):
    return load_images(ImagesConfig(str(path), **settings), DataConfig(image_size=size), seed=0)


def pixels(count, side=8, seed=0):
    return np.random.default_rng(seed).integers(256, size=(count, side, side, 3), dtype=np.uint8)


def fill(folder, names, side=8):
    arrays = pixels(len(names), side)
    for name, array in zip(names, arrays, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / name)
    return torch.from_numpy(arrays).permute(0, 3, 1, 2)


def test_a_flat_folder(tmp_path):
    arrays = fill(tmp_path, ["b.png", "a.png", "c.bmp"])
    (tmp_path / "notes.txt").write_text("no image")
    found = load(tmp_path)
    assert found.names == ["a.png", "b.png", "c.bmp"] and found.labels is None
    assert torch.equal(found.images, arrays[[1, 0, 2]]) and found.images.dtype == torch.uint8
    assert found.notes == ["1 files are no images and left out: 1 .txt"]


def test_class_folders_give_labels(tmp_path):
    arrays = fill(tmp_path, ["dog/x.png", "cat/y.png", "cat/deep/z.PNG"])
    found = load(tmp_path)
    assert found.classes == ["cat", "dog"]
    assert found.names == ["cat/deep/z.PNG", "cat/y.png", "dog/x.png"] and found.labels.tolist() == [0, 0, 1]
    assert torch.equal(found.images, arrays[[2, 1, 0]])


@pytest.mark.parametrize("names", [["one/a.png", "one/b.png"], ["one/a.png", "b.png", "two/c.png"]])
def test_one_subfolder_or_stray_files_give_none(tmp_path, names):
    fill(tmp_path, names)
    found = load(tmp_path)
    assert found.labels is None and found.classes == [] and len(found) == len(names)


def test_hidden_files_are_skipped_but_a_hidden_parent_is_not(tmp_path, monkeypatch):
    base = tmp_path / ".cache" / "images"
    fill(base, ["a.png", ".trash/b.png", ".c.png"])
    assert load(base).names == ["a.png"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert load(os.path.join("..", ".cache", "images")).names == ["a.png"]


@pytest.mark.parametrize(
    ("count", "limit", "expected"),
    [(10, 5, [0, 2, 4, 6, 8]), (10, 3, [0, 3, 6]), (4, 4, [0, 1, 2, 3]), (4, 9, [0, 1, 2, 3]), (7, 1, [0])],
)
def test_a_limit_spreads_over_the_set(tmp_path, count, limit, expected):
    arrays = fill(tmp_path, [f"{i}.png" for i in range(count)])
    found = load(tmp_path, limit=limit)
    assert found.names == [f"{i}.png" for i in expected] and torch.equal(found.images, arrays[expected])
    np.savez(tmp_path / "x.npz", images=arrays.permute(0, 2, 3, 1).numpy(), labels=np.arange(count))
    found = load(tmp_path / "x.npz", limit=limit)
    assert found.labels.tolist() == expected and torch.equal(found.images, arrays[expected])


def save(kind, path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    if kind == "grey":
        Image.fromarray(grey).save(path)
        return np.stack([grey] * 3, -1)
    if kind == "16-bit":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
        return np.stack([grey] * 3, -1)
    if kind == "RGBA":
        array = np.dstack([pixels(1)[0], np.where(grey < 128, 0, 255).astype(np.uint8)])
        Image.fromarray(array).save(path)
        return np.where(array[..., 3:] == 0, 255, array[..., :3])  # over white
    if kind == "palette":
        array = pixels(1)[0] // 64 * 64
        Image.fromarray(array).quantize(256).save(path)
        return np.asarray(Image.open(path).convert("RGB"))
    if kind == "1-bit":
        Image.fromarray(grey > 100).save(path)
        return np.stack([(grey > 100) * 255] * 3, -1)
    if kind == "CMYK":
        image = Image.fromarray(pixels(1)[0]).convert("CMYK")
        image.save(path.with_suffix(".tif"))
        return np.asarray(image.convert("RGB"))
    raise AssertionError


@pytest.mark.parametrize(
    ("kind", "note"),
    [
        ("grey", "mode L"),
        ("16-bit", "16-bit grey scaled"),
        ("RGBA", "over white"),
        ("palette", "mode P"),
        ("1-bit", "mode 1"),
        ("CMYK", "mode CMYK"),
    ],
)
def test_other_kinds_of_images_become_rgb_and_say_so(tmp_path, kind, note):
    expected = save(kind, tmp_path / "x.png")
    found = load(tmp_path)
    assert found.images.shape == (1, 3, 8, 8)
    assert np.array_equal(found.images[0].permute(1, 2, 0).numpy(), expected)
    assert len(found.notes) == 1 and note in found.notes[0] and found.notes[0].startswith("1 images")


def test_images_lie_as_their_exif_says(tmp_path):
    array = pixels(1)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to look at it
    Image.fromarray(array).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(load(tmp_path).images[0].permute(1, 2, 0).numpy(), np.rot90(array, -1))


def test_sizes_are_made_one_by_resizing_and_cropping(tmp_path):
    for name, shape in (("wide", (8, 20)), ("tall", (24, 8)), ("small", (4, 4)), ("right", (8, 8))):
        Image.fromarray(np.full((*shape, 3), 77, np.uint8)).save(tmp_path / f"{name}.png")
    found = load(tmp_path, size=8)
    assert found.images.shape == (4, 3, 8, 8) and (found.images == 77).all()
    with pytest.raises(RunError, match="image sizes.*4 different sizes.*--data.image_size"):
        load(tmp_path)


def test_the_odd_one_out_is_named(tmp_path):
    fill(tmp_path, ["a.png", "c.png"])
    Image.new("RGB", (9, 8)).save(tmp_path / "b.png")
    with pytest.raises(RunError, match="b.png.*2 different sizes.*8 x 8 like most"):
        load(tmp_path)


def test_images_must_be_square(tmp_path):
    Image.new("RGB", (12, 8)).save(tmp_path / "a.png")
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 12, 3), np.uint8))
    for path in (tmp_path, tmp_path / "a.npz"):
        with pytest.raises(RunError, match="12 x 8.*square.*--data.image_size"):
            load(path)
        assert load(path, size=8).images.shape[1:] == (3, 8, 8)


@pytest.mark.parametrize("data", [b"", b"not an image", None])
def test_a_broken_image_is_named(tmp_path, data):
    fill(tmp_path, ["a.png", "b.png"], side=32)
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2] if data is None else data)
    with pytest.raises(RunError, match=r"image .*b\.png.*readable, whole"):
        load(tmp_path)


def test_several_broken_images_are_named_at_once(tmp_path):
    fill(tmp_path, [f"{number:02d}.png" for number in range(30)])
    for number in (3, 17):
        (tmp_path / f"{number:02d}.png").write_bytes(b"not an image")
    with pytest.raises(RunError, match=r"image .*03\.png: got .*2 of 30 images cannot.*the others: .*17\.png\).*readable, whole"):
        load(tmp_path)
    for number in range(25):
        (tmp_path / f"{number:02d}.png").write_bytes(b"")
    with pytest.raises(RunError, match=r"00\.png: got .*25 of 30 images.*, \S*19\.png, \.\.\.\)"):
        load(tmp_path)
    (tmp_path / "list.txt").write_text("".join(f"{number}.jpg 0\n" for number in range(3)))
    with pytest.raises(RunError, match=r"0\.jpg: got no such file .*3 of 3 images.*check the list and its root"):
        load(tmp_path / "list.txt")


def test_an_empty_folder(tmp_path):
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(RunError, match="no images"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["absent", "file.bin", "absent.npz", "absent.txt"])
def test_a_path_that_is_none_of_the_forms(tmp_path, name):
    (tmp_path / "file.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match=f"images: got .*{name}"):
        load(tmp_path / name)


def test_an_imglist_names_files_below_its_root(tmp_path):
    arrays = fill(tmp_path / "root", ["a/x.png", "y.png", "z.png"])
    (tmp_path / "list.txt").write_text("y.png 3\n\na/x.png -1\n")
    found = load(tmp_path / "list.txt", root=str(tmp_path / "root"))
    assert found.names == ["y.png", "a/x.png"] and found.labels.tolist() == [3, -1]
    assert torch.equal(found.images, arrays[[1, 0]])
    (tmp_path / "root" / "list.txt").write_text("z.png 0\n")
    assert torch.equal(load(tmp_path / "root" / "list.txt").images, arrays[2:])  # the list's own folder is the default root


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a b.png 1", "without spaces"),
        ("/etc/passwd 1", "relative path"),
        ("../x.png 1", "relative path"),
        ("a/../../x.png 1", "relative path"),
        ("x.png one", "integer label"),
        ("x.png 1.5", "integer label"),
        ("x.png", "integer label"),
        ("5", "integer label"),
        ("x.png --5", "integer label"),
        ("x.png ²", "integer label"),
        ("absent.png 1", "no such file"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    fill(tmp_path, ["x.png"])
    (tmp_path / "list.txt").write_text(f"x.png 0\n{line}\n", encoding="utf-8")
    with pytest.raises(RunError, match=message) as caught:
        load(tmp_path / "list.txt")
    assert "line 2" in str(caught.value) or "absent.png" in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xff\xfe\x81\x00"])
def test_an_imglist_without_lines(tmp_path, data):
    (tmp_path / "list.txt").write_bytes(data)
    with pytest.raises(RunError, match="imglist"):
        load(tmp_path / "list.txt")


def write_cifar(folder, classes=10):
    random = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    parts = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if classes == 10 else ["train", "test"]
    batches = {}
    for part in parts:
        batches[part] = random.integers(256, size=(4, 3072), dtype=np.uint8), random.integers(classes, size=4).tolist()
        key = b"labels" if classes == 10 else b"fine_labels"
        # protocol 2 and byte keys, as the files of the authors have them
        (folder / part).write_bytes(pickle.dumps({b"data": batches[part][0], key: batches[part][1]}, protocol=2))
    meta = ("batches.meta", b"label_names") if classes == 10 else ("meta", b"fine_label_names")
    (folder / meta[0]).write_bytes(pickle.dumps({meta[1]: [b"class%d" % i for i in range(classes)]}, protocol=2))
    return batches


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar_batches(tmp_path, classes, split):
    batches = write_cifar(tmp_path, classes)
    chosen = [value for part, value in batches.items() if ("test" in part) == (split == "test")]
    found = load(tmp_path, split=split)
    assert torch.equal(found.images, torch.from_numpy(np.concatenate([data for data, _ in chosen]).reshape(-1, 3, 32, 32)))
    assert found.labels.tolist() == [label for _, labels in chosen for label in labels]
    assert found.classes == [f"class{i}" for i in range(classes)]
    assert len(set(found.names)) == len(found)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch /tmp/sdood-was-here",)


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps({b"data": Malicious()}, protocol=2),
        pickle.dumps({b"labels": [1]}, protocol=2),
        pickle.dumps([1, 2], protocol=2),
        b"",
        b"hello",
        b"\x80\x02}q",
    ],
    ids=["malicious", "no data", "a list", "empty", "text", "truncated"],
)
def test_a_batch_that_is_none_is_refused_and_nothing_in_it_runs(tmp_path, monkeypatch, data):
    ran = []
    monkeypatch.setattr(os, "system", lambda command: ran.append(command))
    write_cifar(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(data)
    with pytest.raises(RunError, match="CIFAR batch .*data_batch_3"):
        load(tmp_path)
    assert ran == []


def test_the_pickle_of_a_builtin_is_refused(tmp_path):
    write_cifar(tmp_path)
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.")
    with pytest.raises(RunError, match="builtins.eval has no place"):
        load(tmp_path)


def test_an_array_file(tmp_path):
    images = pixels(5)
    np.savez_compressed(tmp_path / "x.npz", images=images, labels=np.array([4, 3, 2, 1, 0], np.int16))
    found = load(tmp_path / "x.npz")
    assert torch.equal(found.images, torch.from_numpy(images).permute(0, 3, 1, 2)) and found.labels.tolist() == [4, 3, 2, 1, 0]
    np.savez(tmp_path / "x.npz", images=images)
    assert load(tmp_path / "x.npz").labels is None
    assert load(tmp_path / "x.npz", size=16).images.shape == (5, 3, 16, 16)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": pixels(3).astype(np.float32)}, "float32"),
        ({"images": pixels(3).transpose(0, 3, 1, 2)}, "uint8 .N, H, W, 3."),
        ({"images": pixels(3)[..., 0]}, "uint8"),
        ({"images": pixels(3)[:0]}, "N > 0"),
        ({"pictures": pixels(3)}, "array named `images`"),
        ({"images": np.array([{}, 1], dtype=object)}, "plain arrays"),
        ({"images": pixels(3), "labels": np.arange(4)}, "integers .3,"),
        ({"images": pixels(3), "labels": np.arange(3.0)}, "integers .3,"),
        ({"images": pixels(3), "labels": np.array([{}, 1, 2], dtype=object)}, "plain arrays"),
    ],
)
def test_arrays_of_another_form_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(RunError, match=message):
        load(tmp_path / "x.npz")


@pytest.mark.parametrize("keep", [0, 3, 100, -30])
def test_half_an_array_file(tmp_path, keep):
    np.savez(tmp_path / "x.npz", images=pixels(3))
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:keep])
    with pytest.raises(RunError, match="x.npz"):
        load(tmp_path / "x.npz")


def test_an_array_under_the_wrong_suffix(tmp_path):
    np.save(tmp_path / "x.npy", pixels(3))
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    with pytest.raises(RunError, match="x.npz"):
        load(tmp_path / "x.npz")
