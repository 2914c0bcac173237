"""The report of an outlier set on disk, its grids, and the features its distances are taken of."""

from __future__ import annotations

import json
from unittest import mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch_fidelity
from matplotlib.text import Text
from PIL import Image

from sdood_plugin.artifacts import read_tensors, write_json
from sdood_plugin.cli import main
from sdood_plugin.config import InspectionConfig, RunConfig, SelectionConfig
from sdood_plugin.context import Context
from sdood_plugin.data.images import ImageSet
from sdood_plugin.errors import RunError, UsageError
from sdood_plugin.inspection import whole
from sdood_plugin.outliers import fidelity
from sdood_plugin.outliers.dataset import OutlierSet
from sdood_plugin.outliers.fidelity import INCEPTION, Features, distances, load_features, pixel_features
from sdood_plugin.outliers.inspect import grids, report_set
from sdood_plugin.report.figures import grid

from .handmade import write_set

CPU = torch.device("cpu")
PIXELS = Features("pixels", pixel_features)


def some_images(count, side=16, seed=0):
    return torch.randint(256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.fixture
def train():
    return ImageSet(some_images(10), [f"{i}.png" for i in range(10)])


def test_a_set_of_copies_of_the_training_images_is_found_out(train, tmp_path):
    made = OutlierSet(write_set(tmp_path / "set", train.images, train, nearest_train_distance=[0.0] * 10))
    found = report_set(made, train, PIXELS, SelectionConfig(), InspectionConfig())
    assert found["stay_rate"] == 100 and found["near_duplicate_rate"] == 100 and found["distance_to_source"] == 0
    assert found["fidelity"]["fd"] == pytest.approx(0, abs=1e-5) and found["fidelity"]["n_real"] == 10
    json.dumps(found)


def test_a_set_made_of_other_images_is_refused(train, tmp_path):
    made = OutlierSet(write_set(tmp_path / "set", some_images(4, seed=1), train, source_index=[0, 3, 2, 9]))
    report_set(made, train, PIXELS, SelectionConfig(), InspectionConfig())
    other = ImageSet(train.images, [f"other/{i}.png" for i in range(10)])
    with pytest.raises(RunError, match="'other/0.png' at position 0"):
        report_set(made, other, PIXELS, SelectionConfig(), InspectionConfig())
    with pytest.raises(RunError, match="5 images"):
        report_set(made.take(torch.tensor([3])), train.subset(torch.arange(5)), PIXELS, SelectionConfig(), InspectionConfig())


def test_other_images_of_the_same_names_are_refused_before_features_are_loaded(train, tmp_path, capsys, monkeypatch):
    made = write_set(tmp_path / "set", some_images(4, seed=1), train)
    monkeypatch.setattr(fidelity, "load_features", lambda *_: pytest.fail("features were loaded"))
    for side, expected in ((16, "other pixels or names"), (8, "got 8 px; expected 16 px")):
        pictures = tmp_path / str(side)
        pictures.mkdir()
        for name, image in zip(train.names, some_images(10, side, seed=5), strict=True):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(pictures / name)
        settings = ["--images", str(pictures), "--data.image_size", str(side), "--inspection.features", "pixels"]
        assert main(["inspect", str(made), "--out", str(tmp_path / "seen"), *settings]) == 1
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "seen").exists()


def test_a_runs_own_report_is_not_replaced(train, tmp_path, capsys):
    made, out = write_set(tmp_path / "set", some_images(4), train), tmp_path / "out"
    assert main(["inspect", str(made), "--out", str(out)]) == 0
    (out / "run.json").write_text("{}")
    before = (out / "report.html").read_bytes()
    assert main(["inspect", str(made), "--out", str(out)]) == 2
    assert "another folder than a run's" in capsys.readouterr().err and (out / "report.html").read_bytes() == before


def test_grids_show_an_outlier_of_every_pair_and_of_every_setting(tmp_path):
    labels, targets = [0, 0, 1, 2, 1, 0], [1, 2, 0, 1, 0, 1]
    weights, starts = [2, 2, 4, 2, 4, 4], [0.1, 0.3, 0.1, 0.2, 0.2, 0.1]
    made = write_set(
        tmp_path / "set", some_images(6), source_label=labels, target=targets, guidance_weight=weights, start_fraction=starts
    )
    found = grids(OutlierSet(made))
    pair = found["class-pair"]
    assert pair["rows"] == ["of 0", "of 1", "of 2"] and pair["columns"] == ["towards 0", "towards 1", "towards 2"]
    assert pair["index"] == [[-1, 0, 1], [2, -1, -1], [-1, 3, -1]]
    assert found["guidance_weight"]["rows"] == ["w = 2", "w = 4"]
    assert found["guidance_weight"]["index"] == [[0, 1, 3], [2, 4, 5]]
    assert found["start_fraction"]["rows"] == ["S = 0.1", "S = 0.2", "S = 0.3"]
    assert found["start_fraction"]["index"] == [[0, 2, 5], [3, 4, -1], [1, -1, -1]]


def test_without_a_target_the_pair_is_source_and_what_is_seen(tmp_path):
    made = write_set(tmp_path / "set", some_images(3), target=[""] * 3, source_label=[1, 1, 2], predicted_after=[0, 1, 0])
    pair = grids(OutlierSet(made))["class-pair"]
    assert pair["columns"] == ["seen as 0", "seen as 1"] and pair["index"] == [[0, 1], [2, -1]]


def test_a_grid_says_how_many_classes_it_leaves_out(tmp_path):
    labels = list(range(20))
    made = write_set(tmp_path / "set", some_images(20, 8), source_label=labels, target=[(i + 1) % 3 for i in labels])
    pair = grids(OutlierSet(made))["class-pair"]
    assert pair["note"] == "12 of 20 source classes" and len(pair["rows"]) == 12 and len(pair["columns"]) == 3
    made = write_set(tmp_path / "away", some_images(20, 8), target=[""] * 20, predicted_after=labels)
    assert grids(OutlierSet(made))["class-pair"]["note"] == "12 of 20 classes seen"
    assert main(["inspect", str(made), "--out", str(tmp_path / "seen")]) == 0
    (label,) = [text for text in grid(tmp_path / "seen", "class-pair").findobj(Text) if text.get_text().startswith("12 of")]
    assert label.get_text() == "12 of 20 classes seen"


def test_grids_read_what_they_show_and_no_more(tmp_path, monkeypatch):
    made = write_set(tmp_path / "set", some_images(40, 8), start_fraction=[0.1, 0.2] * 20)
    read, seen = OutlierSet.read, []
    monkeypatch.setattr(OutlierSet, "read", lambda self, rows: (seen.extend(rows.tolist()), read(self, rows))[1])
    assert main(["inspect", str(made), "--out", str(tmp_path / "seen")]) == 0
    assert len(set(seen)) < 40 and len(seen) <= 1 + 24 + 12


def test_a_bare_folder_gives_grids_and_with_its_images_the_quality(tmp_path, train, capsys, caplog):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, image in zip(train.names, train.images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(pictures / name)
    made = write_set(tmp_path / "set", some_images(8, seed=3), train, start_fraction=[0.1, 0.2] * 4)
    out = tmp_path / "seen"
    assert main(["inspect", str(made), "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert str(out / "report.html") in told.out and "grids alone" in caplog.text
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "FID" not in page and not (out / "inspection" / "quality.json").exists()
    shown = read_tensors(out / "inspection" / "grids.safetensors")["start_fraction"]
    assert torch.equal(shown, OutlierSet(made).images[[0, 2, 4, 6, 1, 3, 5, 7]].reshape(2, 4, 3, 16, 16))
    settings = ["--images", str(pictures), "--data.image_size", "16", "--inspection.features", "pixels"]
    assert main(["inspect", str(made), "--out", str(out), *settings]) == 0
    quality = json.loads((out / "inspection" / "quality.json").read_text())["set"]
    assert quality["count"] == 8 and quality["stay_rate"] == 100 and quality["fidelity"]["n_real"] == 10
    assert "FD " in (out / "report.html").read_text() and "set by S" in (out / "report.html").read_text()
    assert (
        main(["inspect", str(made), "--out", str(made / "seen")]) == 2
        and main(["inspect", str(made), "--out", str(pictures)]) == 2
    )
    assert sorted(path.name for path in pictures.iterdir()) == sorted(train.names)


def test_features_by_name(tmp_path):
    images = some_images(5)
    assert load_features(InspectionConfig("pixels"), CPU).of(images).shape == (5, 192)
    assert load_features(InspectionConfig(), CPU, PIXELS) is PIXELS
    with pytest.raises(UsageError, match="reference"):
        load_features(InspectionConfig(), CPU)
    for wrong in (("pixels", "x.pth"), ("resnet18", None)):
        with pytest.raises(UsageError, match="inspection.weights"):
            InspectionConfig(*wrong)


def test_pixel_features_are_block_means():
    images = some_images(2)
    naive = (images.numpy() / 127.5 - 1).reshape(2, 3, 8, 2, 8, 2).mean(axis=(3, 5)).reshape(2, -1)
    np.testing.assert_allclose(pixel_features(images).numpy(), naive, atol=1e-6)


def test_without_inception_weights_the_substitute_is_named_and_is_no_fid(train, tmp_path, monkeypatch, caplog):
    def unreachable(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", unreachable)
    found = load_features(InspectionConfig("inception"), CPU, Features("the reference network's features", pixel_features))
    assert found.name == "the reference network's features" and "no FID" in caplog.text and found.instead_of == INCEPTION
    far = distances(found.of(some_images(5)), found.of(some_images(6)), found.name, InspectionConfig("inception"))
    assert "fd" in far and "fid" not in far
    substitute = load_features(InspectionConfig("inception"), CPU)
    assert substitute.name == "pixels averaged to 8 x 8"
    made = OutlierSet(write_set(tmp_path / "set", train.images, train))
    for features, taken in ((substitute, True), (PIXELS, False)):
        quality = {"outliers": report_set(made, train, features, SelectionConfig(), InspectionConfig())}
        assert quality["outliers"]["fidelity"].get("instead_of") == (INCEPTION if taken else None)
        write_json(tmp_path / "inspection" / "quality.json", quality)
        assert whole(Context(RunConfig(), tmp_path)) != taken


def test_inception_weights_that_are_none_are_refused(tmp_path):
    (tmp_path / "text.pth").write_bytes(b"no weights")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save(InspectionConfig(), tmp_path / "code.pth")  # a pickle that is more than tensors
    for name in ("absent.pth", "text.pth", "other.pth", "code.pth"):
        with pytest.raises(UsageError, match="inspection.weights") as error:
            load_features(InspectionConfig("inception", str(tmp_path / name)), CPU)
        assert "\n" not in str(error.value)


def test_fid_is_taken_of_torch_fidelitys_features(tmp_path):
    """Random Inception weights in a file: the features are those of the network they came from, the names FID and KID."""
    extractor = torch_fidelity.FeatureExtractorInceptionV3
    with mock.patch.object(extractor, "load_state_dict"), mock.patch(f"{extractor.__module__}.load_state_dict_from_url"):
        network = extractor("inception-v3-compat", ["2048"], verbose=False)
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    features = load_features(InspectionConfig("inception", str(tmp_path / "inception.pth")), CPU)
    images = some_images(2, 32)
    found = features.of(images)
    torch.testing.assert_close(found, network(images)[0])
    far = distances(found, found.flip(1), features.name, InspectionConfig("inception"))
    assert features.name == INCEPTION and {"fid", "kid", "kid_std"} <= far.keys() and not {"fd", "kd"} & far.keys()


def test_a_download_that_fails_is_not_confused_with_a_broken_file():
    assert issubclass(URLError, OSError)
    with mock.patch.object(fidelity, "_inception", side_effect=PermissionError("no")), pytest.raises(PermissionError):
        load_features(InspectionConfig("inception"), CPU)
