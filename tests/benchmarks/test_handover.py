"""A run folder packed and unpacked: the same stages done, the same weights to bfloat16, nothing large."""

from __future__ import annotations

import shutil

import pytest
import torch

from benchmarks import experiment, handover
from sdood_plugin.artifacts import read_tensors, write_tensors, write_text
from sdood_plugin.config import RunConfig


def test_what_is_packed_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(handover, "PART_BYTES", 103_000)
    generator = torch.Generator().manual_seed(0)
    weights = {f"layer{i}.weight": torch.randn(20, 30, generator=generator) for i in range(9)} | {"count": torch.tensor(3)}
    run = tmp_path / "run"
    write_tensors(run / "diffusion" / "unet.safetensors", weights, {"backbone": "x"})
    write_text(run / "labels.csv", "index,label\n0,1\n")
    write_text(run / "stages" / "cluster.json", "{}")
    write_text(run / ".lock", "")
    write_text(run / "comparators" / ".key", "whose")
    write_text(run / "diffusion" / "checkpoint.pt", "large")
    write_text(run / "outliers" / "images" / "0.png", "large")
    handover.pack(run, tmp_path / "kept")
    parts = sorted((tmp_path / "kept" / "diffusion").iterdir())
    assert len(parts) > 2 and all(part.stat().st_size < handover.PART_BYTES for part in parts)
    handover.unpack(tmp_path / "kept", tmp_path / "again")
    files = {path.relative_to(tmp_path / "again").as_posix() for path in (tmp_path / "again").rglob("*") if path.is_file()}
    assert files == {"comparators/.key", "diffusion/unet.safetensors", "labels.csv", "stages/cluster.json"}
    back = read_tensors(tmp_path / "again" / "diffusion" / "unet.safetensors")
    assert back.keys() == weights.keys() and back["count"] == 3
    for name in weights:
        torch.testing.assert_close(back[name], weights[name], atol=0, rtol=2**-8)
    assert handover._metadata(tmp_path / "again" / "diffusion" / "unet.safetensors") == {"backbone": "x"}
    (tmp_path / "again" / "labels.csv").unlink()
    handover.pack(tmp_path / "again", tmp_path / "kept")  # rounding twice is rounding once
    assert not (tmp_path / "kept" / "labels.csv").exists()
    handover.unpack(tmp_path / "kept", tmp_path / "third")
    third = read_tensors(tmp_path / "third" / "diffusion" / "unet.safetensors")
    assert all(torch.equal(third[name], back[name]) for name in back)


def test_a_slot_that_is_cut_off_hands_over_what_it_finished_and_the_next_begins_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    monkeypatch.setattr(experiment, "RESULTS", tmp_path / "results")
    options = experiment.read_options("table1", "", ["--size", "gpu", "--suffix=-a"])
    folder = options.folder(0)
    with pytest.raises(KeyboardInterrupt), experiment.handed_over(options, RunConfig()):
        write_text(folder / "labels.csv", "made")
        raise KeyboardInterrupt
    shutil.rmtree(folder)
    with experiment.handed_over(options, RunConfig()):
        assert (folder / "labels.csv").read_text() == "made"
    shutil.rmtree(folder)
    other = experiment.read_options("table4", "", ["--size", "gpu", "--start-from", "table1-gpu-a"])
    with experiment.handed_over(other, RunConfig()):
        assert (other.folder(0) / "labels.csv").read_text() == "made"
    assert not folder.exists()
