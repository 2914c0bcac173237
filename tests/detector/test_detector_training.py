"""The detector's batches, what it is trained on, and that a killed training resumes to the same bits."""

from __future__ import annotations

import dataclasses
import math
import re
from types import SimpleNamespace

import pytest
import torch

from sdood_plugin.artifacts import write_tensors
from sdood_plugin.config import DetectorConfig
from sdood_plugin.data.images import to_unit
from sdood_plugin.detector import training
from sdood_plugin.detector.batches import Labelled, make_parts
from sdood_plugin.detector.network import ThreeHeadNet, load_network, save_network
from sdood_plugin.detector.training import make_optimizer, new_network, train_detector, train_parts
from sdood_plugin.errors import RunError, UsageError
from sdood_plugin.features import Backbone, extract
from sdood_plugin.randomness import derive_seed
from sdood_plugin.training import Job

from ..resuming import Dying, Killed, assert_resumes, assert_same

CONFIG = DetectorConfig(epochs=2, batch_size=4, lr=1e-3)
VIT = {"backbone": "test_vit", "input_size": 32}  # six blocks of width 64, four patches


@pytest.fixture
def parts(pictures):
    return [Labelled(pictures.images.roll(shift, 0), pictures.labels.roll(shift, 0)) for shift in range(3)]


@pytest.fixture
def job(tmp_path, accelerator):
    return Job(accelerator, tmp_path, seed=5)


def train(parts, config, job, **settings):
    return train_detector(
        *parts,
        config,
        job,
        classes=3,
        **settings,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw"},
        {"optimizer": "sgd", "ema_decay": 0.9, "layer_decay": 0.5, "label_smoothing": 0.1, "frozen_blocks": 1},
        {**VIT, "optimizer": "sgd", "ema_decay": 0.9, "layer_decay": 0.7, "frozen_blocks": 4, "augmentation": "none"},
    ],
    ids=["plain", "average, frozen and layer decay", "cached transformer"],
)
def test_a_killed_training_resumes_to_the_same_bits(tmp_path, accelerator, parts, settings):
    config = dataclasses.replace(CONFIG, **settings)

    def run(job):
        network, history = train(parts, config, job)
        return network.state_dict(), history

    before = torch.get_rng_state()
    assert_resumes(run, tmp_path, accelerator, die_at=4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_training_that_stops_early_is_a_moment_of_the_whole_one(tmp_path, accelerator, job, parts, ema_decay):
    config = dataclasses.replace(CONFIG, ema_decay=ema_decay)
    with pytest.raises(Killed):  # in its fourth step, the first of the second epoch
        train(parts, config, dataclasses.replace(job, accelerator=Dying(accelerator, 4), checkpoint_seconds=0.0))
    then = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    (tmp_path / "checkpoint.pt").unlink()
    network, history = train(parts, config, job, stop_after=1)
    state = then["state"]["module"]
    if ema_decay:
        state = {name.removeprefix("module."): value for name, value in then["state"]["average"].items()}
    assert_same(dict(network.state_dict()), dict(state))
    assert_same(history, then["history"])


def test_heads_trained_on_kept_features_are_those_of_a_training_on_the_images(job, parts):
    config = dataclasses.replace(CONFIG, frozen_blocks="all", augmentation="none")
    whole, history = train(parts, config, job)
    network = new_network(config, job, classes=3, image_size=parts[0].images.shape[-1])
    kept = [Labelled(extract(network.backbone, images, device=job.device).half(), labels) for images, labels in parts]
    pools = make_parts(kept[0], kept[2], kept[1], config.batch_size, (config.control_ratio, config.outlier_ratio))
    again, losses = train_parts(network, pools, config, job, half_way=True)
    for name in history:
        torch.testing.assert_close(torch.tensor(losses[name]), torch.tensor(history[name]), rtol=0, atol=1e-3)
    for value, other in zip(again.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("with_controls", "with_outliers", "ratios", "expected"),
    [
        (True, True, (0.5, 0.5), (4, 2, 2)),
        (True, True, (1.0, 0.25), (4, 4, 1)),
        (False, True, (0.5, 0.5), (4, 0, 2)),
        (True, True, (0.0, 0.5), (4, 0, 2)),
        (True, False, (0.5, 0.5), (4, 2, 0)),
        (True, True, (0.5, 0.0), (4, 2, 0)),
        (True, True, (0.01, 0.01), (4, 1, 1)),  # wanted is at least one
    ],
)
def test_a_batch_holds_what_the_ratios_say(job, parts, with_controls, with_outliers, ratios, expected):
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
        job,
        loss=loss,
    )
    assert len(seen) == 2 * (12 // 4)
    for labels, flags in seen:
        assert tuple(torch.bincount(labels, minlength=3).tolist()) == expected
        assert torch.equal(flags, labels == 2)


def test_without_outliers_it_is_cross_entropy_on_g_in_alone(job, parts):
    network, history = train([parts[0], None, None], CONFIG, job)
    assert set(history) == {"loss"} and len(history["loss"]) == 6
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(5, "detector-init"))
        fresh = ThreeHeadNet(Backbone("small_cnn"), 3)
    assert_same(network.g_out.bias, fresh.g_out.bias)  # weight decay leaves a bias of no gradient where it is ...
    assert not torch.equal(network.g_in.weight, fresh.g_in.weight)


def test_with_outliers_all_three_parts_are_recorded(job, parts):
    network, history = train(parts, CONFIG, job)
    assert set(history) == {"loss", "binary", "inside", "outside"}
    assert not network.training


def test_frozen_blocks_keep_weights_and_statistics(job, parts):
    network, _ = train(parts, dataclasses.replace(CONFIG, frozen_blocks=1), job)
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(5, "detector-init"))
        fresh = Backbone("small_cnn").body.state_dict()
    for name, value in network.backbone.body.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, fresh[name]) == (int(name.split(".")[1]) < 14), name  # two stages of seven layers


@pytest.mark.parametrize(
    "settings",
    [{**VIT, "frozen_blocks": 3}, {**VIT, "frozen_blocks": "all", "pooling": "mean"}, {"frozen_blocks": "all"}],
    ids=["three blocks", "whole transformer", "whole convolutional network"],
)
def test_outputs_of_frozen_blocks_are_computed_once_and_change_nothing(job, parts, settings, monkeypatch):
    config = dataclasses.replace(CONFIG, augmentation="none", optimizer="sgd", lr=0.01, **settings)
    images, frozen_part = [], Backbone.frozen_part
    monkeypatch.setattr(Backbone, "frozen_part", lambda own, x: (images.append(len(x)), frozen_part(own, x))[1])
    network, cached = train(parts, config, job)
    assert sum(images) == 1 + 3 * 12  # one to see how large they are, then each image once
    plain_network, plain = train(parts, dataclasses.replace(config, cache_gib=0.0), job)
    assert sum(images) == 2 + 3 * 12 + 6 * 8  # then every batch
    for name in plain:
        torch.testing.assert_close(torch.tensor(cached[name]), torch.tensor(plain[name]), rtol=0, atol=5e-3)
    for value, other in zip(network.parameters(), plain_network.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-3)


def test_augmented_images_are_not_cached(job, parts, monkeypatch):
    cached = []
    monkeypatch.setattr("sdood_plugin.detector.training.frozen_outputs", lambda *_, **__: cached.append(1))
    for augmentation, times in (("digits", 0), ("none", 1)):
        train(parts, dataclasses.replace(CONFIG, frozen_blocks="all", augmentation=augmentation), job)
        assert len(cached) == times


def test_frozen_outputs_that_float16_cannot_hold_are_named_before_the_first_step(job, parts, monkeypatch):
    frozen_part = Backbone.frozen_part
    monkeypatch.setattr(Backbone, "frozen_part", lambda own, x: frozen_part(own, x) + 1e5)
    config = dataclasses.replace(CONFIG, frozen_blocks="all", augmentation="none")
    with pytest.raises(
        RunError, match="frozen blocks of small_cnn.*more than float16 holds.*at most 65504.*detector.cache_gib 0"
    ):
        train(parts, config, job, loss=lambda *_: pytest.fail("a step was done"))
    train(parts, dataclasses.replace(config, cache_gib=0.0), job)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({**VIT, "frozen_blocks": 2}, "computed once"),
        ({**VIT, "frozen_blocks": 2, "cache_gib": 0.0}, "computed in every step: more than detector.cache_gib"),
        ({"frozen_blocks": 1}, "computed in every step: small_cnn is not timm's plain vision transformer"),
        ({}, None),
    ],
)
def test_the_log_says_whether_frozen_blocks_are_computed_once(job, parts, caplog, settings, said):
    with caplog.at_level("INFO", logger="sdood_plugin.detector.training"):
        train(parts, dataclasses.replace(CONFIG, epochs=1, augmentation="none", **settings), job)
    assert caplog.messages == ([] if said is None else [f"frozen blocks: {said}"])


def test_the_learning_rate_rises_over_the_share_of_the_steps_asked_for(job, parts, monkeypatch):
    made, rates = [], []
    monkeypatch.setattr(training, "make_optimizer", lambda *args: made.append(make_optimizer(*args)) or made[0])

    def loss(heads, labels, flags):
        rates.append(made[0].param_groups[-1]["lr"])
        return {"loss": heads.inside.sum()}

    train(parts, dataclasses.replace(CONFIG, epochs=3, lr=0.06, warmup_fraction=1 / 3), job, loss=loss)
    assert rates == pytest.approx([0.02, 0.04, 0.06] + [0.03 * (1 + math.cos(math.pi * step / 6)) for step in range(6)])


@pytest.mark.parametrize("augmentation", ["digits", "natural", "none"])
def test_images_come_channels_last(job, parts, monkeypatch, augmentation):
    seen, frozen_part = [], Backbone.frozen_part
    monkeypatch.setattr(Backbone, "frozen_part", lambda own, x: seen.append(x) or frozen_part(own, x))
    network, _ = train(parts, dataclasses.replace(CONFIG, augmentation=augmentation), job)
    weights = [value for value in network.parameters() if value.ndim == 4]
    assert seen and weights and all(x.is_contiguous(memory_format=torch.channels_last) for x in [*seen, *weights])
    assert not any(x.is_contiguous() for x in seen)


def test_the_network_is_compiled_in_place_where_that_is_asked_for(job, parts, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **settings: compiled.append((module, settings)))
    plain, _ = train(parts, CONFIG, job)
    assert not compiled
    network, _ = train(parts, dataclasses.replace(CONFIG, compile=True), job)
    assert compiled == [(network, {"dynamic": False})]
    assert list(network.state_dict()) == list(plain.state_dict())


def test_the_average_is_that_of_all_steps(job, parts, monkeypatch):
    from timm.utils import ModelEmaV3

    seen, update = [], ModelEmaV3.update

    def recording(own, model, step):
        seen.append((step, [value.detach().double().clone() for value in model.parameters()]))
        update(own, model, step)

    monkeypatch.setattr(ModelEmaV3, "update", recording)
    network, _ = train(parts, dataclasses.replace(CONFIG, ema_decay=0.6), job)
    assert [step for step, _ in seen] == list(range(1, 7))
    average = seen[0][1]
    for step, values in seen[1:]:
        decay = min(0.6, 1 - step ** (-2 / 3))  # short memory at the start (timm)
        average = [decay * old + (1 - decay) * new for old, new in zip(average, values, strict=True)]
    for value, expected in zip(network.parameters(), average, strict=True):
        torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-5)
    last = seen[-1][1]
    assert any(not torch.equal(value.double(), other) for value, other in zip(network.parameters(), last, strict=True))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_learning_rates_fall_with_the_distance_from_the_heads(optimizer):
    config = DetectorConfig(**VIT, optimizer=optimizer, lr=0.1, layer_decay=0.5, frozen_blocks=2)
    with torch.random.fork_rng():
        backbone = Backbone("test_vit", input_size=32)
        backbone.freeze(2)
        network = ThreeHeadNet(backbone, 3)
    rates = {parameter: group["lr"] for group in make_optimizer(network, config).param_groups for parameter in group["params"]}
    for name, parameter in network.named_parameters():
        if name.startswith("g_") or ".norm." in name and ".blocks." not in name:
            assert rates.pop(parameter) == pytest.approx(0.1), name
        elif ".blocks." in name and int(name.split(".")[3]) >= 2:
            assert rates.pop(parameter) == pytest.approx(0.1 * 0.5 ** (5 - int(name.split(".")[3]))), name
        else:
            assert parameter not in rates and not parameter.requires_grad, name
    assert not rates


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("test_resnet", ["conv1|bn1", "layer1", "layer2", "layer3", "layer4"]),
        (
            "test_convnext",
            [
                "stem",
                "stages.0",
                *(f"stages.{stage}.({'downsample|' if block == 0 else ''}blocks.{block})" for stage, block in
                  ((1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (2, 3), (3, 0), (3, 1))),
                "head",
            ],
        ),
    ],
)  # fmt: skip
def test_learning_rates_of_convolutional_networks_fall_block_by_block(name, layers):
    with torch.random.fork_rng():
        network = ThreeHeadNet(Backbone(name), 3)
    groups = make_optimizer(network, DetectorConfig(backbone=name, lr=0.1, layer_decay=0.5)).param_groups
    rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    for own, parameter in network.backbone.body.named_parameters():
        (layer,) = [number for number, pattern in enumerate(layers) if re.match(rf"({pattern})\.", own)]
        assert rates.pop(parameter) == pytest.approx(0.1 * 0.5 ** (len(layers) - 1 - layer)), own
    assert len(rates) == 6 and set(rates.values()) == {0.1}  # weights and biases of the heads


def test_shares_that_differ_in_size_are_refused_before_the_first_step(job, parts):
    three = dataclasses.replace(job, accelerator=SimpleNamespace(num_processes=3, device=job.device))
    config = dataclasses.replace(CONFIG, batch_size=6, outlier_ratio=2 / 3)
    with pytest.raises(UsageError, match="outliers a step, of detector.outlier_ratio: got 4; .* 3 processes, whose"):
        train(parts, config, three)


def test_fewer_images_than_a_batch(job, parts):
    few = [Labelled(part.images[:3], part.labels[:3]) for part in parts]
    _, history = train(few, CONFIG, job)
    assert len(history["loss"]) == 2


def test_it_learns_to_tell_outliers_from_images(job):
    labels = torch.arange(24) % 3
    dark = torch.randint(0, 60, (24, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    parts = [Labelled(dark, labels), Labelled(255 - dark, labels), None]
    network, history = train(parts, dataclasses.replace(CONFIG, epochs=20, batch_size=8, augmentation="none"), job)
    assert history["binary"][-1] < 0.3 < history["binary"][0]
    with torch.no_grad():
        assert (network(to_unit(255 - dark)).binary.argmax(1) == 1).all()
        assert (network(to_unit(dark)).binary.argmax(1) == 0).all()


@pytest.mark.parametrize("settings", [{"name": "small_cnn"}, {"name": "test_vit", "input_size": 32, "pooling": "mean"}])
def test_networks_survive_the_disk(tmp_path, settings):
    with torch.random.fork_rng():
        network = ThreeHeadNet(Backbone(**settings), 3).eval()
    save_network(tmp_path / "n.safetensors", network)
    loaded = load_network(tmp_path / "n.safetensors")
    assert_same(loaded.state_dict(), network.state_dict())
    assert not loaded.training and loaded.backbone.pooling == network.backbone.pooling
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_same(loaded(images)._asdict(), network(images)._asdict())


def test_refuses_weights_of_something_else(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)})
    with pytest.raises(RunError, match="metadata.*train-detector"):
        load_network(tmp_path / "x.safetensors")
