"""Guided partial sampling where everything is known in closed form.

The data are Gaussians of one class each: the first channel is the meaning (mean +-MEANING by class, narrow), the
other two are the nuisance (standard normal whatever the class). Their noise prediction is exact, so is the solution of
the probability flow, and DDPM and DDIM can be written out or taken from diffusers' own schedulers.
"""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from diffusers import DDPMScheduler

from sdood_plugin.config import DiffusionConfig
from sdood_plugin.diffusion import sampling
from sdood_plugin.diffusion.guidance import guidance_terms, wrong_classes
from sdood_plugin.diffusion.sampling import as_denoiser, guided_partial_sample, mix_predictions, start_step, visited_steps
from sdood_plugin.diffusion.unet import alphas_bar
from sdood_plugin.randomness import normal

LINEAR = DiffusionConfig(schedule="linear")
SPREAD = 0.1  # standard deviation of the meaning
SIDE = 2


def means(classes: int) -> torch.Tensor:
    """Class means (C, 3, 2, 2): pixel c of the meaning is +1 for class c and -1 for the others; no nuisance."""
    centre = torch.zeros(classes, 3, SIDE * SIDE)
    centre[:, 0] = -1
    centre[torch.arange(classes), 0, torch.arange(classes)] = 1
    return centre.reshape(classes, 3, SIDE, SIDE)


def variance() -> torch.Tensor:
    return torch.tensor([SPREAD**2, 1.0, 1.0]).reshape(3, 1, 1)


def exact_denoiser(config: DiffusionConfig, classes: int):
    """eps(x_t, t, c) of class c, and of the mixture of all classes for c = C; or the v that says the same."""
    bar, centre = alphas_bar(config), means(classes).double()

    def denoiser(x, t, condition):
        a = bar[t].reshape(-1, 1, 1, 1, 1)
        total = a * variance().double() + 1 - a  # variance of x_t
        offset = x.double()[:, None] - a.sqrt() * centre  # (B, C, 3, H, W)
        eps = (1 - a).sqrt() * offset / total
        responsibility = (-0.5 * (offset.square() / total).sum(dim=(2, 3, 4))).softmax(dim=1)
        responsibility = torch.where(
            (condition == classes)[:, None], responsibility, torch.nn.functional.one_hot(condition % classes, classes).double()
        )
        found = (responsibility[:, :, None, None, None] * eps).sum(1)
        if config.prediction == "v":
            a = a[:, 0]
            clean = (x.double() - (1 - a).sqrt() * found) / a.sqrt()
            found = a.sqrt() * found - (1 - a).sqrt() * clean
        return found.float()

    return denoiser


def sources(count: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(count) % classes
    noise = normal(99, torch.arange(count), 0, (3, SIDE, SIDE))
    return means(classes)[labels] + variance().sqrt() * noise, labels


def sample(config, classes, images, conditions, weights, **settings):
    index = torch.arange(len(images))
    noise = settings.pop("noise", lambda draw: normal(1, index, draw, tuple(images.shape[1:])))
    return guided_partial_sample(exact_denoiser(config, classes), images, conditions, weights, noise, config, **settings)


def noised(config, images, fraction):
    abar = alphas_bar(config)[start_step(fraction, config.timesteps)]
    return abar.sqrt() * images.double() + (1 - abar).sqrt() * normal(
        1, torch.arange(len(images)), 1, tuple(images.shape[1:])
    ).double(), abar


def flow(config, images, fraction, centre):
    """Where the probability flow of a Gaussian ends: the noisy image's standard score stays."""
    x, abar = noised(config, images, fraction)
    return centre.double() + variance().double().sqrt() * (x - abar.sqrt() * centre) / (abar * variance() + 1 - abar).sqrt()


def correlation(first, second):
    return float(torch.corrcoef(torch.stack([first[:, 1:].flatten(), second[:, 1:].flatten()]).double())[0, 1])


CONFIGS = [
    DiffusionConfig(schedule=schedule, prediction=prediction)
    for schedule in ("linear", "cosine")
    for prediction in ("epsilon", "v")
]
IDS = [f"{config.schedule}-{config.prediction}" for config in CONFIGS]


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize(("sampler", "steps", "error"), [("ddim", 300, 0.03), ("dpm", 10, 0.2), ("dpm", 40, 0.03)])
def test_ends_where_the_probability_flow_ends(config, sampler, steps, error):
    images, labels = sources(64, 2)
    made = sample(config, 2, images, (1 - labels)[:, None], torch.ones(1), start_fraction=0.3, sampler=sampler, steps=steps)
    assert (made - flow(config, images, 0.3, means(2)[1 - labels])).abs().max() < error


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("fraction", "small_steps", "error"), [(0.3, 300, 0.05), (0.5, 500, 0.08)])
def test_ten_dpm_steps_agree_with_many_small_steps(schedule, fraction, small_steps, error):
    config = DiffusionConfig(schedule=schedule)
    images, labels = sources(64, 3)
    wrong = wrong_classes(labels, 3, seed=0, index=torch.arange(64))
    terms = guidance_terms("other", 2.0, labels, wrong, 3)
    many = sample(config, 3, images, *terms, start_fraction=fraction, sampler="ddim", steps=small_steps)
    found = {
        name: (sample(config, 3, images, *terms, start_fraction=fraction, sampler=name, steps=10) - many).square().mean().sqrt()
        for name in ("dpm", "ddim")
    }
    assert found["dpm"] < error  # root mean square, in [-1, 1] units
    assert found["dpm"] < found["ddim"] / 2


@pytest.mark.parametrize("w", [0.0, 2.0])
@pytest.mark.parametrize("steps", [2, 3, 4, 5, 6, 10, 30, 100])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_guidance_changes_the_meaning_and_keeps_the_nuisance(sampler, steps, w):
    images, labels = sources(600, 2)
    wrong = wrong_classes(labels, 2, seed=0, index=torch.arange(600))
    made = sample(
        LINEAR, 2, images, *guidance_terms("other", w, labels, wrong, 2), start_fraction=0.3, sampler=sampler, steps=steps
    )
    own, other = means(2)[labels][:, 0], means(2)[1 - labels][:, 0]
    assert ((images[:, 0] - own).square().sum((1, 2)) < (images[:, 0] - other).square().sum((1, 2))).all()
    assert (made[:, 0] - other).square().mean().sqrt() < 0.16 and (made[:, 0] - other).abs().max() < 0.6  # five deviations
    # the nuisance of the source survives as the mathematics says: sqrt(abar) along the flow, whose steps are linear in it;
    # abar by ancestral sampling, more where few steps add too little noise
    abar = float(alphas_bar(LINEAR)[start_step(0.3, 1000)])
    most = abar if sampler == "ddpm" and steps >= 100 else math.sqrt(abar)
    least = abar if sampler == "ddpm" else math.sqrt(abar)
    assert least - 0.05 < correlation(made, images) < most + 0.05
    assert abs(correlation(made, images.roll(1, 0))) < 0.08


def four_denoiser(bar: torch.Tensor):
    """eps of Gaussians at (meaning, nuisance) in {-1, 1}^2, channels 0 and 1; classes 0 and 1 are the meanings, 2 is all."""
    centre = torch.tensor([(-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0)]).double()

    def denoiser(x, t, condition):
        a = bar[t].reshape(-1, 1, 1)
        total = a * SPREAD**2 + 1 - a
        offset = x[:, :2, 0, 0].double()[:, None] - a.sqrt() * centre  # (B, 4, 2)
        left_out = (condition[:, None] != 2) & (condition[:, None] != torch.tensor([0, 0, 1, 1]))
        responsibility = (-0.5 * (offset.square() / total).sum(2)).masked_fill(left_out, -math.inf).softmax(dim=1)
        eps = (responsibility[:, :, None] * (1 - a).sqrt() * offset / total).sum(1)
        return torch.nn.functional.pad(eps, (0, 1)).float()[:, :, None, None]

    return denoiser


def of_four(sampler: str, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `other` at w = 2 and S = 0.2 makes of 400 images of the four, (400, 2); and their other meanings and own nuisances."""
    index = torch.arange(400)
    labels, nuisance = index % 2, index // 2 % 2
    images = torch.stack([2.0 * labels - 1, 2.0 * nuisance - 1, torch.zeros(400)], dim=1)[:, :, None, None]
    images[:, :2] += SPREAD * normal(5, index, 0, (2, 1, 1))
    made = guided_partial_sample(
        four_denoiser(alphas_bar(LINEAR)),
        images,
        *guidance_terms("other", 2.0, labels, wrong_classes(labels, 2, seed=0, index=index), 2),
        lambda draw: normal(1, index, draw, (3, 1, 1)),
        LINEAR,
        start_fraction=0.2,
        sampler=sampler,
        steps=steps,
    )
    return made[:, :2, 0, 0], torch.stack([1.0 - 2 * labels, 2.0 * nuisance - 1], dim=1)


@pytest.mark.parametrize("steps", [2, 3, 4, 6])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_of_four_gaussians_the_one_of_the_other_meaning_and_the_own_nuisance_is_reached(sampler, steps):
    made, target = of_four(sampler, steps)
    assert (made - target)[:, 0].abs().max() < 0.3
    assert ((made - target)[:, 1].abs() < 0.5).float().mean() > 0.88  # S = 0.2 noises some images past the middle


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_a_single_step_overshoots(sampler):
    made, target = of_four(sampler, 1)  # guided at the highest noise level alone, with no step to make up for it
    assert (made - target)[:, 0].abs().mean() > 2


def test_second_order_is_for_five_steps_and_more(monkeypatch):
    images, labels = sources(8, 2)
    settings = {"conditions": (1 - labels)[:, None], "weights": torch.ones(1), "start_fraction": 0.3}

    def both(steps):
        return [sample(LINEAR, 2, images, **settings, sampler=name, steps=steps) for name in ("ddim", "dpm")]

    found = {steps: both(steps) for steps in (2, 3, 4, 5, 6, 20)}
    monkeypatch.setattr(sampling, "SECOND_ORDER_STEPS", 0)  # second order as soon as there is a prediction before
    for steps, (first, made) in found.items():
        assert torch.equal(made, first) == (steps < 5)
        assert torch.equal(made, both(steps)[1]) == (steps not in (3, 4))


def test_the_own_class_is_kept_by_the_control():
    images, labels = sources(60, 3)
    made = sample(
        LINEAR, 3, images, *guidance_terms("same", 3.0, labels, torch.zeros(60, 2, dtype=torch.int64), 3), start_fraction=0.3
    )
    torch.testing.assert_close(made[:, 0], means(3)[labels][:, 0], atol=0.45, rtol=0)
    assert correlation(made, images) > 0.6


@pytest.mark.parametrize("mode", ["blend", "blend-own"])
def test_a_blend_ends_between_two_classes(mode):
    images, labels = sources(60, 3)
    wrong = wrong_classes(labels, 3, seed=0, index=torch.arange(60))
    made = sample(LINEAR, 3, images, *guidance_terms(mode, 0.0, labels, wrong, 3), start_fraction=0.3, sampler="ddim", steps=300)
    between = wrong if mode == "blend" else torch.stack([labels, wrong[:, 0]], dim=1)
    midpoint = means(3)[between].mean(dim=1)  # the mean of two Gaussians' predictions is the prediction of the one between
    assert (made - flow(LINEAR, images, 0.3, midpoint)).abs().max() < 0.03


def test_away_leaves_the_own_class():
    images, labels = sources(60, 3)
    own, moved = means(3)[labels][:, 0], {}
    for mode in ("away", "same"):
        for fraction in (0.2, 0.3, 0.5):
            made = sample(
                LINEAR,
                3,
                images,
                *guidance_terms(mode, 3.0, labels, torch.zeros(60, 2, dtype=torch.int64), 3),
                start_fraction=fraction,
            )
            moved[mode, fraction] = float(((made[:, 0] - own).square().sum((1, 2)) > 1).float().mean())
    # where a noisy image still tells its class for sure, null and own prediction agree and nothing pushes
    assert moved["away", 0.2] < 0.15 < moved["away", 0.3] < 0.7 < moved["away", 0.5]
    assert all(moved["same", fraction] == 0 for fraction in (0.2, 0.3, 0.5))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_a_tiny_start_returns_the_source(sampler):
    images, labels = sources(60, 2)
    terms = guidance_terms("other", 2.0, labels, wrong_classes(labels, 2, seed=0, index=torch.arange(60)), 2)
    tiny = sample(LINEAR, 2, images, *terms, start_fraction=0.001, sampler=sampler)
    assert (tiny - images).abs().max() < 0.1
    assert (sample(LINEAR, 2, images, *terms, start_fraction=0.3, sampler=sampler) - images).abs().max() > 1


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_w_minus_one_is_unconditional(sampler):
    images, labels = sources(12, 3)
    wrong = wrong_classes(labels, 3, seed=0, index=torch.arange(12))
    settings = {"start_fraction": 0.3, "sampler": sampler}
    free = sample(LINEAR, 3, images, torch.full((12, 1), 3), torch.ones(1), **settings)
    for mode in ("other", "blend", "blend-own"):
        assert torch.equal(sample(LINEAR, 3, images, *guidance_terms(mode, -1.0, labels, wrong, 3), **settings), free)
    assert not torch.equal(sample(LINEAR, 3, images, *guidance_terms("other", 0.0, labels, wrong, 3), **settings), free)


MODES = ["other", "away", "blend", "blend-own", "same"]
INTERVAL = (0.1, 0.2)  # of T = 1000: the steps t = 99 .. 199


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_an_interval_is_a_weight_that_depends_on_the_noise_level(config, mode):
    images, labels = sources(8, 3)
    wrong = wrong_classes(labels, 3, seed=0, index=torch.arange(8))
    guided, unguided = (guidance_terms(mode, w, labels, wrong, 3) for w in (2.0, 0.0))
    eps_of, plain = exact_denoiser(DiffusionConfig(schedule=config.schedule), 3), alphas_bar(config)
    x, _ = noised(config, images, 0.3)
    times = visited_steps(299, 20)
    for t, following in zip(times, [*times[1:], None], strict=True):  # DDIM written out, in float64
        w = 2.0 if 99 <= t <= 199 else 0.0
        own, first, second, null = (
            eps_of(x, torch.full((8,), t), c).double() for c in (labels, wrong[:, 0], wrong[:, 1], torch.full((8,), 3))
        )
        eps = {
            "other": (1 + w) * first - w * null,
            "away": (1 + w) * null - w * own,
            "blend": (1 + w) * (first + second) / 2 - w * null,
            "blend-own": (1 + w) * (first + own) / 2 - w * null,
            "same": own,
        }[mode]
        clean = (x - (1 - plain[t]).sqrt() * eps) / plain[t].sqrt()
        x = clean if following is None else plain[following].sqrt() * clean + (1 - plain[following]).sqrt() * eps
    settings = {"start_fraction": 0.3, "sampler": "ddim", "steps": 20}
    made = sample(config, 3, images, *guided, **settings, guidance_interval=INTERVAL, outside=unguided)
    torch.testing.assert_close(made.double(), x, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
@pytest.mark.parametrize("mode", MODES)
def test_an_interval_of_all_or_no_noise_levels(mode, sampler):
    images, labels = sources(8, 3)
    wrong = wrong_classes(labels, 3, seed=0, index=torch.arange(8))
    guided, unguided = (guidance_terms(mode, w, labels, wrong, 3) for w in (2.0, 0.0))
    settings = {"start_fraction": 0.3, "sampler": sampler, "steps": 6}
    plain = [sample(LINEAR, 3, images, *terms, **settings) for terms in (guided, unguided)]
    for interval, expected in (((0.0, 0.3), plain[0]), ((0.9, 1.0), plain[1])):
        assert torch.equal(sample(LINEAR, 3, images, *guided, **settings, guidance_interval=interval, outside=unguided), expected)


@pytest.mark.parametrize(
    ("mode", "inside", "outside"), [("other", 2, 1), ("away", 2, 1), ("blend", 3, 2), ("blend-own", 3, 2), ("same", 1, 1)]
)
def test_an_interval_saves_forwards(mode, inside, outside):
    images, labels = sources(8, 3)
    wrong = wrong_classes(labels, 3, seed=0, index=torch.arange(8))
    guided, unguided = (guidance_terms(mode, w, labels, wrong, 3) for w in (2.0, 0.0))
    exact, rows = exact_denoiser(LINEAR, 3), {}

    def denoiser(x, t, condition):
        assert int(t[0]) not in rows  # one batched forward a step
        rows[int(t[0])] = len(x)
        return exact(x, t, condition)

    guided_partial_sample(
        denoiser,
        images,
        *guided,
        lambda draw: normal(1, torch.arange(8), draw, tuple(images.shape[1:])),
        LINEAR,
        start_fraction=0.3,
        steps=30,
        guidance_interval=INTERVAL,
        outside=unguided,
    )
    assert rows == {t: 8 * (inside if 99 <= t <= 199 else outside) for t in range(299, 0, -10)}


def test_an_interval_needs_to_know_what_holds_outside_of_it():
    images, labels = sources(4, 2)
    with pytest.raises(ValueError, match=r"step 299 is outside of guidance_interval \(0.1, 0.2\)"):
        sample(LINEAR, 2, images, labels[:, None], torch.ones(1), start_fraction=0.3, guidance_interval=INTERVAL)


@pytest.mark.parametrize("mode", MODES)
def test_each_image_may_have_its_own_weight(mode):
    images, labels = sources(9, 3)
    wrong = wrong_classes(labels, 3, seed=0, index=torch.arange(9))
    own = torch.tensor([0.0, 1.0, 4.0]).repeat(3)
    settings = {"start_fraction": 0.3, "sampler": "ddpm", "steps": 5}
    together = sample(LINEAR, 3, images, *guidance_terms(mode, own, labels, wrong, 3), **settings)
    for w in (0.0, 1.0, 4.0):
        alone = sample(LINEAR, 3, images, *guidance_terms(mode, w, labels, wrong, 3), **settings)
        torch.testing.assert_close(together[own == w], alone[own == w], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize("steps", [1, 7, 30])
def test_ddpm_is_diffusers_ddpm_step_by_step(config, steps):
    images, labels = sources(8, 2)
    denoiser, bar = exact_denoiser(config, 2), alphas_bar(config).float()
    times = visited_steps(start_step(0.3, 1000), steps)

    def noise(draw):
        return torch.randn(images.shape, generator=torch.Generator().manual_seed(draw))

    trace = []
    made = sample(
        config,
        2,
        images,
        (1 - labels)[:, None],
        torch.ones(1),
        noise=noise,
        start_fraction=0.3,
        sampler="ddpm",
        steps=steps,
        callback=lambda t, x: trace.append((t, x)),
    )
    reference = DDPMScheduler(
        beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[config.schedule],
        variance_type="fixed_small",
        clip_sample=False,
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[config.prediction],
    )
    reference.set_timesteps(timesteps=times)
    x = bar[times[0]].sqrt() * images + (1 - bar[times[0]]).sqrt() * noise(1)
    assert [t for t, _ in trace] == times
    for number, t in enumerate(times):
        torch.testing.assert_close(trace[number][1], x, atol=2e-4, rtol=1e-4)
        predicted = denoiser(x, torch.full((8,), t), 1 - labels)
        x = reference.step(predicted, t, x, generator=torch.Generator().manual_seed(2 + number)).prev_sample
    torch.testing.assert_close(made, x, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize("steps", [1, 7])
def test_ddim_is_its_formula_in_float64(config, steps):
    images, labels = sources(8, 2)
    plain = DiffusionConfig(schedule=config.schedule)
    x, _ = noised(config, images, 0.3)
    bar, times = alphas_bar(config), visited_steps(start_step(0.3, 1000), steps)
    for t, following in zip(times, [*times[1:], None], strict=True):
        eps = exact_denoiser(plain, 2)(x, torch.full((8,), t), 1 - labels).double()
        clean = (x - (1 - bar[t]).sqrt() * eps) / bar[t].sqrt()
        x = clean if following is None else bar[following].sqrt() * clean + (1 - bar[following]).sqrt() * eps
    made = sample(config, 2, images, (1 - labels)[:, None], torch.ones(1), start_fraction=0.3, sampler="ddim", steps=steps)
    torch.testing.assert_close(made.double(), x, atol=2e-4, rtol=1e-4)


def test_only_ddpm_draws_noise_after_the_first():
    images, labels = sources(4, 2)
    for sampler, expected in (("ddpm", list(range(1, 7))), ("ddim", [1]), ("dpm", [1])):
        draws = []

        def noise(draw, draws=draws):
            draws.append(draw)
            return normal(1, torch.arange(4), draw, (3, SIDE, SIDE))

        sample(LINEAR, 2, images, labels[:, None], torch.ones(1), noise=noise, start_fraction=0.2, sampler=sampler, steps=5)
        assert draws == expected


def test_global_randomness_is_left_alone():
    images, labels = sources(4, 2)
    before = torch.get_rng_state()
    for sampler in ("ddpm", "ddim", "dpm"):
        sample(LINEAR, 2, images, labels[:, None], torch.ones(1), start_fraction=0.2, sampler=sampler, steps=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
@pytest.mark.parametrize("weight", [2.0, torch.tensor([2.0, 0.0, 1.0])], ids=["one", "each"])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_waits_for_the_device(monkeypatch, mode, weight, sampler):
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_settings: contextlib.nullcontext())  # which `meta` has not
    # tensors on `meta` have no values: whoever looks at one, for which a GPU would have to be waited for, fails
    with torch.device("meta"):
        images, labels, index = torch.empty(3, 3, 8, 8), torch.empty(3, dtype=torch.int64), torch.empty(3, dtype=torch.int64)
        wrong = wrong_classes(labels, 3, seed=0, index=index)
    made = guided_partial_sample(
        lambda x, t, condition: x * (t + condition)[:, None, None, None],
        images,
        *guidance_terms(mode, weight, labels, wrong, 3),
        lambda draw: normal(0, index, draw, (3, 8, 8)),
        LINEAR,
        start_fraction=0.3,
        sampler=sampler,
        steps=4,
        guidance_interval=INTERVAL,
        outside=guidance_terms(mode, 0.0, labels, wrong, 3),
    )
    assert made.is_meta and made.shape == (3, 3, 8, 8)


class OneConvolution(torch.nn.Module):
    """Stands in for a U-Net; tells what it computed in."""

    def __init__(self):
        super().__init__()
        self.convolution, self.types = torch.nn.Conv2d(3, 3, 1), []

    def forward(self, x, t, class_labels, return_dict):
        made = self.convolution(x)
        self.types.append(made.dtype)
        return (made,)


@pytest.mark.parametrize(
    ("precision", "expected"), [("auto", torch.float32), ("float32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_a_denoiser_has_its_precision_and_the_rest_is_float32(precision, expected):
    images, _ = sources(4, 2)
    network, made = OneConvolution(), []
    noise = normal(1, torch.arange(4), 1, (3, SIDE, SIDE))
    for caller in (False, True):  # whatever the caller has
        with torch.autocast("cpu", torch.bfloat16, enabled=caller):
            made.append(
                guided_partial_sample(
                    as_denoiser(network, precision),
                    images,
                    torch.zeros(4, 2).long(),
                    torch.tensor([1.7, -0.7]),
                    lambda _: noise,
                    LINEAR,
                    start_fraction=0.3,
                    steps=3,
                )
            )
    assert network.types == [expected] * 6
    assert made[0].dtype == torch.float32 and torch.equal(made[0], made[1])


def test_weights_are_cast_once_a_batch():
    from torch.utils._python_dispatch import TorchDispatchMode

    network, casts = OneConvolution(), []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].shape == network.convolution.weight.shape:
                casts.append(func)
            return func(*args, **(kwargs or {}))

    images, _ = sources(4, 2)
    noise = normal(1, torch.arange(4), 1, (3, SIDE, SIDE))
    settings = {"start_fraction": 0.3, "steps": 6}
    with Counting():
        guided_partial_sample(
            as_denoiser(network, "bf16"), images, torch.zeros(4, 1).long(), torch.ones(1), lambda _: noise, LINEAR, **settings
        )
    assert len(network.types) == 6 and len(casts) == 1


def test_mixing_is_the_weighted_sum_of_separate_forwards(generator):
    x, weights = torch.randn(5, 3, 2, 2, generator=generator), torch.tensor([1.5, 1.5, -2.0])
    each = torch.randn(5, 3, generator=generator)
    t, conditions = torch.tensor([3, 50, 120, 7, 299]), torch.tensor([[0, 1, 2], [1, 0, 2], [1, 0, 2], [0, 1, 2], [1, 1, 0]])
    denoiser = exact_denoiser(LINEAR, 2)
    expected = sum(float(w) * denoiser(x, t, conditions[:, m]).double() for m, w in enumerate(weights))
    torch.testing.assert_close(mix_predictions(denoiser, x, t, conditions, weights).double(), expected, atol=1e-5, rtol=1e-5)
    expected = sum(each[:, m, None, None, None] * denoiser(x, t, conditions[:, m]).double() for m in range(3))
    torch.testing.assert_close(mix_predictions(denoiser, x, t, conditions, each).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("fraction", "timesteps", "expected"),
    [(0.2, 1000, 199), (1.0, 1000, 999), (0.001, 1000, 0), (0.0001, 1000, 0), (0.3, 50, 14)],
)
def test_start_step(fraction, timesteps, expected):
    assert start_step(fraction, timesteps) == expected


@pytest.mark.parametrize("start", [0, 1, 9, 199, 999])
@pytest.mark.parametrize("steps", [1, 2, 6, 10, 300])
def test_visited_steps_go_down_evenly_without_repetition(start, steps):
    found = visited_steps(start, steps)
    assert found[0] == start and found[-1] >= 0
    assert len(found) == min(steps, start + 1)
    gaps = [a - b for a, b in zip(found, [*found[1:], -1], strict=True)]  # the last gap leads to the clean image
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1
