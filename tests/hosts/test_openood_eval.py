"""OpenOOD's evaluation with the real host: our network under its postprocessors, our postprocessor in its evaluator."""

from __future__ import annotations

import ast
import inspect
import pickle
import random
import re
import shutil
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from sdood_plugin.config import ScoringConfig
from sdood_plugin.data.sources import load_images
from sdood_plugin.detector.network import ThreeHeadNet, load_network
from sdood_plugin.errors import UsageError
from sdood_plugin.features import Backbone, extract
from sdood_plugin.outliers.dataset import OutlierSet
from sdood_plugin.scoring.score import fit_score
from sdood_plugin.scoring.storage import load_score

from .openood_tree import REPOSITORY, all_images, common, run_settings

pytestmark = pytest.mark.filterwarnings("ignore")  # the host's warnings are not ours to mend

RUNS = (
    "msp",
    "mls",
    "ebo",
    "odin",
    "iodin",
    "mds",
    "mds_ensemble",
    "rmds",
    "gmm",
    "openmax",
    "react",
    "vim",
    "gradnorm",
    "gram",
    "residual",
    "klm",
    "temp_scaling",
    "dropout",
    "knn",
    "dice",
    "ash",
    "scale",
    "she",
    "rankfeat",
    "gen",
    "nnguide",
    "relation",
    "adascale_a",
    "adascale_l",
    "vra",
    "cfood",
    "fdbd",
    "nci",
)
CANNOT = {  # what the host then says; why: POSTPROCESSORS.md
    "cider": "missing 1 required positional argument: 'layer_index'",
    "npos": "missing 1 required positional argument: 'layer_index'",
    "reweightood": "missing 1 required positional argument: 'layer_index'",
    "conf_branch": "unexpected keyword argument 'return_confidence'",
    "godin": "unexpected keyword argument 'inference'",
    "rotpred": "unexpected keyword argument 'return_rot_logits'",
    "mcd": "unexpected keyword argument 'return_double'",
    "t2fnorm": "no attribute 'forward_ood_inference'",
    "mos": "no attribute 'group_slices'",
    "opengan": "'SDOODNet' object is not subscriptable",
    "draem": "'SDOODNet' object is not subscriptable",
    "rd4ad": "'SDOODNet' object is not subscriptable",
    "cutpaste": "should inherit BasePostprocessor",
    "dsvdd": "'NoneType' object has no attribute 'name'",
    "patchcore": "expected a folder with postprocessors/patchcore.yml",
    "ensemble": "'NoneType' object has no attribute 'name'",
    "ssd": "list index out of range",
    "grood": "expected a folder with postprocessors/grood.yml",
}
OUTSIDE = {"temperature_scaling", "rts", "MCMPostprocessor"}  # the host has them, its evaluation API does not name them
OWN_SETTINGS = {  # where the host's own are for wider features or more images than these
    "vim": {"dim": [64]},
    "residual": {"dim": [64]},
    "nnguide": {"K": [20], "alpha": [1.0]},
}


@pytest.fixture(scope="module")
def short_configs(configs, tmp_path_factory):
    """The host's postprocessor YAMLs with each sweep cut to its first value, for the sake of time."""
    root = tmp_path_factory.mktemp("configs")
    shutil.copytree(configs / "postprocessors", root / "postprocessors", ignore=shutil.ignore_patterns("_*"))
    for path in (root / "postprocessors").glob("*.yml"):
        section = yaml.safe_load(path.read_text())
        post = section.get("postprocessor", {})
        sweep = {name: values[:1] for name, values in (post.get("postprocessor_sweep") or {}).items()}
        for name, values in OWN_SETTINGS.get(path.stem, {}).items():
            post["postprocessor_args"][name] = values[0]
            sweep[f"{name}_list"] = values
        if sweep:
            post["postprocessor_sweep"] = sweep
        path.write_text(yaml.safe_dump(section, sort_keys=False))  # the order of a sweep is the order of its values
    return root


@pytest.fixture(scope="module")
def trained(run_folder, tree):
    """A network that gets an image of every class right, which OpenMax and SHE need."""
    from sdood_plugin.data.augment import training_view
    from sdood_plugin.data.images import to_unit
    from sdood_plugin.hosts.openood import SDOODNet

    config = run_settings(tree)
    images = load_images(config.data.train, config.data, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ThreeHeadNet(Backbone("small_cnn"), 10)
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(30):
        rows = torch.randperm(len(images), generator=generator)[:40]
        heads = network(training_view(to_unit(images.images[rows]), generator, "none"))
        loss = torch.nn.functional.cross_entropy(heads.inside, images.labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return SDOODNet(network, "cifar10").eval()


def evaluate(trained, tree, short_configs, name):
    from sdood_plugin.hosts.openood import Evaluator

    random.seed(0)
    np.random.seed(0)
    trained.requires_grad_(name != "gmm")  # the host's GMM forgets no_grad; frozen weights are enough for it
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Evaluator(trained, "cifar10", config_root=str(short_configs), postprocessor_name=name, **common(tree))
        return made.eval_ood(progress=False)


def test_every_postprocessor_of_the_host_is_accounted_for(host):
    from openood.evaluation_api.postprocessor import postprocessors

    assert {*RUNS, *CANNOT} == set(postprocessors)
    assert not {*RUNS} & {*CANNOT}
    told = (REPOSITORY / "sdood_plugin" / "hosts" / "openood" / "POSTPROCESSORS.md").read_text()
    ran, cannot, outside = re.split("## Cannot be run|## Outside", told)
    assert {*ran.split("## Run (33)")[1].split("With a remark")[0].replace(".", "").replace(",", "").split()} == {*RUNS}
    assert _rows(cannot) == {*CANNOT}
    assert _rows(outside) == OUTSIDE
    assert f"## Cannot be run ({len(CANNOT)})" in told and f"({len(OUTSIDE)})" in outside.splitlines()[0]


def _rows(section: str) -> set[str]:
    """The names in the first column of a section's table."""
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return {name.strip() for line in lines for name in line.split("|")[1].split(",")} - {"name"}


def test_what_the_host_has_outside_its_evaluation_api_is_accounted_for(host):
    from openood import postprocessors as package
    from openood.evaluation_api.postprocessor import postprocessors

    source = ast.parse(textwrap.dedent(inspect.getsource(package.get_postprocessor)))
    table = next(node for node in ast.walk(source) if isinstance(node, ast.Dict))
    named = {key.value: getattr(package.utils, value.id) for key, value in zip(table.keys, table.values, strict=True)}
    unnamed = {kind for kind in vars(package).values() if isinstance(kind, type)} - {*postprocessors.values(), *named.values()}
    assert {*(named.keys() - postprocessors.keys()), *(kind.__name__ for kind in unnamed)} == OUTSIDE
    assert named["temperature_scaling"] is postprocessors["temp_scaling"]


def test_what_is_said_of_rts_and_mcm(trained, loaders):
    from openood.postprocessors import MCMPostprocessor
    from openood.postprocessors.rts_postprocessor import RTSPostprocessor
    from openood.utils import Config

    def made(kind, **settings):
        return kind(Config({"postprocessor": {"postprocessor_args": settings}}))

    images = all_images(loaders["id"]["test"])[:4]
    with torch.no_grad():
        expected, classes = (trained(images) / 2).softmax(dim=1).max(dim=1)
    confidence = made(MCMPostprocessor, tau=2).postprocess(trained, images)
    torch.testing.assert_close(confidence, (classes, expected))
    with pytest.raises(TypeError, match="unexpected keyword argument 'return_var'"):
        made(RTSPostprocessor, ood_score="var").postprocess(trained, images)


@pytest.mark.parametrize("name", sorted(CANNOT))
def test_what_is_said_not_to_run_does_not(trained, tree, short_configs, name):
    with pytest.raises(Exception, match=CANNOT[name]):
        evaluate(trained, tree, short_configs, name)


def test_stock_postprocessors_and_ours_make_one_table_on_the_cpu(trained, run_folder, net, tree, short_configs, capsys):
    import pandas

    from sdood_plugin.hosts.openood import Evaluator, SDOODPostprocessor

    rows = {name: evaluate(trained, tree, short_configs, name).loc["nearood"] for name in RUNS}
    ours = Evaluator(net, "cifar10", postprocessor=SDOODPostprocessor(outliers=run_folder), **common(tree)).eval_ood(
        progress=False
    )
    table = pandas.DataFrame({**rows, "sdood": ours.loc["nearood"]}).T
    with capsys.disabled():
        print(f"\n{table.round(1)}")
    assert len(table) == len(RUNS) + 1 >= 11
    assert np.isfinite(table.to_numpy(dtype=float)).all()
    assert table["AUROC"].astype(float).between(0, 100).all()
    assert list(ours.index) == ["cifar100", "tin", "nearood", "farood"], "the host's rows; absent far sets left out"
    assert np.isnan(ours.loc["farood", "AUROC"])


def test_a_left_out_set_is_said_by_name(net, tree, caplog):
    from sdood_plugin.hosts.openood import Evaluator, SDOODPostprocessor

    Evaluator(net, "cifar10", postprocessor=SDOODPostprocessor(), **common(tree))
    assert "left out" in caplog.text
    assert "mnist, svhn, texture, places365" in caplog.text
    with pytest.raises(UsageError, match="no mnist, svhn, texture, places365"):
        Evaluator(net, "cifar10", postprocessor=SDOODPostprocessor(), **{**common(tree), "skip_absent": False})


@pytest.mark.parametrize("name", ["msp", "odin", "knn", "sdood"])
def test_numbers_are_the_hosts_own_with_cuda_neutralised(trained, tree, configs, short_configs, tmp_path, monkeypatch, name):
    """The host's own evaluator, all its data sets there, with `.cuda()` made to do nothing by other means than ours."""
    from openood.evaluation_api import Evaluator as HostEvaluator

    from sdood_plugin.hosts.openood import Evaluator, SDOODPostprocessor

    lists = tmp_path / "benchmark_imglist" / "cifar10"
    shutil.copytree(tree / "benchmark_imglist" / "cifar10", lists)
    (tmp_path / "images_classic").mkdir()
    for folder in ("cifar10", "cifar100", "tin"):
        (tmp_path / "images_classic" / folder).symlink_to(tree / "images_classic" / folder)
    for folder in ("mnist", "svhn", "texture", "places365"):
        (tmp_path / "images_classic" / folder).mkdir()
        (tmp_path / "images_classic" / folder / "here").touch()  # else the host downloads
        shutil.copyfile(lists / "test_tin.txt", lists / f"test_{folder}.txt")
    shutil.copyfile(lists / "val_cifar10.txt", lists / "test_cifar10c.txt")
    arguments = {"data_root": str(tmp_path), "config_root": str(short_configs), "batch_size": 50, "num_workers": 0}

    def made(evaluator):
        own = {"postprocessor": SDOODPostprocessor()} if name == "sdood" else {"postprocessor_name": name}
        return evaluator(trained, "cifar10", **arguments, **own)

    def numbers(evaluation):
        tables = [evaluation.eval_ood(fsood=fsood, progress=False) for fsood in (False, True)]
        return *tables, [evaluation.eval_acc(data) for data in ("id", "csid")]

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "cuda", lambda self, *_, **__: self)
        patch.setattr(torch.nn.Module, "cuda", lambda self, *_, **__: self)
        *theirs, their_accuracy = numbers(made(HostEvaluator))
    *ours, accuracy = numbers(made(Evaluator))
    assert accuracy == their_accuracy
    for own, other in zip(ours, theirs, strict=True):
        assert list(own.index) == list(other.index)
        np.testing.assert_array_equal(own.to_numpy(dtype=float), other.to_numpy(dtype=float))
    assert not ours[0].equals(ours[1]), "covariate-shifted images count as ID"


def test_the_network_sees_the_pixels_the_core_sees(net, run_folder, loaders, tree):
    """Loaders normalise with CIFAR-10's mean, our backbone wants [-1, 1]: features must not know the difference."""
    config = run_settings(tree)
    images = load_images(config.data.test.__class__(config.data.test.path, root=config.data.test.root), config.data, 0)
    core = load_network(run_folder / "detector" / "detector.safetensors")
    expected = extract(core.backbone, images.images, device=torch.device("cpu"))
    with torch.no_grad():
        logits, features = net(all_images(loaders["id"]["test"]), return_feature=True)
        heads = net(all_images(loaders["id"]["test"]), return_heads=True)
        unit = net.unit(all_images(loaders["id"]["test"]))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, heads.inside)
    torch.testing.assert_close(unit, images.images.float() / 127.5 - 1, rtol=0, atol=1e-5)
    weight, bias = net.get_fc()
    np.testing.assert_allclose(features.numpy() @ weight.T + bias, logits.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backbone", ["small_cnn", "resnet18_cifar"])
def test_feature_list_and_intermediate_maps_belong_to_the_forward_pass(host, backbone):
    from sdood_plugin.hosts.openood import SDOODNet

    three = SDOODNet(ThreeHeadNet(Backbone(backbone), 4), "cifar10").eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, maps = three(images, return_feature_list=True)
        features = three(images, return_feature=True)[1]
        last = three.intermediate_forward(images, 4)
        torch.testing.assert_close(three.layer4(three.intermediate_forward(images, 3)), last)
        torch.testing.assert_close(three.forward_threshold(images, 1e9), logits)
        clipped = three.forward_threshold(images, 0.1)
    assert len(maps) == 5
    torch.testing.assert_close(maps[-1].flatten(1), features)
    torch.testing.assert_close(three.avgpool(last).flatten(1), features)
    torch.testing.assert_close(clipped, features.clip(max=0.1) @ three.fc.weight.T + three.fc.bias)
    with pytest.raises(UsageError, match="layer_index"):
        three.intermediate_forward(images, 5)


def test_a_stock_resnet18_checkpoint_gives_the_hosts_logits_and_no_other_heads(host, tmp_path):
    from openood.networks import ResNet18_32x32

    from sdood_plugin.hosts.openood import load_checkpoint

    with torch.random.fork_rng():
        torch.manual_seed(0)
        stock = ResNet18_32x32(num_classes=10)
        images = torch.randn(4, 3, 32, 32)
    stock(images)  # BatchNorm statistics other than the initial ones
    stock.eval()
    torch.save(stock.state_dict(), tmp_path / "best.ckpt")
    ours = load_checkpoint(tmp_path / "best.ckpt", 10)
    with torch.no_grad():
        expected, maps = stock(images, return_feature_list=True)
        found, own_maps = ours(images, return_feature_list=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        for own, other in zip(own_maps, maps, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            ours.forward_threshold(images, 0.5), stock.forward_threshold(images, 0.5), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(UsageError, match="head g_bin: got none in .*best.ckpt"):
        ours.heads(images)
    with pytest.raises(UsageError, match="got 10 classes; expected 100"):
        load_checkpoint(tmp_path / "best.ckpt", 100)
    torch.save({**stock.state_dict(), "conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "other.ckpt")
    with pytest.raises(UsageError, match="give the checkpoint of this backbone"):
        load_checkpoint(tmp_path / "other.ckpt", 10)
    torch.save(stock, tmp_path / "pickled.ckpt")
    with pytest.raises(UsageError, match="loads with weights_only"):
        load_checkpoint(tmp_path / "pickled.ckpt", 10)


class FeatureNet(torch.nn.Module):
    """Hands its input on as features, so that banks and queries are known to the last bit."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(6, 3)

    def forward(self, data, return_feature=False):
        return (self.fc(data), data) if return_feature else self.fc(data)


def feature_loader(features):
    dataset = SimpleNamespace(transform_image=None)
    batches = [{"data": part, "label": torch.zeros(len(part), dtype=torch.int64)} for part in features.split(7)]
    return type("Loader", (list,), {"dataset": dataset})(batches)


def test_confidence_is_minus_the_cores_score_and_survives_pickling(host, generator):
    from sdood_plugin.hosts.openood import SDOODPostprocessor

    bank, heldout, queries = (torch.randn(count, 6, generator=generator) for count in (40, 15, 30))
    queries[15:] += 4
    config = ScoringConfig(k_distance=3, k_vote=4, alpha=0.7)
    post = SDOODPostprocessor(k_distance=3, k_vote=4, alpha=0.7)
    post.setup(FeatureNet(), {"train": feature_loader(bank), "val": feature_loader(heldout)}, {})
    expected = fit_score(bank, bank[:0], heldout, bank[:0], config)(queries)
    _, confidence, labels = post.inference(FeatureNet(), feature_loader(queries), progress=False)
    np.testing.assert_array_equal(confidence, -expected.numpy())
    assert confidence[:15].mean() > confidence[15:].mean(), "larger = in-distribution"
    assert labels.dtype == int
    again = pickle.loads(pickle.dumps(post))
    assert again.setup_flag
    np.testing.assert_array_equal(again.inference(FeatureNet(), feature_loader(queries), progress=False)[1], confidence)


def test_hyperparameters_recompute_what_hangs_on_them(host, generator):
    from sdood_plugin.hosts.openood import SDOODPostprocessor

    bank, heldout, queries = (torch.randn(count, 6, generator=generator) for count in (40, 15, 30))
    loaders = {"train": feature_loader(bank), "val": feature_loader(heldout)}
    post = SDOODPostprocessor(k_distance=1)
    post.setup(FeatureNet(), loaders, {})
    first = post.postprocess(FeatureNet(), queries)[1]
    for hyperparam in ([5, 3, 0.2, False], [2, 5, 0.0, True]):
        post.set_hyperparam(hyperparam)
        assert post.get_hyperparam() == hyperparam
        fresh = SDOODPostprocessor(**dict(zip(("k_distance", "k_vote", "alpha", "normalise"), hyperparam, strict=True)))
        fresh.setup(FeatureNet(), loaders, {})
        torch.testing.assert_close(post.postprocess(FeatureNet(), queries)[1], fresh.postprocess(FeatureNet(), queries)[1])
        assert not torch.equal(post.postprocess(FeatureNet(), queries)[1], first)
    with pytest.raises(UsageError, match="k_distance"):
        post.set_hyperparam([0, 1, 0.1, True])
    with pytest.raises(UsageError, match="postprocessor_args: got k_distanse"):
        SDOODPostprocessor(k_distanse=3)


def test_the_run_folders_banks_rank_as_the_core_does(net, run_folder, loaders):
    from sdood_plugin.hosts.openood import SDOODPostprocessor

    post = SDOODPostprocessor(outliers=run_folder)
    post.setup(net, loaders["id"], loaders["ood"])
    core = load_score(run_folder / "detector")
    assert len(core.outliers) > 0
    with torch.no_grad():
        for loader in (loaders["id"]["test"], loaders["ood"]["near"]["cifar100"]):
            expected = core(net(all_images(loader), return_feature=True)[1])
            _, confidence, _ = post.inference(net, loader, progress=False)
            np.testing.assert_allclose(-confidence, expected.numpy(), rtol=1e-4, atol=1e-5)
            assert (np.argsort(-confidence, kind="stable") == np.argsort(expected.numpy(), kind="stable")).all()
    post.set_hyperparam([3, 4, 0.5, True])
    assert post.score_.calibration.distance_scale != core.calibration.distance_scale
    with pytest.raises(UsageError, match="saved with unit length"):
        post.set_hyperparam([3, 4, 0.5, False])


def test_an_outlier_folder_is_embedded_by_the_given_network(trained, run_folder, loaders):
    from sdood_plugin.hosts.openood import SDOODPostprocessor

    post = SDOODPostprocessor(outliers=run_folder / "outliers")
    post.setup(trained, loaders["id"], loaders["ood"])
    outliers = OutlierSet(run_folder / "outliers")
    expected = extract(trained.network.backbone, outliers.images, device=torch.device("cpu"))
    held = outliers.sources.unique(return_inverse=True)[1] % 10 == 9
    torch.testing.assert_close(post.features["outliers"], expected[~held], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(post.features["heldout_outliers"], expected[held], rtol=1e-4, atol=1e-5)
    kinds = {"outlier_classes": outliers.labels[~held], "heldout_classes": outliers.labels[held]}
    assert all(torch.equal(post.features[name], labels) for name, labels in kinds.items())
    left_out = fit_score(config=post.config_, **post.features).calibration
    assert post.score_.calibration == left_out
    assert left_out.votes != fit_score(config=post.config_, **post.features | dict.fromkeys(kinds)).calibration.votes
    with torch.no_grad():
        train = trained(all_images(loaders["id"]["train"]), return_feature=True)[1]
    torch.testing.assert_close(post.features["inside"], train, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="those of another network"):
        SDOODPostprocessor(outliers=run_folder).setup(trained, loaders["id"], loaders["ood"])


def test_the_hosts_parameter_search_runs_ours(trained, run_folder, tree, tmp_path):
    from sdood_plugin.hosts.openood import Evaluator
    from sdood_plugin.hosts.openood.yamls import FILES

    section = yaml.safe_load(FILES["postprocessors/sdood.yml"])
    section["postprocessor"]["APS_mode"] = True
    section["postprocessor"]["postprocessor_args"]["outliers"] = str(run_folder / "outliers")
    section["postprocessor"]["postprocessor_sweep"] = {
        "k_distance_list": [1, 5],
        "k_vote_list": [3],
        "alpha_list": [0.0, 0.5],
        "normalise_list": [True, False],
    }
    (tmp_path / "postprocessors").mkdir()
    (tmp_path / "postprocessors" / "sdood.yml").write_text(yaml.safe_dump(section))
    made = Evaluator(trained, "cifar10", config_root=str(tmp_path), postprocessor_name="sdood", **common(tree))
    assert made.postprocessor.hyperparam_search_done
    chosen = made.postprocessor.get_hyperparam()
    scores = {}
    for hyperparam in made.recursive_generator(list(made.postprocessor.args_dict.values()), 4):
        made.postprocessor.set_hyperparam(hyperparam)
        inside, outside = (
            made.postprocessor.inference(trained, made.dataloader_dict[kind]["val"], progress=False)[1] for kind in ("id", "ood")
        )
        scores[tuple(hyperparam)] = (inside[:, None] > outside).mean() + 0.5 * (inside[:, None] == outside).mean()
    assert len(scores) == 8
    assert scores[tuple(chosen)] == pytest.approx(max(scores.values()))


def test_evaluator_says_in_one_line_what_does_not_fit(net, tree, tmp_path):
    from openood.networks.lenet import LeNet

    from sdood_plugin.hosts.openood import Evaluator, SDOODNet, SDOODPostprocessor

    def attempt(network=net, id_name="cifar10", **changed):
        Evaluator(network, id_name, **{**common(tree), "postprocessor": SDOODPostprocessor(), **changed})

    def lists_with(name, line):
        root = tmp_path / name.replace("/", "-") / str(abs(hash(line)))
        shutil.copytree(tree / "benchmark_imglist", root / "benchmark_imglist")
        (root / "images_classic").symlink_to(tree / "images_classic")
        (root / "benchmark_imglist" / "cifar10" / f"{name}.txt").write_text(line)
        return {"data_root": str(root)}

    wrong = SDOODNet(ThreeHeadNet(Backbone("small_cnn"), 7), "cifar10")
    other = SDOODNet(ThreeHeadNet(Backbone("small_cnn"), 10), "imagenet")
    stock = LeNet(num_classes=7, num_channel=3)
    unsaid = LeNet(num_classes=7, num_channel=3)
    unsaid.fc = torch.nn.Identity()
    cases = [
        (dict(network=wrong), "got 7 classes; expected 10 as cifar10 has"),
        (dict(network=stock), "got 7 classes; expected 10 as cifar10 has"),
        (dict(network=unsaid), "got 7 classes; expected 10 as cifar10 has"),
        (dict(network=other), "normalisation of the network"),
        (dict(id_name="cifar11"), "id_name: got cifar11"),
        (dict(postprocessor=None, postprocessor_name="knnn"), "postprocessor_name: got knnn"),
        (
            dict(postprocessor=None, postprocessor_name="knn", config_root=str(tmp_path)),
            "expected a folder with postprocessors/knn.yml",
        ),
        (dict(data_root=str(tmp_path / "nowhere")), "imglist .*nowhere.*No such file"),
        (lists_with("test_cifar10", "cifar10/test/cat/0001.png 10\n"), "line 1: got label 10; expected at most 9"),
        *(
            (lists_with(f"{split}_cifar10", "cifar10/test/cat/0001.png -1\n"), "line 1: got label -1; .* and not below 0")
            for split in ("train", "val", "test")
        ),
        (lists_with("train_cifar10", "cifar10/test/my cat/0001.png 3\n"), "expected a relative path without spaces"),
        (lists_with("val_tin", "tin/val/images/none.png -1\n"), "no file .*none.png"),
        (lists_with("test_tin", "tin/val/images/val_0.JPEG cat\n"), "integer label"),
        (dict(postprocessor=SDOODPostprocessor(outliers=tmp_path)), "meta.json"),
    ]
    for changed, expected in cases:
        with pytest.raises(ValueError, match=expected) as caught:
            attempt(**changed)
        assert "\n" not in str(caught.value)


def test_a_run_without_banks_is_said(net, run_folder, loaders, tmp_path):
    from sdood_plugin.hosts.openood import SDOODPostprocessor

    (tmp_path / "detector").mkdir()
    shutil.copy(run_folder / "detector" / "detector.safetensors", tmp_path / "detector")
    for folder in (tmp_path, tmp_path / "detector"):
        with pytest.raises(UsageError, match="got a detector without banks"):
            SDOODPostprocessor(outliers=folder).setup(net, loaders["id"], {})


def test_an_outlier_folder_whose_manifest_does_not_fit_is_refused(trained, run_folder, loaders, tmp_path):
    from sdood_plugin.hosts.openood import SDOODPostprocessor

    folder = tmp_path / "outliers"
    shutil.copytree(run_folder / "outliers", folder)
    next((folder / "images").rglob("*.png")).unlink()
    with pytest.raises(ValueError, match="readable, whole PNG"):
        SDOODPostprocessor(outliers=folder).setup(trained, loaders["id"], {})
    lines = (folder / "manifest.csv").read_text().splitlines(keepends=True)
    (folder / "manifest.csv").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="as in meta.json"):
        SDOODPostprocessor(outliers=folder).setup(trained, loaders["id"], {})
