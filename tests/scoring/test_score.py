"""The distance + voting score against loops over the banks, and the calibration against its rules."""

from __future__ import annotations

import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from sdood_plugin.artifacts import read_json, write_json, write_tensors
from sdood_plugin.config import ScoringConfig
from sdood_plugin.errors import RunError, UsageError
from sdood_plugin.metrics import detection_metrics
from sdood_plugin.neighbours import Bank
from sdood_plugin.scoring import score as score_module
from sdood_plugin.scoring import terms as terms_module
from sdood_plugin.scoring.reduction import reduce_banks
from sdood_plugin.scoring.score import fit_score
from sdood_plugin.scoring.storage import load_score, save_score
from sdood_plugin.scoring.terms import terms_by_class

FAISS = find_spec("faiss") is not None


def distance_and_votes(features, inside, outliers, k_distance, k_vote):
    banks = Bank(inside), None if outliers is None or not len(outliers) else Bank(outliers)
    return terms_module.distance_and_votes(features, *banks, k_distance, k_vote)


def squared(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def naive_terms(features, inside, outliers, k_distance, k_vote):
    """METHOD section 5 in Python floats: sort both banks for each image; at equal distance ID comes first."""
    distances, votes = [], []
    for image in features.double().tolist():
        near = sorted(squared(image, other) for other in inside.double().tolist())
        both = sorted(
            [(squared(image, other), 0) for other in inside.double().tolist()]
            + [(squared(image, other), 1) for other in outliers.double().tolist()]
        )
        distances.append(sum(near[:k_distance]))
        votes.append(sum(flag for _, flag in both[:k_vote]) if len(outliers) else 0)
    return torch.tensor(distances, dtype=torch.float64), torch.tensor(votes, dtype=torch.float64)


def unit(features):
    rows = [[value / max(math.sqrt(sum(x * x for x in row)), 1e-12) for value in row] for row in features.double().tolist()]
    return torch.tensor(rows, dtype=torch.float64).reshape(features.shape)


@pytest.fixture
def banks(generator):
    inside, outliers = torch.randn(12, 4, generator=generator), torch.randn(9, 4, generator=generator) + 0.7
    inside[5] = inside[2]  # a duplicate within a bank
    outliers[3] = inside[7]  # one in both banks
    queries = torch.cat([torch.randn(10, 4, generator=generator), inside[[2, 7]]])
    return queries, inside, outliers


@pytest.mark.parametrize(("k_distance", "k_vote"), [(1, 1), (2, 5), (5, 2), (12, 21), (12, 1), (1, 21), (3, 15)])
def test_terms_equal_the_loops(banks, k_distance, k_vote):
    distance, votes = distance_and_votes(*banks, k_distance, k_vote)
    expected = naive_terms(*banks, k_distance, k_vote)
    torch.testing.assert_close(distance.double(), expected[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(votes.double(), expected[1])


def test_at_equal_distance_the_image_is_inside():
    point, far = torch.zeros(1, 2), torch.full((3, 2), 9.0)
    for k, expected in ((1, 0), (2, 0), (3, 1), (4, 2)):
        inside, outliers = torch.cat([torch.ones(2, 2), far]), torch.cat([-torch.ones(2, 2), far])
        assert distance_and_votes(point, inside, outliers, 1, k)[1].tolist() == [expected]


def test_an_outlier_that_is_nearer_than_float32_can_tell_wins():
    point, inside, outlier = torch.zeros(1, 2), torch.tensor([[1.0, 1e-4]]), torch.tensor([[1.0, 0.0]])
    assert distance_and_votes(point, inside, outlier, 1, 1)[1].tolist() == [1]
    assert naive_terms(point, inside, outlier, 1, 1)[1].tolist() == [1]
    assert distance_and_votes(point, outlier, inside, 1, 1)[1].tolist() == [0]


@pytest.mark.parametrize("turn", [1, -1])
def test_a_row_in_both_banks_is_a_tie_in_whatever_order_its_squares_are_summed(generator, monkeypatch, turn):
    nearest = Bank.nearest

    def rounded(self, *args):  # sums in other orders, as the shapes that a GPU gets bring with them
        distances, rows = nearest(self, *args)
        return distances * (1 + turn * (2 if self is inside else -2) * torch.finfo(distances.dtype).eps), rows

    features = torch.randn(40, 64, generator=generator)
    inside, outliers = Bank(features), Bank(features)
    monkeypatch.setattr(Bank, "nearest", rounded)
    votes = terms_module.distance_and_votes(torch.randn(30, 64, generator=generator), inside, outliers, 1, 3)[1]
    assert (votes == 1).all()  # inside, outlier, inside


@pytest.mark.parametrize("outliers", [None, torch.empty(0, 4)])
def test_without_outliers_nobody_votes(banks, outliers):
    queries, inside, _ = banks
    distance, votes = distance_and_votes(queries, inside, outliers, 2, 5)
    torch.testing.assert_close(distance.double(), naive_terms(queries, inside, torch.empty(0, 4), 2, 5)[0], rtol=1e-5, atol=1e-6)
    assert (votes == 0).all()


@pytest.mark.parametrize(("k_distance", "k_vote", "name"), [(13, 1, "k_distance"), (1, 22, "k_vote")])
def test_refuses_a_k_larger_than_its_bank(banks, k_distance, k_vote, name):
    with pytest.raises(UsageError, match=name):
        distance_and_votes(*banks, k_distance, k_vote)


def heldout(generator, count=21):
    return torch.randn(count, 4, generator=generator), torch.randn(count, 4, generator=generator) + 0.7


@pytest.mark.parametrize("normalise", [False, True])
def test_score_is_scaled_distance_plus_alpha_votes(generator, banks, normalise):
    queries, inside, outliers = banks
    near, far = heldout(generator)
    config = ScoringConfig(k_distance=2, k_vote=5, normalise=normalise, alpha=0.7)
    score = fit_score(inside, outliers, near, far, config)
    prepare = unit if normalise else (lambda features: features)
    distance, votes = naive_terms(prepare(queries), prepare(inside), prepare(outliers), 2, 5)
    scale = sorted(naive_terms(prepare(near), prepare(inside), prepare(outliers), 2, 5)[0].tolist())[10]  # the median of 21
    assert score.calibration.distance_scale == pytest.approx(scale, rel=1e-5)
    assert score.calibration.alpha == 0.7
    torch.testing.assert_close(score(queries).double(), distance / scale + 0.7 * votes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [2, 19, 20, 21, 100, 101])
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_the_threshold_rejects_no_more_held_out_images_than_asked(generator, banks, rate, count):
    _, inside, outliers = banks
    near, far = heldout(generator, count)
    score = fit_score(inside, outliers, near, far, ScoringConfig(false_alarm_rate=rate))
    scores = score(near).double().numpy()
    rejected = (scores > score.threshold.value).sum()
    assert rejected <= rate * count
    assert score.threshold.value in scores  # and it is a held-out image's own score: not needlessly high
    assert (scores >= score.threshold.value).sum() > rate * (count + 1) - 1
    new = score(torch.randn(300, 4, generator=generator))
    if rate >= 1 / (count + 1):
        assert torch.equal(new > score.threshold.value, score.p_values(new) <= rate)
    assert score.calibration.heldout == [count, count, 0]


def naive_auroc(inside, outside):
    return 100 * np.mean([(b > a) + 0.5 * (b == a) for a in inside for b in outside])


def standard_error(auroc, n, m):
    """Hanley & McNeil 1982, per cent."""
    area = auroc / 100
    q1, q2 = area / (2 - area), 2 * area * area / (1 + area)
    return 100 * math.sqrt((area * (1 - area) + (m - 1) * (q1 - area**2) + (n - 1) * (q2 - area**2)) / (n * m))


@pytest.mark.parametrize("count", [40, 400])
def test_alpha_is_the_smallest_candidate_within_a_standard_error_of_the_best(generator, banks, count):
    _, inside, outliers = banks
    near, far = heldout(generator, count)
    config = ScoringConfig(normalise=False, alphas=[3.0, 0.0, 0.1, 1.0])
    calibration = fit_score(inside, outliers, near, far, config).calibration
    d_near, v_near = naive_terms(near, inside, outliers, 2, 5)
    d_far, v_far = naive_terms(far, inside, outliers, 2, 5)
    scale = sorted(d_near.tolist())[(count - 1) // 2]  # the lower median of an even number
    curve = [
        [alpha, naive_auroc((d_near / scale + alpha * v_near).tolist(), (d_far / scale + alpha * v_far).tolist())]
        for alpha in (0.0, 0.1, 1.0, 3.0)
    ]
    assert np.array(calibration.curve) == pytest.approx(np.array(curve))
    best = max(value for _, value in curve)
    assert calibration.alpha == next(alpha for alpha, value in curve if value >= best - standard_error(best, count, count))
    assert 0 < calibration.alpha  # the smallest of all is not close enough here


@pytest.mark.parametrize("controls", [0, 15])
@pytest.mark.parametrize("k_vote", [5, 20])  # 20 is more than the images and the outliers of the other classes
def test_alpha_is_chosen_on_outliers_of_kinds_the_bank_lacks_against_images_and_controls(
    generator, banks, monkeypatch, controls, k_vote
):
    asked = []
    monkeypatch.setattr(score_module, "auroc_standard_error", lambda *given: asked.append(given) or standard_error(*given))
    _, inside, outliers = banks
    near, far = heldout(generator, 30)
    same = torch.randn(controls, 4, generator=generator) + 0.2
    classes, own = torch.arange(9) % 3, torch.arange(30) % 4  # the bank has none of class 3
    config = ScoringConfig(k_vote=k_vote, normalise=False, alphas=[0.0, 0.1, 1.0])
    kinds = {"outlier_classes": classes, "heldout_classes": own}
    calibration = fit_score(inside, outliers, near, far, config, **kinds, heldout_controls=same).calibration
    scale = sorted(naive_terms(near, inside, outliers, 2, k_vote)[0].tolist())[14]
    d_near, v_near = naive_terms(torch.cat([near, same]), inside, outliers, 2, k_vote)
    each = [naive_terms(far[[row]], inside, outliers[classes != own[row]], 2, k_vote) for row in range(30)]
    d_far, v_far = (torch.cat(column) for column in zip(*each, strict=True))
    curve = [
        [alpha, naive_auroc((d_near / scale + alpha * v_near).tolist(), (d_far / scale + alpha * v_far).tolist())]
        for alpha in (0.0, 0.1, 1.0)
    ]
    assert np.array(calibration.curve) == pytest.approx(np.array(curve))
    best, count = max(value for _, value in curve), 30 + controls
    assert calibration.alpha == next(alpha for alpha, value in curve if value >= best - standard_error(best, count, 30))
    assert asked == [(pytest.approx(best), count, 30)]
    votes = {"ID": v_near[:30], "outliers of other classes": v_far, "outliers": naive_terms(far, inside, outliers, 2, k_vote)[1]}
    votes |= {"controls": v_near[30:]} if controls else {}
    assert calibration.votes == pytest.approx({name: float(values.mean()) for name, values in votes.items()})
    assert calibration.heldout == [30, 30, controls]
    assert calibration.distance_scale == pytest.approx(scale)


def test_a_perfect_best_leaves_room_for_half_a_misplaced_image(monkeypatch, generator):
    inside, outliers = torch.randn(50, 2, generator=generator), 20 + torch.randn(50, 2, generator=generator)
    near, far = torch.randn(60, 2, generator=generator), 20 + torch.randn(40, 2, generator=generator)
    far[0] = near[near.norm(dim=1).argsort()[-2]] + 0.01  # only this one lies among the images
    asked = []
    monkeypatch.setattr(score_module, "auroc_standard_error", lambda *given: asked.append(given) or standard_error(*given))
    config = ScoringConfig(normalise=False, k_vote=1, alphas=[0.0, 1e4])
    assert fit_score(inside, torch.cat([outliers, far[:1]]), near, far, config).calibration.alpha == 0
    assert asked == [(100 - 50 / 40, 60, 40)]


def test_votes_that_know_only_the_kinds_at_hand_are_given_no_weight(generator):
    inside = torch.randn(60, 2, generator=generator)
    places = torch.tensor([[0.3, 0.0], [-0.3, 0.0]])  # two kinds amid the images: only votes of one's own kind can tell
    kinds = torch.arange(40) % 2
    outliers, far = (places[kinds] + 0.01 * torch.randn(40, 2, generator=generator) for _ in range(2))
    config = ScoringConfig(normalise=False)
    given = inside, outliers, torch.randn(60, 2, generator=generator), far, config
    assert fit_score(*given).calibration.alpha > 0
    left_out = fit_score(*given, outlier_classes=kinds, heldout_classes=kinds)
    votes = left_out.calibration.votes
    assert left_out.calibration.alpha == 0 and votes["outliers of other classes"] < 1 < 4 < votes["outliers"]
    for same in (torch.zeros(40, dtype=torch.int64), kinds - 1):  # one class alone, and one that is not known
        assert fit_score(*given, outlier_classes=same, heldout_classes=same).calibration == fit_score(*given).calibration


def test_of_many_classes_a_tenth_is_left_out_at_a_time(generator, banks):
    features, inside, _ = banks
    outliers, classes = torch.randn(46, 4, generator=generator), torch.arange(46) % 23 * 7
    own = torch.tensor([0, 7, 14, 70, 140, 154, 3, 0, 7, 7, 7, 7])
    whole, found = terms_by_class(features, own, Bank(inside), outliers, classes, 2, 9, "auto")
    for term, expected in zip(whole, naive_terms(features, inside, outliers, 2, 9), strict=True):
        torch.testing.assert_close(term, expected)
    rank = {name: place % 10 for place, name in enumerate(classes.unique().tolist())}
    group = torch.tensor([rank[name] for name in classes.tolist()])
    for row, name in enumerate(own.tolist()):
        left = outliers[group != rank.get(name, -1)]
        assert len(left) == (46 if name == 3 else 40 if rank[name] < 3 else 42)  # 3 is a class that the bank lacks
        distance, votes = naive_terms(features[[row]], inside, left, 2, 9)
        assert float(found.votes[row]) == float(votes) and float(found.distance[row]) == pytest.approx(float(distance), rel=1e-5)


def test_votes_for_being_generated_are_given_no_weight_and_said(generator, caplog):
    inside, near = torch.randn(2, 60, 3, generator=generator)
    mark = torch.tensor([0.0, 0.0, 9.0])  # what every generated image has, whatever it shows
    outliers, far, controls = mark + torch.randn(3, 60, 3, generator=generator)
    config = ScoringConfig(normalise=False)
    assert not fit_score(inside, outliers, near, far, config, heldout_controls=near).calibration.votes["controls"]
    assert "outliers" not in fit_score(inside, outliers, near, far[:0], config, heldout_controls=controls).calibration.votes
    assert not caplog.records
    calibration = fit_score(inside, outliers, near, far, config, heldout_controls=controls).calibration
    assert calibration.votes["controls"] == pytest.approx(5) == calibration.votes["outliers"]
    assert "generated from what is real" in caplog.text and "5.0, held-out outliers 5.0, images 0.0" in caplog.text
    alone = fit_score(inside, outliers, near, far, config).calibration
    assert calibration.curve[-1][1] < 80 < 99 < alone.curve[-1][1]


@pytest.mark.parametrize("name", ["outlier_classes", "heldout_classes"])
@pytest.mark.parametrize(("wrong", "said"), [(torch.zeros(7), "7 classes"), (None, "none")])
def test_refuses_classes_of_other_outliers_or_of_one_set_alone(generator, banks, name, wrong, said):
    _, inside, outliers = banks
    classes = {"outlier_classes": torch.zeros(9), "heldout_classes": torch.zeros(21)} | {name: wrong}
    with pytest.raises(UsageError, match=f"_classes: got {said if wrong is not None else ''}"):
        fit_score(inside, outliers, *heldout(generator), ScoringConfig(), **classes)


def test_without_a_bank_of_outliers_alpha_is_not_chosen(generator, banks):
    _, inside, outliers = banks
    near, far = heldout(generator)
    found = fit_score(inside, outliers[:0], near, far, ScoringConfig(alphas=[1.0, 10.0])).calibration
    assert (found.alpha, found.curve) == (0.0, []) and "outliers" not in found.votes


@pytest.mark.parametrize(("shift", "expected"), [("distance tells", 0.0), ("votes tell", 10.0)])
def test_alpha_follows_the_term_that_tells(shift, expected):
    inside = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    near = inside + torch.tensor([[0.3, 0.1], [-0.2, 0.3], [0.1, -0.3], [0.2, 0.2]])
    if shift == "distance tells":
        far, outliers = near + 50, -50 - inside  # far away, and not where the outliers are
    else:
        far = torch.tensor([[0.5, 0.5], [0.52, 0.5], [0.5, 0.52], [0.51, 0.51]])  # no farther from ID than ID, among outliers
        near = inside + torch.tensor([[-0.9, 0.0], [0.9, 0.0], [0.0, 0.9], [0.9, 0.0]])
        outliers = far + 0.01
    config = ScoringConfig(k_distance=1, k_vote=2, normalise=False, alphas=[0.0, 10.0])
    assert fit_score(inside, outliers, near, far, config).calibration.alpha == expected


def test_without_held_out_outliers_alpha_is_zero_unless_set(generator, banks):
    _, inside, outliers = banks
    near, _ = heldout(generator)
    nothing = torch.empty(0, 4)
    assert fit_score(inside, outliers, near, nothing, ScoringConfig()).calibration.alpha == 0
    assert fit_score(inside, outliers, near, nothing, ScoringConfig(alpha=2.0)).calibration.alpha == 2
    assert fit_score(inside, nothing, near, nothing, ScoringConfig()).calibration.curve == []


def test_refuses_held_out_images_that_are_all_in_the_bank(banks):
    _, inside, outliers = banks
    with pytest.raises(RunError, match="median distance of held-out images"):
        fit_score(inside, outliers, inside[[2, 2, 5]], outliers, ScoringConfig(normalise=False))


@pytest.mark.parametrize("normalise", [True, False])
def test_refuses_held_out_images_that_only_rounding_moves_away_from_the_bank(generator, normalise):
    same, outliers = torch.ones(10, 8), torch.randn(10, 8, generator=generator)
    for moved in (same, same * (1 + 2 * torch.finfo(torch.float32).eps * torch.randn(10, 8, generator=generator))):
        with pytest.raises(RunError, match="median distance of held-out images"):
            fit_score(same, outliers, moved, outliers, ScoringConfig(normalise=normalise))


def test_an_image_of_the_bank_is_at_distance_0(generator, banks):
    _, inside, outliers = banks
    score = fit_score(inside, outliers, *heldout(generator), ScoringConfig(k_distance=1))
    assert (score.terms(inside)[0] == 0).all()


def test_larger_is_more_ood(generator, banks):
    _, inside, outliers = banks
    near, far = heldout(generator)
    score = fit_score(inside, outliers, near, far, ScoringConfig(normalise=False))
    assert float(score(torch.full((1, 4), 30.0))) > float(score(near).max())


def test_scores_survive_the_disk(tmp_path, generator, banks):
    queries, inside, outliers = banks
    score = fit_score(inside, outliers, *heldout(generator), ScoringConfig(k_vote=3))
    save_score(tmp_path, score)
    loaded = load_score(tmp_path)
    assert loaded.config == score.config and loaded.calibration == score.calibration
    assert torch.equal(loaded(queries), score(queries))


def test_scores_of_another_version_are_refused(tmp_path, generator, banks):
    _, inside, outliers = banks
    score = fit_score(inside, outliers, *heldout(generator, 2), ScoringConfig())
    save_score(tmp_path, score)
    earlier = {"inside": inside, "outliers": outliers, "heldout": score.combined(*score.heldout).sort().values}
    write_tensors(tmp_path / "bank.safetensors", earlier)
    with pytest.raises(RunError, match="got 'heldout_distance'; expected the files of this version.*train-detector"):
        load_score(tmp_path)
    save_score(tmp_path, score)
    settings = read_json(tmp_path / "score.json")
    del settings["calibration"]["votes"]
    write_json(tmp_path / "score.json", settings)
    with pytest.raises(RunError, match="got 'votes'.*train-detector"):
        load_score(tmp_path)


def test_what_is_scored_together_changes_nothing(generator, banks):
    queries, inside, outliers = banks
    score = fit_score(inside, outliers, *heldout(generator), ScoringConfig(alpha=0.3))
    alone = torch.cat([score(query[None]) for query in queries])
    torch.testing.assert_close(score(queries), alone, rtol=1e-6, atol=1e-7)
    assert score(queries[:0]).shape == (0,)


@pytest.mark.parametrize(
    "backend", ["torch", pytest.param("faiss", marks=pytest.mark.skipif(not FAISS, reason="faiss is not installed"))]
)
@pytest.mark.parametrize("kind", ["far apart", "constant", "tight"])
def test_terms_of_awkward_features_equal_the_loops(generator, backend, kind):
    noise = torch.randn(30, 4, generator=generator)
    features = {
        "far apart": torch.cat([1e4 + noise[:15], -1e4 + noise[15:]]),
        "constant": torch.full((30, 4), 7.0),
        "tight": 1 + 1e-4 * noise,
    }[kind]
    queries, inside, outliers = features[::3], features[1::3], features[2::3] + (0 if kind == "constant" else 1e-4)
    terms = terms_module.distance_and_votes(queries, Bank(inside, backend=backend), Bank(outliers, backend=backend), 2, 5)
    expected = naive_terms(queries, inside, outliers, 2, 5)
    torch.testing.assert_close(terms[0].double(), expected[0], rtol=1e-5, atol=0)
    assert torch.equal(terms[1].double(), expected[1])


def numpy_score(queries, inside, outliers, near, config):
    """METHOD section 5 in numpy's float64, of features that may be as large as float32 holds."""

    def prepared(features):
        rows = features.double().numpy()
        if not config.normalise:
            return rows
        rows = rows / np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-320)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-320)

    def terms(features):
        to_inside, to_outliers = (
            np.square(prepared(features)[:, None] - prepared(bank)[None]).sum(axis=2) for bank in (inside, outliers)
        )
        order = np.argsort(np.concatenate([to_inside, to_outliers], axis=1), axis=1, kind="stable")[:, : config.k_vote]
        return np.sort(to_inside, axis=1)[:, : config.k_distance].sum(axis=1), (order >= len(inside)).sum(axis=1)

    (distance, votes), scale = terms(queries), np.sort(terms(near)[0])[(len(near) - 1) // 2]
    return distance / scale + config.alpha * votes


SIZES = [1e4, 1e19, 1e25, 1e38, 1e-30, 1e-44]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("kind", ["all", "queries", "half of the bank"])
def test_features_of_any_finite_size_are_scored_as_in_float64(generator, normalise, size, kind, dtype):
    def draw(count):
        return torch.rand(count, 4, generator=generator) * torch.randn(count, 4, generator=generator).sign()

    sets = [(size if kind == "all" else 1) * draw(count) for count in (25, 30, 31, 31)]
    queries = draw(20) if kind == "half of the bank" else size * draw(20)
    sets[1][::2] *= size if kind == "half of the bank" else 1
    outliers, inside, near, far = sets
    config = ScoringConfig(normalise=normalise, alpha=0.3)
    score = fit_score(*(part.to(dtype) for part in (inside, outliers, near, far)), config)
    expected = numpy_score(queries, inside, outliers, near, config)
    np.testing.assert_allclose(score(queries.to(dtype)).numpy(), expected, rtol=2e-4 if normalise else 1e-9)
    if normalise:  # a row of zeros has no direction: 1 from every other
        assert float(score.terms(torch.zeros(1, 4)).distance) * score.calibration.distance_scale == pytest.approx(2)


def test_the_directions_of_ordinary_features_are_torch_s_own(generator, banks):
    features = torch.randn(500, 64, generator=generator) * 10 ** torch.randint(-8, 13, (500, 1), generator=generator)
    score = fit_score(features.double(), features[:0], features.flip(1), features[:0], ScoringConfig())
    assert torch.equal(score.inside, torch.nn.functional.normalize(features, dim=1))


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_features_of_one_place_are_refused_whatever_their_size(generator, normalise, size):
    same, outliers = torch.full((9, 4), size), torch.randn(9, 4, generator=generator)
    with pytest.raises(RunError, match="median distance of held-out images: got 0.0; expected above"):
        fit_score(same, outliers, same, outliers, ScoringConfig(normalise=normalise))


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_reduced_banks_of_any_finite_size_have_centres_among_their_rows(generator, normalise, size):
    inside, outliers, near, far = (size * (0.1 + 0.9 * torch.rand(40, 4, generator=generator)) for _ in range(4))
    score = fit_score(inside, outliers, near, far, ScoringConfig(normalise=normalise, bank_size=20))
    for bank, rows in ((score.inside, inside), (score.outliers, outliers)):
        assert len(bank) == 10 and (len(bank.unique(dim=0)) == 10 or size < 1e-40)
        assert normalise or (rows.min() <= bank.min() and bank.max() <= rows.max())


def test_numbers_beyond_float32_are_named_where_they_are_not_normalised(generator, banks):
    given = [part.double() for part in (banks[1], banks[2], *heldout(generator))]
    given[2][6] *= 1e39
    assert fit_score(*given, ScoringConfig()).heldout.distance.isfinite().all()
    with pytest.raises(UsageError, match="held-out in-distribution features: got NaN or infinity in row 6"):
        fit_score(*given, ScoringConfig(normalise=False))


def test_outliers_that_crowd_in_do_not_hide_the_nearest_images(generator):
    query = torch.zeros(1, 4)
    inside, outliers = 5 + torch.randn(40, 4, generator=generator), 0.01 * torch.randn(300, 4, generator=generator)
    distance, votes = distance_and_votes(query, inside, outliers, 3, 50)
    torch.testing.assert_close(distance.double(), naive_terms(query, inside, outliers, 3, 50)[0], rtol=1e-6, atol=0)
    assert votes.tolist() == [50]


def test_held_out_scores_make_the_threshold_and_its_interval(generator, banks):
    _, inside, outliers = banks
    near, far = heldout(generator, 50)
    score = fit_score(inside, outliers, near, far, ScoringConfig())
    assert all(torch.equal(*pair) for pair in zip(score.heldout, score.terms(near), strict=True))
    assert score.threshold == score.threshold_at(0.05)
    assert score.threshold.low < 0.05 < score.threshold.high < score.threshold_at(0.3).high
    assert float(score.p_values(score(near)).min()) == pytest.approx(1 / 51 + 1 / 51)


@pytest.mark.parametrize("before", [None, 0.0, 10.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 7.0])
def test_another_alpha_has_the_threshold_and_p_values_of_a_score_fitted_with_it(tmp_path, generator, banks, before, alpha):
    queries, inside, outliers = banks
    given = inside, outliers, *heldout(generator, 50)
    save_score(tmp_path, fit_score(*given, ScoringConfig(alpha=before, false_alarm_rate=0.1)))
    score, fitted = load_score(tmp_path).with_alpha(alpha), fit_score(*given, ScoringConfig(alpha=alpha, false_alarm_rate=0.1))
    assert score.config == fitted.config and score.threshold == fitted.threshold and score.heldout[1].any()
    assert score.threshold_at(0.3) == fitted.threshold_at(0.3) != score.threshold
    assert torch.equal(score.p_values(score(queries)), fitted.p_values(fitted(queries)))
    save_score(tmp_path, score)
    assert read_json(tmp_path / "score.json")["calibration"]["threshold"] == load_score(tmp_path).threshold.value
    with pytest.raises(UsageError, match="scoring.alpha: got -1"):
        score.with_alpha(-1.0)


def test_a_bank_is_reduced_by_one_factor_to_centres_of_unit_length(generator):
    inside, outliers = torch.randn(300, 4, generator=generator), torch.randn(100, 4, generator=generator) + 3
    small = reduce_banks((inside, outliers), 40, 2)
    assert [len(bank) for bank in small] == [30, 10]
    nearby = (small[0][:, None] - inside).square().sum(dim=2).min(dim=1).values
    assert float(nearby.max()) < 4 and not torch.isin(small[0], inside).all()
    assert all(a is b for a, b in zip(reduce_banks((inside, outliers), 400, 2), (inside, outliers), strict=True))
    assert [len(bank) for bank in reduce_banks((inside, outliers[:0]), 40, 2)] == [40, 0]
    near, far = heldout(generator)
    first, second = (fit_score(inside, outliers, near, far, ScoringConfig(bank_size=40)) for _ in range(2))
    assert len(first.inside) + len(first.outliers) == 40 and torch.equal(first.inside, second.inside)
    torch.testing.assert_close(first.inside.norm(dim=1), torch.ones(30))
    assert all(torch.equal(*pair) for pair in zip(first.heldout, first.terms(near), strict=True))
    big = fit_score(inside, outliers, near, far, ScoringConfig())
    whole = big.calibration
    assert (first.calibration.curve, first.calibration.votes) == (whole.curve, whole.votes)
    assert first.calibration.distance_scale != whole.distance_scale
    cost = {name: detection_metrics(one(near), one(far))["auroc"] for name, one in {"whole": big, "reduced": first}.items()}
    assert first.calibration.reduction == pytest.approx(cost) and cost["whole"] != cost["reduced"] and not whole.reduction


@pytest.mark.parametrize(("images", "made", "size", "kept"), [(10, 1000, 5, 2), (100, 1000, 10, 2), (1, 30, 5, 1)])
def test_a_reduced_bank_has_images_for_the_distance(generator, images, made, size, kept):
    inside, outliers = torch.randn(images, 4, generator=generator), torch.randn(made, 4, generator=generator) + 3
    config = ScoringConfig(k_distance=kept, bank_size=size)
    score = fit_score(inside, outliers, *heldout(generator), config)
    assert (len(score.inside), len(score.outliers)) == (kept, size - kept if made else 0)


@pytest.mark.parametrize("place", [0, 1, 2, 3, 4])
def test_a_feature_that_is_not_finite_is_named_by_its_set_and_row(generator, banks, place):
    given = [part.clone() for part in (banks[1], banks[2], *heldout(generator), banks[0])]
    given[place][6, 1] = math.nan
    names = ["in-distribution", "outlier", "held-out in-distribution", "held-out outlier", "held-out control"]
    with pytest.raises(UsageError, match=f"{names[place]} features.*row 6"):
        fit_score(*given[:4], ScoringConfig(), heldout_controls=given[4])


@pytest.mark.parametrize(("field", "value"), [("bank_size", 3), ("backend", "annoy"), ("false_alarm_rate", 1.0), ("k_vote", 0)])
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(UsageError, match=f"scoring.{field}"):
        ScoringConfig(**{field: value})


def test_held_out_images_are_needed(generator):
    with pytest.raises(UsageError, match="held-out in-distribution features: got none"):
        fit_score(*(torch.randn(count, 4, generator=generator) for count in (20, 20, 0, 5)), ScoringConfig())
