"""Files are whole or absent, errors are one line, hashes depend on content alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
import stat
import subprocess

import pytest
import torch
from safetensors import safe_open

from sdood_plugin import artifacts
from sdood_plugin.artifacts import (
    atomic_path,
    file_hash,
    provenance,
    read_csv,
    read_json,
    read_tensors,
    value_hash,
    write_bytes,
    write_csv,
    write_json,
    write_tensors,
    write_text,
)
from sdood_plugin.data.images import save_png
from sdood_plugin.errors import RunError, SdoodError, UsageError

LIMIT = 5000


@contextlib.contextmanager
def small_disk():
    """No file may grow beyond 5,000 bytes: what a full disk is to the code that writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


NOISE = torch.randint(256, (3, 200, 200), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
WRITERS = {
    "bytes": lambda path: write_bytes(path, b"0" * 100_000),
    "text": lambda path: write_text(path, "0" * 100_000),
    "json": lambda path: write_json(path, list(range(20_000))),
    "csv": lambda path: write_csv(path, ("a",), ([i] for i in range(20_000))),
    "tensors": lambda path: write_tensors(path, {"a": torch.zeros(100_000)}),
    "png": lambda path: save_png(path, NOISE),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_writing_replaces_and_leaves_nothing_else(tmp_path, kind):
    path = tmp_path / "below" / f"file.{kind}"
    WRITERS[kind](path)
    whole = path.read_bytes()
    path.write_bytes(b"old")
    WRITERS[kind](path)
    assert path.read_bytes() == whole and len(whole) > LIMIT
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, kind):
    path = tmp_path / f"file.{kind}"
    path.write_bytes(b"old")
    with small_disk(), pytest.raises(RunError, match=f"writing {path}"):
        WRITERS[kind](path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_that_cannot_be_written(tmp_path, kind):
    # a regular file where a folder should be stops root too
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="writing .*write permission"):
        WRITERS[kind](tmp_path / "file" / "below" / "x")


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_a_failure_in_the_block_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_get_the_permissions_of_the_umask(tmp_path):
    import os

    old = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
        assert os.umask(0o027) == 0o027  # and the umask is as it was
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_tensors_survive_with_shape_and_type(tmp_path):
    tied = torch.arange(4.0)
    tensors = {
        "tied": tied,
        "tied too": tied,
        "part": tied[1:],
        "a": torch.arange(6).reshape(2, 3).T,
        "b": torch.tensor(1.5, dtype=torch.float64),
        "c": torch.empty(0, 4),
        "d": torch.tensor([True, False]),
    }
    write_tensors(tmp_path / "t.safetensors", tensors, {"name": "x"})
    found = read_tensors(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)


@pytest.mark.parametrize("keep", [0, 4, 50, -1])
def test_a_truncated_tensor_file_is_named(tmp_path, keep):
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RunError, match="t.safetensors.*a whole safetensors file"):
        read_tensors(path)


@pytest.mark.parametrize("read", [read_json, read_csv, read_tensors])
def test_an_absent_file_is_named(tmp_path, read):
    with pytest.raises(RunError, match="absent.*nothing there"):
        read(tmp_path / "absent")


@pytest.mark.parametrize("text", [b"{", b"", b"\xff\xfe"])
def test_json_that_is_none(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(RunError, match="x.json.*valid JSON"):
        read_json(tmp_path / "x.json")


def test_equal_tensors_and_metadata_are_equal_bytes(tmp_path):
    info = {"size": "16", "backbone": 'näme "x"', "classes": "3"}
    written = set()
    for i in range(20):  # the library alone shuffles three entries: 20 equal files would be luck of 6^-19
        write_tensors(tmp_path / f"{i}.safetensors", {"b": torch.arange(3), "a": torch.zeros(2, 2)}, info)
        written.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(written) == 1
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert file.metadata() == info and torch.equal(file.get_tensor("b"), torch.arange(3))


def test_csv_keeps_awkward_text(tmp_path):
    rows = [['a "quoted", comma', "1"], ["ü\nline", "2"]]
    write_csv(tmp_path / "x.csv", ("name", "value"), rows)
    assert read_csv(tmp_path / "x.csv") == [{"name": name, "value": value} for name, value in rows]


def test_hashes(tmp_path):
    data = bytes(range(256)) * 10_000  # more than one block
    (tmp_path / "x").write_bytes(data)
    assert file_hash(tmp_path / "x") == hashlib.sha256(data).hexdigest()
    assert value_hash({"a": 1, "b": [1, 2]}) == value_hash({"b": [1, 2], "a": 1})
    assert len({value_hash(value) for value in ({"a": 1}, {"a": 1.5}, {"a": "1"}, {"b": 1}, {"a": [1]}, {"a": None})}) == 6


def test_the_commit_is_dirty_where_code_differs_and_not_where_a_result_does(tmp_path, monkeypatch):
    def git(*words):
        own = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *own, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    code, result = tmp_path / "sdood_plugin" / "artifacts.py", tmp_path / "result.json"
    code.parent.mkdir()
    code.write_text("x = 1")
    result.write_text("1")
    git("init")
    git("add", "-A")
    git("commit", "-m", "first")
    monkeypatch.setattr(artifacts, "__file__", str(code))
    head = git("rev-parse", "HEAD")
    result.write_text("2")
    assert provenance([])["commit"] == head
    code.write_text("x = 2")
    assert provenance([])["commit"] == f"{head}-dirty"


def test_provenance_says_who_made_it():
    found = provenance(["sdood", "run"])
    json.dumps(found)
    assert found["command"] == ["sdood", "run"]
    assert {"torch", "diffusers", "numpy"} <= found["versions"].keys()
    assert found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"] == torch.__version__
    assert {"commit", "python", "platform"} <= found.keys()


@pytest.mark.parametrize(("kind", "code"), [(UsageError, 2), (RunError, 1)])
def test_an_error_is_one_line_of_what_value_expected_remedy(kind, code):
    error = kind("k", "7\n8", "less", "lower it")
    assert str(error) == "k: got 7 8; expected less; lower it"
    assert error.exit_code == code and isinstance(error, SdoodError)
