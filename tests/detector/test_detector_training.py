"""The detector's batches, what it is trained on, and that a killed training resumes to the same bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sdood_plugin.artifacts import write_tensors
from sdood_plugin.config import DetectorConfig
from sdood_plugin.data.images import to_unit
from sdood_plugin.detector.network import ThreeHeadNet, load_network, save_network
from sdood_plugin.detector.training import Labelled, _rows, train_detector
from sdood_plugin.errors import RunError
from sdood_plugin.features import Backbone
from sdood_plugin.randomness import derive_seed

from ..resuming import assert_resumes, assert_same

CONFIG = DetectorConfig(epochs=2, batch_size=4, lr=1e-3)


@pytest.fixture
def parts(pictures):
    return [Labelled(pictures.images.roll(shift, 0), pictures.labels.roll(shift, 0)) for shift in range(3)]


def train(parts, config, folder, accelerator, key="k", checkpoint_seconds=1e9, **settings):
    return train_detector(
        *parts,
        config,
        classes=3,
        accelerator=accelerator,
        seed=5,
        folder=folder,
        key=key,
        checkpoint_seconds=checkpoint_seconds,
        **settings,
    )


@pytest.mark.parametrize(("total", "count"), [(10, 3), (7, 7), (5, 12), (8, 1), (1, 4)])
def test_every_pass_over_the_rows_is_a_permutation(total, count):
    steps = 4 * total
    rows = torch.cat([_rows(total, count, step, 3, 0, torch.device("cpu")) for step in range(steps)])
    for epoch in range(len(rows) // total):
        assert sorted(rows[epoch * total : (epoch + 1) * total].tolist()) == list(range(total))
    if total > 4:
        assert not torch.equal(rows[:total], rows[total : 2 * total])
        other = torch.cat([_rows(total, count, step, 3, 1, torch.device("cpu")) for step in range(steps)])
        assert not torch.equal(rows, other)  # parts are shuffled apart from each other


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_killed_training_resumes_to_the_same_bits(tmp_path, accelerator, parts, optimizer):
    config = dataclasses.replace(CONFIG, optimizer=optimizer)

    def run(folder, by, **settings):
        network, history = train(parts, config, folder, by, **settings)
        return network.state_dict(), history

    before = torch.get_rng_state()
    assert_resumes(run, tmp_path, accelerator, die_at=4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("with_controls", "with_outliers", "ratios", "expected"),
    [
        (True, True, (0.5, 0.5), (4, 2, 2)),
        (True, True, (1.0, 0.25), (4, 4, 1)),
        (False, True, (0.5, 0.5), (4, 0, 2)),
        (True, True, (0.0, 0.5), (4, 0, 2)),
        (True, False, (0.5, 0.5), (4, 2, 0)),
        (True, True, (0.5, 0.0), (4, 2, 0)),
    ],
)
def test_a_batch_holds_what_the_ratios_say(tmp_path, accelerator, parts, with_controls, with_outliers, ratios, expected):
    seen = []

    def loss(heads, labels, flags):
        seen.append((labels, flags))
        return {"loss": heads.inside.sum() * 0}

    config = dataclasses.replace(CONFIG, control_ratio=ratios[0], outlier_ratio=ratios[1])
    # labels tell the origin here: 0 inside, 1 control, 2 outlier
    sets = [Labelled(part.images, torch.full((12,), number)) for number, part in zip((0, 2, 1), parts, strict=True)]
    train(
        [sets[0], sets[1] if with_outliers else None, sets[2] if with_controls else None],
        config,
        tmp_path,
        accelerator,
        loss=loss,
    )
    assert len(seen) == 2 * (12 // 4)
    for labels, flags in seen:
        assert tuple(torch.bincount(labels, minlength=3).tolist()) == expected
        assert torch.equal(flags, labels == 2)


def test_without_outliers_it_is_cross_entropy_on_g_in_alone(tmp_path, accelerator, parts):
    network, history = train([parts[0], None, None], CONFIG, tmp_path, accelerator)
    assert set(history) == {"loss"} and len(history["loss"]) == 6
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(5, "detector-init"))
        fresh = ThreeHeadNet(Backbone("small_cnn"), 3)
    assert_same(network.g_out.bias, fresh.g_out.bias)  # weight decay leaves a bias of no gradient where it is ...
    assert not torch.equal(network.g_in.weight, fresh.g_in.weight)


def test_with_outliers_all_three_parts_are_recorded(tmp_path, accelerator, parts):
    network, history = train(parts, CONFIG, tmp_path, accelerator)
    assert set(history) == {"loss", "binary", "inside", "outside"}
    assert not network.training


def test_fewer_images_than_a_batch(tmp_path, accelerator, parts):
    few = [Labelled(part.images[:3], part.labels[:3]) for part in parts]
    _, history = train(few, CONFIG, tmp_path, accelerator)
    assert len(history["loss"]) == 2


def test_it_learns_to_tell_outliers_from_images(tmp_path, accelerator):
    labels = torch.arange(24) % 3
    dark = torch.randint(0, 60, (24, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    parts = [Labelled(dark, labels), Labelled(255 - dark, labels), None]
    network, history = train(
        parts, dataclasses.replace(CONFIG, epochs=20, batch_size=8, augmentation="none"), tmp_path, accelerator
    )
    assert history["binary"][-1] < 0.3 < history["binary"][0]
    with torch.no_grad():
        assert (network(to_unit(255 - dark)).binary.argmax(1) == 1).all()
        assert (network(to_unit(dark)).binary.argmax(1) == 0).all()


def test_networks_survive_the_disk(tmp_path):
    network = ThreeHeadNet(Backbone("small_cnn"), 3).eval()
    save_network(tmp_path / "n.safetensors", network)
    loaded = load_network(tmp_path / "n.safetensors")
    assert_same(loaded.state_dict(), network.state_dict())
    assert not loaded.training
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_same(loaded(images)._asdict(), network(images)._asdict())


def test_refuses_weights_of_something_else(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)})
    with pytest.raises(RunError, match="metadata.*train-detector"):
        load_network(tmp_path / "x.safetensors")
