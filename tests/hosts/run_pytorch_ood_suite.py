"""Run pytorch-ood's own tests over our components; started by test_pytorch_ood_suite.py in a process of its own.

    cd CHECKOUT && python run_pytorch_ood_suite.py     # prints one JSON line: outcomes, subtests about ours, detectors built

The tests come from the checkout, the code they test is the installed package: `src.pytorch_ood`, as the tests call it,
is made a second name for it. Two ways to bring ours in: where a suite walks a list of components ours is appended to
the list, where a test file is about one detector that takes an encoder alone that detector's name is set to ours. The
suite's device tests want CUDA; where there is none they run here with the CPU as the device to move to.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
import types
import unittest
from collections import Counter
from pathlib import Path
from unittest import mock

import pytorch_ood
import torch

from sdood_plugin.detector.network import Heads
from sdood_plugin.hosts.pytorch_ood import SDOOD, SDOutliers, ThreeHeadLoss, register

# test file -> name that stands for our detector there, test methods; those left out check one detector's own numbers
STAND_IN = {
    "tests.detectors.test_knn": ("KNN", {"test_requires_fitting", "test_input"}),
    "tests.detectors.test_mahalanobis": ("Mahalanobis", {"test_something", "test_nofit"}),
    "tests.detectors.test_gmm": ("GMM", {"test_fit_predict", "test_fit_predict_features", "test_nofit", "test_no_model"}),
    "tests.detectors.test_detector_taxonomy": ("KNN", {"test_feature_detectors_inherit_features_base"}),
}


def installed_as_src() -> None:
    """Let `src.pytorch_ood...` be the installed modules, not second copies of them."""
    for name in "api benchmark dataset.audio dataset.img dataset.txt detector loss metrics model utils".split():
        importlib.import_module(f"pytorch_ood.{name}")
    sys.modules["src"] = types.ModuleType("src")
    sys.modules["src"].pytorch_ood = pytorch_ood
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "pytorch_ood":
            sys.modules[f"src.{name}"] = module


def three_heads(shape: tuple[int, ...], classes: int, features: int) -> Heads:
    return Heads(*(torch.randn(shape[0], width) for width in (features, 2, classes, classes)))


def smoke(module: types.ModuleType) -> None:
    """The smoke suite with ours in the registry."""
    case = module.TestAllDetectorsSmoke
    theirs = case._classification_detector_registry

    def registry(self):
        return [*theirs(self), ("SDOOD", lambda: SDOOD(module.ClassificationModel().eval().features))]

    case._classification_detector_registry = registry


def devices(module: types.ModuleType) -> None:
    """The registry of feature detectors with ours; cuda:0 where there is one, else the CPU."""
    case = module.TestDetectorDeviceHandling
    theirs, prepare = case._classification_fit_and_predict_features_registry, case.setUp

    def on_this_machine(self):
        prepare(self)
        if not torch.cuda.is_available():
            self.device = torch.device("cpu")

    ours = ("SDOOD", lambda: SDOOD(module.ClassificationModel().features))
    case._classification_fit_and_predict_features_registry = staticmethod(lambda: [*theirs(), ours])
    case.setUp, case.__unittest_skip__ = on_this_machine, False


def benchmark(module: types.ModuleType) -> None:
    """The host's benchmark encodes a data set once for all detectors of features; ours in the place of the test's own."""
    train = torch.randn(24, 2, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3 - 1
    module.SummedFeaturesDetector = lambda encoder: SDOOD(encoder, k_distance=1, k_vote=1).fit_features(*train)


def info(module: types.ModuleType) -> None:
    module.DETECTORS.append(SDOOD)
    module.LOSSES.append(ThreeHeadLoss)
    module.DATASETS.append(SDOutliers)
    module.LOSS_INPUTS[ThreeHeadLoss] = lambda shape: (
        ThreeHeadLoss(),
        (three_heads(shape, module.C, module.D), module._targets(shape)),
    )


def hpo(module: types.ModuleType) -> None:
    """The test tunes `k`; the same of ours is called k_distance."""
    module.KNN = lambda encoder: SDOOD(encoder)
    space = SDOOD.hyperparameter_space
    SDOOD.hyperparameter_space = {**space, "k": space["k_distance"]}
    SDOOD.k = property(lambda self: self.k_distance, lambda self, value: setattr(self, "k_distance", value))


def cases() -> list[unittest.TestCase]:
    """Every test of the checkout that can be about ours."""
    loader, chosen = unittest.TestLoader(), []

    def add(name: str, change=None, keep=None) -> None:
        if not Path(*name.split(".")).with_suffix(".py").exists():
            return
        module = importlib.import_module(name)
        if change is not None:
            change(module)
        for suite in loader.loadTestsFromModule(module):
            chosen.extend(case for case in suite if keep is None or keep(case))

    for name, (detector, methods) in STAND_IN.items():
        add(
            name,
            lambda module, detector=detector: setattr(module, detector, SDOOD),
            lambda case, methods=methods: case._testMethodName in methods,
        )
    add("tests.detectors.test_all_detectors_smoke", smoke, lambda case: "classification" in case._testMethodName)
    add("tests.detectors.test_device_handling", devices, lambda case: "test_feature_fit" in case._testMethodName)
    add("tests.test_benchmark", benchmark, lambda case: "reuses_feature_cache" in case._testMethodName)
    add("tests.detectors.test_signatures")
    add("tests.test_info", info, lambda case: type(case).__name__ in ("TestInfoRecords", "TestDetectorTasks", "TestLossTasks"))
    add("tests.test_hpo", hpo, lambda case: type(case).__name__ == "TestGridSearchKNN")
    return chosen


class Outcomes(unittest.TestResult):
    """Outcome by test, subtests of ours listed apart; a subtest that fails over a component of the host is the host's."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: dict[str, str] = {}
        self.ours: list[str] = []
        self.theirs: list[str] = []  # failures over the host's own components
        self.built: Counter[str] = Counter()  # detectors of ours, by test
        self.current = ""

    def startTest(self, test):
        super().startTest(test)
        self.current = test.id()

    def addSuccess(self, test):
        self.outcomes.setdefault(test.id(), "passed")

    def addSkip(self, test, reason):
        self.outcomes[test.id()] = f"skipped: {reason}"

    def addFailure(self, test, err):
        self.outcomes[test.id()] = self._exc_info_to_string(err, test)[-2000:]

    addError = addFailure

    def addSubTest(self, test, subtest, err):
        about_ours = any(ours in str(subtest) for ours in ("SDOOD", "ThreeHeadLoss", "SDOutliers"))
        if about_ours:
            self.ours.append(f"{test._testMethodName}: {subtest._subDescription()}")
        if err is not None and about_ours:
            self.addFailure(test, err)
        elif err is not None:
            self.theirs.append(f"{test._testMethodName}: {subtest._subDescription()}")
            self.outcomes.setdefault(test.id(), "passed")


def main() -> None:
    sys.path.insert(0, ".")
    installed_as_src()
    register()
    result = Outcomes()
    build = SDOOD.__init__

    def counted(self, *args, **kwargs):
        result.built[result.current] += 1
        build(self, *args, **kwargs)

    spy = mock.patch.object(SDOOD, "__init__", counted)
    with contextlib.redirect_stdout(io.StringIO()), spy:
        unittest.TestSuite(cases()).run(result)
    print(json.dumps({name: getattr(result, name) for name in ("outcomes", "ours", "theirs", "built")}))


if __name__ == "__main__":
    main()
