"""The comparators' stages: two train their networks, with our outliers and without; the third scores the test images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ._version import __version__
from .artifacts import file_hash, read_tensors, tensor_hash, value_hash, write_csv, write_json, write_tensors, write_text
from .backbones import RANDOM, weights_file
from .baselines.dn2 import knn_score
from .baselines.fake_it import binary, fake_it_loss, sample_fakes, stop_after, unconditional
from .baselines.mscl import train_mscl
from .baselines.multi_class_ad import fine_tuning
from .baselines.outlier_exposure import EXPOSED, exposed_scores, outlier_exposure_loss, uniform_noise
from .baselines.posthoc import POSTHOC, posthoc_scores
from .clustering.simclr import train_simclr
from .config import DetectorConfig, InspectionConfig, key_dict
from .context import Context
from .detector.network import Heads, ThreeHeadNet, load_network, save_network
from .detector.training import Labelled, Loss, train_detector
from .diffusion.sampling import as_denoiser
from .diffusion.training import train_diffusion
from .evaluation import TestSets, method_rows, read_tests
from .features import Backbone, evaluating, extract, load_backbone
from .neighbours import Bank
from .outliers.fidelity import distances
from .stages import read_outliers, write_curves
from .training import Job, place

Scorer = Callable[[list[torch.Tensor]], dict[str, list[torch.Tensor]]]  # sets of uint8 images -> by row, scores of each set


def train_comparators(run: Context, folder: Path, _key: str) -> None:
    """A folder for each comparator that trains something, with its weights and losses."""
    Comparators(run, folder).fit([method for method in run.config.compare.methods if method not in EXPOSED])


def train_exposed(run: Context, folder: Path, _key: str) -> None:
    """A folder for each comparator that trains on this run's own outliers and controls."""
    Comparators(run, folder).fit([method for method in run.config.compare.methods if method in EXPOSED])


def compare(run: Context, folder: Path, _key: str) -> None:
    """rows.json of the comparators and, for each test set, a CSV with every image's scores."""
    scorers = Comparators(run, run.folder / "comparators").fit(run.config.compare.methods)
    tests, rows = read_tests(run), []
    if tests is not None:
        scores = {name: values for scorer in scorers for name, values in scorer([one.images for one in tests.sets]).items()}
        rows = [row for method, values in scores.items() for row in method_rows(run, tests, method, values)]
        if run.is_main:
            _write_scores(folder, tests, scores)
    if run.is_main:
        write_json(folder / "rows.json", rows)


def _write_scores(folder: Path, tests: TestSets, scores: dict[str, list[torch.Tensor]]) -> None:
    for number, (name, images) in enumerate(zip(tests.names, tests.sets, strict=True)):
        columns = torch.stack([values[number].double().cpu() for values in scores.values()], dim=1).tolist()
        lines = ([path, *(f"{value:.9g}" for value in row)] for path, row in zip(images.names, columns, strict=True))
        write_csv(folder / f"scores-{name}.csv", ("path", *scores), lines)


class Comparators:
    """The comparators of one run: same images, pseudo-labels, held-out split, backbone and epochs as the detector.

    What a method trains lies in `folder`/METHOD beside a hash of all it was made of: one method after the other, in any
    number of calls, trains only what is not there.

    Args:
        run: The run; its test images are not touched here.
        folder: The stage's folder.
    """

    def __init__(self, run: Context, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.device = run.accelerator.device

    def fit(self, methods: Sequence[str]) -> list[Scorer]:
        """Train what each method needs; a scorer for each, in order."""
        special = {"oe-noise": self._oe_noise, "dn2": self._dn2, "mscl": self._mscl}
        special |= {"multi-class": self._multi_class, "fake-it": self._fake_it, "distance": self._distance}
        special |= {method: partial(self._exposed, method) for method in EXPOSED}
        return [special[method]() if method in special else self._posthoc(method) for method in methods]

    @cached_property
    def _train(self) -> Labelled:
        kept = ~self.run.heldout
        return Labelled(self.run.train.images[kept], self.run.labels.labels[kept])

    @cached_property
    def _reference(self) -> ThreeHeadNet:
        return place(load_network(self.run.folder / "reference" / "reference.safetensors"), self.device)

    @cached_property
    def _reference_features(self) -> torch.Tensor:
        return self._features(self._reference.backbone, self._train.images)

    def _features(self, backbone: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        return extract(backbone, images, device=self.device)

    def _posthoc(self, method: str) -> Scorer:
        assert method in POSTHOC

        def score(sets: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
            head, train = self._reference.g_in, (self._reference_features, self._train.labels)
            queries = [self._features(self._reference.backbone, one) for one in sets]
            return {method: posthoc_scores(method, train, head.weight, head.bias, queries)}

        return score

    def _distance(self) -> Scorer:
        """Our distance term on the reference network: what the outliers add is the difference to `sdood-distance`."""
        scoring = self.run.config.scoring
        prepare = (lambda values: F.normalize(values, dim=1)) if scoring.normalise else (lambda values: values)

        def score(sets: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
            bank, features = Bank(prepare(self._reference_features)), partial(self._features, self._reference.backbone)
            return {"distance": [bank.nearest(prepare(features(one)), scoring.k_distance)[0].sum(dim=1) for one in sets]}

        return score

    def _oe_noise(self) -> Scorer:
        images = self._train.images
        noise = uniform_noise(len(images), images.shape[-1], self.run.seed("noise"))
        outliers = Labelled(noise, torch.zeros(len(noise), dtype=torch.int64))
        return self._exposure("oe-noise", self._network("oe-noise", self.run.detector, outliers, outlier_exposure_loss))

    def _exposed(self, method: str) -> Scorer:
        """Trained on the detector's own batches, controls among them: the loss is the only difference."""
        own = Comparators(self.run, self.run.folder / "exposed")
        outliers, controls = (read_outliers(self.run, name, ~self.run.heldout) for name in ("outliers", "controls"))
        return self._exposure(method, own._network(method, self.run.detector, outliers, EXPOSED[method], controls))

    def _exposure(self, method: str, network: ThreeHeadNet) -> Scorer:
        def scores(images: torch.Tensor) -> torch.Tensor:
            features = self._features(network.backbone, images)
            with evaluating(network):
                heads = Heads(features, network.g_bin(features), network.g_in(features), network.g_out(features))
                return exposed_scores(method, heads)

        return lambda sets: {method: [scores(one) for one in sets]}

    def _dn2(self) -> Scorer:
        return self._knn("dn2", place(self._backbone(self._pretrained), self.device))

    def _mscl(self) -> Scorer:
        config, path = self.run.config, self.folder / "mscl" / "backbone.safetensors"
        own = {name: getattr(config.compare, name) for name in ("mscl_lr", "mscl_angular")}
        key = self._key({**own, "detector": self._settings(config.detector, self._pretrained)}, self._train.images)
        kept = _is_kept(path, key)
        backbone = self._backbone(None if kept else self._pretrained)
        if kept:
            backbone.load_state_dict(read_tensors(path))  # of the detector's input size, not of the model's own
        else:
            backbone.freeze(config.detector.frozen_blocks)
            backbone, history = train_mscl(
                self._train.images,
                backbone,
                config.compare,
                self._job("mscl", key),
                epochs=config.detector.epochs,
                augmentation=config.clustering.augmentation,
            )
            self._keep(path, key, lambda: write_tensors(path, backbone.state_dict()), history)
        scorer = self._knn("mscl", place(backbone, self.device))
        return lambda sets: {"mscl": scorer(sets)["mscl-cosine"]}

    def _multi_class(self) -> Scorer:
        config = self.run.config
        network = self._network("multi-class", fine_tuning(config.detector, self._pretrained, config.compare), None, None)
        return self._knn("multi-class", network.backbone)

    def _fake_it(self) -> Scorer:
        config, fakes = self.run.config, self._fakes()
        outliers = Labelled(fakes, torch.zeros(len(fakes), dtype=torch.int64))
        network = self._network("fake-it", binary(config.detector, self._pretrained, config.compare), outliers, fake_it_loss)
        return self._knn("fake-it", network.backbone)

    def _backbone(self, weights: str | None) -> Backbone:
        own = self.run.config.detector
        return load_backbone(own.backbone, weights, pooling=own.pooling, input_size=own.input_size)

    def _knn(self, name: str, backbone: Backbone) -> Scorer:
        """Two rows: the papers' score and, named -cosine, the same on features of unit length."""

        def score(sets: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
            bank = self._features(backbone, self._train.images)  # of no use to a stage that trains and scores nothing
            features = [self._features(backbone, one) for one in sets]
            return {
                f"{name}{ending}": [knn_score(bank, one, unit_length=bool(ending)) for one in features]
                for ending in ("", "-cosine")
            }

        return score

    @cached_property
    def _pretrained(self) -> str:
        """Weights that fine-tuning and frozen features start from.

        The detector's own unless they are random, else those the clustering ended with where its backbone is the same,
        else SimCLR as the clustering would train it.
        """
        weights = self.run.detector.weights
        if found := self.run.clustered_weights if weights == RANDOM else weights:
            return found
        path = self.folder / "pretext" / "pretext.safetensors"
        config = dataclasses.replace(self.run.config.clustering, backbone=self.run.config.detector.backbone)
        key = self._key(key_dict(config), self.run.train.images)
        if not _is_kept(path, key):
            model, history = train_simclr(self.run.train.images, config, self._job("pretext", key))
            self._keep(path, key, lambda: write_tensors(path, model.state_dict()), history)
        return str(path)

    def _network(
        self,
        name: str,
        config: DetectorConfig,
        outliers: Labelled | None,
        loss: Loss | None,
        controls: Labelled | None = None,
    ) -> ThreeHeadNet:
        path = self.folder / name / "network.safetensors"
        tensors = [values for part in (self._train, outliers, controls) for values in part or ()]
        key = self._key(self._settings(config, config.weights), *tensors)
        if _is_kept(path, key):
            return place(load_network(path), self.device)
        network, history = train_detector(
            self._train,
            outliers,
            controls,
            config,
            self._job(name, key),
            classes=self.run.labels.classes,
            name=name,
            loss=loss,
        )
        self._keep(path, key, lambda: save_network(path, network), history)
        return network

    def _fakes(self) -> torch.Tensor:
        """As many fakes as training images, uint8, and how far they are from those."""
        path, config = self.folder / "fake-it" / "fakes.safetensors", self.run.config
        diffusion, steps = unconditional(config.diffusion), stop_after(config.diffusion, config.compare)
        images, nothing = self._train.images, torch.zeros(len(self._train.images), dtype=torch.int64)
        key = self._key({**key_dict(diffusion), "stop after": steps}, images)
        if _is_kept(path, key):
            return read_tensors(path)["images"]
        unet, history = train_diffusion(
            images, nothing, diffusion, self._job("fake-it-diffusion", key), classes=1, stop_after=steps
        )
        fakes = sample_fakes(
            as_denoiser(unet, self.run.precision),
            len(images),
            images.shape[-1],
            diffusion,
            seed=self.run.seed("fakes"),
            device=self.device,
        )
        self._keep(path, key, lambda: self._write_fakes(path, fakes, steps), history)
        return fakes

    def _write_fakes(self, path: Path, fakes: torch.Tensor, steps: int) -> None:
        """The fakes and, beside them, how far they and pure noise are from the training images."""
        real, backbone = self._reference_features, self._reference.backbone
        noise = uniform_noise(len(fakes), fakes.shape[-1], self.run.seed("noise"))
        found = {
            name: distances(self._features(backbone, images), real, "reference network", InspectionConfig())
            for name, images in (("fakes", fakes), ("noise", noise))
        }
        write_json(path.with_name("fakes.json"), {"steps": steps, "count": len(fakes), **found})
        write_tensors(path, {"images": fakes})

    def _settings(self, config: DetectorConfig, weights: Path | str | None) -> dict[str, Any]:
        """A detector's settings, its weights by what they are and not by where they lie."""
        by_content = weights
        if file := weights_file(weights):
            made_of = file.with_suffix(".key")
            by_content = made_of.read_text() if made_of.exists() else file_hash(file)
        return {**key_dict(config), "weights": by_content}

    def _key(self, settings: dict[str, Any], *tensors: torch.Tensor) -> str:
        """Hash of all that a training depends on."""
        seed = self.run.config.seed
        return value_hash([__version__, seed, settings, self.run.config.clustering.augmentation, *map(tensor_hash, tensors)])

    def _job(self, name: str, key: str) -> Job:
        return self.run.job(self.folder / name, key, name)

    def _keep(self, path: Path, key: str, write: Callable[[], None], history: dict[str, list[float]]) -> None:
        """Write what was trained, its key last: that says that it is done."""
        if self.run.is_main:
            write_curves(path.with_name(f"{path.stem}-loss.csv"), history)
            write()
            write_text(path.with_suffix(".key"), key)
            for checkpoint in path.parent.parent.glob(f"{path.parent.name}*/checkpoint.pt"):
                checkpoint.unlink()
        self.run.accelerator.wait_for_everyone()


def _is_kept(path: Path, key: str) -> bool:
    """Whether a file is there, whole and made of what the key says."""
    mark = path.with_suffix(".key")
    return path.exists() and mark.exists() and mark.read_text() == key
