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

from sdood_plugin.artifacts import read_json
from sdood_plugin.errors import RunError, UsageError
from sdood_plugin.outliers import writer
from sdood_plugin.outliers.files import check_name, encode, read_file
from sdood_plugin.outliers.storage import only_writer, remove_set
from sdood_plugin.outliers.writer import BlockWriter

from .making import RANGES, a_recipe, idle, spread_images, write


@pytest.fixture
def recipe(pictures, tiny):
    return a_recipe(pictures, tiny)


@pytest.mark.parametrize("what", ["a thesis", "images", "a file", "a link", "a meta", "a progress", "hidden files"])
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
    if what in ("a meta", "a progress"):
        (folder / "images").mkdir(parents=True)
        (folder / "images" / "holiday.png").write_text("a beach")
        (folder / "manifest.csv").write_text("mine")
        (folder / ("meta.json" if what == "a meta" else "in-progress.json")).write_text('{"title": "my data", "key": "C major"}')
    if what == "hidden files":
        folder.mkdir()
        (folder / ".env.local").write_text("a password")
    before = sorted(tmp_path.rglob("*"))
    for work in (lambda: write(folder, idle, recipe, accelerator), lambda: remove_set(folder)):
        with pytest.raises(UsageError, match="nothing was written"):
            work()
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_kill_left_before_anything_was_made_is_ours(tmp_path, unet, accelerator, recipe):
    for name in (".lock", ".in-progress.json.abc.json", ".meta.json.x_y.json"):
        (tmp_path / name).write_text("")
    write(tmp_path, unet, recipe, accelerator)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_set_is_removed_without_what_lies_beside_it(tmp_path, unet, accelerator, recipe):
    for name in ("bare", "noted"):
        write(tmp_path / name, unet, recipe, accelerator)
    (tmp_path / "noted" / "notes.txt").write_text("mine")
    for name in ("bare", "noted"):
        remove_set(tmp_path / name)
    assert not (tmp_path / "bare").exists() and [path.name for path in (tmp_path / "noted").iterdir()] == ["notes.txt"]


def test_on_what_a_set_was_made_is_told_and_a_change_too(tmp_path, unet, accelerator, recipe, monkeypatch, caplog):
    def on(threads):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        return {"device": "cpu", "threads": threads}

    shards = [tmp_path / f"{i}-of-2" for i in (1, 2)]
    one = on(1)
    write(shards[0], unet, recipe, accelerator, shard=(1, 2))
    write(shards[0], idle, recipe, accelerator, shard=(1, 2))
    two = on(2)
    write(shards[1], unet, recipe, accelerator, shard=(2, 2))
    assert "the last bits" not in caplog.text
    write(tmp_path / "merged", idle, recipe, accelerator, shards=shards)
    assert caplog.text.count("the last bits") == 1
    assert read_json(tmp_path / "merged" / "meta.json")["made_on"] == [one, two]
    write(shards[0], unet, recipe, accelerator)  # the other blocks, with two threads
    assert caplog.text.count("the last bits") == 2
    assert read_json(shards[0] / "meta.json")["made_on"] == [one, two]


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
    put, room = os.write, [1500]  # bytes: a few images and part of one

    def full(handle, data):
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = put(handle, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(writer.os, "write", full)
    with pytest.raises(RunError, match=r"No space left on device.*free space and give the same command again") as caught:
        write(tmp_path / "set", unet, recipe, accelerator)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert sum(file.stat().st_size for file in (tmp_path / "set" / "images").rglob("*.png")) >= 1500
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
import os, sys, time, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from tests.conftest import TINY
from tests.outliers.making import RANGES, a_recipe, write
from sdood_plugin.config import RunConfig
from sdood_plugin.data.images import ImageSet
from sdood_plugin.diffusion.unet import build_unet
from sdood_plugin.outliers import writer
from sdood_plugin.training import make_accelerator

def work():
    store = writer.store
    def slowly(*args):
        time.sleep(0.03)
        store(*args)
    writer.store = slowly
    torch.manual_seed(0)
    unet = build_unet(TINY, classes=3, image_size=8).eval()
    with torch.no_grad():
        unet.class_embedding.weight *= 3
    images = torch.randint(256, (12, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    pictures = ImageSet(images, [f"{{i}}.png" for i in range(12)], torch.arange(12) % 3)
    write(Path({folder!r}), unet, a_recipe(pictures, TINY, RANGES), make_accelerator(RunConfig(device="cpu")))

for line in sys.stdin:  # a process for each line, which is told the process's number
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_a_process_killed_without_warning_again_and_again_is_continued(tmp_path, unet, accelerator, pictures, tiny):
    folder, recipe = tmp_path / "killed", a_recipe(pictures, tiny, RANGES)
    script = SCRIPT.format(tests=str(Path(__file__).parents[2]), folder=str(folder))
    command = [sys.executable, "-W", "ignore", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        for files in (1, 4, 9, 15):
            parent.stdin.write("start\n")
            parent.stdin.flush()
            child, deadline = int(parent.stdout.readline()), time.monotonic() + 120
            while len(list(folder.glob("images/*/*"))) < files and time.monotonic() < deadline:
                time.sleep(0.002)
            os.kill(child, signal.SIGKILL)
            assert int(parent.stdout.readline()) == signal.SIGKILL  # it was killed, it did not end
            assert len(list(folder.glob("images/*/*"))) >= files and not (folder / "meta.json").exists()
        parent.stdin.close()
    assert len(list(folder.glob("images/*/*"))) < 24
    assert write(folder, unet, recipe, accelerator) == write(tmp_path / "whole", unet, recipe, accelerator)
