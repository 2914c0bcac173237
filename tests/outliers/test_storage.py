"""Whose folder it is, who may write there, and what a kill, a full disk or a stranger leaves."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sdood_plugin.errors import RunError, UsageError
from sdood_plugin.outliers import writer
from sdood_plugin.outliers.blocks import file_name
from sdood_plugin.outliers.files import check_name, encode, read_file
from sdood_plugin.outliers.storage import only_writer, remove_set
from sdood_plugin.outliers.writer import BlockWriter

from .making import a_recipe, contents, idle, spread_images, write


@pytest.fixture
def recipe(pictures, tiny):
    return a_recipe(pictures, tiny)


@pytest.mark.parametrize("what", ["a thesis", "images", "a file", "a link"])
def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, accelerator, recipe, what):
    folder = tmp_path / "set"
    if what == "a thesis":
        folder.mkdir()
        (folder / "thesis.tex").write_text("years of work")
    if what == "images":
        (folder / "images").mkdir(parents=True)
        (folder / "images" / "holiday.png").write_text("a beach")
    if what == "a file":
        folder.write_text("here")
    if what == "a link":
        (tmp_path / "theirs").mkdir()
        folder.symlink_to(tmp_path / "theirs")
    before = sorted(tmp_path.rglob("*"))
    for work in (lambda: write(folder, idle, recipe, accelerator), lambda: remove_set(folder)):
        with pytest.raises(UsageError, match="nothing was written"):
            work()
    assert sorted(tmp_path.rglob("*")) == before


def test_two_writers_are_refused(tmp_path, unet, accelerator, recipe):
    with only_writer(tmp_path), pytest.raises(RunError, match=r"in use by another process.*one process at a time"):
        write(tmp_path, idle, recipe, accelerator)
    write(tmp_path, unet, recipe, accelerator)  # the lock went with its holder
    assert not (tmp_path / ".lock").exists()


def test_a_lock_that_was_removed_while_it_was_waited_for_is_none(tmp_path, monkeypatch):
    lock = fcntl.flock

    def late(stream, how):
        (tmp_path / ".lock").unlink()  # its holder is done, and a third process has come
        (tmp_path / ".lock").touch()
        lock(stream, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(RunError, match="in use by another process"), only_writer(tmp_path):
        pass
    assert (tmp_path / ".lock").exists()  # the third one's


@pytest.mark.parametrize("name", ["images", "images/0000", "parts"])
def test_links_among_the_folders_are_refused(tmp_path, unet, accelerator, recipe, name):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "set"
    elsewhere.mkdir()
    write(folder, unet, recipe, accelerator)
    part = folder / name
    if part.exists():
        part.rename(tmp_path / "moved")
    part.symlink_to(elsewhere)
    with pytest.raises(RunError, match="symbolic link"):
        write(folder, unet, recipe, accelerator)
    assert not list(elsewhere.iterdir())


def test_a_full_disk_is_one_line_and_what_was_written_counts(tmp_path, unet, accelerator, recipe, monkeypatch):
    store, count = writer.store, []

    def full(folder, name, data):
        count.append(1)
        if len(count) > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        store(folder, name, data)

    monkeypatch.setattr(writer, "store", full)
    with pytest.raises(RunError, match=r"No space left on device.*free space and give the same command again") as caught:
        write(tmp_path / "set", unet, recipe, accelerator)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert write(tmp_path / "set", unet, recipe, accelerator) == write(tmp_path / "whole", unet, recipe, accelerator)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../a.png", "images/../../a.png", "images//a.png", "./a.png", "", "a\\b.png", "a\0"]
)
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(RunError, match="a path inside the folder"):
        check_name(name, tmp_path)
    with pytest.raises(RunError, match="a path inside the folder"):
        read_file(tmp_path, name)


def test_only_plain_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("/etc/hostname")
    (tmp_path / "linked").symlink_to("/etc")
    for name in ("pipe.png", "folder.png", "link.png", "linked/hostname", "absent.png"):
        with pytest.raises(RunError, match="a readable, whole"):
            read_file(tmp_path, name)


def test_the_queue_is_bounded_and_a_failure_is_told(tmp_path, monkeypatch):
    running, most = [], []

    def slow(folder, name, data):
        running.append(name)
        most.append(len(running))
        time.sleep(0.002)
        running.remove(name)

    monkeypatch.setattr(writer, "store", slow)
    image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    columns = {name: ["x"] for name in writer.COLUMNS}
    with BlockWriter(tmp_path, "png", threads=2, ahead=3) as blocks:
        for number in range(12):
            blocks.put(number, columns, image)
            assert len(blocks._pending) <= 3
    assert max(most) <= 2 and len(most) == 12 and len(list((tmp_path / "parts").iterdir())) == 12

    def failing(folder, name, data):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(writer, "store", failing)
    with pytest.raises(RunError, match="Permission denied"), BlockWriter(tmp_path, "png") as blocks:
        blocks.put(0, columns, image)


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_both_formats_keep_every_bit(tmp_path, suffix):
    from sdood_plugin.outliers.dataset import read_images

    images = torch.cat([spread_images(5), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
    for number, image in enumerate(images):
        (tmp_path / f"{number}.{suffix}").write_bytes(encode(image, suffix))
    assert torch.equal(read_images(tmp_path, [f"{number}.{suffix}" for number in range(6)]), images)


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
from tests.conftest import TINY
from tests.outliers.making import a_recipe, write
from sdood_plugin.config import RunConfig
from sdood_plugin.data.images import ImageSet
from sdood_plugin.diffusion.unet import build_unet
from sdood_plugin.training import make_accelerator
from pathlib import Path
torch.manual_seed(0)
unet = build_unet(TINY, classes=3, image_size=8).eval()
with torch.no_grad():
    unet.class_embedding.weight *= 3
images = torch.randint(256, (12, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
pictures = ImageSet(images, [f"{{i}}.png" for i in range(12)], torch.arange(12) % 3)
write(Path({folder!r}), unet, a_recipe(pictures, TINY), make_accelerator(RunConfig(device="cpu")))
"""


def test_a_process_killed_without_warning_is_continued(tmp_path, unet, accelerator, recipe):
    folder = tmp_path / "killed"
    script = SCRIPT.format(tests=str(Path(__file__).parents[2]), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / file_name(0, 0)).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / file_name(0, 0)).exists()
    assert write(folder, unet, recipe, accelerator) == write(tmp_path / "whole", unet, recipe, accelerator)
    assert contents(folder)
