"""One bank, one set of features, one k: the core, the OpenOOD postprocessor and the pytorch-ood detector rank alike."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sdood_plugin.config import ScoringConfig
from sdood_plugin.scoring.score import fit_score
from sdood_plugin.scoring.storage import save_score

from .samples_pytorch_ood import blobs
from .test_openood_eval import FeatureNet, feature_loader

pytestmark = [pytest.mark.usefixtures("host"), pytest.mark.filterwarnings("ignore")]  # the host's warnings are not ours


@pytest.fixture
def parts():
    """Features by what they are for, and queries of which a third are outliers."""
    x, y = blobs()
    heldout, outside = torch.arange(len(y)) % 5 == 0, y < 0
    groups = {"inside": ~heldout & ~outside, "outliers": ~heldout & outside}
    groups |= {"heldout_inside": heldout & ~outside, "heldout_outliers": heldout & outside}
    features = {name: x[chosen] for name, chosen in groups.items()}
    assert min(map(len, features.values())) > 0
    return SimpleNamespace(x=x, y=y, heldout=heldout, features=features, queries=blobs(60, 30, seed=1)[0])


def by_openood(parts, outliers, monkeypatch, settings):
    """-confidence of the postprocessor, given the outliers' folder or, for None, their features."""
    from sdood_plugin.hosts.openood import SDOODPostprocessor, postprocessor

    post = SDOODPostprocessor(outliers=outliers, **settings)
    if outliers is None:
        made = {name: parts.features[name] for name in ("outliers", "heldout_outliers")}
        monkeypatch.setattr(postprocessor, "open_outliers", lambda where, net: SimpleNamespace(folder="features"))
        monkeypatch.setattr(postprocessor, "outlier_features", lambda net, opened, transform: made)
    loaders = {name: feature_loader(parts.features[key]) for name, key in (("train", "inside"), ("val", "heldout_inside"))}
    post.setup(FeatureNet(), loaders)
    assert len(post.score_.outliers) == len(parts.features["outliers"])
    return -post.inference(FeatureNet(), feature_loader(parts.queries), progress=False)[1]


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("k_distance", "k_vote", "alpha"), [(1, 1, 0.1), (3, 7, 0.5), (5, 20, None)])
@pytest.mark.parametrize("saved", [True, False])
def test_core_openood_and_pytorch_ood_rank_alike(parts, tmp_path, monkeypatch, k_distance, k_vote, alpha, normalise, saved):
    from sdood_plugin.hosts.pytorch_ood import SDOOD

    settings = {"k_distance": k_distance, "k_vote": k_vote, "alpha": alpha, "normalise": normalise}
    core = fit_score(config=ScoringConfig(**settings), **parts.features)
    save_score(tmp_path, core)
    expected = core(parts.queries).numpy()
    if saved:
        detector = SDOOD.load(tmp_path)
    else:
        detector = SDOOD(None, **settings).fit_features(parts.x, parts.y, heldout=parts.heldout)
    theirs = detector.predict_features(parts.queries).numpy()
    ours = by_openood(parts, tmp_path if saved else None, monkeypatch, {} if saved else settings)
    assert core.calibration.alpha > 0 and len(np.unique(expected)) > 80, "a ranking in which outliers vote"
    assert core.terms(parts.queries).votes.unique().numel() > 1
    for scores in (ours, theirs):
        np.testing.assert_array_equal(np.argsort(scores, kind="stable"), np.argsort(expected, kind="stable"))
        np.testing.assert_array_equal(scores, expected)
