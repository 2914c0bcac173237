"""A run folder packed and unpacked: finished stages stay finished, images byte by byte, weights rounded once, small parts."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from benchmarks import experiment, handover
from benchmarks.experiment import handed_over, train_comparator
from sdood_plugin import comparison
from sdood_plugin.artifacts import read_json, read_tensors, write_tensors, write_text
from sdood_plugin.config import RunConfig
from sdood_plugin.errors import RunError
from sdood_plugin.outliers.dataset import OutlierSet
from sdood_plugin.run import run

FEW = "--data.train.limit 120 --data.test.limit 30 --outliers.sources 40 --compare.methods [distance,multi-class,fake-it]".split()
KEPT = ("labels.csv", "stages/cluster.json", "comparators/.key", "diffusion/checkpoint.pt", "outliers/0.png", "outliers/.lock")
LEFT_OUT = (".lock", "report.html", "figures/loss.png", "outliers/.manifest.csv.x1.csv")


@pytest.fixture
def made(tmp_path):
    """A run folder with weights, a bank, images, a checkpoint and what is not kept."""
    generator = torch.Generator().manual_seed(0)
    weights = {f"layer{i}.weight": torch.randn(20, 30, generator=generator) for i in range(9)} | {"count": torch.tensor(3)}
    folder = tmp_path / "run"
    write_tensors(folder / "diffusion" / "unet.safetensors", weights, {"backbone": "x"})
    bank = {"inside": torch.randn(40, 8, generator=generator), "heldout_distance": 1e6 * torch.rand(9, generator=generator)}
    write_tensors(folder / "detector" / "bank.safetensors", bank)
    write_tensors(folder / "evaluation" / "features-id.safetensors", {"features": bank["inside"].half()})
    kept = (
        "labels.csv",
        "stages/cluster.json",
        "comparators/.key",
        "diffusion/checkpoint.pt",
        "outliers/0.png",
        "outliers/.lock",
    )
    for name in (*kept, *LEFT_OUT):
        write_text(folder / name, f"content of {name}")
    return folder


def _contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_packed_comes_back(made, tmp_path, monkeypatch):
    monkeypatch.setattr(handover, "PART_BYTES", 1000)
    monkeypatch.setattr(handover, "SMALL_BYTES", 4000)
    before = {path: read_tensors(path) for path in made.rglob("*.safetensors")}
    new = handover.pack(made, tmp_path / "kept")
    assert new[0].name == "run.json" and set(new) == set((tmp_path / "kept").iterdir())
    assert all(path.stat().st_size <= 1000 for path in new[1:])
    assert len([path for path in new if path.name.startswith("diffusion-")]) < 15  # 9 x 600 weights of two bytes
    assert f"{-(-len(new) // 8)} calls" in handover.in_words("run", new) and "calls" not in handover.in_words("run", new[:8])
    monkeypatch.setattr(handover, "BYTES_A_CALL", 2000)
    assert f"{-(-sum(path.stat().st_size for path in new[:8]) // 2000)} calls" in handover.in_words("run", new[:8])
    handover.unpack(tmp_path / "kept", "run", tmp_path / "again")
    assert _contents(tmp_path / "again") == {name: data for name, data in _contents(made).items() if name not in LEFT_OUT}
    for path, tensors in before.items():
        back = read_tensors(tmp_path / "again" / path.relative_to(made))
        for name, value in tensors.items():
            assert back[name].dtype == value.dtype
            precision = 2**-11 if path.name == "bank.safetensors" else 2**-8
            exact = name in ("heldout_distance", "count", "features")
            torch.testing.assert_close(back[name], value, atol=0 if exact else 1e-7, rtol=0 if exact else precision)
            assert exact or not torch.equal(back[name], value)
    assert handover.pack(made, tmp_path / "kept") == new[:1]  # nothing changed: nothing new but the list


def test_runs_share_parts_and_what_no_run_has_any_more_goes(made, tmp_path):
    kept = tmp_path / "kept"
    parts = set(handover.pack(made, kept)[1:])
    shutil.copytree(made, tmp_path / "other")
    assert handover.pack(tmp_path / "other", kept) == [kept / "other.json"]
    write_text(made / "labels.csv", "other labels")
    changed = handover.pack(made, kept)
    assert len(changed) > 1 and parts < set(kept.iterdir())
    shutil.rmtree(tmp_path / "other" / "diffusion")
    handover.pack(tmp_path / "other", kept)
    assert not parts & set(kept.iterdir())


def test_a_kill_while_packing_leaves_the_earlier_handover_whole(made, tmp_path, monkeypatch):
    handover.pack(made, tmp_path / "kept")
    write_text(made / "labels.csv", "other labels")
    whole = os.replace

    def killed(source, target):
        if str(target).endswith(".json"):
            raise KeyboardInterrupt
        whole(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        handover.pack(made, tmp_path / "kept")
    monkeypatch.setattr(os, "replace", whole)
    handover.unpack(tmp_path / "kept", "run", tmp_path / "again")
    assert (tmp_path / "again" / "labels.csv").read_text() == "content of labels.csv"


def test_a_part_that_is_absent_or_changed_makes_no_run_folder(made, tmp_path):
    part = handover.pack(made, tmp_path / "kept")[1]
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match="other bytes"):
        handover.unpack(tmp_path / "kept", "run", tmp_path / "again")
    part.unlink()
    with pytest.raises(RunError, match="nothing there"):
        handover.unpack(tmp_path / "kept", "run", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_after_unpacking_only_what_is_new_runs(tmp_path, monkeypatch):
    """A slot a stage, each on another machine; then comparators one by one."""
    trained, train = [], comparison.train_detector
    monkeypatch.setattr(
        comparison, "train_detector", lambda *data, name, **rest: trained.append(name) or train(*data, name=name, **rest)
    )
    options = experiment.read_options("table1", "", ["--size", "tiny", *FEW])
    config = experiment.configuration(options, {"tiny": ["demo.yml", *experiment.TINY]})
    kept, images, finished = tmp_path / "kept", {}, set()

    def slot(number, work):
        folder = tmp_path / str(number) / "run"
        if number:
            handover.unpack(kept, "run", folder)
            assert images.items() <= _contents(folder).items()
        outcome = work(folder)
        handover.pack(folder, kept)
        return outcome

    for number, stage in enumerate(("train-diffusion", "generate", "train-detector", "evaluate")):
        outcome = slot(number, lambda folder, stage=stage: run(config, folder, stage))
        assert {name for name, state in outcome.items() if state == "done"} == finished & outcome.keys()
        finished |= outcome.keys()
        if stage == "generate":
            made = _contents(tmp_path / str(number) / "run")
            images = {name: data for name, data in made.items() if name.startswith(("outliers/", "controls/"))}
            assert len([name for name in images if "/images/" in name]) == 80
    for number, method in enumerate(("multi-class", "fake-it"), 4):
        slot(number, lambda folder, method=method: train_comparator(config, folder, method))
    assert "comparators/fake-it/fakes.safetensors" in read_json(kept / "run.json")["files"]
    outcome = slot(6, lambda folder: run(config, folder, "compare"))
    assert {name for name, state in outcome.items() if state == "ran"} == {"train-comparators", "compare"}
    assert trained == ["multi-class", "fake-it"]  # the stage found both
    slot(7, lambda folder: run(config, folder))
    assert set(slot(8, lambda folder: run(config, folder)).values()) == {"done"}
    OutlierSet(tmp_path / "8" / "run" / "outliers").verify()


def test_a_slot_that_is_cut_off_hands_over_what_it_finished_and_the_next_begins_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "RESULTS", tmp_path / "results")
    folder = tmp_path / "table1-gpu-a-0"
    with pytest.raises(KeyboardInterrupt), handed_over(folder, RunConfig(), None, True):
        write_text(folder / "labels.csv", "made")
        raise KeyboardInterrupt
    shutil.rmtree(folder)
    with handed_over(folder, RunConfig(), None, True):
        assert (folder / "labels.csv").read_text() == "made"
    shutil.rmtree(folder)
    other = tmp_path / "table4-gpu-0"
    with handed_over(other, RunConfig(), "table1-gpu-a", True):
        assert (other / "labels.csv").read_text() == "made"
    assert not folder.exists()


def test_a_result_to_start_from_that_left_nothing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "RESULTS", tmp_path / "results")
    with handed_over(tmp_path / "table4-gpu-0", RunConfig(), "tabel1-gpu", False):
        assert capsys.readouterr().out.startswith("tabel1-gpu-0: neither a run folder nor a handover")
