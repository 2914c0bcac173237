"""OpenOOD's training with the real host: our pipeline, and its stock outlier trainers on an exported outlier set."""

from __future__ import annotations

import logging
import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from sdood_plugin.detector.network import Heads, ThreeHeadNet
from sdood_plugin.errors import UsageError
from sdood_plugin.features import Backbone
from sdood_plugin.scoring.score import fit_score
from sdood_plugin.scoring.storage import load_score

from .openood_tree import REPOSITORY, all_images
from .readme import script

pytestmark = pytest.mark.filterwarnings("ignore")  # the host's warnings are not ours to mend

SMALL = "--dataset.train.batch_size 12 --dataset.oe.batch_size 12 --optimizer.num_epochs 1 --num_workers 0"
RESNET = "networks/resnet18_32x32.yml"
STOCK = {  # what few images and one epoch need beside the exported command
    "OE": "",
    "MixOE": "",
    "MCD": "--trainer.start_epoch_ft 0",
    "UDG": "--trainer.num_clusters 4 --trainer.pca_dim 8 --network.num_clusters 4",
}


@pytest.fixture(scope="session")
def exported(run_folder, tmp_path_factory) -> Path:
    from sdood_plugin.hosts.openood import export_openood

    root = tmp_path_factory.mktemp("exported") / "data"
    export_openood(run_folder, root)
    return root


@pytest.fixture(scope="session")
def few(exported) -> Path:
    """The exported YAML with every list cut to 24 images: a ResNet-18 on a CPU is slow."""
    section = yaml.safe_load((exported / "sdood" / "dataset.yml").read_text())
    for split in section["dataset"]["split_names"]:
        lines = Path(section["dataset"][split]["imglist_pth"]).read_text().splitlines(keepends=True)
        short = exported / f"{split}-few.txt"
        short.write_text("".join(lines[row * len(lines) // 24] for row in range(24)) if len(lines) > 24 else "".join(lines))
        section["dataset"][split]["imglist_pth"] = str(short)
    path = exported / "few.yml"
    path.write_text(yaml.safe_dump(section))
    return path


def arguments(dataset: Path, files: list[str], settings: str, output: Path) -> list[str]:
    return [
        "--config",
        str(dataset),
        *files,
        "--num_gpus",
        "0",
        "--merge_option",
        "merge",
        "--output_dir",
        str(output),
        *settings.split(),
    ]


def stock_files(configs: Path, network: str, pipeline: str) -> list[str]:
    names = (network, "preprocessors/base_preprocessor.yml", "pipelines/train/baseline.yml", f"pipelines/train/{pipeline}.yml")
    return [str(configs / name) for name in names]


def pasted(exported: Path, title: str) -> list[str]:
    """The arguments of the exported command of that title, as a shell would split them."""
    lines = (exported / "sdood" / "commands.txt").read_text().splitlines()
    command = next(line for name, line in zip(lines[::2], lines[1::2], strict=True) if title in name)
    words = shlex.split(command.replace("$OPENOOD_ROOT", os.environ["OPENOOD_ROOT"]))
    assert words[:3] == ["python", "-m", "sdood_plugin.hosts.openood"]
    return words[3:]


def own_files(exported: Path) -> list[str]:
    return [str(exported / "sdood" / name) for name in ("networks/sdood_net.yml", "pipelines/train_sdood.yml")]


def test_export_writes_what_the_run_has(exported, run_folder):
    lists = exported / "benchmark_imglist" / "sdood"
    rows = {path.stem: [line.rsplit(" ", 1) for line in path.read_text().splitlines()] for path in lists.glob("*.txt")}
    assert {name: len(lines) for name, lines in rows.items()} == {
        "train": 128,
        "val": 32,
        "test": 20,
        "oe": 128,
        "oe_heldout": 32,
        "controls": 128,
        "controls_heldout": 32,
        "ood_cifar100": 20,
        "ood_tin": 20,
    }
    assert all((exported / "images_classic" / name).is_file() for lines in rows.values() for name, _ in lines)
    manifest = dict(line.rsplit(" ", 1) for line in (run_folder / "outliers" / "imglist.txt").read_text().splitlines())
    for name, label in (*rows["oe"], *rows["oe_heldout"]):
        file = name.removeprefix("sdood/outliers/")
        assert manifest[file] == label, "an outlier keeps its source's label"
        assert (exported / "images_classic" / name).read_bytes() == (run_folder / "outliers" / file).read_bytes()
    with pytest.raises(UsageError, match="earlier export"):
        from sdood_plugin.hosts.openood import export_openood

        export_openood(run_folder, exported)
    with pytest.raises(UsageError, match="expected a run folder"):
        export_openood(exported, exported / "again")


def test_an_export_says_what_its_files_cannot(run_folder, exported, tmp_path):
    """The same run as if its classes were pseudo-labels and its detector another."""
    from sdood_plugin.hosts.openood import export_openood

    shutil.copytree(run_folder, tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["clustering"]["method"] = "kmeans"
    weights = tmp_path / "a long name with spaces, that a line of YAML would be folded at" / "weights.safetensors"
    config["detector"] |= {"input_size": 48, "frozen_blocks": 1, "weights": str(weights)}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    labels, network, *jobs = export_openood(tmp_path / "run", tmp_path / "data").splitlines()
    assert labels.startswith("# note: the run's classes are pseudo-labels")
    assert "ACC mean nothing" in labels
    assert network.startswith("# note: `three heads` trains all of small_cnn")
    assert "frozen_blocks 1" in network
    assert len(jobs) == 12
    section = yaml.safe_load((tmp_path / "data" / "sdood" / "networks" / "sdood_net.yml").read_text())["network"]
    assert {name: section[name] for name in ("backbone", "input_size", "pooling", "weights")} == {
        "backbone": "small_cnn",
        "input_size": 48,
        "pooling": "own",
        "weights": config["detector"]["weights"],
    }
    given, pseudo = (
        yaml.safe_load((root / "sdood" / "dataset.yml").read_text())["dataset"]["test"] for root in (exported, tmp_path / "data")
    )
    assert "labelled" not in given
    assert pseudo["labelled"] is False


@pytest.mark.parametrize("name", STOCK)
def test_stock_outlier_trainers_train_on_our_outliers(exported, few, tmp_path, name, capsys):
    """The exported command, its data set cut to the few images."""
    from sdood_plugin.hosts.openood.__main__ import main

    given = [str(few) if word.endswith("sdood/dataset.yml") else word for word in pasted(exported, f"the host's {name}")]
    before = random.getstate(), torch.get_rng_state(), sys.stdout
    status = main([*given, *SMALL.split(), *STOCK[name].split(), "--output_dir", str(tmp_path)])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert "Epoch 001 | Time" in said.out
    loss = float(said.out.split("Train Loss ")[1].split(" ")[0])
    assert np.isfinite(loss)
    assert list(tmp_path.rglob("best.ckpt"))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert sys.stdout is before[2]
    print("standard output is still open")


def test_our_pipeline_trains_three_heads_and_leaves_a_detector(exported, tmp_path, capsys):
    from openood.datasets import get_dataloader

    from sdood_plugin.hosts.openood import SDOODPostprocessor, load_checkpoint, load_detector
    from sdood_plugin.hosts.openood.__main__ import main, read_config

    settings = "--optimizer.num_epochs 2 --optimizer.lr 0.05 --num_workers 0"
    assert main(arguments(exported / "sdood" / "dataset.yml", own_files(exported), settings, tmp_path)) == 0, (
        capsys.readouterr().err
    )
    said = capsys.readouterr().out
    losses = [float(part.split(" ")[0]) for part in said.split("Train Loss ")[1:]]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    folder = next(tmp_path.rglob("detector.safetensors")).parent
    score = load_score(folder)
    assert len(score.inside) == 128
    assert len(score.outliers) == 128
    assert score.calibration.heldout == [32, 32, 32]
    made = load_detector(folder, "half")
    last = load_checkpoint(next(folder.glob("last_epoch2*.ckpt")), 10, backbone="small_cnn", normalisation="half")
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(made(images), last(images))
        binary = made.heads(images).binary
    assert binary.shape == (3, 2)
    config = read_config(arguments(exported / "sdood" / "dataset.yml", own_files(exported), settings, tmp_path / "again"))
    loaders, post = get_dataloader(config), SDOODPostprocessor(outliers=folder)
    post.setup(made, loaders)
    with torch.no_grad():
        expected = score(made(all_images(loaders["test"]), return_feature=True)[1])
        features = {
            name: made(all_images(loader), return_feature=True)[1]
            for name, loader in loaders.items()
            if "_" in name or name == "val"
        }
    own = torch.tensor([int(line.rsplit(" ", 1)[1]) for line in (exported / "benchmark_imglist/sdood/oe_heldout.txt").open()])
    labels = torch.tensor([int(line.rsplit(" ", 1)[1]) for line in (exported / "benchmark_imglist/sdood/oe.txt").open()])
    given = score.inside, score.outliers, features["val"], features["oe_heldout"], score.config
    kinds = {"outlier_classes": labels, "heldout_classes": own, "heldout_controls": features["controls_heldout"]}
    again = fit_score(*given, **kinds).calibration
    assert score.calibration.votes == pytest.approx(again.votes) and set(again.votes) == {
        "ID",
        "outliers",
        "controls",
        "outliers of other classes",
    }
    assert np.array(score.calibration.curve) == pytest.approx(np.array(again.curve), abs=1e-3)
    np.testing.assert_allclose(-post.inference(made, loaders["test"], progress=False)[1], expected.numpy(), rtol=1e-4)
    with pytest.raises(UsageError, match="checkpoint of this backbone"):
        load_checkpoint(folder / "best.ckpt", 10, backbone="resnet18_cifar", normalisation="half")


def test_the_exported_test_pipeline_scores_the_runs_detector(exported, tmp_path, capsys):
    from sdood_plugin.hosts.openood.__main__ import main

    given = [*pasted(exported, "this run's detector"), "--num_workers", "0", "--output_dir", str(tmp_path)]
    assert main(given) == 0, capsys.readouterr().err
    rows = next(tmp_path.rglob("ood.csv")).read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["dataset", "cifar100", "nearood", "tin", "farood"]


def test_the_shipped_yamls_work_in_the_hosts_own_data_tree(run_folder, configs, tree, tmp_path, monkeypatch, capsys):
    """`sdood export-openood RUN ./data`, then the host's cifar10.yml and ours, as a user of the host's own data does it."""
    from sdood_plugin.cli import main as sdood
    from sdood_plugin.hosts.openood.__main__ import main, read_config

    (tmp_path / "data" / "images_classic").mkdir(parents=True)
    (tmp_path / "data" / "benchmark_imglist").mkdir()
    (tmp_path / "data" / "images_classic" / "cifar10").symlink_to(tree / "images_classic" / "cifar10")
    (tmp_path / "data" / "benchmark_imglist" / "cifar10").symlink_to(tree / "benchmark_imglist" / "cifar10")
    monkeypatch.chdir(tmp_path)
    assert sdood(["export-openood", str(run_folder), "data"]) == 0
    assert "python -m sdood_plugin.hosts.openood --config" in capsys.readouterr().out
    assert sdood(["export-openood", str(run_folder), "data"]) == 2
    ours = REPOSITORY / "configs" / "openood"
    own = [str(ours / "networks" / "sdood_net.yml"), str(ours / "pipelines" / "train_sdood.yml")]
    settings = "--network.backbone small_cnn --optimizer.num_epochs 1 --num_workers 0"
    files = [str(ours / "datasets" / "cifar10_sdood_oe.yml"), *own]
    assert main(arguments(configs / "datasets/cifar10/cifar10.yml", files, settings, tmp_path / "results")) == 0, (
        capsys.readouterr().err
    )
    assert load_score(next((tmp_path / "results").rglob("score.json")).parent).calibration.heldout == [40, 32, 0]
    files[0] = str(ours / "datasets" / "cifar100_sdood_oe.yml")
    config = read_config(arguments(configs / "datasets/cifar100/cifar100.yml", files, settings, tmp_path / "results"))
    assert config.dataset.split_names == ["train", "oe", "val", "test", "oe_heldout"]
    assert Path(config.dataset.oe.imglist_pth).is_file()
    assert config.network.num_classes == 100


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("trainer", ["mixoe", "udg"])
def test_what_the_shipped_yamls_say_of_the_hosts_trainers_is_what_they_need(configs, tmp_path, name, trainer):
    from sdood_plugin.hosts.openood.__main__ import read_config

    path = REPOSITORY / "configs" / "openood" / "datasets" / f"{name}_sdood_oe.yml"
    said = next(line for line in path.read_text().splitlines() if line.lower().startswith(f"# the host's {trainer} needs"))
    files = [str(path), *stock_files(configs, RESNET, f"train_{trainer}")]
    stock = configs / f"datasets/{name}/{name}.yml"
    before, after = (
        read_config(arguments(stock, files, settings, tmp_path)).dataset for settings in ("", said[said.index("--") :])
    )
    setting, wanted = {"mixoe": ("batch_size", 64), "udg": ("dataset_class", "UDGDataset")}[trainer]
    assert before.train[setting] != wanted and before.oe[setting] != wanted
    assert after.train[setting] == after.oe[setting] == wanted
    assert trainer != "mixoe" or before.train.batch_size != before.oe.batch_size


def test_one_pasted_command_line_starts_the_host(exported, configs, tmp_path):
    text = (exported / "sdood" / "commands.txt").read_text()
    commands = dict(zip(text.splitlines()[::2], text.splitlines()[1::2], strict=True))
    assert len(commands) == 6
    command = (
        commands["# three heads"].replace("python", shlex.quote(sys.executable), 1)
        + f" --optimizer.num_epochs 1 --output_dir {tmp_path}"
    )
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("score.json"))
    for line in commands.values():
        named = [os.path.expandvars(part) for part in shlex.split(line) if part.endswith(".yml")]
        named = [part.replace("$OPENOOD_ROOT", os.environ["OPENOOD_ROOT"]) for part in named]
        assert all(Path(part).is_file() for part in named), line


def test_the_script_of_the_readme_runs(run_folder, tree, tmp_path, monkeypatch, capsys):
    """As it is printed there: a run in runs/cifar10, the host's data in data, its checkout in OpenOOD."""
    from sdood_plugin.hosts.openood import evaluator

    (tmp_path / "runs").mkdir()
    for name, target in (("runs/cifar10", run_folder), ("data", tree), ("OpenOOD", os.environ["OPENOOD_ROOT"])):
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    made = evaluator.host_evaluator.get_id_ood_dataloader
    monkeypatch.setattr(  # worker processes would take longer than the images
        evaluator.host_evaluator, "get_id_ood_dataloader", lambda *given, **rest: made(*given, **{**rest, "num_workers": 0})
    )
    exec(script("OpenOOD"), {})
    assert capsys.readouterr().out.count("nearood") == 4, "each of the two tables is printed by the host and by the script"


def test_the_example_script_runs(run_folder, tree):
    example = REPOSITORY / "examples" / "openood_eval.py"
    assert len(example.read_text().splitlines()) < 20
    done = subprocess.run(
        [sys.executable, str(example), str(run_folder), str(tree)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nearood") >= 3
    assert "knn" in done.stdout


def test_the_loss_sees_one_batch_with_the_labels_of_the_lists(exported, monkeypatch, tmp_path):
    """One forward pass a step, outliers flagged and with their sources' labels, controls as ID, all augmented alike."""
    from sdood_plugin.hosts.openood import trainer
    from sdood_plugin.hosts.openood.__main__ import read_config
    from sdood_plugin.hosts.openood.pipeline import run_pipeline

    seen, transforms = [], []
    original, loaders = trainer.three_head_loss, []

    def watched(heads: Heads, labels, flags, weight):
        seen.append((len(heads.features), labels, flags, weight))
        return original(heads, labels, flags, weight)

    def kept(self, net, train, oe, config, controls=None):
        loaders.append((train, oe, controls))
        transforms.extend(loader.dataset.transform_image for loader in (train, oe, controls))
        plain(self, net, train, oe, config, controls)

    plain = trainer.SDOODTrainer.__init__
    monkeypatch.setattr(trainer, "three_head_loss", watched)
    monkeypatch.setattr(trainer.SDOODTrainer, "__init__", kept)
    settings = "--optimizer.num_epochs 1 --num_workers 0 --trainer.lambda_out 0.5"
    run_pipeline(read_config(arguments(exported / "sdood" / "dataset.yml", own_files(exported), settings, tmp_path)))
    assert len(seen) == 4, "128 images, 32 a batch"
    assert transforms[0] is transforms[1] is transforms[2]
    assert "RandomCrop" in str(transforms[0].transform)
    for size, labels, flags, weight in seen:
        assert size == len(labels) == 32 + 16 + 16
        assert weight == 0.5
        assert flags.tolist() == [False] * 48 + [True] * 16
    train, oe, controls = loaders[0]
    for part, loader in ((slice(0, 32), train), (slice(32, 48), controls), (slice(48, 64), oe)):
        counted = torch.bincount(torch.cat([labels[part] for _, labels, _, _ in seen]), minlength=10)
        listed = [int(line.rsplit(" ", 1)[1]) for line in loader.dataset.imglist]
        assert (counted <= torch.bincount(torch.tensor(listed), minlength=10)).all()


def test_training_says_what_is_wrong_before_it_writes(exported, configs, tmp_path, capsys):
    from sdood_plugin.hosts.openood.__main__ import main

    dataset = exported / "sdood" / "dataset.yml"

    def changed(**splits):
        section = yaml.safe_load(dataset.read_text())
        for key, value in splits.items():
            split, name = key.split("__")
            target = section["dataset"] if split == "dataset" else section["dataset"][split]
            target[name] = value
        path = tmp_path / f"case{len(list(tmp_path.glob('case*')))}.yml"
        path.write_text(yaml.safe_dump(section))
        return path

    def with_list(text):
        path = tmp_path / f"list{len(list(tmp_path.glob('list*')))}.txt"
        path.write_text(text)
        return changed(oe__imglist_pth=str(path))

    other = ThreeHeadNet(Backbone("resnet18_cifar"), 10)
    torch.save({f"network.{key}": value for key, value in other.state_dict().items()}, tmp_path / "other.ckpt")
    outlier = (exported / "benchmark_imglist" / "sdood" / "oe.txt").read_text().splitlines()[0].split(" ")[0]
    unknown = yaml.safe_load((exported / "sdood" / "pipelines" / "train_sdood.yml").read_text())
    unknown["trainer"]["lamda_out"] = 1.0
    (tmp_path / "unknown.yml").write_text(yaml.safe_dump(unknown))
    pretrained = "--network.pretrained True --network.checkpoint"
    own = own_files(exported)
    cases = [
        (with_list(f"{outlier} 10\n"), own, "", "got label 10; expected at most 9"),
        (with_list("sdood/out liers/0.png 1\n"), own, "", "without spaces"),
        (with_list("sdood/outliers/absent.png 1\n"), own, "", "no file"),
        (with_list(""), own, "", "no lines"),
        (changed(oe__imglist_pth=str(tmp_path / "gone.txt")), own, "", "No such file"),
        (changed(dataset__split_names=["train", "val", "test"]), own, "", "expected train, oe, val, test among them"),
        (changed(dataset__num_classes=5), own, "", "expected at most 4"),
        (dataset, own, "--network.num_classes 7", "network.num_classes: got 7; expected 10"),
        (
            dataset,
            own,
            f"{pretrained} {tmp_path}/other.ckpt --network.backbone small_cnn",
            "give the checkpoint of this backbone",
        ),
        (dataset, own, f"{pretrained} {tmp_path}/none.ckpt", "checkpoint: got"),
        (dataset, own, "--trainer.lamda 1", "expected a key that the YAML files set"),
        (dataset, [own[0], str(tmp_path / "unknown.yml")], "", "lamda_out"),
        (tmp_path / "none.yml", own, "", "No such file"),
        (dataset, stock_files(configs, RESNET, "train_oe"), "--network.num_classes 3", "network.num_classes: got 3"),
    ]
    for path, files, settings, expected in cases:
        status = main(arguments(path, files, f"{settings} --num_workers 0", tmp_path / "results"))
        said = capsys.readouterr().err.strip()
        assert status == 2, (said, expected)
        assert expected in said
        assert said.count("\n") == 0, said
    assert not (tmp_path / "results").exists()
    if not torch.cuda.is_available():
        assert main([*arguments(dataset, own, "", tmp_path / "results"), "--num_gpus", "1"]) == 2
        assert "expected at most 0, the CUDA devices here" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def quiet_logging():
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)
