"""`sdood select`: a subset is a set of its own, made without generating again."""

from __future__ import annotations

import json
import os
import shutil
import types

import numpy as np
import pytest
import torch
from PIL import Image

from sdood_plugin.cli import main
from sdood_plugin.config import RunConfig, SelectionConfig
from sdood_plugin.errors import RunError, UsageError
from sdood_plugin.outliers import subset
from sdood_plugin.outliers.card import write_card
from sdood_plugin.outliers.dataset import OutlierSet
from sdood_plugin.outliers.storage import STATE
from sdood_plugin.outliers.subset import select, select_set
from sdood_plugin.stage_table import STAGES
from sdood_plugin.stages import read_outliers

from .handmade import write_set

SEEN, SURE, NEAR = [0, 1, 1, 2, 0, 2, 0, 1, 1], [0.5, 0.95, 0.6, 0.99, 0.9, 0.3, 0.9, 0.7, 0.95], [0.1] * 7 + [0.01] * 2
AMBIGUOUS, FLIPS, NEAR_FLIPS = [2, 5, 7], [1, 3, 8], [8]


@pytest.fixture
def whole(tmp_path, generator):
    images = torch.randint(256, (9, 3, 8, 8), generator=generator, dtype=torch.uint8)
    folder = write_set(tmp_path / "whole", images, predicted_after=SEEN, confidence_after=SURE, nearest_train_distance=NEAR)
    write_card(folder)
    return folder


def tree(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"
    }


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        (SelectionConfig(["ambiguous"]), AMBIGUOUS),
        (SelectionConfig(["flip", "ambiguous"]), sorted(AMBIGUOUS + FLIPS)),
        (SelectionConfig(["flip"], duplicate_distance=0.02), [1, 3]),
        (SelectionConfig(), list(range(9))),
    ],
)
def test_a_subset_is_a_whole_outlier_set(whole, tmp_path, config, rows):
    before = tree(whole)
    told = select_set(whole, tmp_path / "part", config)
    part, made = OutlierSet(tmp_path / "part"), OutlierSet(whole)
    part.verify()
    assert torch.equal(part.images, made.images[rows]) and torch.equal(part.sources, made.sources[rows])
    assert list(part.manifest) == [made.manifest[row] for row in rows]
    (step,) = part.meta["selections"]
    assert step["of"]["manifest_sha256"] == made.meta["manifest_sha256"] and part.meta["key"] != made.meta["key"]
    assert sum(step["dropped"].values()) == 9 - len(rows)
    assert f"{len(rows)} of 9" in told and "hard links" in told
    assert os.path.samefile(tmp_path / "part" / part.manifest[0]["file"], whole / part.manifest[0]["file"])
    card = (tmp_path / "part" / "README.md").read_text()
    assert card.startswith(f"# {len(rows)} semantic-discrepant outliers, selected from 9") and card.count("\n# ") == 0
    assert "Nothing was selected" not in card and "Nothing was selected" in (whole / "README.md").read_text()
    assert f"kept {' and '.join(config.keep)}," in card and f"| 0 | {len(rows)} |" in card
    for name, count in step["dropped"].items():
        assert f"{count} {name}" in card
    with Image.open(tmp_path / "part" / "examples.png") as figure:  # its own images, none that was dropped
        shown = torch.from_numpy(np.array(figure)).permute(2, 0, 1)[:, 2:66, 2:-2].unfold(2, 64, 66)
    assert torch.equal(shown[:, ::8, :, ::8].permute(2, 0, 1, 3), part.images)
    assert tree(whole) == before
    select_set(whole, tmp_path / "part", config)  # once more: nothing changes
    OutlierSet(tmp_path / "part").verify()


def test_a_subset_of_a_subset_remembers_both_selections(whole, tmp_path):
    select_set(whole, tmp_path / "part", SelectionConfig(["flip", "ambiguous"]))
    select_set(tmp_path / "part", tmp_path / "less", SelectionConfig(["flip"], duplicate_distance=0.02))
    less, card = OutlierSet(tmp_path / "less"), (tmp_path / "less" / "README.md").read_text()
    first, second = less.meta["selections"]
    assert (first["of"]["count"], first["dropped"], second["of"]["count"]) == (9, {"stay": 3}, 6)
    assert second["dropped"] == {"stay": 0, "ambiguous": 3, "duplicate": 1}
    assert second["of"]["manifest_sha256"] == OutlierSet(tmp_path / "part").meta["manifest_sha256"]
    assert card.startswith("# 2 semantic-discrepant outliers, selected from 9") and "dropped 3 stay" in card
    assert "dropped 0 stay, 3 ambiguous, 1 duplicate" in card


def test_where_links_are_impossible_files_are_copied(whole, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no links here")

    monkeypatch.setattr(subset.os, "link", refuse)
    assert "(copies)" in select_set(whole, tmp_path / "part", SelectionConfig(["flip"]))
    part = OutlierSet(tmp_path / "part")
    part.verify()
    assert not os.path.samefile(tmp_path / "part" / part.manifest[0]["file"], whole / part.manifest[0]["file"])


def test_a_killed_selection_goes_on_to_the_same_bytes(whole, tmp_path, monkeypatch):
    select_set(whole, tmp_path / "part", SelectionConfig(["ambiguous", "flip"]))
    link, left = os.link, [3]

    def dying(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        link(*args, **kwargs)

    monkeypatch.setattr(subset.os, "link", dying)
    with pytest.raises(KeyboardInterrupt):
        select_set(whole, tmp_path / "again", SelectionConfig(["ambiguous", "flip"]))
    with pytest.raises(RunError):
        OutlierSet(tmp_path / "again")
    left[0] = 99
    select_set(whole, tmp_path / "again", SelectionConfig(["ambiguous", "flip"]))
    assert tree(tmp_path / "again") == tree(tmp_path / "part")
    assert not (tmp_path / "again" / STATE).exists()


def test_folders_that_are_not_ours_stay_as_they_are(whole, tmp_path):
    other = write_set(tmp_path / "other", torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text.txt").write_text("mine")
    theirs, making = tmp_path / "theirs", tmp_path / "making"
    for folder, name, text in ((theirs, "meta.json", {"title": "my data"}), (making, "in-progress.json", {"key": "1" * 64})):
        (folder / "images").mkdir(parents=True)
        (folder / "images" / "holiday.png").write_text("a beach")
        (folder / name).write_text(json.dumps(text))
    for dest in (other, theirs, making, tmp_path / "notes", whole, whole / "inside", tmp_path):
        before = tree(tmp_path)
        with pytest.raises(UsageError):
            select_set(whole, dest, SelectionConfig(["flip"]))
        assert tree(tmp_path) == before


def test_an_outlier_that_was_changed_is_refused(whole, tmp_path):
    name = OutlierSet(whole).manifest[FLIPS[0]]["file"]
    shutil.copyfile(whole / OutlierSet(whole).manifest[0]["file"], whole / name)
    with pytest.raises(RunError, match=name):
        select_set(whole, tmp_path / "part", SelectionConfig(["flip"]))
    with pytest.raises(RunError):
        OutlierSet(tmp_path / "part")


def test_nothing_left_is_said_before_anything_is_written(whole, tmp_path):
    with pytest.raises(RunError, match="no outlier left"):
        select_set(whole, tmp_path / "part", SelectionConfig(["stay"], duplicate_distance=5.0))
    assert not (tmp_path / "part").exists()
    assert select(OutlierSet(whole), SelectionConfig()).kept.all()


def test_the_command_line(whole, tmp_path, capsys):
    assert main(["select", str(whole), str(tmp_path / "part"), "--keep", "ambiguous, flip", "--duplicate_distance", "0.02"]) == 0
    told = capsys.readouterr().out
    assert "4 of 9 outliers" in told and "3 stay, 2 duplicate" in told
    assert len(OutlierSet(tmp_path / "part")) == 4
    assert main(["select", str(whole), str(tmp_path / "x"), "--keep", "good"]) == 2
    assert "selection.keep" in capsys.readouterr().err
    assert main(["select", str(tmp_path / "nothing"), str(tmp_path / "x"), "--keep", "flip"]) == 1
    assert "nothing" in capsys.readouterr().err


def test_the_detector_is_trained_on_the_selection(whole, tmp_path):
    heldout = torch.zeros(9, dtype=torch.bool)
    heldout[[1, 2]] = True
    whole.rename(tmp_path / "outliers")

    def given(selection, held):
        run = types.SimpleNamespace(folder=tmp_path, config=RunConfig(selection=selection))
        return read_outliers(run, "outliers", heldout if held else ~heldout).images

    images = OutlierSet(tmp_path / "outliers").images
    assert torch.equal(given(SelectionConfig(["ambiguous"]), False), images[[5, 7]])
    assert torch.equal(given(SelectionConfig(["ambiguous"]), True), images[[2]])
    assert torch.equal(given(SelectionConfig(), False), images[~heldout])
    with pytest.raises(RunError, match="no outlier left"):
        given(SelectionConfig(["flip"], duplicate_distance=9.0), False)
    changed = {
        stage.name
        for stage in STAGES
        if stage.settings(RunConfig()) != stage.settings(RunConfig(selection=SelectionConfig(["ambiguous"])))
    }
    assert changed >= {"inspect", "train-detector"} and "generate" not in changed
