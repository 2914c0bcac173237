"""Configs that cannot work, said in one line before anything is written; and what a run leaves of the process it ran in."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sdood_plugin.artifacts import read_tensors
from sdood_plugin.hosts.openood.yamls import write_yamls
from sdood_plugin.scoring.storage import load_score

from .two_processes import fail
from .two_processes import train as train_in_one

pytestmark = pytest.mark.filterwarnings("ignore")  # the host's warnings are not ours to mend

COUNTS = {"train": 24, "oe": 24, "val": 10, "test": 8, "oe_heldout": 6, "ood": 6}


@pytest.fixture(scope="module")
def data(host, tmp_path_factory) -> Path:
    """Noise in three classes with lists and YAMLs: dataset.yml, ood.yml and those the package brings."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for split, count in COUNTS.items():
        names = [f"{split}{row}.png" for row in range(count)]
        for row, name in enumerate(names):
            Image.fromarray(random.integers(row % 3 * 80, row % 3 * 80 + 90, (32, 32, 3), dtype=np.uint8)).save(root / name)
        label = {"ood": -1}
        (root / f"{split}.txt").write_text("".join(f"{name} {label.get(split, row % 3)}\n" for row, name in enumerate(names)))

    def entry(split: str) -> dict:
        return {"data_dir": f"{root}/", "imglist_pth": str(root / f"{split}.txt")}

    workers = {"num_workers": "@{num_workers}", "num_gpus": "@{num_gpus}", "num_machines": "@{num_machines}"}
    splits = ["train", "oe", "val", "test", "oe_heldout"]
    dataset = {"name": "noise", "num_classes": 3, "pre_size": 32, "image_size": 32, "interpolation": "bilinear"}
    dataset |= {"normalization_type": "half", **workers, "split_names": splits}
    for split in splits:
        dataset[split] = {"dataset_class": "ImglistDataset", **entry(split), "batch_size": 6, "shuffle": split in ("train", "oe")}
    ood = {"name": "ood", "num_classes": 3, **workers, "dataset_class": "ImglistDataset", "batch_size": 6, "shuffle": False}
    ood |= {"split_names": ["val", "nearood"], "val": entry("ood"), "nearood": {"datasets": ["far"], "far": entry("ood")}}
    (root / "dataset.yml").write_text(yaml.safe_dump({"dataset": dataset}))
    (root / "ood.yml").write_text(yaml.safe_dump({"ood_dataset": ood}))
    write_yamls(root)
    return root


def command(data: Path, output: Path, *settings: str, **files: Path) -> list[str]:
    """`train_sdood` for an epoch of a tiny network; a file of the data set's may be another."""
    own = {
        "dataset": data / "dataset.yml",
        "network": data / "networks/sdood_net.yml",
        "train": data / "pipelines/train_sdood.yml",
    }
    fixed = "--network.backbone small_cnn --optimizer.num_epochs 1"
    return started(output, own | files, *fixed.split(), *settings)


def scoring(data: Path, configs: Path, output: Path, *settings: str, **files: Path) -> list[str]:
    """The host's test pipeline with our postprocessor."""
    own = {"dataset": data / "dataset.yml", "ood": data / "ood.yml", "network": data / "networks/sdood_net.yml"}
    stock = {"preprocessor": configs / "preprocessors/base_preprocessor.yml", "test": configs / "pipelines/test/test_ood.yml"}
    fixed = "--network.backbone small_cnn --network.pretrained False"
    return started(output, own | stock | {"post": data / "postprocessors/sdood.yml"} | files, *fixed.split(), *settings)


def started(output: Path, files: dict[str, Path], *settings: str) -> list[str]:
    fixed = "--num_gpus 0 --num_workers 0 --merge_option merge --output_dir"
    return ["--config", *map(str, files.values()), *fixed.split(), str(output), *settings]


def edited(source: Path, folder: Path, **values: object) -> Path:
    """A copy of a YAML in which `section__key` is a value, or gone where that is None."""
    content = yaml.safe_load(source.read_text())
    for where, value in values.items():
        *keys, last = where.split("__")
        section = content
        for key in keys:
            section = section[key]
        section[last] = value
        if value is None:
            del section[last]
    path = folder / f"case{len(list(folder.glob('case*')))}.yml"
    path.write_text(yaml.safe_dump(content))
    return path


def refused(arguments: list[str], capsys, code: int = 2) -> str:
    """The one line that the command line ends with, in that exit code."""
    from sdood_plugin.hosts.openood.__main__ import main

    capsys.readouterr()
    status = main(arguments)
    said = capsys.readouterr().err.strip()
    assert status == code, said
    assert said.count("\n") == 0, said
    return said


def test_what_training_would_stumble_over_is_refused_before_it_writes(data, tmp_path, capsys):
    def listed(split: str) -> dict[str, Path]:
        (tmp_path / f"{split}.txt").write_text(f"{split}0.png -1\n")
        return {
            "dataset": edited(data / "dataset.yml", tmp_path, **{f"dataset__{split}__imglist_pth": f"{tmp_path}/{split}.txt"})
        }

    def dataset(**values: object) -> dict[str, Path]:
        return {"dataset": edited(data / "dataset.yml", tmp_path, **values)}

    text = edited(data / "pipelines/train_sdood.yml", tmp_path, optimizer__lr="1e-3")
    cases = [
        *(
            (listed(split), "", f"{split}.txt line 1: got label -1; expected at most 2, and not below 0")
            for split in ("train", "oe", "val", "test")
        ),
        (dataset(dataset__oe__data_dir=None), "", "dataset.oe.data_dir: got None"),
        (dataset(dataset__oe__dataset_class=None), "", "dataset.oe.dataset_class: got None"),
        (dataset(dataset__val__dataset_class="Imglist"), "", "dataset.val.dataset_class: got Imglist"),
        ({}, "--optimizer.num_epochs 0", "optimizer.num_epochs: got 0; expected a whole number above 0"),
        ({"train": text}, "", "optimizer.lr: got '1e-3'; expected a number above 0"),
        ({}, "--network.name resnet18_32x32", "network.name: got resnet18_32x32"),
    ]
    for files, settings, expected in cases:
        arguments = command(data, tmp_path / "results", *settings.split(), **files)
        assert expected in refused(arguments, capsys)
    assert not (tmp_path / "results").exists()


def test_a_list_with_held_out_outliers_or_ood_images_may_have_labels_below_zero(data, tmp_path):
    from sdood_plugin.hosts.openood.__main__ import read_config
    from sdood_plugin.hosts.openood.checks import check_config

    (tmp_path / "heldout.txt").write_text("oe_heldout0.png -1\n")
    path = edited(data / "dataset.yml", tmp_path, dataset__oe_heldout__imglist_pth=f"{tmp_path}/heldout.txt")
    check_config(read_config(command(data, tmp_path, dataset=path)))


def test_what_scoring_would_stumble_over_is_refused_before_it_writes(data, configs, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("none.png -1\n")

    def ood(**values: object) -> dict[str, Path]:
        return {"ood": edited(data / "ood.yml", tmp_path, **values)}

    wrong = "ood_dataset__nearood__far__"
    cases = [
        (ood(**{f"{wrong}imglist_pth": str(tmp_path / "list.txt")}), "", "list.txt line 1: got no file"),
        (ood(**{f"{wrong}data_dir": None}), "", "ood_dataset.nearood.far.data_dir: got None"),
        (ood(ood_dataset__nearood__datasets=[]), "", "ood_dataset.nearood.datasets: got None"),
        (ood(ood_dataset__dataset_class=None), "", "ood_dataset.dataset_class: got None"),
        (ood(ood_dataset__split_names=None), "", "ood_dataset: got"),
        ({}, "--postprocessor.postprocessor_args.outliers /nowhere", "postprocessor_args.outliers: got /nowhere"),
        (
            {"post": configs / "postprocessors/rts.yml"},
            "",
            "postprocessor.name: got rts on network sdood; expected a network rts_net",
        ),
        ({}, "--postprocessor.name knnn", "postprocessor.name: got knnn; expected sdood, or one that the host can make"),
        (
            {"post": configs / "postprocessors/gram.yml"},
            "--dataset.name digits",
            "postprocessor.name: got gram: KeyError 'digits';",
        ),
    ]
    for files, settings, expected in cases:
        given = scoring(data, configs, tmp_path / "results", *settings.split(), **files)
        assert expected in refused(given, capsys)
    assert not (tmp_path / "results").exists()


def test_a_command_line_or_yaml_that_cannot_be_read_is_said_in_one_line(data, configs, tmp_path, capsys):
    from sdood_plugin.hosts.openood.__main__ import read_config

    (tmp_path / "broken.yml").write_text("a: [1,\n b: 2\n")
    (tmp_path / "list.yml").write_text("- 1\n")
    (tmp_path / "dataset.yaml").write_text((data / "dataset.yml").read_text())
    votes = "--postprocessor.postprocessor_args.k_vote"
    cases = [
        (command(data, tmp_path, "--optimizer.lr", "abc"), "could not convert string to float: 'abc'; expected YAML files"),
        (command(data, tmp_path, dataset=tmp_path / "broken.yml"), "broken.yml"),
        (command(data, tmp_path, dataset=tmp_path / "list.yml"), "AttributeError"),
        (command(data, tmp_path, dataset=tmp_path / "dataset.yaml"), "unknown file format"),
        (command(data, tmp_path, "--network.pretrained", "yes"), "got 'yes'; expected True or False"),
        (command(data, tmp_path, "--network.pretrained=yes"), "got 'yes'; expected True or False"),
        (command(data, tmp_path, "--network.pretrainde", "True"), "expected a key that the YAML files set"),
        (scoring(data, configs, tmp_path, votes, "3"), "takes its type after a colon, as 3:int"),
    ]
    for arguments, expected in cases:
        assert expected in refused(arguments, capsys)
    config = read_config(scoring(data, configs, tmp_path, votes, "3:int"))
    assert config.postprocessor.postprocessor_args.k_vote == 3


def test_a_stock_network_cannot_train_three_heads(data, tmp_path, capsys):
    from openood.networks import ResNet18_32x32

    torch.save(ResNet18_32x32(num_classes=3).state_dict(), tmp_path / "stock.ckpt")
    settings = ["--network.backbone", "resnet18_cifar", "--network.pretrained", "True"]
    settings += ["--network.checkpoint", str(tmp_path / "stock.ckpt")]
    assert "expected a network with three heads" in refused(command(data, tmp_path / "results", *settings), capsys)
    assert "trainer.lambda_out: got -1" in refused(command(data, tmp_path / "results", "--trainer.lambda_out", "-1"), capsys)
    assert not (tmp_path / "results").exists()


def test_what_a_process_of_the_launcher_raises_is_one_line_too(data, tmp_path, monkeypatch, capsys):
    import openood.utils

    from sdood_plugin.hosts.openood.__main__ import main

    monkeypatch.setattr(openood.utils, "launch", lambda *_, **__: torch.multiprocessing.spawn(fail))
    assert main(command(data, tmp_path)) == 1
    assert capsys.readouterr().err == "sdood: error: loss: got nan: at once; expected a number; lower optimizer.lr\n"

    def other(*_, **__):
        raise torch.multiprocessing.ProcessRaisedException("Traceback\nValueError: not ours\n", 0, 0)

    monkeypatch.setattr(openood.utils, "launch", other)
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="not ours"):
        main(command(data, tmp_path))


def test_two_processes_share_the_images_and_end_with_one_network(data, tmp_path):
    """Each trains on half of the images and tests on half; the numbers are of all, and the bank, made by one, holds all."""
    from sdood_plugin.hosts.openood import load_checkpoint

    given = command(data, tmp_path / "results")
    given[given.index("--num_gpus") + 1] = "2"  # what the host shares its loaders by
    torch.multiprocessing.spawn(train_in_one, (str(tmp_path), given), nprocs=2)
    one, two = (read_tensors(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    shares = [tensors.pop("share") for tensors in (one, two)]
    assert torch.equal(torch.cat(shares).sort().values, torch.arange(24))
    assert all(torch.equal(one[name], two[name]) for name in one)
    folder = next(tmp_path.rglob("detector.safetensors")).parent
    bank = load_score(folder).inside
    assert len(bank.unique(dim=0)) == len(bank) == 24
    assert load_score(folder).calibration.heldout == [10, 6, 0]
    assert len(list(tmp_path.rglob("best.ckpt"))) == 1
    net = load_checkpoint(next(folder.glob("last_epoch1*.ckpt")), 3, backbone="small_cnn", normalisation="half")
    images, labels = read_images(data, "val")
    with torch.no_grad():
        logits = net(images)
    said = re.search(r"Val Loss ([0-9.]+) \| Val Acc ([0-9.]+)", (folder / "log.txt").read_text())
    assert said is not None
    assert float(said[2]) == pytest.approx(100 * float((logits.argmax(dim=1) == labels).float().mean()), abs=0.01)
    assert float(said[1]) == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), abs=0.01)


def read_images(data: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of a list in [-1, 1], as the host hands them over under the normalisation `half`, and their labels."""
    rows = [line.split() for line in (data / f"{split}.txt").read_text().splitlines()]
    images = np.stack([np.asarray(Image.open(data / name)) for name, _ in rows])
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor([int(label) for _, label in rows])


def test_test_images_without_known_classes_get_no_accuracy(data, tmp_path, caplog):
    from sdood_plugin.hosts.openood.__main__ import read_config
    from sdood_plugin.hosts.openood.pipeline import run_pipeline

    caplog.set_level("INFO")
    path = edited(data / "dataset.yml", tmp_path, dataset__test__labelled=False)
    run_pipeline(read_config(command(data, tmp_path, dataset=path)))
    assert "test accuracy" not in caplog.text
    run_pipeline(read_config(command(data, tmp_path)))
    assert "test accuracy" in caplog.text


def test_batchnorm_is_over_all_gpus_as_in_the_hosts_pipelines(host, monkeypatch):
    from sdood_plugin.hosts.openood import pipeline

    class OnGPU(torch.nn.Sequential):
        def parameters(self, recurse=True):
            return iter([SimpleNamespace(is_cuda=True)])

    def kinds(net):
        return [type(layer) for layer in pipeline._synchronised(net)]

    ordinary, synchronised = [torch.nn.BatchNorm2d], [torch.nn.SyncBatchNorm]
    assert kinds(OnGPU(torch.nn.BatchNorm2d(2))) == ordinary
    monkeypatch.setattr(pipeline.comm, "get_world_size", lambda: 2)
    assert kinds(OnGPU(torch.nn.BatchNorm2d(2))) == synchronised
    assert kinds(torch.nn.Sequential(torch.nn.BatchNorm2d(2))) == ordinary, "torch has it on GPUs only"


def test_gpu_random_states_are_as_before_a_pipeline(host, monkeypatch):
    from sdood_plugin.hosts.openood import pipeline

    given: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: ["before"])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", given.append)
    with pytest.raises(KeyError), pipeline._restored_process():
        raise KeyError
    assert given == [["before"]]


def stock(
    data: Path, configs: Path, output: Path, *settings: str, network: str = "networks/lenet.yml", **files: Path
) -> list[str]:
    """The host's `train_oe` of one of its networks."""
    names = ("preprocessors/base_preprocessor.yml", "pipelines/train/baseline.yml", "pipelines/train/train_oe.yml")
    own = {"dataset": data / "dataset.yml", **{name: configs / name for name in (network, *names)}}
    return started(output, own | files, "--optimizer.num_epochs", "1", *settings)


def test_a_stock_network_or_checkpoint_that_does_not_fit_is_refused(data, configs, tmp_path, capsys):
    from openood.networks.lenet import LeNet

    state = LeNet(num_classes=3, num_channel=3).state_dict()
    first = next(iter(state))
    files = {
        "fits": state,
        "foreign": {f"network.{name}": value for name, value in state.items()},
        "parallel": {f"module.{name}": value for name, value in state.items()},
        "classes": LeNet(num_classes=5, num_channel=3).state_dict(),
        "shape": {**state, first: torch.zeros(1, 2, 3)},
        "more": {**state, "layer9.weight": torch.zeros(1)},
    }
    for name, tensors in files.items():
        torch.save(tensors, tmp_path / f"{name}.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    pretrained = f"--network.pretrained True --network.checkpoint {tmp_path}/"
    within = f"--network.backbone.pretrained True --network.backbone.checkpoint {tmp_path}/"
    plain, mcd = "networks/lenet.yml", "networks/mcd_net.yml"
    cases = [
        (plain, "--network.name lenett", "network: got lenett: Unexpected Network Architecture!"),
        (mcd, "--network.backbone.name lenett", "network: got mcd: Unexpected Network Architecture!"),
        (plain, f"{pretrained}none.ckpt", "none.ckpt; expected a file"),
        (plain, f"{pretrained}text.ckpt", "expected a state dict that loads with weights_only"),
        (plain, f"{pretrained}foreign.ckpt", f"foreign.ckpt: got no {first}; expected the tensors of lenet"),
        (plain, f"{pretrained}parallel.ckpt", f"parallel.ckpt: got no {first}"),
        (plain, f"{pretrained}classes.ckpt", "of shape (5,"),
        (plain, f"{pretrained}shape.ckpt", f"got {first} of shape (1, 2, 3); expected the tensors of lenet with"),
        (plain, f"{pretrained}more.ckpt", "got layer9.weight of shape (1,)"),
        (mcd, f"{pretrained}fits.ckpt", "expected the tensors of mcd"),
        (mcd, f"{within}foreign.ckpt", f"foreign.ckpt: got no {first}"),
    ]
    for network, settings, expected in cases:
        assert expected in refused(stock(data, configs, tmp_path / "results", *settings.split(), network=network), capsys)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("setting", ["network", "network.backbone"])
def test_a_stock_checkpoint_that_fits_passes_and_leaves_random_states(data, configs, tmp_path, setting):
    from openood.networks.lenet import LeNet

    from sdood_plugin.hosts.openood.__main__ import read_config
    from sdood_plugin.hosts.openood.checks import check_config

    torch.save(LeNet(num_classes=3, num_channel=3).state_dict(), tmp_path / "fits.ckpt")
    settings = [f"--{setting}.pretrained", "True", f"--{setting}.checkpoint", str(tmp_path / "fits.ckpt")]
    network = "networks/lenet.yml" if setting == "network" else "networks/mcd_net.yml"
    config = read_config(stock(data, configs, tmp_path, *settings, network=network))
    given, before = str(config), torch.get_rng_state()
    check_config(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert str(config) == given


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_label_below_zero_is_refused_where_the_host_learns_or_counts_it(data, configs, tmp_path, capsys, split):
    (tmp_path / "list.txt").write_text(f"{split}0.png -1\n")
    path = edited(data / "dataset.yml", tmp_path, **{f"dataset__{split}__imglist_pth": f"{tmp_path}/list.txt"})
    for given in (stock(data, configs, tmp_path / "results", dataset=path), scoring(data, configs, tmp_path, dataset=path)):
        assert "list.txt line 1: got label -1; expected at most 2, and not below 0" in refused(given, capsys)
    assert not (tmp_path / "results").exists()


def test_outliers_of_the_hosts_trainers_need_no_class(data, configs, tmp_path):
    from sdood_plugin.hosts.openood.__main__ import read_config
    from sdood_plugin.hosts.openood.checks import check_config

    (tmp_path / "list.txt").write_text("oe0.png -1\n")
    path = edited(data / "dataset.yml", tmp_path, dataset__oe__imglist_pth=f"{tmp_path}/list.txt")
    check_config(read_config(stock(data, configs, tmp_path, dataset=path)))


def test_damaged_outliers_or_banks_are_refused_before_the_host_writes(data, configs, run_folder, tmp_path, capsys):
    for name in ("outliers", "detector"):
        shutil.copytree(run_folder / name, tmp_path / name)
    next((tmp_path / "outliers" / "images").rglob("*.png")).unlink()
    (tmp_path / "empty").mkdir()

    def said(name: str, code: int) -> str:
        outliers = ("--postprocessor.postprocessor_args.outliers", str(tmp_path / name))
        return refused(scoring(data, configs, tmp_path / "results", *outliers), capsys, code)

    assert "expected a readable, whole PNG" in said("outliers", 1)
    assert "no meta.json" in said("empty", 1)
    (tmp_path / "detector" / "score.json").unlink()
    assert "score.json" in said("detector", 1)
    (tmp_path / "detector" / "bank.safetensors").unlink()
    assert "a detector without banks" in said("detector", 2)
    assert not (tmp_path / "results").exists()
