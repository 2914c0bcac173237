"""Finding the host, saying what it lacks, and leaving the process as it was."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest

from sdood_plugin.errors import UsageError
from sdood_plugin.hosts.openood.yamls import FILES

from .openood_tree import REPOSITORY


def python(code: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "OPENOOD_ROOT"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, env={**environment, **variables}
    )


def test_importing_the_package_imports_no_host():
    code = """
import sys, sdood_plugin, sdood_plugin.hosts.openood, sdood_plugin.cli, sdood_plugin.run
print([name for name in sys.modules if name.split(".")[0] in ("openood", "imgaug", "libmr", "foolbox")])
"""
    assert python(code, OPENOOD_ROOT=os.environ.get("OPENOOD_ROOT", "")).stdout.strip() == "[]"


def test_without_a_host_the_doctors_line_is_the_error(tmp_path):
    code = """
import sdood_plugin.hosts.openood as openood
print(openood.doctor().splitlines()[0])
for name in ("Evaluator", "SDOODPostprocessor", "SDOODTrainer", "TrainSDOOD"):
    try:
        getattr(openood, name)
    except ValueError as error:
        print(error)
from sdood_plugin import cli
print(cli.main(["doctor"]))
from sdood_plugin.hosts.openood.__main__ import main
print(main(["--config", "a.yml"]))
"""
    for variables, expected in (
        ({}, "OPENOOD_ROOT is not set; git clone https"),
        ({"OPENOOD_ROOT": str(tmp_path)}, "holds no openood package"),
    ):
        told = python(code, **variables)
        assert told.returncode == 0, told.stderr
        first, *errors = told.stdout.splitlines()[:5]
        assert told.stdout.splitlines()[5] == first, "`sdood doctor` prints the same"
        done, status = told.stdout.splitlines()[-2:]
        line = first.removeprefix("OpenOOD: ")
        assert expected in line
        assert len(errors) == 4
        assert all(error.endswith(line) for error in [*errors, told.stderr.strip()])
        assert (done, status) == ("0", "2")


def test_missing_packages_are_named_with_the_pip_line(monkeypatch, tmp_path):
    from sdood_plugin.hosts.openood import host as module

    (tmp_path / "openood").mkdir()
    (tmp_path / "openood" / "__init__.py").touch()
    monkeypatch.setenv("OPENOOD_ROOT", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(module, "find_spec", lambda name: None if name in ("libmr", "cv2") else object())
    assert module.diagnosis() == (
        "openood is there, but not cv2, libmr; pip install opencv-python-headless && "
        "pip install Cython setuptools wheel && pip install --no-build-isolation libmr"
    )
    assert "libmr        MISSING   (needed by the host, not declared by it)" in module.doctor()
    with pytest.raises(UsageError, match="pip install --no-build-isolation libmr"):
        module.require_host()


def test_importing_the_host_leaves_the_process_as_it_was(host):
    code = """
import random, warnings
import numpy as np, torch
from PIL import ImageFile
import pandas, statsmodels, sympy, scipy.special, requests  # what the host imports and what adds filters of its own
def state():
    return (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), list(warnings.filters),
            np.get_printoptions(), sorted(vars(np)), ImageFile.LOAD_TRUNCATED_IMAGES, torch.backends.cudnn.benchmark)
before = state()
from sdood_plugin.hosts.openood import Evaluator, TrainSDOOD
from sdood_plugin.hosts.openood.device import on_device
print([a == b for a, b in zip(before, state())])
cuda, module = torch.Tensor.cuda, torch.nn.Module.cuda
with on_device("cpu"):
    value = torch.ones(2).cuda()
    layer = torch.nn.Linear(2, 2).cuda()
    made = [torch.zeros(1, device="cuda"), torch.cuda.FloatTensor([1.0])]
    made += [torch.ones(1).to(where) for where in ("cuda:0", torch.device("cuda"))]
print({t.device.type for t in (value, layer.weight, *made)}, torch.Tensor.cuda is cuda, torch.nn.Module.cuda is module)
"""
    done = python(code, OPENOOD_ROOT=os.environ["OPENOOD_ROOT"])
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().splitlines()[-2:]
    assert first == str([True] * 8), first
    assert second == "{'cpu'} True True"


def test_numpys_lost_name_is_there_only_inside_the_block():
    import numpy as np

    from sdood_plugin.hosts.openood.compat import importing_host

    before = "sctypes" in vars(np)
    with importing_host():
        assert {np.float32, np.float64} <= set(np.sctypes["float"])
    assert ("sctypes" in vars(np)) == before


def test_the_shipped_yamls_are_the_packages():
    folder = REPOSITORY / "configs" / "openood"
    assert {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.yml")} == FILES


def test_commands_fit_the_set_they_are_for(tmp_path):
    from sdood_plugin.hosts.openood.commands import command_lines

    folder = tmp_path / "it's a folder"
    small, large = (command_lines(folder, train, outliers, None).splitlines() for train, outliers in ((40, 30), (9000, 8000)))
    assert len(small) == len(large) == 10, "five jobs; none that scores with a detector"
    assert "--dataset.train.batch_size 20 --dataset.oe.batch_size 20" in small[5]
    assert "--dataset.train.batch_size 64 --dataset.oe.batch_size 64" in large[5]
    assert "--trainer.num_clusters 17 --network.num_clusters 17 --trainer.pca_dim 17" in small[9]
    assert "clusters" not in large[9]
    last = command_lines(folder, 40, 30, folder / "detector").splitlines()[-1]
    assert shlex.split(last)[-1] == str(folder / "detector" / "detector.safetensors")


def test_a_host_that_does_not_import_is_said_whatever_it_raises(monkeypatch, tmp_path):
    from sdood_plugin.hosts.openood import host as module

    (tmp_path / "openood").mkdir()
    (tmp_path / "openood" / "__init__.py").touch()
    monkeypatch.setenv("OPENOOD_ROOT", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(module, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / name / "__init__.py")))

    def broken(name):
        raise RuntimeError("operator torchvision::nms\ndoes not exist")

    monkeypatch.setattr(module, "import_module", broken)
    module._import_all.cache_clear()
    said = "RuntimeError: operator torchvision::nms does not exist"
    with pytest.raises(UsageError, match=f"OpenOOD: got {said}"):
        module.require_host()
    first, *lines = module.doctor().splitlines()
    assert first == f"OpenOOD: openood.evaluation_api does not import: {said}"
    assert f"openood.evaluation_api  FAILS: {said}" in lines
    assert lines[-1] == f"openood is {tmp_path / 'openood'}"
