"""The table and figure scripts at their smallest: what they write, that they go on where they were, that tests stay unseen."""

from __future__ import annotations

import ast
import dataclasses
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

from benchmarks import (
    demo,
    experiment,
    features_cache,
    fig2,
    fig3,
    paired,
    readme,
    real_vit_tiny,
    selection,
    table1,
    table1_openood,
    table2,
    table3,
    table4,
)
from benchmarks.experiment import configuration, read_options, with_given_labels, with_present_sets
from benchmarks.handover import pack
from benchmarks.record import summary
from sdood_plugin import run as running
from sdood_plugin.artifacts import file_hash, read_csv, read_json, value_hash, write_json, write_tensors, write_text
from sdood_plugin.cli import read_config
from sdood_plugin.config import CompareConfig, ImagesConfig, OODConfig, RunConfig, as_dict
from sdood_plugin.context import Context
from sdood_plugin.detector.network import load_network
from sdood_plugin.detector.training import Labelled, train_detector
from sdood_plugin.features import Backbone, extract, load_backbone
from sdood_plugin.outliers.dataset import OutlierSet
from sdood_plugin.randomness import derive_seed
from sdood_plugin.scoring.storage import load_score
from sdood_plugin.training import Job

from ..test_run import tiny_config

SCRIPTS = ("table1", "table1_openood", "table2", "table3", "table4", "fig2", "fig3")
FEW = """--data.train.limit 120 --data.test.limit 30 --data.heldout_fraction 0.25 --outliers.sources 40
--compare.methods [distance,multi-class]""".split()
SHARED = ["--size", "tiny", *FEW, "--start-from", "table1-tiny"]  # table1's run folder, where its test has run before
SAYS = "command config_sha256 device versions seeds wall_s data absent published paired summary".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("tables")
    (root / "configs").symlink_to(Path(__file__).parents[2] / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "ROOT", root)
        patch.setattr(demo, "ROOT", root)
        yield root / "runs" / "benchmarks"


@pytest.fixture
def reads(monkeypatch):
    """(what was read, whether every score was fixed by then) for each look at test images."""
    seen, checking = [], False
    check = running.check_input

    def checked(context, chosen):  # reads every image once, to refuse bad input before work; it decides nothing
        nonlocal checking
        checking = True
        check(context, chosen)
        checking = False

    def spy(name):
        whole = getattr(Context, name)

        def images(self):
            stages = [self.folder / "stages" / f"{stage}.json" for stage in ("calibrate", "train-comparators")]
            if not checking:
                seen.append((name, all(stage.exists() for stage in stages)))
            return whole.fget(self) if isinstance(whole, property) else whole.func(self)

        monkeypatch.setattr(Context, name, property(images))

    monkeypatch.setattr(running, "check_input", checked)
    spy("ood")
    spy("test")
    return seen


def test_table1_writes_what_a_result_must_say_and_reads_test_images_after_the_score_is_fixed(place, reads):
    rows = table1.main(["--size", "tiny", *FEW])
    result = read_json(place / "table1-tiny.json")
    assert not set(SAYS) - result.keys()
    assert result["rows"] == rows and {row["method"] for row in rows} >= {"sdood", "distance", "multi-class"}
    assert {row["method"] for row in result["paired"]} == {"distance", "multi-class", "multi-class-cosine"}
    assert reads and all(late for _, late in reads)


def test_rows_are_written_before_the_paired_differences(place, monkeypatch):
    def cut_off(*_args, **_settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(paired, "paired_rows", cut_off)
    with pytest.raises(KeyboardInterrupt):
        table1.main([*SHARED, "--suffix=-cut"])
    assert {row["method"] for row in read_json(place / "table1-tiny-cut.json")["rows"]} >= {"sdood", "distance"}


def test_scores_of_a_seed_are_found_where_an_earlier_slot_kept_them(place, monkeypatch):
    options = read_options("table9", "", ["--size", "gpu"])
    scores = options.folder(0) / "table4" / "scores-id.csv"
    write_text(scores, "path,sdood\n")
    monkeypatch.setattr(experiment, "RESULTS", place.parent)
    pack(options.folder(0), place.parent / "handover")
    shutil.rmtree(options.folder(0))
    assert experiment.begun(options, 0) == options.folder(0) and scores.read_text() == "path,sdood\n"


def test_the_labelled_table_1_holds_its_methods_and_reads_test_images_after_the_score_is_fixed(place, reads):
    rows = table1_openood.main(["--size", "tiny", *FEW[:-1], "[distance,msp]"])
    result = read_json(place / "table1_openood-tiny.json")
    assert not set(SAYS) - result.keys()
    assert result["rows"] == rows and {row["method"] for row in rows} >= {"sdood", "distance", "msp"}
    assert {row["method"] for row in result["paired"]} == {"distance", "msp"}
    assert reads and all(late for _, late in reads)


def test_the_demo_table_holds_every_comparator_and_reads_test_images_after_the_score_is_fixed(place, reads):
    config = place.parent / "tiny.yml"
    write_text(config, yaml.safe_dump(as_dict(tiny_config(compare=CompareConfig(fake_it_steps=2)))))
    rows = demo.main(["--labels", "hidden", "--seeds", "0", "--config", str(config)])
    result = read_json(place.parents[1] / "benchmarks" / "results" / "demo-hidden.json")
    assert result["rows"] == rows and {row["method"] for row in rows} >= {"sdood", *CompareConfig().methods}
    assert {row["method"] for row in result["paired"]} >= set(CompareConfig().methods)
    assert reads and all(late for _, late in reads)


def test_frozen_features_of_test_images_are_read_after_every_seed_is_fitted(tmp_path, monkeypatch):
    generator, counts = torch.Generator().manual_seed(0), {"cifar10_train": 200}
    weights = _small_heads(tmp_path, monkeypatch)
    for name, imglist in features_cache.LISTS.items():
        count = counts.get(name, 30)
        lines = [f"{row}.png {row % 10}" for row in range(count)]
        write_text(tmp_path / "data" / "benchmark_imglist" / "cifar10" / imglist, "\n".join(lines))
        tensors = {
            "features": torch.randn(count, 128, generator=generator),
            "labels": torch.arange(count) % 10,
            "index": torch.arange(count),
        }
        origin = {"imglist": imglist, "backbone": features_cache.BACKBONE, "images": str(count), "lines": value_hash(lines)}
        write_tensors(tmp_path / "cache" / f"{name}.safetensors", tensors, origin | {"weights": file_hash(weights)})
    events = []

    def noted(module, function, event):
        whole = getattr(module, function)

        def noting(*args, **settings):
            events.append(event(*args))
            return whole(*args, **settings)

        monkeypatch.setattr(module, function, noting)

    noted(features_cache, "read_tensors", lambda file: file.stem)
    noted(real_vit_tiny, "fit_score", lambda *_: "fit")
    noted(real_vit_tiny, "train_parts", lambda *_: "train")
    monkeypatch.setattr(real_vit_tiny, "RESULTS", tmp_path)
    given = [str(tmp_path / "data"), "--weights", str(weights), "--cache", str(tmp_path / "cache")]
    rows = real_vit_tiny.main([*given, "--seeds", "0", "1", "--bank-sizes", "20"])
    tests = [number for number, event in enumerate(events) if event in ("cifar10_test", *real_vit_tiny.OODS)]
    assert len(tests) == 3 and not {"fit", "train"} & set(events[tests[0] :])
    assert events[: tests[0]].count("fit") == events[: tests[0]].count("train") == 4
    result = read_json(tmp_path / "real_vit_tiny.json")
    assert result["rows"] == rows and [one["seed"] for one in result["chosen"]] == [0, 1]
    assert {row["n_runs"] for row in result["paired"]} == {2}


def _small_heads(folder, monkeypatch):
    """Weights of a small backbone that the heads are trained on from now on."""
    with torch.random.fork_rng():
        write_tensors(folder / "weights.safetensors", Backbone("small_cnn").state_dict())
    heads = dataclasses.replace(real_vit_tiny.HEADS, backbone="small_cnn", epochs=2, batch_size=16)
    monkeypatch.setattr(real_vit_tiny, "HEADS", heads)
    return folder / "weights.safetensors"


def test_heads_on_kept_features_are_what_the_package_trains_on_the_images(tmp_path, monkeypatch, accelerator):
    weights = _small_heads(tmp_path, monkeypatch)
    images = torch.randint(256, (48, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inside, outliers = Labelled(images[:32], torch.arange(32) % 10), Labelled(images[32:], torch.arange(16) % 10)
    backbone = load_backbone("small_cnn", weights)
    kept = [real_vit_tiny.Labelled(extract(backbone, part.images, device=torch.device("cpu")), part.labels)
            for part in (inside, outliers)]  # fmt: skip
    config = dataclasses.replace(real_vit_tiny.HEADS, weights=str(weights))
    job = Job(accelerator, tmp_path / "whole", derive_seed(3, "heads"))
    whole, _ = train_detector(inside, outliers, None, config, job, classes=10)
    for value, other in zip(real_vit_tiny.train_heads(*kept, weights, 3).parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-3)


def test_outliers_are_held_out_with_the_images_they_are_made_of(tmp_path, monkeypatch):
    made = mock.MagicMock(
        manifest=[{"source": name} for name in ("b", "c", "b", "a")], images=torch.zeros(4, 3, 2, 2), labels=torch.arange(4)
    )
    made.__len__.return_value = 4
    monkeypatch.setattr(real_vit_tiny, "OutlierSet", lambda _folder: made)
    monkeypatch.setattr(real_vit_tiny, "load_backbone", lambda *_: None)
    monkeypatch.setattr(real_vit_tiny, "features_of", lambda images, *_: torch.arange(len(images.images))[:, None].float())
    found = real_vit_tiny.OutlierFeatures(tmp_path, ["a", "b", "c"], tmp_path, "cpu")
    kept, heldout = found.split(torch.tensor([True, False, True]))
    assert (kept.labels.tolist(), heldout.labels.tolist()) == ([0, 2], [1, 3])
    with pytest.raises(SystemExit, match="1 sources, c the first"):
        real_vit_tiny.OutlierFeatures(tmp_path, ["a", "b"], tmp_path, "cpu")


def test_a_grid_that_was_cut_off_does_the_cells_that_are_missing(place, monkeypatch):
    done = []
    whole = table2.run

    def counting(config, folder, only=None):
        done.append(config.outliers.guidance_weight)
        if len(done) == 3:
            raise KeyboardInterrupt
        return whole(config, folder, only)

    monkeypatch.setattr(table2, "run", counting)
    with pytest.raises(KeyboardInterrupt):
        table2.main(["--size", "tiny", *FEW])
    assert {row["guidance_weight"] for row in read_json(place / "table2-tiny.json")["rows"]} == {2.0}
    table2.main(["--size", "tiny", *FEW])
    assert done == [2.0, 2.0, 3.0, 3.0, 3.0]
    rows = read_json(place / "table2-tiny.json")["rows"]
    assert {row["guidance_weight"] for row in rows} == {2.0, 3.0}
    assert len({(row["guidance_weight"], row["method"], row["ood"]) for row in rows}) == len(rows)
    third = table3.main(["--size", "tiny", *FEW])
    assert len(done) == 5  # of cells that are there
    assert third == [row for row in rows if row["guidance_weight"] == 2] == read_json(place / "table3-tiny.json")["rows"]
    assert {row["method"] for row in third} == set(table2.METHODS)


def test_table4_chooses_on_one_half_of_the_heldout_sources_and_tests_on_the_other(place, reads, monkeypatch):
    chosen_on, detectors = [], []
    whole = table4.detector_chosen_on

    def noted(images, context):
        assert not reads
        chosen_on.append(images)
        detectors.append(whole(images, context))
        return detectors[-1]

    monkeypatch.setattr(table4, "detector_chosen_on", noted)
    rows = table4.main(SHARED)
    assert reads and all(late for _, late in reads)
    options = read_options("table4", "", SHARED)
    context = Context(configuration(options, table4.SIZES), options.folder(0))
    for name in table4.SETS:
        made = OutlierSet(context.folder / name)
        source = {row["file"]: int(row["source_index"]) for row in made.manifest}
        tested = [source[row["path"]] for row in read_csv(context.folder / "table4" / f"scores-{name}.csv")]
        assert tested and context.heldout[tested].all() and not chosen_on[0][tested].any()
        assert {row["n_ood"] for row in rows if row["ood"] == name} == {len(tested)}
    outliers = OutlierSet(context.folder / "outliers").sources
    controls = OutlierSet(context.folder / "controls").sources
    counts = [int(chosen_on[0][rows].sum()) for rows in (slice(None), outliers, controls)]
    assert detectors[0].fitted.calibration.heldout == counts
    again = whole(context.heldout, context).fitted.calibration  # all of them: what the run itself chose
    run_own = load_score(context.folder / "detector").calibration
    assert again.alpha == run_own.alpha and again.distance_scale == pytest.approx(run_own.distance_scale, rel=1e-4)
    assert {row["method"] for row in rows} >= {"sdood", "distance", "multi-class", "msp", "energy", "knn", "mahalanobis", "vim"}


def test_the_halves_of_the_heldout_sources_are_apart_and_whole():
    heldout = torch.tensor([1, 0, 1, 1, 1, 0, 1], dtype=torch.bool)
    chosen, tested = table4.halves(heldout, torch.tensor([6, 4, 2, 2, 0, 5, 1]))
    assert tested.nonzero()[:, 0].tolist() == [2, 6] and chosen.nonzero()[:, 0].tolist() == [0, 3, 4]  # 3 has no outlier


def test_a_table4_that_goes_on_pairs_the_seeds_of_earlier_calls_too(place):
    table4.main(SHARED)
    table4.main([*SHARED, "--seeds", "1"])
    result = read_json(place / "table4-tiny.json")
    assert result["seeds"] == [0, 1] and {row["n_runs"] for row in result["paired"]} == {2}
    assert {row["ood"] for row in result["paired"]} == set(table4.SETS)
    means = {(row["method"], row["ood"]): row["auroc"] for row in result["summary"]}
    for row in result["paired"]:
        gap = means["sdood", row["ood"]] - means[row["method"], row["ood"]]
        assert row["difference"] == pytest.approx(gap, abs=1e-3)


def test_table3_makes_the_cells_it_shows_and_no_others(place, monkeypatch):
    monkeypatch.setattr(table2, "run_cells", _cells(made := []))
    rows = table3.main(["--size", "tiny", "--start-from", "other", "--suffix=-a"])
    (options, wanted) = made[0]
    assert options.start_from == "other" and options.name == "table2-tiny-a" and wanted == table2.grid("tiny")[:1]
    result = read_json(place / "table3-tiny-a.json")
    assert result["rows"] == rows and {row["guidance_weight"] for row in rows} == {2.0}
    assert result["seeds"] == [0, 4] == [row["seed"] for row in rows]


def _cells(calls):
    """`run_cells` of a table 2 that has another seed and other cells already."""

    def run_cells(options, wanted):
        calls.append((options, wanted))
        rows = [{**cell, "seed": seed} for seed in (0, 4) for cell in table2.grid("tiny")]
        write_json(options.result, {"command": "x", "wall_s": 1.0, "rows": rows})
        return rows

    return run_cells


def test_early_and_late_are_moments_of_one_training_looked_at_after_the_score_is_fixed(place, reads):
    if not (place / "table1-tiny-0").exists():
        table1.main(["--size", "tiny", *FEW])
    reads.clear()
    rows = fig3.main([*SHARED, "--suffix=-two", "--detector.epochs", "10"])
    result = read_json(place / "fig3-tiny-two.json")
    assert reads and all(late for _, late in reads)
    assert {(row["training"], row["epochs"]) for row in rows} == {("early", 1), ("late", 10)} and result["rows"] == rows
    assert {row["loss_gap"] for row in rows if row["training"] == "early"} == {0.0}
    found = {(row["training"], row["kind"]) for row in result["summary"] if "knn_acc" in row}
    assert found == {(training, kind) for training in ("early", "late") for kind in ("digits6-9", "outliers")}
    run = Context(read_config(place / "fig3-tiny-two-0" / "config.yaml"), place / "fig3-tiny-two-0")
    trained = load_network(run.folder / "detector" / "detector.safetensors").state_dict()
    early, late = (fig3.early_network(run, epochs)[0].state_dict() for epochs in (1, 10))
    assert all(torch.equal(late[name], value) for name, value in trained.items())
    assert not all(torch.equal(early[name], value) for name, value in trained.items())


def test_neighbours_say_how_far_two_kinds_are_apart():
    generator = torch.Generator().manual_seed(0)
    points, shift = torch.randn(300, 4, generator=generator), torch.tensor([50.0, 0, 0, 0])
    assert fig3.told_apart(points[:100], points[100:] + shift) == {"knn_acc": 100.0, "images": 100}
    same = fig3.told_apart(points[:150], points[150:])
    assert 35 < same["knn_acc"] < 65 and same["images"] == 150
    twice = fig3.told_apart(points[:100], points[:100])  # every image's nearest is its copy of the other kind
    assert twice["knn_acc"] < 50


@pytest.mark.parametrize("script", [fig2, fig3])
def test_a_figure_is_drawn_from_its_result_alone(place, script):
    name = script.__name__.removeprefix("benchmarks.")
    script.main(SHARED)
    figure = place.parent / "figures" / f"{name}-tiny.png"
    figure.unlink()
    for folder in place.glob(f"{name}-tiny-[0-9]"):
        shutil.rmtree(folder)
    script.draw(read_json(place / f"{name}-tiny.json"), read_options(name, "", ["--size", "tiny"]))
    assert figure.exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_table_script_has_no_way_to_images_but_a_run(script):
    tree = ast.parse((Path(experiment.__file__).parent / f"{script}.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not names & {"load_images", "draw_demo", "load_dataset", "sources", "demo", "read_images"}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "ood" not in attributes or script in ("table1", "table1_openood")  # of the configuration, never of a Context
    # fig2 takes training images, table4 its ID test images, fig3 those of a run that is evaluated
    assert "Context" not in names or script in ("fig2", "fig3", "table4")


def test_absent_sets_are_named(tmp_path):
    wanted = [OODConfig("near", "near", ImagesConfig("demo", split="near")), OODConfig("lsun", "far", ImagesConfig("data/lsun"))]
    options = read_options("table1", "", ["--size", "gpu", "--data", str(tmp_path)])
    config, absent = with_present_sets(RunConfig(), wanted, options)
    assert absent == ["lsun"] and [one.name for one in config.data.ood] == ["near"]
    (tmp_path / "lsun").mkdir()
    assert with_present_sets(RunConfig(), wanted, options)[1] == []


def test_a_summary_is_the_mean_over_seeds_of_rows_that_are_alike():
    rows = [{"method": name, "ood": "near", "seed": seed, "auroc": value, "n_id": 9} for name, seed, value in
            [("a", 0, 1.0), ("a", 1, 3.0), ("b", 0, 5.0)]]  # fmt: skip
    found = summary([*rows, {"method": "c", "skipped": "why"}])
    assert [(one["method"], one["auroc"], one["n_seeds"]) for one in found] == [("a", 2.0, 2), ("b", 5.0, 1)]
    assert found[0]["auroc_std"] == pytest.approx(2**0.5)


def test_the_readme_says_not_yet_and_who_is_ahead():
    assert readme.published_beside_ours({}).count("not yet") == (15 + 5) * 4 + 10 + 3 + 7
    rows = [{"method": "dn2", "ood": "cifar100", "seed": seed, "auroc": 90.0 + seed} for seed in (0, 1)]
    text = readme.published_beside_ours({"table1-gpu-resnet18": {"rows": rows}})
    assert "| DN2 | ResNet-18 | 83.3: not yet |" in text  # whose weights have seen ImageNet
    assert "| DN2 | ResNet-18, SimCLR on CIFAR-10 | -: 90.5 +- 0.7 |" in text
    difference = {"ours": "sdood", "ood": "near", "difference": 2.0, "spread": 0.4, "n_runs": 3}
    ahead, level = {**difference, "method": "x", "low": 1.0, "high": 3.0}, {**difference, "method": "y", "low": -1.0, "high": 3.0}
    text = readme.paired([ahead, level])
    assert "+2.0 +- 0.4 (+1.0 to +3.0) ahead" in text and text.count("ahead") == 1
    assert "ahead" not in readme.paired([{**ahead, "n_runs": 2}])
    assert "| +2.0 (+1.0 to +3.0) |" in readme.paired([{**ahead, "spread": 0.0, "n_runs": 1}])
    assert "python -m benchmarks.table1" in readme.queue()


def test_openoods_numbers_stand_beside_the_mean_of_both_near_sets():
    rows = [{"method": "msp", "seed": 0, "ood": ood, "auroc": auroc} for ood, auroc in [("cifar100", 86.0), ("tin", 89.0)]]
    text = readme.openood_beside_ours({"seeds": [0, 1], "rows": [*rows, {**rows[0], "seed": 1}]})
    assert "| MSP | 88.03: 87.5 | 90.73 |" in text and "| KNN | 90.64: not yet |" in text and "| sdood | -: not yet |" in text


def test_the_readme_says_what_a_threshold_calls_ood():
    assert readme.decisions([{"ood": "near", "auroc": 1.0}]) == ""
    shares = [("near", 4.0, 80.0), ("far", 4.0, 100.0), ("near", 6.0, 90.0), ("far", 6.0, 100.0)]
    rows = [{"ood": name, "called_id": inside, "called_ood": outside} for name, inside, outside in shares]
    assert readme.decisions(rows).endswith("ID 5.0 +- 1.4, near 85.0 +- 7.1, far 100.0 +- 0.0.")


def test_the_readme_says_how_far_kinds_are_apart_early_and_late():
    assert readme.told_apart([{"training": "early", "kind": "id"}]) == ""
    rows = [{"training": moment, "kind": "near", "seed": seed, "knn_acc": value} for moment, seed, value in
            (("early", 0, 60.0), ("late", 0, 90.0), ("early", 1, 62.0), ("late", 1, 90.0))]  # fmt: skip
    assert readme.told_apart(rows).endswith("in per cent: early, near 61.0 +- 1.4; late, near 90.0 +- 0.0.")
    result = {"command": "x", "device": "cpu", "versions": {}, "seeds": [0, 1], "wall_s": 1, "rows": rows}
    assert readme.told_apart(rows) in readme.section("fig3", result)


def test_the_readme_shows_the_auroc_of_each_id_class():
    assert readme.by_class([]) == ""
    cells = [("near", 1, 0, 80.0), ("near", 1, 1, 90.0), ("far", 1, 0, 99.0), ("near", 0, 0, 70.0), ("far", 0, 0, 98.0)]
    rows = [
        {"method": "both", "seed": seed, "ood": name, "id_class": label, "auroc": auroc, "n_id": 50 + label, "n_ood": 20}
        for name, label, seed, auroc in cells
    ]
    other = {**rows[0], "method": "distance", "auroc": 1.0}
    text = readme.by_class([*rows, other])
    assert text.endswith("| class | ID images | near | far |\n| --- | --- | --- | --- |\n| 0 | 50 | 70.0 | 98.0 |\n"
                         "| 1 | 51 | 85.0 +- 7.1 | 99.0 |")  # fmt: skip
    result = {"command": "x", "device": "cpu", "versions": {}, "seeds": [0, 1], "wall_s": 1, "rows": [], "by_class": rows}
    assert text in readme.section("scoring", result)


def test_a_result_of_older_code_says_so(tmp_path, monkeypatch):
    def git(*words):
        said = subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True, text=True)
        return said.stdout.strip()

    monkeypatch.setattr(readme, "ROOT", tmp_path)
    assert not readme.is_older("0" * 40)  # no checkout
    git("init", "--quiet")
    git("-c", "user.name=a", "-c", "user.email=a", "commit", "--quiet", "--allow-empty", "--message", "first")
    head = git("rev-parse", "HEAD")
    assert not readme.is_older(head) and not readme.is_older(None)
    assert readme.is_older(f"{head}-dirty") and readme.is_older("0" * 40)
    assert readme.shortcomings({"commit": head, "threads": 1, "data": {}, "summary": []}) == ""
    assert readme.shortcomings({"commit": "0" * 40, "threads": 1, "summary": []}) == (
        "older code: its command may differ; not recorded: image counts"
    )


def test_a_start_of_the_selection_changes_weights_and_rate_alone():
    base = read_config(selection.ROOT / "configs" / "demo.yml")
    whole = next(one for one in selection.variants(base) if selection.name_of(one) == "all, with controls")
    starts = [one for one in selection.variants(base) if one["part"] == "start"]
    for variant, (weights, lr) in zip(starts, selection.STARTS, strict=True):
        changed = dataclasses.replace(base.detector, weights=weights, lr=lr)
        assert selection.configured(base, variant, 0) == dataclasses.replace(
            selection.configured(base, whole, 0), detector=changed
        )
    assert not any(one["part"] == "start" for one in selection.variants(with_given_labels(base)))
