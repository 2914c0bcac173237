"""The figures of an outlier set beside slow float64 ones, and on sets whose figures are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from sdood_plugin.config import InspectionConfig, SelectionConfig
from sdood_plugin.data.images import ImageSet
from sdood_plugin.outliers import quality
from sdood_plugin.outliers.dataset import OutlierSet
from sdood_plugin.outliers.fidelity import Features, distances, pixel_features
from sdood_plugin.outliers.inspect import report_set
from sdood_plugin.outliers.quality import (
    border_correlation,
    breakdown,
    diversity,
    grouped,
    image_figures,
    in_parts,
    low_frequency_correlation,
    other_sources,
    set_quality,
)
from sdood_plugin.outliers.select import Verdicts
from sdood_plugin.outliers.verdicts import Referee

from .handmade import write_set
from .making import judge


def some_images(count, side, seed=0):
    return torch.randint(256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def unit(images):
    return images.numpy().astype(np.float64) / 127.5 - 1


def naive_border(first, second):
    """The correlation of the outer ring, smoothed by a 3 x 3 mean that ignores what lies outside."""
    found = []
    for pair in zip(unit(first), unit(second), strict=True):
        side = pair[0].shape[-1]
        ring = max(1, side // 8)
        values = [
            [
                image[c, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].mean()
                for c in range(3)
                for y in range(side)
                for x in range(side)
                if min(y, x, side - 1 - y, side - 1 - x) < ring
            ]
            for image in pair
        ]
        found.append(np.corrcoef(values)[0, 1])
    return np.array(found)


def naive_low_frequency(first, second):
    found = []
    for pair in zip(unit(first), unit(second), strict=True):
        step = pair[0].shape[-1] // 4
        values = [
            [
                image[c, y * step : (y + 1) * step, x * step : (x + 1) * step].mean()
                for c in range(3)
                for y in range(4)
                for x in range(4)
            ]
            for image in pair
        ]
        found.append(np.corrcoef(values)[0, 1])
    return np.array(found)


@pytest.mark.parametrize("side", [8, 16, 32])
@pytest.mark.parametrize(
    ("figure", "naive"), [(border_correlation, naive_border), (low_frequency_correlation, naive_low_frequency)]
)
def test_nuisance_correlations_equal_the_loops(side, figure, naive):
    own = some_images(5, side)
    made = (own.float() * 0.6 + 0.4 * some_images(5, side, 1)).to(torch.uint8)
    found = in_parts(figure, made, own, size=2)  # in parts of another size than the set
    np.testing.assert_allclose(found.numpy(), naive(made, own), atol=1e-5)
    assert found.mean() > in_parts(figure, made, own.roll(2, 0)).mean() + 0.3


def test_constant_images_correlate_with_nothing():
    flat = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(256, 3, 16, 16)  # rounding leaves a rest of many
    for figure in (border_correlation, low_frequency_correlation):
        assert in_parts(figure, flat, flat.roll(1, 0)).abs().max() < 1e-3


def naive_diversity(values, group):
    squares = {True: [], False: []}
    for i, j in itertools.combinations(range(len(values)), 2):
        squares[bool(group[i] == group[j])].append(np.mean((values[i] - values[j]) ** 2))
    return tuple(float(np.sqrt(np.mean(part))) if part else None for part in (squares[True], squares[False]))


@pytest.mark.parametrize("group", [[0, 0, 5, 5, 5, 2, 9], [3, 3, 3], [4, 2, 8]])
def test_diversity_equals_the_mean_over_all_pairs(group):
    values = np.random.default_rng(0).normal(size=(len(group), 6)) + 3 * np.array(group)[:, None]
    found = diversity(torch.tensor(values), torch.tensor(group))
    for mine, expected in zip(found, naive_diversity(values, np.array(group)), strict=True):
        assert mine == (None if expected is None else pytest.approx(expected, rel=1e-9))


@pytest.mark.parametrize("sources", [[0, 1, 2], [7, 7, 7, 3, 3, 9], [0, 1, 2, 3, 0, 1, 2, 3]])
def test_the_random_comparison_never_meets_the_own_source(sources):
    own = torch.tensor(sources)
    other = other_sources(own)
    assert (other != own).all() and set(other.tolist()) == set(sources)


@pytest.mark.parametrize("labels", [torch.arange(600) // 100, torch.arange(600) % 150 // 25], ids=["sorted", "repeated"])
def test_the_random_comparison_meets_the_own_class_as_often_as_chance_has_it(labels):
    other = other_sources(torch.arange(600))
    assert 0.1 < (labels[other] == labels).double().mean() < 0.24  # 1 / 6; its deviation is 0.015


def test_ranges_are_filled_evenly_and_few_values_are_named():
    assert grouped([0.1, 0.2, 0.1]) == ["0.1", "0.2", "0.1"]
    values = np.random.default_rng(0).uniform(1, 3, 800).tolist()
    names = grouped(values)
    assert {names.count(name) for name in set(names)} == {100}
    for value, name in zip(values, names, strict=True):
        low, high = map(float, name.split(" to "))
        assert low - 0.01 <= value <= high + 0.01


def test_a_breakdown_equals_the_mean_of_each_group():
    random = np.random.default_rng(1)
    keys = [(int(random.integers(12)), str(random.choice(["2", "10", ""]))) for _ in range(90)]
    values = random.normal(size=90)
    rows = breakdown(keys, ("label", "target"), {"figure": torch.tensor(values)})
    assert [row["label"] for row in rows] == sorted(row["label"] for row in rows)
    assert {(row["label"], row["target"]) for row in rows} == set(keys)
    for row in rows:
        mine = values[[key == (row["label"], row["target"]) for key in keys]]
        assert row["count"] == len(mine) and row["figure"] == pytest.approx(mine.mean(), rel=1e-12)


def quality_of(images, sources, train, labels, predicted, confidence, nearest, target=None):
    count = len(images)
    verdicts = Verdicts(*(torch.tensor(values) for values in (labels, predicted, confidence, nearest)))
    settings = {
        "target": target or [""] * count,
        "start_fraction": ["0.2"] * count,
        "guidance_weight": ["2.0", "4.0"] * (count // 2) + ["2.0"] * (count % 2),
    }
    return set_quality(images, torch.tensor(sources), train, verdicts, settings, SelectionConfig())


def test_rates_of_a_set_made_by_hand():
    train, made = some_images(6, 16), some_images(5, 16, 1)
    found = quality_of(
        made,
        [0, 1, 2, 3, 4],
        train,
        labels=[0, 0, 0, 2, 2],
        predicted=[0, 1, 2, 2, 0],
        confidence=[0.5, 0.7, 0.95, 0.99, 0.9],
        nearest=[0.01, 0.5, 0.5, 0.019, 0.02],
        target=["1", "1", "2", "0", "0"],
    )
    for name, rate in (("stay", 40), ("flip", 20), ("ambiguous", 40), ("near_duplicate", 40), ("target", 60)):
        assert found[f"{name}_rate"] == pytest.approx(rate)
    distance = np.sqrt(((unit(made) - unit(train[:5])) ** 2).mean(axis=(1, 2, 3)))
    assert found["distance_to_source"] == pytest.approx(distance.mean(), rel=1e-6)
    assert found["border_correlation"] == pytest.approx(naive_border(made, train[:5]).mean(), abs=1e-6)
    other = train[other_sources(torch.arange(5))]
    assert found["border_correlation_random"] == pytest.approx(naive_border(made, other).mean(), abs=1e-6)
    assert found["low_frequency_correlation_random"] == pytest.approx(naive_low_frequency(made, other).mean(), abs=1e-6)
    assert found["diversity_within_source"] is None
    pixels = unit(made).reshape(5, -1)
    assert found["diversity_between_sources"] == pytest.approx(naive_diversity(pixels, np.arange(5))[1], rel=1e-5)
    assert [(row["source_label"], row["target"], row["count"]) for row in found["by_class_pair"]] == [
        (0, "1", 2),
        (0, "2", 1),
        (2, "0", 2),
    ]
    assert found["by_class_pair"][2]["stay_rate"] == 50
    assert [(row["guidance_weight"], row["count"]) for row in found["by_guidance_weight"]] == [("2", 3), ("4", 2)]
    assert found["by_guidance_weight"][0]["distance_to_source"] == pytest.approx(distance[::2].mean(), rel=1e-6)


def naive_fidelity(made, real, k):
    """Kernel distance of the whole sets, precision and recall, in float64 loops."""
    made, real = made.double().numpy(), real.double().numpy()

    def kernel(a, b):
        return (a @ b / len(a) + 1) ** 3

    def inside(points, centres):
        radius = [sorted(np.linalg.norm(c - other) for other in centres)[k] for c in centres]
        return 100 * np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radius, strict=True)) for p in points])

    within = [np.mean([kernel(a, b) for a, b in itertools.permutations(part, 2)]) for part in (made, real)]
    across = np.mean([[kernel(a, b) for b in real] for a in made])
    return {"kd": sum(within) - 2 * across, "precision": inside(made, real), "recall": inside(real, made)}


@pytest.mark.parametrize(("count", "width", "k"), [(12, 4, 3), (25, 40, 2)])
def test_fidelity_equals_the_loops(count, width, k):
    random = torch.Generator().manual_seed(count)
    real = torch.randn(count, width, generator=random)
    made = 0.9 * torch.randn(count, width, generator=random) + 0.2
    found = distances(made, real, "some features", InspectionConfig(neighbours=k))
    for name, expected in naive_fidelity(made, real, k).items():
        assert found[name] == pytest.approx(expected, rel=1e-6, abs=1e-6), name
    assert 0 < found["precision"] < 100 and 0 < found["recall"] < 100
    assert found["fd"] == pytest.approx(naive_frechet(made, real), rel=1e-4)
    assert found["features"] == "some features" and found["n_real"] == count
    assert not {"fid", "kid"} & found.keys()  # these names belong to the Inception network


def naive_frechet(a, b):
    import scipy.linalg

    a, b = a.double().numpy(), b.double().numpy()
    c1, c2 = (np.cov(values.T) + 1e-10 * np.eye(values.shape[1]) for values in (a, b))  # sqrtm needs full rank
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)


def test_frechet_distance_in_closed_form():
    a = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))

    def frechet(b):
        return distances(b, a, "some features", InspectionConfig())["fd"]

    assert frechet(a) == pytest.approx(0, abs=1e-6)
    assert frechet(a + 3) == pytest.approx(4 * 9, rel=1e-6)
    assert frechet(2 * (a - a.mean(0)) + a.mean(0)) == pytest.approx(float(torch.cov(a.T).trace()), rel=1e-5)


def test_the_kernel_distance_of_subsets_is_near_that_of_the_whole():
    random = torch.Generator().manual_seed(0)
    real, made = torch.randn(60, 5, generator=random), torch.randn(50, 5, generator=random) + 1
    found = distances(made, real, "x", InspectionConfig(kernel_subset_size=30, kernel_subsets=200))
    assert found["kd"] == pytest.approx(naive_fidelity(made, real, 3)["kd"], rel=0.05) and found["kd_std"] > 0


def test_tiny_sets_leave_out_what_they_cannot_tell():
    a = torch.randn(3, 4)
    assert distances(a[:1], a, "x", InspectionConfig()).keys() == {"features", "n_real"}
    assert "precision" not in distances(a, a, "x", InspectionConfig(neighbours=3))


@pytest.fixture
def classes():
    """Smooth images of three classes, each brighter in a channel of its own, which `judge` sees."""
    random = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(30, 3, 3, 3, generator=random), size=16, mode="bilinear")
    labels = torch.arange(30) % 3
    smooth = 0.5 * smooth + 0.5 * torch.nn.functional.one_hot(labels)[:, :, None, None]
    return ImageSet((smooth * 255).to(torch.uint8), [f"{i}.png" for i in range(30)], labels)


def judged_quality(folder, made, sources, train):
    """The report of images whose manifest was filled by the referee."""
    labels = train.labels[sources]
    said = Referee(train.images, judge, torch.device("cpu"))(made, sources, labels)
    columns = {"source_index": sources.tolist(), "source_label": labels.tolist(), "mode": ["away"] * len(made), **said}
    columns |= {"source": [train.names[i] for i in sources.tolist()], "target": [""] * len(made)}
    features = Features("pixels", pixel_features)
    folder = write_set(folder, made, train, **columns)
    return report_set(OutlierSet(folder), train, features, SelectionConfig(), InspectionConfig())


def test_the_report_of_copies_of_the_training_images_shows_it(classes, tmp_path):
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    found = judged_quality(tmp_path / "set", classes.images[order], order, classes)
    assert found["stay_rate"] == 100 and found["near_duplicate_rate"] == 100 and found["distance_to_source"] == 0
    assert found["border_correlation"] == pytest.approx(1) and found["low_frequency_correlation"] == pytest.approx(1)
    assert found["border_correlation_random"] < 0.8
    far = found["fidelity"]
    assert far["fd"] == pytest.approx(0, abs=1e-4) and far["precision"] == far["recall"] == 100
    assert far["kd"] <= 1e-12  # unbiased: equal sets come out below 0
    assert [(row["source_label"], row["predicted"], row["count"]) for row in found["by_class_pair"]] == [
        (0, 0, 10),
        (1, 1, 10),
        (2, 2, 10),
    ]


def test_the_report_of_copies_of_another_class_shows_flips_that_are_copies(classes, tmp_path):
    found = judged_quality(tmp_path / "set", classes.images.roll(-1, 0), torch.arange(30), classes)
    assert found["flip_rate"] == 100 and found["near_duplicate_rate"] == 100 and found["distance_to_source"] > 0.3
    pairs = [(row["source_label"], row["predicted"], row["flip_rate"]) for row in found["by_class_pair"]]
    assert pairs == [(0, 1, 100), (1, 2, 100), (2, 0, 100)] and "target_rate" not in found


def test_the_report_of_noise_shows_it(classes, tmp_path):
    noise = some_images(30, 16, 5)
    found = judged_quality(tmp_path / "set", noise, torch.arange(30), classes)
    assert 10 < found["stay_rate"] < 60 and found["flip_rate"] < 10 and found["near_duplicate_rate"] == 0  # it is no class
    assert abs(found["border_correlation"]) < 0.1 and abs(found["low_frequency_correlation"]) < 0.2
    near = distances(pixel_features(classes.images[::2]), pixel_features(classes.images), "pixels", InspectionConfig())
    assert found["fidelity"]["precision"] == 0 and found["fidelity"]["fd"] > 3 * near["fd"]


def test_the_figures_of_a_set_with_several_outliers_a_source(monkeypatch):
    monkeypatch.setattr(quality, "_PART", 4)  # in parts of another size than the set
    train, made, sources = some_images(3, 32), some_images(7, 32, 1), [0, 0, 2, 2, 2, 1, 1]
    made[:2] = made[2:4]  # copies of one another, of different sources
    found = quality_of(made, sources, train, [0] * 7, [1, 1, 0, 2, 2, 1, 0], [0.5] * 7, [0.5] * 7)
    pixels = unit(made).reshape(7, 3, 16, 2, 16, 2).mean(axis=(3, 5)).reshape(7, -1)
    within, between = naive_diversity(pixels, np.array(sources))
    assert found["diversity_within_source"] == pytest.approx(within, rel=1e-5)
    assert found["diversity_between_sources"] == pytest.approx(between, rel=1e-5) and abs(within - between) > 0.01
    assert found["low_frequency_correlation"] == pytest.approx(naive_low_frequency(made, train[sources]).mean(), abs=1e-6)
    assert found["border_correlation"] == pytest.approx(naive_border(made, train[sources]).mean(), abs=1e-6)
    pairs = [(row["source_label"], row["predicted"], row["count"]) for row in found["by_class_pair"]]
    assert pairs == [(0, 0, 2), (0, 1, 3), (0, 2, 2)]


def test_image_figures_are_those_of_each_image_alone():
    train, made = some_images(4, 16), some_images(4, 16, 1)
    verdicts = Verdicts(torch.tensor([0, 1, 0, 1]), torch.zeros(4).long(), torch.tensor([0.95] * 4), torch.tensor([0.0] * 4))
    whole = image_figures(made, train, verdicts, SelectionConfig())
    for i in range(4):
        alone = image_figures(made[i : i + 1], train[i : i + 1], Verdicts(*(v[i : i + 1] for v in verdicts)), SelectionConfig())
        for name, values in alone.items():
            assert whole[name][i] == pytest.approx(float(values[0]), abs=1e-6), name
