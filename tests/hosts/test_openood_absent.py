"""OpenOOD's evaluator where some of its data sets are not there, or only their lists are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdood_plugin.detector.network import ThreeHeadNet
from sdood_plugin.errors import UsageError
from sdood_plugin.features import Backbone

pytestmark = pytest.mark.filterwarnings("ignore")  # the host's warnings are not ours to mend

THERE = {"train_cifar10": 12, "val_cifar10": 6, "test_cifar10": 6, "val_tin": 6, "test_cifar100": 6, "test_tin": 6}


def add_set(root: Path, name: str, count: int, label: int | None) -> None:
    """Images of one list below images_classic, and the list; None is ID labels."""
    folder = root / "images_classic" / name
    folder.mkdir(parents=True)
    random = np.random.default_rng(len(name))
    for row in range(count):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{row}.png")
    add_list(root, name, [f"{name}/{row}.png {row % 10 if label is None else label}" for row in range(count)])


def add_list(root: Path, name: str, lines: list[str]) -> None:
    path = root / "benchmark_imglist" / "cifar10" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def root(host, tmp_path) -> Path:
    """CIFAR-10's ID and near sets, a few images each."""
    for name, count in THERE.items():
        add_set(tmp_path, name, count, None if name.endswith("cifar10") else -1)
    return tmp_path


@pytest.fixture(scope="module")
def net(host):
    from sdood_plugin.hosts.openood import SDOODNet

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SDOODNet(ThreeHeadNet(Backbone("small_cnn"), 10), "cifar10").eval()


def made(net, root: Path, **changed):
    from sdood_plugin.hosts.openood import Evaluator, SDOODPostprocessor

    settings = {"data_root": root, "batch_size": 6, "num_workers": 0, "skip_absent": True}
    return Evaluator(net, "cifar10", postprocessor=SDOODPostprocessor(), **(settings | changed))


def test_a_set_that_is_only_a_list_is_absent(net, root, caplog):
    add_list(root, "test_places365", ["places365/1.jpg -1", "places365/2.jpg -1"])
    table = made(net, root).eval_ood(progress=False)
    assert list(table.index) == ["cifar100", "tin", "nearood", "farood"]
    assert "mnist, svhn, texture, places365" in caplog.text
    with pytest.raises(UsageError, match="no mnist, svhn, texture, places365 under"):
        made(net, root, skip_absent=False)


def test_absent_covariate_shifted_sets_are_said_and_refused(net, root, caplog):
    add_list(root, "test_cifar10c", ["cifar10c/1.png 3"])
    evaluator = made(net, root)
    assert "places365, cifar10c" in caplog.text
    for ask in (lambda: evaluator.eval_acc("csid"), lambda: evaluator.eval_ood(fsood=True, progress=False)):
        with pytest.raises(UsageError, match="covariate-shifted sets of cifar10: got none .* at least one of cifar10c"):
            ask()


def test_covariate_shifted_sets_that_are_there_are_checked_and_used(net, root, caplog):
    add_set(root, "test_cifar10c", 6, None)
    evaluator = made(net, root)
    assert "cifar10c" not in caplog.text
    assert len(evaluator.eval_ood(fsood=True, progress=False)) == 4
    assert evaluator.eval_acc("csid") == evaluator.metrics["fsood"].loc["cifar100", "ACC"]
    add_list(root, "test_cifar10c", ["test_cifar10c/1.png 10"])
    with pytest.raises(UsageError, match="got label 10; expected at most 9"):
        made(net, root)


def test_arguments_may_be_positional_as_the_hosts(net, root, configs):
    from sdood_plugin.hosts.openood import Evaluator

    evaluator = Evaluator(net, "cifar10", str(root), str(configs), None, "msp", None, 6, False, 0, skip_absent=True)
    assert evaluator.dataloader_dict["id"]["test"].batch_size == 6
    assert type(evaluator.postprocessor).__name__ == "BasePostprocessor"


def test_a_download_comes_before_the_data_is_looked_at(net, root, monkeypatch):
    from openood.evaluation_api import datasets

    asked = []

    def download(data_root, id_name):
        asked.append((data_root, id_name))
        for name in ("mnist", "svhn", "texture", "places365"):
            add_set(root, f"test_{name}", 3, -1)

    monkeypatch.setattr(datasets, "data_setup", download)
    evaluator = made(net, root, download=True, skip_absent=False)
    assert asked == [(str(root), "cifar10")]
    assert list(evaluator.dataloader_dict["ood"]["far"]) == ["mnist", "svhn", "texture", "places365"]
