"""Our OpenOOD postprocessor on features known to the last bit, with the real host: sweeps, folders, loaders, pickles."""

from __future__ import annotations

import dataclasses
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from sdood_plugin.config import ScoringConfig
from sdood_plugin.detector.network import ThreeHeadNet, save_network
from sdood_plugin.errors import RunError, UsageError
from sdood_plugin.features import Backbone
from sdood_plugin.outliers.dataset import OutlierSet
from sdood_plugin.scoring.score import fit_score
from sdood_plugin.scoring.storage import save_score

from .test_openood_eval import FeatureNet, feature_loader

pytestmark = [pytest.mark.usefixtures("host"), pytest.mark.filterwarnings("ignore")]  # the host's warnings are not ours


@pytest.fixture
def loaders(generator):
    return {name: feature_loader(torch.randn(count, 6, generator=generator)) for name, count in (("train", 40), ("val", 15))}


@pytest.fixture
def detector(tmp_path, generator):
    """A detector folder's banks, calibrated with alpha 0.3."""
    inside, outliers, heldout = (torch.randn(count, 6, generator=generator) for count in (30, 10, 12))
    score = fit_score(inside, outliers, heldout, outliers[:0], ScoringConfig(k_distance=2, k_vote=4, alpha=0.3))
    save_score(tmp_path, dataclasses.replace(score, config=dataclasses.replace(score.config, alpha=None)))
    return tmp_path


class Untouched:
    """A loader whose images nobody may ask for."""

    dataset = SimpleNamespace(transform_image=len)

    def __iter__(self):
        raise AssertionError("images were embedded")


def settings(sweep, **arguments):
    section = {"APS_mode": True, "postprocessor_args": arguments, "postprocessor_sweep": sweep}
    return SimpleNamespace(postprocessor=section)


def test_a_sweep_keeps_what_it_leaves_out(detector, loaders):
    """Where the values come from a detector folder, they are known after `setup` only."""
    from sdood_plugin.hosts.openood import SDOODPostprocessor

    post = SDOODPostprocessor(settings({"k_distance_list": [1, 3], "normalise_list": None}, outliers=detector))
    post.setup(FeatureNet(), loaders)
    assert post.args_dict == {"k_distance": [1, 3], "k_vote": [4], "alpha": [0.3], "normalise": [True]}
    for k_distance in post.args_dict["k_distance"]:
        post.set_hyperparam([k_distance, None, None, None])
        assert post.get_hyperparam() == [k_distance, 4, 0.3, True]
        assert post.score_.calibration.alpha == 0.3
    given = SDOODPostprocessor(outliers=detector, alpha=0.5)
    given.setup(FeatureNet(), loaders)
    assert given.get_hyperparam() == [2, 4, 0.5, True]


def test_hyperparameters_set_before_setup_wait_for_it(detector, loaders):
    from sdood_plugin.hosts.openood import SDOODPostprocessor

    post = SDOODPostprocessor(outliers=detector, k_vote=3)
    post.set_hyperparam([1, 2, 0.7, None])
    post.setup(FeatureNet(), loaders)
    assert post.get_hyperparam() == [1, 2, 0.7, True]
    assert (post.score_.config.k_vote, post.score_.calibration.alpha) == (2, 0.7)


def test_a_hyperparameter_that_fails_changes_nothing(loaders):
    from sdood_plugin.hosts.openood import SDOODPostprocessor

    post = SDOODPostprocessor()
    post.setup(FeatureNet(), loaders)
    before, score = post.get_hyperparam(), post.score_
    with pytest.raises(UsageError, match="k_distance: got 41"):
        post.set_hyperparam([41, 1, 0.1, True])
    assert post.get_hyperparam() == before
    assert post.score_ is score


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        ({"k_vot_list": [1]}, "postprocessor_sweep: got k_vot_list; expected one of alpha_list"),
        ({"alpha_list": [None, 0.1]}, "postprocessor_sweep.alpha_list: got .None, 0.1.; expected a list of values"),
        ({"k_vote_list": 3}, "postprocessor_sweep.k_vote_list: got 3"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_line(sweep, expected):
    from sdood_plugin.hosts.openood import SDOODPostprocessor

    with pytest.raises(UsageError, match=expected):
        SDOODPostprocessor(settings(sweep))


def test_a_wrong_folder_is_found_before_an_image_is_embedded(detector, tmp_path_factory):
    from sdood_plugin.hosts.openood import SDOODNet, SDOODPostprocessor

    untouched = {"train": Untouched(), "val": Untouched()}
    with pytest.raises(RunError, match="meta.json"):
        SDOODPostprocessor(outliers=tmp_path_factory.mktemp("none")).setup(FeatureNet(), untouched)
    save_network(detector / "detector.safetensors", ThreeHeadNet(Backbone("small_cnn"), 3))
    other = SDOODNet(ThreeHeadNet(Backbone("small_cnn"), 3), None)
    with pytest.raises(UsageError, match="those of another network"):
        SDOODPostprocessor(outliers=detector).setup(other, untouched)


class Views(Dataset):
    """As the host's training data: `data` augmented, `data_aux` not."""

    def __init__(self, features, transform):
        self.features, self.transform_image = features, transform

    def __len__(self):
        return len(self.features)

    def __getitem__(self, index):
        return {"data": self.features[index] + 9, "data_aux": self.features[index], "label": 0}


def test_a_subset_is_embedded_without_augmentation_and_an_empty_loader_is_said(generator):
    from sdood_plugin.hosts.openood import SDOODPostprocessor

    features = torch.randn(30, 6, generator=generator)
    train, val = Views(features, str), Views(features, len)
    loaders = {"train": DataLoader(Subset(train, range(20)), 4), "val": DataLoader(Subset(Subset(val, range(25)), range(9)), 4)}
    post = SDOODPostprocessor()
    post.setup(FeatureNet(), loaders)
    torch.testing.assert_close(post.features["inside"], features[:20])
    torch.testing.assert_close(post.features["heldout_inside"], features[:9] + 9)
    empty = DataLoader(Subset(val, []), 4)
    with pytest.raises(UsageError, match="loader: got no images"):
        post.inference(FeatureNet(), empty, progress=False)
    for name in loaders:
        with pytest.raises(UsageError, match=f"ID loader `{name}`: got no images"):
            SDOODPostprocessor().setup(FeatureNet(), {**loaders, name: empty})


def test_a_network_of_half_the_bits_scores_as_the_whole_one(generator):
    from sdood_plugin.hosts.openood import SDOODNet, SDOODPostprocessor

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SDOODNet(ThreeHeadNet(Backbone("small_cnn"), 3), "cifar10").eval()
    images = torch.randn(24, 3, 16, 16, generator=generator)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        post = SDOODPostprocessor(k_distance=1)
        net.to(dtype)
        post.setup(net, {name: feature_loader(images[rows]) for name, rows in (("train", slice(14)), ("val", slice(14, 24)))})
        found[dtype] = post.inference(net, feature_loader(images), progress=False)[1]
        assert net(images).dtype == dtype
        assert net.get_fc()[0].dtype == np.float32
    assert np.corrcoef(*found.values())[0, 1] > 0.99


@pytest.mark.parametrize(("alpha", "warnings"), [(None, 1), (0.1, 0)])
def test_outliers_of_too_few_sources_to_hold_any_out_are_said(run_folder, net, tree, monkeypatch, caplog, alpha, warnings):
    from sdood_plugin.hosts.openood import Evaluator, SDOODPostprocessor, postprocessor

    from .openood_tree import common

    outliers = OutlierSet(run_folder / "outliers")
    few = outliers.take(torch.isin(outliers.sources, outliers.sources.unique()[:9]))
    monkeypatch.setattr(postprocessor, "open_outliers", lambda where, net: few)
    Evaluator(net, "cifar10", postprocessor=SDOODPostprocessor(alpha=alpha), **common(tree))
    assert caplog.text.count("fewer than 10 sources") == warnings


def test_outliers_need_a_data_set_that_says_what_it_makes_of_an_image(run_folder):
    from sdood_plugin.hosts.openood import SDOODPostprocessor

    plain = DataLoader(torch.zeros(4, 6), 2)
    with pytest.raises(UsageError, match="ID loader `val`: got a Tensor without transform_image"):
        SDOODPostprocessor(outliers=run_folder / "outliers").setup(FeatureNet(), {"train": plain, "val": plain})


def test_a_pickle_leaves_the_postprocessor_where_it_is(loaders):
    from sdood_plugin.hosts.openood import SDOODPostprocessor

    post = SDOODPostprocessor()
    post.setup(FeatureNet(), loaders)
    features, score = post.features, post.score_
    again = pickle.loads(pickle.dumps(post))
    assert post.features is features
    assert post.score_ is score
    torch.testing.assert_close(again.score_.inside, score.inside)


def test_a_sweep_says_nothing_of_a_threshold_that_the_host_has_no_use_of(loaders, caplog):
    from sdood_plugin.hosts.openood import SDOODPostprocessor

    post = SDOODPostprocessor()
    post.setup(FeatureNet(), loaders)
    for k_distance in (1, 2, 3):
        post.set_hyperparam([k_distance, None, None, None])
    assert not caplog.records
    assert post.score_.threshold.value == post.score_.combined(*post.score_.heldout).max()
    assert "the threshold is that of a rate of 0.0625" in caplog.text


def test_a_detector_folder_s_score_has_a_threshold_under_every_alpha(detector, loaders):
    from sdood_plugin.hosts.openood import SDOODPostprocessor
    from sdood_plugin.scoring.storage import load_score

    post, own = SDOODPostprocessor(outliers=detector), load_score(detector)
    post.setup(FeatureNet(), loaders)
    for alpha in (0.0, 2.0, 0.3):
        post.set_hyperparam([None, None, alpha, None])
        expected = (own.heldout.distance + alpha * own.heldout.votes).max()  # of 12 images the rate 0.05 takes the largest
        assert post.score_.threshold.value == pytest.approx(float(expected))
    assert post.score_.threshold == own.threshold
