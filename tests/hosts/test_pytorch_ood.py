"""The pytorch-ood detector: the core's numbers, the host's manners."""

# ruff: noqa: F401, F811 (a fixture that several files share)

from __future__ import annotations

import copy
import pickle
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from pytorch_ood.api import FeaturesDetector, ModelNotSetException, RequiresFittingException
from pytorch_ood.metrics import OODMetrics
from pytorch_ood.utils import GridSearch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sdood_plugin.artifacts import read_csv, read_tensors, write_tensors
from sdood_plugin.config import ScoringConfig
from sdood_plugin.data.images import to_unit
from sdood_plugin.data.sources import load_images
from sdood_plugin.detector.network import ThreeHeadNet, load_network, save_network
from sdood_plugin.errors import RunError, UsageError
from sdood_plugin.features import Backbone, evaluating, extract
from sdood_plugin.hosts.pytorch_ood import SDOOD, network_input, outlier_target
from sdood_plugin.scoring.score import fit_score
from sdood_plugin.scoring.storage import load_score

from ..test_run import tiny_config
from .samples_pytorch_ood import blobs, run_folder


def flags(y: torch.Tensor, every: int = 5) -> torch.Tensor:
    return torch.arange(len(y)) % every == 0


def naive(x, y, heldout, query, k_distance, k_vote, alpha, normalise):
    """The score of METHOD section 5, one image after the other."""

    def prepared(features):
        values = features.double().numpy()
        return values / np.linalg.norm(values, axis=1, keepdims=True) if normalise else values

    bank, outlier = prepared(x[~heldout]), (y < 0)[~heldout].numpy()

    def terms(z):
        squared = ((bank - z) ** 2).sum(axis=1)
        return np.sort(squared[~outlier])[:k_distance].sum(), outlier[np.argsort(squared, kind="stable")[:k_vote]].sum()

    scale = float(torch.tensor([terms(z)[0] for z in prepared(x[heldout & (y >= 0)])]).median())
    return np.array([terms(z)[0] / scale + alpha * terms(z)[1] for z in prepared(query)])


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("k_distance", "k_vote", "alpha"), [(1, 1, 0.0), (2, 5, 0.3), (7, 20, 2.0)])
def test_the_score_is_that_of_the_naive_loop(k_distance, k_vote, alpha, normalise):
    (x, y), (query, _) = blobs(), blobs(10, 10, seed=1)
    detector = SDOOD(None, k_distance, k_vote, alpha, normalise).fit_features(x, y, heldout=flags(y))
    expected = naive(x, y, flags(y), query, k_distance, k_vote, alpha, normalise)
    np.testing.assert_allclose(detector.predict_features(query).numpy(), expected, rtol=2e-4)


@pytest.mark.parametrize("outliers", [40, 0])
def test_the_core_score_of_the_same_bank_gives_the_same_values(outliers):
    (x, y), (query, _) = blobs(outliers=outliers), blobs(seed=1)
    held = flags(y)
    core = fit_score(x[~held & (y >= 0)], x[~held & (y < 0)], x[held & (y >= 0)], x[held & (y < 0)], ScoringConfig(3, 7, True))
    detector = SDOOD(None, 3, 7, normalise=True).fit_features(x, y, heldout=held)
    assert detector.score_.calibration == core.calibration
    assert torch.equal(detector.predict_features(query), core(query))
    assert (core.calibration.alpha > 0) == bool(outliers)


def test_targets_tell_of_which_kind_an_outlier_is():
    x, y = blobs()
    held, outside = flags(y), y < 0
    kinds = torch.arange(len(y)) % 3
    y = torch.where(outside, outlier_target(kinds), y)
    parts = x[~held & ~outside], x[~held & outside], x[held & ~outside], x[held & outside], ScoringConfig()
    core = fit_score(*parts, outlier_classes=kinds[~held & outside], heldout_classes=kinds[held & outside])
    detector = SDOOD(None).fit_features(x, y, heldout=held)
    assert detector.score_.calibration == core.calibration
    assert core.calibration.votes != fit_score(*parts).calibration.votes
    again = fit_score(
        *parts[:4], ScoringConfig(k_vote=3), outlier_classes=kinds[~held & outside], heldout_classes=kinds[held & outside]
    )
    assert detector.set_hyperparameters(k_vote=3).score_.calibration == again.calibration
    y[(~held & outside).nonzero()[0]] = -1  # one that is not known
    assert SDOOD(None).fit_features(x, y, heldout=held).score_.calibration == fit_score(*parts).calibration


def test_a_run_gives_the_scores_it_wrote(run_folder):
    config = tiny_config()
    detector = SDOOD.from_run(run_folder)
    core, network = load_score(run_folder / "detector"), load_network(run_folder / "detector" / "detector.safetensors")
    for name, source in (("id", config.data.test), *((ood.name, ood.images) for ood in config.data.ood)):
        images = load_images(source, config.data, config.seed).images
        scores = detector(to_unit(images))
        written = [float(row["score"]) for row in read_csv(run_folder / "evaluation" / f"scores-{name}.csv")]
        np.testing.assert_allclose(scores.numpy(), written, rtol=1e-4)
        core_scores = core(extract(network.backbone, images, device=torch.device("cpu")))
        assert torch.equal(scores.argsort(), core_scores.argsort())
        torch.testing.assert_close(scores, core_scores)
    assert detector.alpha == core.config.alpha and not detector.requires_fit and detector.image_size == images.shape[-1]


def test_larger_means_more_ood_and_outliers_help():
    x, y = blobs(300, 100)
    query, target = blobs(100, 100, seed=1)
    areas = {}
    for name, chosen in (("both", y == y), ("alone", y >= 0)):
        metrics = OODMetrics()
        metrics.update(SDOOD(None, normalise=False).fit_features(x[chosen], y[chosen]).predict_features(query), target)
        areas[name] = metrics.compute()["AUROC"]
    assert areas["both"] > areas["alone"] + 0.02 and areas["alone"] > 0.7, areas


def test_fit_of_a_loader_is_fit_of_its_features_at_any_batch_size():
    x, y = blobs()
    encoder = nn.Linear(6, 4).requires_grad_(False).eval()
    expected = SDOOD(encoder).fit_features(encoder(x), y).predict_features(encoder(x))
    for size in (1, 17, 160):
        detector = SDOOD(encoder).fit(DataLoader(TensorDataset(x, y), batch_size=size))
        torch.testing.assert_close(torch.cat([detector(part) for part in x.split(size)]), expected, rtol=1e-4, atol=1e-5)


def test_the_split_follows_the_seed_and_no_global_state():
    x, y = blobs()
    torch.manual_seed(3)
    np.random.seed(3)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = (SDOOD(None, seed=seed).fit_features(x, y) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.equal(first.score_.inside, again.score_.inside) and not torch.equal(first.score_.inside, other.score_.inside)
    assert [len(first.score_.inside), len(first.score_.outliers), *first.score_.calibration.heldout] == [108, 36, 12, 4, 0]


def test_the_host_exceptions():
    assert issubclass(SDOOD, FeaturesDetector) and SDOOD.requires_fit
    detector = SDOOD(nn.Identity())
    for call in (detector.predict, detector.predict_features, detector):
        with pytest.raises(RequiresFittingException):
            call(torch.zeros(2, 3))
    with pytest.raises(RequiresFittingException):
        detector.save("anywhere")
    for call in (SDOOD(None).predict, SDOOD(None).fit):
        with pytest.raises(ModelNotSetException):
            call(torch.zeros(2, 3))


def test_save_load_pickle_and_copy_give_the_same_scores(tmp_path):
    x, y = blobs()
    detector = SDOOD(nn.Identity(), k_distance=3).fit_features(x, y)
    detector.save(tmp_path / "kept")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["bank.safetensors", "score.json"]
    loaded = SDOOD.load(tmp_path / "kept", nn.Identity())
    assert loaded.get_hyperparameters() == detector.get_hyperparameters()
    for other in (loaded, pickle.loads(pickle.dumps(detector)), copy.deepcopy(detector)):
        assert torch.equal(other(x), detector(x))


def test_to_moves_every_bank():
    x, y = blobs()
    detector = SDOOD(nn.Linear(6, 6), k_distance=2).fit_features(x, y)
    assert detector.to("meta") is detector
    held = [detector.encoder.weight, detector.score_.inside, detector.score_.outliers, *detector._fitted]
    assert {tensor.device.type for tensor in held} == {"meta"} and detector.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_scores_are_those_of_the_cpu():
    x, y = blobs()
    detector = SDOOD(nn.Identity()).fit_features(x, y)
    expected = detector(x)
    moved = detector.to("cuda")
    assert moved(x).device.type == "cuda"
    torch.testing.assert_close(moved(x).cpu(), expected, rtol=1e-4, atol=1e-4)
    refitted = SDOOD(nn.Identity()).to("cuda").fit(DataLoader(TensorDataset(x, y), batch_size=32))
    torch.testing.assert_close(refitted(x).cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_what_a_gpu_pickled_loads_on_the_cpu_and_a_copy_stays_on_the_gpu():
    x, y = blobs()
    detector = SDOOD(nn.Linear(6, 4)).to("cuda").fit(DataLoader(TensorDataset(x, y), batch_size=32))
    scores = detector(x)
    again, copied = pickle.loads(pickle.dumps(detector)), copy.deepcopy(detector)
    for made, device in ((again, "cpu"), (detector, "cuda"), (copied, "cuda")):
        held = [made.encoder.weight, made.score_.inside, made.score_.outliers, *made._fitted]
        assert {tensor.device.type for tensor in held} == {made.device.type} == {device}
        torch.testing.assert_close(made(x).cpu(), scores.cpu(), rtol=1e-4, atol=1e-4)
    again.set_hyperparameters(k_distance=3)
    assert again(x).device.type == "cpu"


def test_a_pickle_is_made_of_a_copy_that_lies_on_the_cpu(monkeypatch):
    """Where there is no GPU: what `to` is asked for, and of which object."""
    x, y = blobs()
    detector = SDOOD(nn.Linear(6, 4)).fit_features(x[:, :4], y)
    moved = []
    monkeypatch.setattr(SDOOD, "device", torch.device("cuda"))
    monkeypatch.setattr(SDOOD, "to", lambda self, device: moved.append((self, device)) or self)
    state = detector.__getstate__()
    ((other, device),) = moved
    assert other is not detector and device == "cpu" and other.__dict__ is state
    assert state["encoder"] is not detector.encoder and torch.equal(state["encoder"].weight, detector.encoder.weight)
    assert state["score_"].inside is not detector.score_.inside


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_encoder_of_another_dtype_takes_what_the_loader_gives(dtype):
    x, y = blobs()
    encoder = nn.Linear(6, 4).requires_grad_(False)
    expected = SDOOD(encoder).fit(DataLoader(TensorDataset(x, y), batch_size=32))(x)
    scores = SDOOD(encoder.to(dtype)).fit(DataLoader(TensorDataset(x, y), batch_size=32))(x)
    assert np.corrcoef(scores.float().numpy(), expected.numpy())[0, 1] > 0.98


@pytest.mark.parametrize(("outliers", "alpha", "said"), [(1, None, 1), (1, 0.1, 0), (0, None, 0), (2, None, 0)])
def test_an_outlier_too_few_to_hold_one_out_is_said(outliers, alpha, said, caplog):
    SDOOD(None, alpha=alpha).fit_features(*blobs(outliers=outliers))
    assert caplog.text.count("No outlier is held out") == said


def test_the_encoder_is_called_as_it_is():
    x, y = blobs()
    encoder = nn.Sequential(nn.Linear(6, 6), nn.Dropout()).train()
    detector = SDOOD(encoder).fit(DataLoader(TensorDataset(x, y), batch_size=32))
    assert encoder.training
    graded = []
    detector.encoder = lambda x: graded.append(torch.is_grad_enabled()) or x
    assert not detector(x).requires_grad and graded == [False]


def test_grid_search_of_a_fitted_detector_keeps_its_outliers():
    (x, y), (query, target) = blobs(), blobs(seed=1)
    space = {"k_distance": [1, 4], "k_vote": [3], "alpha": [0.0, 1.0], "normalise": [True, False]}
    detector = SDOOD(nn.Identity()).fit_features(x, y)
    search = GridSearch(detector, None, DataLoader(TensorDataset(query, target), batch_size=50), space)
    best = search.run()
    assert len(search.results_) == 8 and detector.get_hyperparameters() == best and len(detector.score_.outliers)
    fresh = SDOOD(nn.Identity(), **best).fit_features(x, y)
    assert torch.equal(detector(query), fresh(query))


def test_grid_search_of_an_unfitted_detector_fits_it():
    (x, y), (query, target) = blobs(), blobs(seed=1)
    detector = SDOOD(nn.Identity())
    loader, val = DataLoader(TensorDataset(x, y), batch_size=32), DataLoader(TensorDataset(query, target), batch_size=32)
    assert GridSearch(detector, loader, val, {"k_distance": [1, 3]}).run()["k_distance"] == detector.k_distance
    assert not len(detector.score_.outliers)  # the host drops targets < 0 before fitting, as the class says


def test_grid_search_of_a_loaded_detector_tunes_alpha(tmp_path):
    (x, y), (query, target) = blobs(), blobs(seed=1)
    SDOOD(None).fit_features(x, y).save(tmp_path)
    detector = SDOOD.load(tmp_path, nn.Identity())
    search = GridSearch(detector, None, DataLoader(TensorDataset(query, target), batch_size=50), {"alpha": [0.0, 0.3, 3.0]})
    assert search.run()["alpha"] == detector.alpha == detector.score_.calibration.alpha and len(search.results_) == 3


def test_numbers_of_numpy_are_numbers(tmp_path):
    x, y = blobs()
    detector = SDOOD(None, k_distance=np.int64(3)).fit_features(x, y)
    detector.set_hyperparameters(k_vote=np.int64(7), alpha=np.float32(0.5), normalise=np.bool_(True))
    plain = SDOOD(None, k_distance=3, k_vote=7, alpha=0.5, normalise=True).fit_features(x, y)
    assert torch.equal(detector.predict_features(x), plain.predict_features(x))
    detector.save(tmp_path)


def test_a_value_that_fails_changes_nothing(tmp_path):
    x, y = blobs()
    detector = SDOOD(None).fit_features(x, y)
    before, scores = detector.get_hyperparameters(), detector.predict_features(x)
    for wrong in ({"k_distance": 109}, {"alpha": -1.0}, {"what": 1}, {"k_vote": "3"}, {"alpha": "auto"}):
        with pytest.raises((ValueError, TypeError)):
            detector.set_hyperparameters(**wrong)
        assert detector.get_hyperparameters() == before and torch.equal(detector.predict_features(x), scores)
    detector.save(tmp_path)
    loaded = SDOOD.load(tmp_path).set_hyperparameters(**before)
    with pytest.raises(UsageError, match="loaded detector"):
        loaded.set_hyperparameters(k_vote=3)
    assert loaded.get_hyperparameters() == before


@pytest.mark.parametrize("alpha", [None, 0.2])
def test_a_loaded_detector_takes_another_alpha_and_nothing_else(tmp_path, alpha):
    x, y = blobs()
    SDOOD(None, alpha=alpha).fit_features(x, y).save(tmp_path)
    detector = SDOOD.load(tmp_path).to("cpu")
    loaded, scores = detector.score_, detector.predict_features(x)
    distance, votes = loaded.terms(x)
    assert votes.any() and detector.set_hyperparameters(alpha=np.float32(0.5)) is detector
    assert torch.equal(detector.predict_features(x), distance + 0.5 * votes) and detector.alpha == 0.5
    fitted = SDOOD(None, alpha=0.5).fit_features(x, y).score_
    assert detector.score_.threshold == fitted.threshold != loaded.threshold
    assert torch.equal(detector.score_.p_values(scores), fitted.p_values(scores))
    changed = detector.predict_features(x)
    for wrong in ({"k_vote": 3}, {"alpha": 0.1, "normalise": False}, {"alpha": -1.0}, {"alpha": "auto"}):
        with pytest.raises((UsageError, TypeError)):
            detector.set_hyperparameters(**wrong)
        assert detector.alpha == 0.5 and torch.equal(detector.predict_features(x), changed)
    for again in (pickle.loads(pickle.dumps(detector)), copy.deepcopy(detector), detector):
        again.set_hyperparameters(alpha=alpha)  # None stands for what it was calibrated with
        assert torch.equal(again.predict_features(x), scores) and again.score_.calibration == loaded.calibration
        assert again.score_.threshold == loaded.threshold
    detector.set_hyperparameters(alpha=0.7).save(tmp_path / "other")
    other = SDOOD.load(tmp_path / "other")
    torch.testing.assert_close(other.predict_features(x), distance + 0.7 * votes)
    assert other.score_.threshold == detector.score_.threshold


def test_alpha_of_a_loaded_detector_is_not_chosen_anew(tmp_path):
    SDOOD(None, alpha=0.2).fit_features(*blobs()).save(tmp_path)
    with pytest.raises(UsageError, match="hyperparameters of a loaded detector: got {'alpha': None}"):
        SDOOD.load(tmp_path).set_hyperparameters(alpha=None)


X, Y = blobs()
NARROW = SDOOD(None).fit_features(X, Y)
BAD_INPUT = {
    "no ID": (lambda: SDOOD(None).fit_features(X, -torch.ones(len(X))), "labels: got 160 below 0"),
    "one ID": (lambda: SDOOD(None).fit_features(X[-3:], torch.tensor([0, -1, -1])), "got 1 to compare with and 0 held out"),
    "k_distance": (lambda: SDOOD(None, k_distance=109).fit_features(X, Y), "k_distance: got 109; expected at most 108"),
    "k_vote": (lambda: SDOOD(None, k_vote=145).fit_features(X, Y), "k_vote: got 145; expected at most 144"),
    "k of nothing": (lambda: SDOOD(None, k_distance=0).fit_features(X, Y), "k_distance: got 0"),
    "alpha": (lambda: SDOOD(None, alpha=-1).fit_features(X, Y), "alpha: got -1"),
    "heldout_fraction": (lambda: SDOOD(None, heldout_fraction=1).fit_features(X, Y), "heldout_fraction: got 1"),
    "heldout": (lambda: SDOOD(None).fit_features(X, Y, heldout=torch.zeros(3, dtype=torch.bool)), "heldout: got"),
    "all held out": (lambda: SDOOD(None).fit_features(X, Y, heldout=Y == Y), "ID samples: got 0 to compare with"),
    "maps": (lambda: SDOOD(None).fit_features(X[:, :, None], Y), "features and labels: got shapes"),
    "labels": (lambda: SDOOD(None).fit_features(X, Y[:-1]), "features and labels: got shapes"),
    "NaN": (lambda: SDOOD(None).fit_features(X.masked_fill(X > 3, torch.nan), Y), "NaN"),
    "query width": (lambda: NARROW.predict_features(torch.zeros(2, 7)), "width: got 7; expected 6"),
    "query maps": (lambda: NARROW.predict_features(torch.zeros(2, 6, 1)), "features: got shape (2, 6, 1)"),
    "encoder": (lambda: SDOOD(lambda x: (x, x)).fit(DataLoader(TensorDataset(X, Y))), "encoder output: got tuple"),
    "empty": (lambda: SDOOD(nn.Identity()).fit([]), "data_loader: got no batches"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_clear_line(name):
    call, message = BAD_INPUT[name]
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, UsageError)


WRONG = {"backbone": "resnet18_cifar", "pooling": "own", "input_size": "", "classes": "3", "image_size": "16"}


def test_folders_that_do_not_fit(tmp_path, run_folder):
    with pytest.raises(RunError, match="no bank.safetensors"):
        SDOOD.load(tmp_path)
    with pytest.raises(RunError, match="no detector/detector.safetensors"):
        SDOOD.from_run(tmp_path)
    with pytest.raises(UsageError, match="width 512; expected 128"):
        SDOOD.load(run_folder / "detector", Backbone("resnet18_cifar"))
    shutil.copytree(run_folder / "detector", tmp_path / "detector")
    save_network(tmp_path / "detector" / "detector.safetensors", ThreeHeadNet(Backbone("resnet18_cifar"), 3))
    with pytest.raises(UsageError, match="width 512; expected 128"):
        SDOOD.from_run(tmp_path)
    tensors = read_tensors(run_folder / "detector" / "detector.safetensors")
    write_tensors(tmp_path / "detector" / "detector.safetensors", tensors, WRONG)
    with pytest.raises(RunError) as caught:
        SDOOD.from_run(tmp_path)
    assert "\n" not in str(caught.value) and "expected tensors of resnet18_cifar" in str(caught.value)


def test_the_transform_is_what_the_run_reads(run_folder):
    from PIL import Image

    from sdood_plugin.config import DataConfig, ImagesConfig

    folder = run_folder / "outliers" / "images"
    file = sorted(folder.rglob("*.png"))[0]
    for size in (None, 8):
        read = load_images(ImagesConfig(str(folder), limit=1), DataConfig(ImagesConfig(str(folder)), image_size=size), 0)
        assert torch.equal(partial(network_input, size=size)(Image.open(file)), to_unit(read.images[0]))


def test_import_changes_nothing_register_adds_the_three_and_the_core_knows_no_host():
    code = """
import random, sys, warnings
import numpy as np, torch, torchvision, sklearn.metrics
torch.manual_seed(5); np.random.seed(5); random.seed(5)
def state():
    return (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(), list(warnings.filters),
            np.geterr(), sorted(vars(np)), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.hub._hub_dir)
import sdood_plugin.cli, sdood_plugin.run, sdood_plugin.stages
assert not [name for name in sys.modules if name.startswith('sdood_plugin.hosts') or name.split('.')[0] == 'pytorch_ood']
import pytorch_ood.detector, pytorch_ood.benchmark  # what the host itself changes is the host's
before = state()
import sdood_plugin.hosts.pytorch_ood as ours, sdood_plugin.hosts.pytorch_ood.benchmarks
assert state() == before
img = pytorch_ood.dataset.img
homes = {pytorch_ood.detector: ours.SDOOD, pytorch_ood.loss: ours.ThreeHeadLoss, img: ours.SDOutliers}
assert not any(hasattr(home, kind.__name__) for home, kind in homes.items())
ours.register(); ours.register()
assert all(getattr(home, kind.__name__) is kind for home, kind in homes.items())
assert pytorch_ood.detector.__all__.count('SDOOD') == img.__all__.count('SDOutliers') == 1
assert state() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_first_import_of_the_host_leaves_no_warning_filter():
    code = """
import sys, warnings, torch
before = list(warnings.filters)
assert 'pytorch_ood' not in sys.modules
import sdood_plugin.hosts.pytorch_ood, sdood_plugin.hosts.pytorch_ood.benchmarks
assert 'pytorch_ood.benchmark' in sys.modules and warnings.filters == before, set(warnings.filters) - set(before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr


def test_the_core_network_of_a_run_is_in_evaluation_mode(run_folder):
    detector = SDOOD.from_run(run_folder)
    assert not any(part.training for part in detector.encoder.modules())
    with evaluating(detector.encoder):
        assert detector.encoder(torch.zeros(1, 3, 16, 16)).shape == (1, detector.score_.inside.shape[1])
