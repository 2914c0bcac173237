"""pytorch-ood's benchmarks over images on disk, the benchmark script, and the example of the README."""

# ruff: noqa: F401, F811 (a fixture that several files share)

from __future__ import annotations

import inspect
import json
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import pytorch_ood.detector
import torch
from pytorch_ood.api import Detector
from pytorch_ood.benchmark import CIFAR10_ODIN, CIFAR100_ODIN, CIFAR10_OpenOOD, CIFAR100_OpenOOD, ImageNet200_OpenOOD
from pytorch_ood.detector import KNN, Mahalanobis, MaxSoftmax
from torch import nn
from torch.utils.data import DataLoader

from benchmarks import pytorch_ood_cifar10, pytorch_ood_detectors, record
from sdood_plugin.data.images import save_png
from sdood_plugin.data.sources import load_images
from sdood_plugin.errors import RunError, UsageError
from sdood_plugin.features import load_backbone
from sdood_plugin.hosts.pytorch_ood import SDOOD, network_input
from sdood_plugin.hosts.pytorch_ood.benchmarks import limit, odin_benchmark, openood_benchmark

from ..test_run import tiny_config
from .readme import script
from .samples_pytorch_ood import run_folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a test tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write_images(folder: Path, names: list[str], mean: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise = torch.randint(-60, 60, (3, 32, 32), generator=generator)
        save_png(folder / name, (mean + noise).clamp(0, 255).to(torch.uint8))


@pytest.fixture
def data_root(tmp_path) -> Path:
    """OpenOOD's tree with CIFAR-10, CIFAR-100 and half of SVHN."""
    lists = tmp_path / "benchmark_imglist" / "cifar10"
    lists.mkdir(parents=True)
    parts = {
        "train_cifar10": [f"cifar10/train/class{i % 3}/{i}.png" for i in range(72)],
        "test_cifar10": [f"cifar10/test/class{i % 3}/{i}.png" for i in range(12)],
        "val_cifar10": [f"cifar10/test/class{i % 3}/{i}.png" for i in range(3)],
        "test_cifar100": [f"cifar100/test/{i}.png" for i in range(10)],
        "test_svhn": [f"svhn/test/{i}.png" for i in range(10)],
        "val_tin": ["tin/val/0.png"],
    }
    for seed, (name, files) in enumerate(parts.items()):
        known = name.endswith("cifar10")
        lines = [f"{file} {int(file.split('class')[1][0]) if known else -1}" for file in files]
        (lists / f"{name}.txt").write_text("\n".join(lines) + "\n")
        if name not in ("val_tin", "val_cifar10"):
            write_images(tmp_path / "images_classic", files[: 5 if "svhn" in name else None], 90 if known else 190, seed)
    return tmp_path


def flat(images: torch.Tensor) -> torch.Tensor:
    """An encoder: 4 x 4 averages."""
    return nn.functional.avg_pool2d(images, 8).flatten(1)


def test_openood_runs_with_what_is_there_and_names_the_rest(data_root):
    hub = torch.hub.get_dir()
    benchmark, absent = openood_benchmark(data_root, network_input)
    assert torch.hub.get_dir() == hub and isinstance(benchmark, CIFAR10_OpenOOD)
    assert benchmark.ood_names == ["CIFAR100"]
    assert absent == {
        "TinyImageNet": "no test_tin.txt",
        "MNIST": "no test_mnist.txt",
        "Textures": "no test_texture.txt",
        "Places365": "no test_places365.txt",
        "SVHN": "5 of 10 images absent, the first is svhn/test/5.png",
        "validation OOD": "1 of 1 images absent, the first is tin/val/0.png",
    }
    train = DataLoader(benchmark.train_set(), batch_size=16)
    ours = SDOOD(flat).fit(train)
    rows = benchmark.evaluate([ours, KNN(flat, k=5).fit(train), Mahalanobis(flat).fit(train)], loader_kwargs={"batch_size": 8})
    assert [(row["Detector"], row["Dataset"]) for row in rows] == [(name, "CIFAR100") for name in ("SDOOD", "KNN", "Mahalanobis")]
    assert rows[0]["AUROC"] > 0.9  # the sets differ in brightness
    alone = benchmark.evaluate(ours, loader_kwargs={"batch_size": 3})
    assert alone[0]["AUROC"] == pytest.approx(rows[0]["AUROC"])


def test_the_validation_set_is_checked_too(data_root):
    write_images(data_root / "images_classic", ["tin/val/0.png"], 190, seed=9)
    benchmark, absent = openood_benchmark(data_root, network_input)
    assert "validation OOD" not in absent
    assert [target for _, target in benchmark.validation_set()] == [0, 1, 2, -1]
    (data_root / "benchmark_imglist" / "cifar10" / "val_cifar10.txt").write_text("cifar10/val/0.png 1\n")
    with pytest.raises(RunError, match="val_cifar10.txt: got 1 of 1 images absent, the first is cifar10/val/0.png"):
        openood_benchmark(data_root, network_input)


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("train_cifar10", "cifar10/train/class0/0.png 12", "got label 12; expected at most 9"),
        ("train_cifar10", "cifar10/train/class0/0.png -5", "got label -5; expected at most 9, and not below 0"),
        ("val_cifar10", "cifar10/test/class0/0.png cat", "got 'cifar10/test/class0/0.png cat'; expected `relative/path label`"),
        ("val_cifar10", "cifar10/test/class0/0.png", "got 'cifar10/test/class0/0.png'; expected `relative/path label`"),
        ("test_cifar10", "cifar10/test/my cat.png 1", "got 'cifar10/test/my cat.png'; expected a relative path without spaces"),
        ("test_cifar10", "/etc/hostname 1", "got '/etc/hostname'; expected a relative path"),
        ("test_cifar100", "cifar100/test/0.png 3", "got label 3; expected one below 0"),
        ("val_tin", "tin/val/0.png 0", "got label 0; expected one below 0"),
    ],
)
def test_a_line_that_the_host_would_misread_is_one_clear_line(data_root, file, line, expected):
    path = data_root / "benchmark_imglist" / "cifar10" / f"{file}.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, line]) + "\n")
    with pytest.raises(UsageError) as caught:
        openood_benchmark(data_root, network_input)
    assert f"imglist {path} line {len(lines) + 1}: {expected}" in str(caught.value) and "\n" not in str(caught.value)


def test_openood_of_cifar100_has_its_own_lists_and_classes(data_root):
    lists = data_root / "benchmark_imglist"
    (lists / "cifar100").mkdir()
    write_images(data_root / "images_classic", [f"cifar100/train/{i}.png" for i in range(6)], 90, seed=7)
    rows = {
        "train_cifar100": [f"cifar100/train/{i}.png {99 - i}" for i in range(6)],
        "val_cifar100": ["cifar100/test/0.png 99"],
        "test_cifar100": [f"cifar100/test/{i}.png {i}" for i in range(1, 4)],
        "test_cifar10": [f"cifar10/test/class{i % 3}/{i}.png -1" for i in range(12)],
        "val_tin": ["tin/val/0.png -1"],
    }
    for name, lines in rows.items():
        (lists / "cifar100" / f"{name}.txt").write_text("\n".join(["# as the host allows", *lines]) + "\n")
    benchmark, absent = openood_benchmark(data_root, network_input, CIFAR100_OpenOOD)
    assert isinstance(benchmark, CIFAR100_OpenOOD) and benchmark.ood_names == ["CIFAR10"]
    assert set(absent) == {"TinyImageNet", "MNIST", "SVHN", "Textures", "Places365", "validation OOD"}
    assert benchmark.train_set().labels == [99, 98, 97, 96, 95, 94]
    assert [[target for _, target in part] for part in benchmark.test_sets()] == [[1, 2, 3, *[-1] * 12]]
    (lists / "cifar100" / "val_cifar100.txt").write_text("cifar100/test/0.png 100\n")
    with pytest.raises(UsageError, match="got label 100; expected at most 99"):
        openood_benchmark(data_root, network_input, CIFAR100_OpenOOD)


def test_another_kind_of_benchmark_is_one_clear_line(data_root):
    with pytest.raises(UsageError, match="kind: got .*ImageNet200_OpenOOD.*; expected CIFAR10_OpenOOD or CIFAR100_OpenOOD"):
        openood_benchmark(data_root, network_input, ImageNet200_OpenOOD)
    for kind in (ImageNet200_OpenOOD, "cifar10"):
        with pytest.raises(UsageError, match="kind: got .*; expected CIFAR10_ODIN or CIFAR100_ODIN"):
            odin_benchmark(data_root, network_input, kind)


def test_odin_of_cifar100_has_its_own_images(data_root):
    for part, count in (("train", 20), ("test", 8)):
        names = [f"cifar100/{part}/class{i % 2}/{i}.png" for i in range(count)]
        write_images(data_root / "cifar" / "images_classic", names, 90, seed=count)
    benchmark, absent = odin_benchmark(data_root / "cifar", network_input, CIFAR100_ODIN)
    assert isinstance(benchmark, CIFAR100_ODIN) and len(absent) == 4
    assert [len(part) for part in (benchmark.train_set(), *benchmark.test_sets(unknown=False))] == [20, 8]
    assert [len(part) for part in benchmark.test_sets()] == [1008, 1008]
    with pytest.raises(RunError, match="CIFAR10 train: got neither cifar-10-batches-py nor images_classic/cifar10/train"):
        odin_benchmark(data_root / "cifar", network_input)


def test_odin_runs_without_its_archives_and_names_them(data_root):
    benchmark, absent = odin_benchmark(data_root, network_input)
    assert isinstance(benchmark, CIFAR10_ODIN) and benchmark.ood_names == ["UniformNoise", "GaussianNoise"]
    assert set(absent) == {"TinyImageNetCrop", "TinyImageNetResize", "LSUNResize", "LSUNCrop"}
    assert "LSUN.tar.gz" in absent["LSUNCrop"]
    limit(benchmark, test=6, train=60)
    assert [len(part) for part in (benchmark.train_set(), benchmark.test_in, *benchmark.test_oods)] == [60, 6, 6, 6]
    detector = SDOOD(flat).fit(DataLoader(benchmark.train_set(), batch_size=16))
    logits = MaxSoftmax(nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 3)))
    rows = benchmark.evaluate([detector, logits], loader_kwargs={"batch_size": 4})
    assert len(rows) == 4 and all(0 <= row["AUROC"] <= 1 for row in rows)


def test_data_without_cifar10_or_without_any_ood_set_is_one_clear_line(data_root, tmp_path_factory):
    for build in (openood_benchmark, odin_benchmark):
        with pytest.raises(RunError) as caught:
            build(tmp_path_factory.mktemp("empty"), network_input)
        assert "\n" not in str(caught.value)
    (data_root / "images_classic" / "cifar100" / "test" / "3.png").unlink()
    with pytest.raises(RunError, match="got none; expected one of CIFAR100, TinyImageNet"):
        openood_benchmark(data_root, network_input)
    (data_root / "images_classic" / "cifar10" / "train" / "class0" / "3.png").unlink()
    with pytest.raises(RunError, match="1 of 72 images absent, the first is cifar10/train/class0/3.png"):
        openood_benchmark(data_root, network_input)


@pytest.mark.filterwarnings("ignore:AUTC is undefined")  # the host's, of a random backbone's constant logits
def test_the_script_names_every_detector_of_the_host_beside_ours(data_root, run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pytorch_ood_cifar10, "write_result", partial(record.write_result, folder=tmp_path))
    options = [str(data_root), "--backbone", "small_cnn", "--outliers", str(run_folder / "outliers"), "--limit", "8"]
    monkeypatch.setattr(sys, "argv", ["benchmarks/pytorch_ood_cifar10.py", *options])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_rng_state()
    pytorch_ood_cifar10.main()
    assert torch.get_rng_state().equal(before)
    written = json.loads((tmp_path / "pytorch_ood_cifar10.json").read_text())
    assert written["command"] == f"python -m benchmarks.pytorch_ood_cifar10 {' '.join(options)}"
    assert {"config_sha256", "device", "versions", "wall_s"} <= set(written) and written["seeds"] == [0]
    assert written["data"] == {"train": 72, "outliers": 24, "CIFAR10": 8, "CIFAR100": 8, "UniformNoise": 8, "GaussianNoise": 8}
    ran = [row for row in written["rows"] if "skipped" not in row]
    skipped = {row["method"]: row["skipped"] for row in written["rows"] if "skipped" in row and "method" in row}
    classes = [value for value in vars(pytorch_ood.detector).values() if inspect.isclass(value) and issubclass(value, Detector)]
    theirs = {value.__name__ for value in classes if value.__module__.startswith("pytorch_ood.")}
    assert len(theirs) >= 35
    assert {row["method"] for row in ran} | set(skipped) == theirs | {"sdood", "sdood-distance"}
    assert set(skipped) == {"MCM", "SHE"} and "text embeddings" in skipped["MCM"]
    assert "No correct predictions" in skipped["SHE"]  # the classes look alike here; the next test has it run
    sets = ["CIFAR100 (8 of 9000)", "UniformNoise (8 of 1000)", "GaussianNoise (8 of 1000)"]
    for method in theirs - set(skipped) | {"sdood", "sdood-distance"}:
        assert [row["ood"] for row in ran if row["method"] == method] == sets
    names = ("auroc", "aupr", "aupr_id", "fpr95", "fpr95_ood_positive")
    assert all(0 <= row[name] <= 100 and row["seed"] == 0 for row in ran for name in names)
    absent = {(row["benchmark"], row["ood"]): row["skipped"] for row in written["rows"] if "method" not in row}
    assert absent["CIFAR10_OpenOOD", "Places365"] == "no test_places365.txt" and ("CIFAR10_ODIN", "LSUNCrop") in absent
    said = capsys.readouterr().out
    assert "| sdood-distance |" in said and "- Places365: no test_places365.txt" in said and "- MCM: needs text" in said


def test_the_script_scores_as_the_host_does_with_the_detector_itself(data_root):
    """The script has every image scored once; the host would score the ID images again for every OOD set."""
    settings = pytorch_ood_cifar10.arguments([str(data_root), "--batch-size", "5"])
    benchmark, _ = odin_benchmark(data_root, network_input)
    limit(benchmark, test=8, train=None)
    detector = KNN(flat, k=5).fit(DataLoader(benchmark.train_set(), batch_size=16))
    direct = benchmark.evaluate(detector, loader_kwargs={"batch_size": 8})
    parts = [pytorch_ood_cifar10.Encoded(part, None, None) for part in (benchmark.test_in, *benchmark.test_oods)]
    recipe = pytorch_ood_detectors.Recipe("images", lambda: detector)
    rows = pytorch_ood_cifar10.rows("KNN", recipe, {"CIFAR10_ODIN": (benchmark, parts)}, settings)
    assert [row["auroc"] for row in rows] == pytest.approx([100 * row["AUROC"] for row in direct])
    assert [row["fpr95_ood_positive"] for row in rows] == pytest.approx([100 * row["FPR95TPR"] for row in direct])


def test_a_detector_that_fails_is_a_row_with_the_reason(data_root):
    settings = pytorch_ood_cifar10.arguments([str(data_root)])

    def broken():
        raise ValueError("no\nrank")

    assert pytorch_ood_cifar10.rows("GMM", pytorch_ood_detectors.Recipe("features", broken), {}, settings) == [
        {"method": "GMM", "skipped": "failed, ValueError: no rank"}
    ]


def test_detectors_without_maps_are_named_and_the_rest_tells_far_samples(tmp_path):
    """On two clear clusters; far away are samples that no cluster is near to, and whose logits are about zero."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    centres = torch.zeros(2, 128).index_put((torch.arange(2), torch.arange(2)), torch.tensor(8.0))
    near, far = (mean + 0.3 * torch.randn(200, 128, generator=generator) for mean in (centres[labels], torch.zeros(200, 128)))
    third = torch.full((20,), 2)  # logistic regression of two classes has one row of weights
    train = pytorch_ood_detectors.Train(torch.cat([near, -near[:20]]), None, torch.cat([labels, third]))
    found = pytorch_ood_detectors.recipes(load_backbone("small_cnn", None), train, "cpu", 64)
    reasons = {name: recipe for name, recipe in found.items() if isinstance(recipe, str)}
    assert reasons.pop("MCM") and reasons == dict.fromkeys(
        ("Gram", "MultiMahalanobis", "NACUE", "RankFeat"), pytorch_ood_detectors.UNSPLIT
    )
    for name in ("SHE", "KNN", "RMD", "MaxLogit", "EnergyBased", "TemperatureScaling", "WeightedEBO", "GradNorm", "PNML"):
        torch.manual_seed(0)
        detector = found[name].fitted()
        assert detector(far).median() > detector(near).median(), name


@pytest.mark.parametrize("name", ["small_cnn", "resnet18_cifar", "vit_tiny_patch16_224"])
def test_the_tail_of_a_backbone_makes_its_features(name):
    backbone = load_backbone(name, None).eval()
    tail = pytorch_ood_detectors.split(backbone)
    images = [(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(i)) * 2 - 1, i) for i in range(3)]
    settings = pytorch_ood_cifar10.arguments(["nowhere", "--batch-size", "2"])
    encoded = pytorch_ood_cifar10.encode(images, backbone, tail, settings)
    maps, targets = encoded.maps.tensors
    assert maps.dim() == 4 and targets.tolist() == [0, 1, 2]
    with torch.no_grad():
        after = tail.block(maps)
        torch.testing.assert_close(tail.pool(after), encoded.features.tensors[0], rtol=1e-4, atol=1e-4)
    assert after.dim() == 4 and not (maps.shape == after.shape and maps.equal(after))


def test_the_script_of_the_readme_runs(run_folder, tmp_path):
    config = tiny_config()
    for name, source in (("train", config.data.train), ("test", config.data.test), ("ood", config.data.ood[0].images)):
        images = load_images(source, config.data, config.seed).images
        for number, image in enumerate(images):
            save_png(tmp_path / name / "all" / f"{number}.png", image)
    code = script("pytorch-ood")
    folders = [tmp_path / name for name in ("train", "test", "ood")]
    left_out = "assert 'outliers of other classes' in own.score_.calibration.votes"  # alpha is chosen on those
    command = [sys.executable, "-c", f"{code}\n{left_out}", run_folder, *folders]
    done = subprocess.run(command, text=True, capture_output=True, check=True, timeout=200)
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["of the run", "fitted here"]
    assert all(0 <= float(line.split()[-1]) <= 1 for line in lines)
    assert len([line for line in code.splitlines() if line.strip()]) < 20
