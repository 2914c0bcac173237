"""Noising, targets, dropped conditions, and training that resumes to the same bits."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdood_plugin.artifacts import write_tensors
from sdood_plugin.config import DetectorConfig, DiffusionConfig
from sdood_plugin.data.images import to_unit
from sdood_plugin.detector.network import ThreeHeadNet
from sdood_plugin.detector.training import make_optimizer
from sdood_plugin.diffusion import training
from sdood_plugin.diffusion.training import (
    Average,
    add_noise,
    denoising_loss,
    drop_condition,
    loss_by_noise_level,
    regression_target,
    train_diffusion,
)
from sdood_plugin.diffusion.unet import alphas_bar, build_unet, load_unet
from sdood_plugin.errors import UsageError
from sdood_plugin.features import Backbone
from sdood_plugin.training import Job

from ..resuming import assert_resumes, assert_same
from .two_processes import diverge, train


def linear_bar(timesteps=1000):
    """abar by hand: the product of 1 - beta, beta from 1e-4 to 0.02."""
    product, found = 1.0, []
    for i in range(timesteps):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / (timesteps - 1))
        found.append(product)
    return torch.tensor(found, dtype=torch.float64)


def test_linear_schedule_is_the_product_of_its_betas():
    bar = alphas_bar(DiffusionConfig(schedule="linear"))
    torch.testing.assert_close(bar, linear_bar(), rtol=1e-4, atol=0)
    # the noise levels METHOD section 3 quotes
    assert [round(float((1 - bar[t]).sqrt()), 2) for t in (100, 200, 400)] == pytest.approx([0.32, 0.58, 0.90], abs=0.011)


def test_cosine_schedule_is_milder():
    bar = alphas_bar(DiffusionConfig(schedule="cosine"))
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    cosine = (
        torch.cos((t + 0.008) / 1.008 * torch.pi / 2).square()
        / torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2, dtype=torch.float64)).square()
    )
    torch.testing.assert_close(bar[:990], cosine[:990], rtol=1e-3, atol=1e-6)
    assert (bar[50:900] > linear_bar()[50:900]).all()


@pytest.mark.parametrize("timesteps", [10, 50, 100, 4000])
def test_the_linear_schedule_ends_in_noise_whatever_t_is(timesteps):
    bar, reference = alphas_bar(DiffusionConfig(timesteps=timesteps)), linear_bar()
    assert bar.min() > 0 and float((1 - bar[-1]).sqrt()) > 0.9999
    if timesteps >= 100:  # the same noise at the same fraction of T
        for fraction in (0.1, 0.2, 0.3, 0.5):
            found, expected = (float((1 - b[round(fraction * len(b)) - 1]).sqrt()) for b in (bar, reference))
            assert found == pytest.approx(expected, abs=0.015)


def test_noising_is_its_equation(generator):
    clean, noise = torch.randn(2, 4, 3, 5, 5, generator=generator)
    abar = torch.tensor([0.99, 0.5, 0.1, 0.001])
    found = add_noise(clean, noise, abar)
    for b in range(4):
        a = float(abar[b])
        torch.testing.assert_close(
            found[b].double(), a**0.5 * clean[b].double() + (1 - a) ** 0.5 * noise[b].double(), atol=1e-6, rtol=1e-6
        )
    torch.testing.assert_close(add_noise(clean, noise, abar[1]), add_noise(clean, noise, abar[1].expand(4)))


def test_targets_let_the_clean_image_be_recovered(generator):
    clean, noise = torch.randn(2, 4, 3, 5, 5, generator=generator, dtype=torch.float64)
    abar = torch.tensor([0.99, 0.5, 0.1, 0.01], dtype=torch.float64)
    a, x = abar.reshape(-1, 1, 1, 1), add_noise(clean, noise, abar)
    eps, v = (regression_target(clean, noise, abar, name) for name in ("epsilon", "v"))
    torch.testing.assert_close((x - (1 - a).sqrt() * eps) / a.sqrt(), clean)
    torch.testing.assert_close(a.sqrt() * x - (1 - a).sqrt() * v, clean)
    torch.testing.assert_close(a.sqrt() * v + (1 - a).sqrt() * x, noise)


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_conditions_are_dropped_at_their_rate_and_otherwise_kept(generator, probability):
    labels = torch.arange(40000) % 7
    found = drop_condition(labels, 7, probability, generator)
    dropped = found == 7
    assert torch.equal(found[~dropped], labels[~dropped])
    for own in range(7):  # at the same rate in every class
        share = dropped[labels == own].double().mean()
        assert abs(share - probability) < 5 * (probability * (1 - probability) / (40000 / 7)) ** 0.5


@pytest.mark.parametrize(("fraction", "highest"), [(0.3, 30), (1.0, 100), (0.001, 1)])
def test_noise_levels_above_the_highest_are_never_trained(monkeypatch, tmp_path, accelerator, tiny, pictures, fraction, highest):
    seen = []
    real = training.add_noise
    monkeypatch.setattr(training, "add_noise", lambda clean, noise, abar: (seen.append(abar), real(clean, noise, abar))[1])
    config = dataclasses.replace(tiny, max_start_fraction=fraction, steps=3, batch_size=300)
    train_diffusion(
        pictures.images,
        pictures.labels,
        config,
        Job(accelerator, tmp_path),
        classes=3,
    )
    found, bar = torch.cat(seen), alphas_bar(config).float()
    assert found.min() == bar[highest - 1] and found.max() == bar[0]  # 900 draws reach both ends
    assert len(found.unique()) == highest


def recorded(monkeypatch):
    """What the last step of a training was given (clean, noise, abar), and of every step the conditions and the predictions."""
    given, seen = {}, []
    real, real_unet = training.add_noise, training.build_unet
    monkeypatch.setattr(
        training,
        "add_noise",
        lambda clean, noise, abar: given.update(clean=clean, noise=noise, abar=abar) or real(clean, noise, abar),
    )

    def recording(*args, **kwargs):
        unet = real_unet(*args, **kwargs)
        unet.register_forward_hook(
            lambda module, args, kwargs, output: seen.append((kwargs["class_labels"], output[0].detach().double())),
            with_kwargs=True,
        )
        return unet

    monkeypatch.setattr(training, "build_unet", recording)
    return given, seen


@pytest.mark.parametrize("flips", [True, False])
def test_an_image_is_trained_on_with_its_own_class_or_none_and_mirrored_if_wanted(
    tmp_path, monkeypatch, accelerator, tiny, pictures, flips
):
    given, seen = recorded(monkeypatch)
    config = dataclasses.replace(tiny, steps=1, batch_size=120, condition_dropout=0.3, flips=flips)
    train_diffusion(pictures.images, pictures.labels, config, Job(accelerator, tmp_path), classes=3)
    real = to_unit(pictures.images)
    dropped = mirrored = 0
    for clean, condition in zip(given["clean"], seen[0][0].tolist(), strict=True):
        plain, other = ((real == image).flatten(1).all(dim=1) for image in (clean, clean.flip(2)))
        assert int((plain | other).sum()) == 1
        assert condition in (3, int(pictures.labels[plain | other]))
        dropped, mirrored = dropped + (condition == 3), mirrored + int(other.any())
    assert 12 <= dropped <= 60  # 36 are expected; five standard deviations are 25
    assert 32 <= mirrored <= 88 if flips else mirrored == 0


def test_the_weights_are_the_running_average_of_steps_with_a_clipped_gradient(tmp_path, monkeypatch, accelerator, tiny, pictures):
    trail, clips = [], []

    class Recording(training.Descent):
        def __init__(self, module, *args, **settings):
            super().__init__(module, *args, **settings)
            clips.append(settings["gradient_clip"])

        def __call__(self, loss):
            super().__call__(loss)
            trail.append([weight.detach().clone() for weight in self._module.parameters()])

    monkeypatch.setattr(training, "Descent", Recording)
    config = dataclasses.replace(tiny, lr=1e-2, ema_decay=0.2, gradient_clip=0.7)
    unet, _ = train_diffusion(pictures.images, pictures.labels, config, Job(accelerator, tmp_path), classes=3)
    average = trail[0]
    for done, weights in enumerate(trail[1:], 1):
        decay = min(0.2, (1 + done) / (10 + done))  # 0.18, then the configured one
        average = [decay * before + (1 - decay) * now for before, now in zip(average, weights, strict=True)]
    assert len(trail) == config.steps and clips == [0.7]
    for found, expected in zip(unet.parameters(), average, strict=True):
        torch.testing.assert_close(found.detach(), expected, atol=1e-6, rtol=1e-5)


def trained_state(device, kind):
    """What a checkpoint may hold besides the network, on a device, after a step where there can be one; and its tensors."""
    with torch.device(device):
        network = ThreeHeadNet(Backbone("small_cnn"), 3, 8)
    weights = list(network.parameters())
    if kind == "average":
        average = Average(weights, decay=0.9, foreach=True)
        return average, lambda: average.shadow_params, lambda: average.step(weights)
    optimizer = make_optimizer(network, DetectorConfig(optimizer=kind))
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    return optimizer, lambda: [v for s in optimizer.state.values() for n, v in s.items() if n != "step"], optimizer.step


@pytest.mark.parametrize("kind", ["average", "adamw", "sgd"])
def test_a_state_that_was_read_to_the_cpu_comes_back_to_its_device(kind):
    saved, _, step = trained_state("cpu", kind)
    step()
    state, tensors, step = trained_state("meta", kind)
    state.load_state_dict(saved.state_dict())
    assert tensors() and all(tensor.device.type == "meta" for tensor in tensors())
    step()  # would not mix devices


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_of_a_step_is_the_weighted_mean_squared_error_of_the_prediction(
    tmp_path, monkeypatch, accelerator, tiny, pictures, prediction, gamma
):
    config = dataclasses.replace(tiny, prediction=prediction, min_snr_gamma=gamma, steps=1)
    given, seen = recorded(monkeypatch)
    _, history = train_diffusion(
        pictures.images,
        pictures.labels,
        config,
        Job(accelerator, tmp_path),
        classes=3,
    )
    clean, noise, abar = (given[name].double() for name in ("clean", "noise", "abar"))
    a = abar.reshape(-1, 1, 1, 1)
    target = noise if prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * clean
    ((condition, predicted),) = seen
    weight, snr = torch.ones(()), a / (1 - a)
    if gamma is not None:
        weight = torch.minimum(snr, torch.full_like(snr, gamma)) / (snr if prediction == "epsilon" else snr + 1)
    assert history["loss"] == [pytest.approx(float((weight * (predicted - target).square()).mean()), rel=1e-4)]
    assert set(condition.tolist()) <= {0, 1, 2, 3}


def run(job, tiny, pictures):
    unet, history = train_diffusion(
        pictures.images,
        pictures.labels,
        tiny,
        job,
        classes=3,
    )
    return unet.state_dict(), history


def test_a_killed_training_resumes_to_the_same_bits(tmp_path, accelerator, tiny, pictures):
    assert_resumes(lambda job: run(job, tiny, pictures), tmp_path, accelerator, die_at=3)


def test_two_processes_train_as_one_does_and_stop_together(tmp_path, accelerator):
    script = str(Path(__file__).with_name("two_processes.py"))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, str(tmp_path)]
    done = subprocess.run([sys.executable, *launch], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, both = train(accelerator, tmp_path), [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [found["processes"] for found in both] == [2, 2] and one["processes"] == 1
    assert_same(both[0]["weights"], both[1]["weights"])
    torch.testing.assert_close(both[0]["weights"], dict(one["weights"]), rtol=1e-3, atol=1e-5)
    assert both[0]["losses"] == both[1]["losses"] == pytest.approx(one["losses"], rel=1e-4)  # of the whole batch
    assert "step 2: got nan" in diverge(accelerator, tmp_path)
    assert [found["error"] for found in both] == [diverge(accelerator, tmp_path)] * 2


def test_global_randomness_is_left_alone_and_the_result_does_not_depend_on_it(tmp_path, accelerator, tiny, pictures):
    before = torch.get_rng_state()
    first = run(Job(accelerator, tmp_path / "a"), tiny, pictures)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert_same(run(Job(accelerator, tmp_path / "b"), tiny, pictures), first)


def test_the_weights_returned_are_the_average(tmp_path, accelerator, tiny, pictures):
    # decay 0 leaves the last weights, a high decay stays near the first ones
    runs = {}
    for decay in (0.0, 0.999):
        runs[decay] = run(Job(accelerator, tmp_path / str(decay)), dataclasses.replace(tiny, ema_decay=decay), pictures)
    assert runs[0.0][1] == runs[0.999][1]  # the training itself is the same
    assert any(not torch.equal(a, b) for a, b in zip(runs[0.0][0].values(), runs[0.999][0].values(), strict=True))


def test_it_learns(tmp_path, accelerator, tiny):
    # two classes of one colour each: after a while the U-Net says the noise much better than 0 does
    labels = torch.arange(32) % 2
    images = torch.where(labels.bool()[:, None, None, None], 230, 25).expand(32, 3, 8, 8).to(torch.uint8).contiguous()
    config = dataclasses.replace(tiny, steps=80, batch_size=32, lr=3e-3, ema_decay=0.9)
    _, history = train_diffusion(images, labels, config, Job(accelerator, tmp_path), classes=2)
    assert sum(history["loss"][-10:]) / 10 < 0.5 * history["loss"][0]


def test_loss_by_noise_level_of_a_network_that_says_nothing(pictures):
    config = DiffusionConfig(max_start_fraction=0.3)
    many = pictures.images.repeat(20, 1, 1, 1)
    rows = loss_by_noise_level(
        lambda x, t, class_labels, return_dict: (torch.zeros_like(x),),
        many,
        pictures.labels.repeat(20),
        config,
        device=torch.device("cpu"),
        seed=0,
    )
    assert [row["timestep"] for row in rows] == [round(i * 299 / 9) for i in range(10)]
    bar = linear_bar()
    assert [row["noise"] for row in rows] == pytest.approx([float((1 - bar[row["timestep"]]).sqrt()) for row in rows], rel=1e-3)
    assert [row["loss"] for row in rows] == pytest.approx([1.0] * 10, abs=0.05)  # the variance of the noise


def test_unets_survive_the_disk(tmp_path, tiny, unet):
    write_tensors(tmp_path / "unet.safetensors", unet.state_dict())
    loaded = load_unet(tmp_path / "unet.safetensors", tiny, classes=3, image_size=8)
    assert_same(loaded.state_dict(), unet.state_dict())
    assert not loaded.training


@pytest.mark.parametrize(("size", "millions"), [("tiny", 0.0734), ("demo", 1.115), ("small", 14.55), ("cifar", 35.75)])
def test_the_sizes_have_their_parameters(size, millions):
    with torch.device("meta"):
        built = build_unet(DiffusionConfig(size=size), classes=10, image_size=32)
    assert sum(weight.numel() for weight in built.parameters()) / 1e6 == pytest.approx(millions, rel=5e-3)


def test_the_largest_is_the_unet_of_ho_et_al():
    # 35.7 M without classes (their Table 1 and appendix B): widths 128, 256, 256, 256, two blocks, attention at 16 x 16 only
    with torch.device("meta"):
        built = build_unet(DiffusionConfig(size="cifar"), classes=10, image_size=32)
    embedding = sum(weight.numel() for weight in built.class_embedding.parameters())
    assert (sum(weight.numel() for weight in built.parameters()) - embedding) / 1e6 == pytest.approx(35.7, abs=0.1)
    attends = [hasattr(block, "attentions") and len(block.attentions) > 0 for block in built.down_blocks]
    assert attends == [False, True, False, False]
    assert [len(block.resnets) for block in built.down_blocks] == [2] * 4
    assert [block.resnets[-1].out_channels for block in built.down_blocks] == [128, 256, 256, 256]


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_weighs_the_clean_images_error(generator, prediction, gamma):
    # whatever is predicted, the loss is min(SNR, gamma) times the squared error of the clean image it stands for
    clean, noise, predicted = torch.randn(3, 6, 3, 4, 4, generator=generator, dtype=torch.float64)
    abar = torch.tensor([0.999, 0.95, 0.8, 0.5, 0.2, 0.01], dtype=torch.float64)
    expected = 0.0
    for b in range(6):
        a = float(abar[b])
        x = a**0.5 * clean[b] + (1 - a) ** 0.5 * noise[b]
        if prediction == "epsilon":
            said = (x - (1 - a) ** 0.5 * predicted[b]) / a**0.5
        else:
            said = a**0.5 * x - (1 - a) ** 0.5 * predicted[b]
        expected += min(a / (1 - a), gamma) * float((said - clean[b]).square().mean()) / 6
    config = DiffusionConfig(prediction=prediction, min_snr_gamma=gamma)
    found = denoising_loss(predicted.double(), clean, noise, abar, config)
    assert float(found) == pytest.approx(expected, rel=1e-4)
    plain = denoising_loss(predicted, clean, noise, abar, DiffusionConfig(prediction=prediction))
    target = regression_target(clean, noise, abar, prediction)
    assert float(plain) == pytest.approx(float((predicted.float() - target).square().mean()), rel=1e-6)


def test_a_compiled_unet_has_the_same_weights_by_name_and_is_compiled_in_training_and_sampling(tmp_path, monkeypatch, tiny, unet):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **settings: compiled.append((module, settings)))
    config = dataclasses.replace(tiny, compile=True)
    assert list(build_unet(config, classes=3, image_size=8).state_dict()) == list(unet.state_dict())
    write_tensors(tmp_path / "unet.safetensors", unet.state_dict())
    loaded = load_unet(tmp_path / "unet.safetensors", config, classes=3, image_size=8)
    assert len(compiled) == 2 and compiled[1] == (loaded, {"dynamic": False})
    build_unet(tiny, classes=3, image_size=8)
    assert len(compiled) == 2


@pytest.mark.parametrize("size", ["tiny", "demo"])
def test_every_class_the_null_class_and_the_step_are_heard(tiny, size):
    # group norm with one channel a group would subtract them again, as they are constant over the image
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = build_unet(dataclasses.replace(tiny, size=size), classes=4, image_size=8)
    assert built.class_embedding.num_embeddings == 5
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).expand(6, 3, 8, 8)
    with torch.no_grad():
        said = built(x, torch.tensor([3, 3, 3, 3, 3, 90]), class_labels=torch.tensor([0, 1, 2, 3, 4, 0]), return_dict=False)[0]
    assert said.shape == x.shape
    for first in range(6):
        for second in range(first):
            assert (said[first] - said[second]).std() > 0.02 * said.std()


def test_refuses_a_side_that_cannot_be_halved(tiny):
    with pytest.raises(UsageError, match="data.image_size: got 10; expected a multiple of 4, for diffusion.size demo"):
        build_unet(dataclasses.replace(tiny, size="demo"), classes=3, image_size=10)
