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


def test_ours_was_what_they_ran(result):
    assert result["built"] >= 2
    root = Path(CHECKOUT)
    if (root / "tests" / "detectors" / "test_all_detectors_smoke.py").exists():
        assert any("SDOOD" in line and "smoke" in line for line in result["ours"])
    if (root / "tests" / "test_info.py").exists():
        for name in ("SDOOD", "ThreeHeadLoss", "SDOutliers"):
            assert any(name in line for line in result["ours"]), result["ours"]
