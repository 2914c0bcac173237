"""pytorch-ood's own tests over our detector, loss and data set; the tests are taken from a checkout, never kept here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = os.environ.get("PYTORCH_OOD_ROOT")
HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(CHECKOUT is None, reason="PYTORCH_OOD_ROOT, a checkout of pytorch-ood with its tests, is not set")


@pytest.fixture(scope="module")
def result() -> dict:
    root = Path(CHECKOUT)
    if not (root / "tests" / "detectors").is_dir():
        pytest.fail(f"PYTORCH_OOD_ROOT: got {root} without tests/detectors; expected the root of a checkout of pytorch-ood")
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, HERE / "run_pytorch_ood_suite.py"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_host_tests_pass_over_ours(result):
    wrong = {test: outcome for test, outcome in result["outcomes"].items() if not outcome.startswith(("passed", "skipped"))}
    assert not wrong, "\n".join(f"{test}\n{outcome}" for test, outcome in wrong.items())
    assert sum(outcome == "passed" for outcome in result["outcomes"].values()) >= 3
    assert not result["theirs"], "the suite is of another version than the installed pytorch-ood"


def test_ours_was_what_they_ran(result):
    """A test that stands on ours must have built one, and what walks a list must have met ours there."""
    standing = [test for test, outcome in result["outcomes"].items() if outcome == "passed" and ".detectors." in test]
    classes_only = ("test_detector_taxonomy", "test_signatures")
    assert all(result["built"].get(test) for test in standing if not any(name in test for name in classes_only))
    expected = {
        "detectors/test_all_detectors_smoke.py": ["all_classification_detectors_smoke: (detector='SDOOD')"],
        "detectors/test_detector_taxonomy.py": ["inherit_features_base: (detector='SDOOD')"],
        "detectors/test_device_handling.py": ["for_cuda_detector: (detector='SDOOD')"],
        "detectors/test_signatures.py": ["(detector='SDOOD', method='predict_features')"],
        "test_info.py": ["smoke_tested: [SDOOD]", "test_detectors: [SDOOD]", "test_losses: [ThreeHeadLoss]"]
        + ["test_datasets: [SDOutliers]", "test_tasks: [ThreeHeadLoss, classification]"],
    }
    for file, subtests in expected.items():
        if (Path(CHECKOUT) / "tests" / file).exists():
            for subtest in subtests:
                assert any(line.endswith(subtest) for line in result["ours"]), (subtest, result["ours"])
