"""The whole run at tiny size: what it writes, what it skips, what it resumes to."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sdood_plugin import context, stages
from sdood_plugin.artifacts import read_csv, read_tensors, value_hash, write_tensors
from sdood_plugin.config import (
    ClusteringConfig,
    CompareConfig,
    DataConfig,
    DetectorConfig,
    DiffusionConfig,
    ImagesConfig,
    OODConfig,
    OutliersConfig,
    RunConfig,
    ScoringConfig,
    SelectionConfig,
)
from sdood_plugin.detector.network import load_network
from sdood_plugin.errors import RunError, UsageError
from sdood_plugin.features import extract
from sdood_plugin.generation import load_judge
from sdood_plugin.inspection import warn_of_controls
from sdood_plugin.outliers.dataset import OutlierSet
from sdood_plugin.plan import describe_plan
from sdood_plugin.report.page import write_report
from sdood_plugin.run import check_input, is_current, run
from sdood_plugin.scoring.score import fit_score
from sdood_plugin.scoring.storage import load_score
from sdood_plugin.stage_table import chosen_stages


def tiny_config(**changes) -> RunConfig:
    """The embedded data, a few steps of everything."""
    config = RunConfig(
        report=False,
        device="cpu",
        data=DataConfig(
            ImagesConfig("demo", limit=90),
            ImagesConfig("demo", split="test", limit=30),
            [
                OODConfig("digits", "near", ImagesConfig("demo", split="near", limit=20)),
                OODConfig("noise", "far", ImagesConfig("demo", split="noise", limit=20)),
            ],
            image_size=None,
            heldout_fraction=0.2,
        ),
        clustering=ClusteringConfig(method="kmeans", clusters=3, pretext_steps=3, pretext_batch_size=16, augmentation="digits"),
        diffusion=DiffusionConfig(size="tiny", steps=4, batch_size=8),
        outliers=OutliersConfig(sampling_steps=2, sources=24, batch_size=10),
        detector=DetectorConfig(epochs=2, batch_size=24, augmentation="digits"),
        scoring=ScoringConfig(),
        compare=CompareConfig(["distance", "msp", "vim", "oe-noise"]),
    )
    return dataclasses.replace(config, **changes)


def artefacts(folder: Path) -> dict[str, bytes]:
    """Bytes of everything a run makes that is not about when or how it was called, nor the checkout's commit."""
    told = {"run.json", "config.yaml"}
    return {
        path.relative_to(folder).as_posix(): re.sub(rb'commit(": "| )[0-9a-f]{40}(-dirty)?', b"", path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in told and path.parent.name != "stages"
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert set(run(tiny_config(), folder).values()) == {"ran"}
    return folder


def test_outliers_and_controls_are_inspected_beside_their_sources(finished, tmp_path):
    run = context.Context(tiny_config(), finished)
    quality = json.loads((finished / "inspection" / "quality.json").read_text())
    assert set(quality) == {"outliers", "controls"}
    seen = load_judge(run)(run.train.images)[1].argmax(dim=1)
    for name, found in quality.items():
        rows = list(OutlierSet(finished / name).manifest)
        right = [int(seen[int(row["source_index"])]) == int(row["source_label"]) for row in rows]
        assert found["source_accuracy"] == pytest.approx(100 * sum(right) / len(right)) and found["count"] == 24
        assert [row["heldout"] for row in rows] == [str(int(run.heldout[int(row["source_index"])])) for row in rows]
    shutil.copytree(finished, tmp_path / "copy")  # a report is among the artefacts that other tests compare
    page = write_report(tmp_path / "copy").read_text()
    assert f"<td>24</td><td>{quality['outliers']['source_accuracy']:.1f}</td>" in page and "outliers were used" not in page


def test_the_meta_of_a_run_tells_where_labels_and_models_come_from(finished):
    meta = json.loads((finished / "outliers" / "meta.json").read_text())
    assert (meta["data"], meta["label_source"], meta["label_weights"]) == ("demo", "kmeans", "random")
    assert (meta["reference_backbone"], meta["reference_weights"], meta["training_images"]) == ("small_cnn", "clustering", 90)
    assert "trained on training images, from the clustering's weights" in (finished / "outliers" / "README.md").read_text()


def test_networks_start_from_the_weights_of_the_clustering_unless_told_otherwise(finished, tmp_path):
    still = dataclasses.replace(tiny_config().detector, lr=1e-12, weight_decay=0.0)
    started = {}
    for weights in (None, "random"):
        folder = tmp_path / str(weights)
        shutil.copytree(finished, folder)
        run(tiny_config(detector=dataclasses.replace(still, weights=weights)), folder, "train-detector")
        for name in ("reference", "detector"):
            started[weights, name] = read_tensors(folder / name / f"{name}.safetensors")
    clustered = read_tensors(finished / "clustering" / "backbone.safetensors")
    for (weights, _), tensors in started.items():
        same = [torch.allclose(tensors[f"backbone.{name}"], value) for name, value in clustered.items() if value.ndim == 4]
        assert len(same) == 6 and all(same) == (weights is None) == any(same)


@pytest.mark.parametrize(
    ("clustering", "detector", "expected"),
    [
        ({"method": "given"}, {}, None),
        ({"backbone": "resnet18_cifar"}, {}, None),
        ({"weights": "w"}, {}, "w"),
        ({"weights": "w", "finetune_epochs": 1}, {}, "clustering/backbone.safetensors"),
        ({}, {"weights": "random"}, "random"),
        ({}, {"weights": "other"}, "other"),
    ],
)
def test_which_weights_a_detector_starts_from(tmp_path, clustering, detector, expected):
    config = tiny_config(clustering=ClusteringConfig(**clustering), detector=DetectorConfig(**detector))
    found = context.Context(config, tmp_path).detector.weights
    assert found == (str(tmp_path / expected) if expected and "/" in expected else expected)


def test_what_a_selection_drops_is_recorded_and_told(finished, tmp_path, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    assert json.loads((copy / "detector" / "selection.json").read_text())["dropped"] == {}
    near = sorted(float(row["nearest_train_distance"]) for row in OutlierSet(copy / "outliers").manifest)[5]
    with caplog.at_level("INFO", logger="sdood_plugin"):
        run(tiny_config(selection=SelectionConfig(duplicate_distance=near)), copy, "train-detector")
    found = json.loads((copy / "detector" / "selection.json").read_text())
    assert (found["count"], found["kept"], found["dropped"]) == (24, 19, {"duplicate": 5})
    assert "19 of 24 outliers kept; dropped 5 duplicate" in caplog.text
    heldout = context.Context(tiny_config(), copy).heldout
    rows = [row for row in OutlierSet(copy / "outliers").manifest if float(row["nearest_train_distance"]) >= near]
    assert found["kept_of_heldout_sources"] == sum(bool(heldout[int(row["source_index"])]) for row in rows)
    write_report(copy)
    page = (copy / "report.html").read_text()
    assert "19 of 24 outliers were used" in page and "5 duplicate" in page


def test_the_report_says_what_was_called_ood(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    path = copy / "evaluation" / "scores-id.csv"
    threshold = json.loads((copy / "detector" / "score.json").read_text())["calibration"]["threshold"]
    above = [float(row["score"]) > threshold for row in read_csv(path)]
    write_report(copy)
    assert f"in per cent: id {100 * sum(above) / len(above):.1f}, digits " in (copy / "report.html").read_text()
    path.write_text(path.read_text().replace(",0\n", ",1\n"))
    write_report(copy)
    assert "in per cent: id 100.0, digits " in (copy / "report.html").read_text()


@pytest.mark.parametrize(("heldout", "outlier"), [(False, False), (True, False), (False, True)])
def test_an_image_whose_features_are_not_finite_is_named_by_its_file(finished, monkeypatch, heldout, outlier):
    run = context.Context(tiny_config(), finished)
    chosen = run.heldout if heldout else ~run.heldout
    name = run.train.names[chosen.nonzero()[3].item()]
    broken = run.train.images[chosen][3]
    if outlier:
        made = OutlierSet(finished / "outliers")
        row = int(chosen[made.sources].nonzero()[3])
        name, broken = f"outliers/{made.manifest[row]['file']}", made.images[row]

    def spoilt(model, images, **rest):
        features = extract(model, images, **rest)
        features[(images == broken).flatten(1).all(dim=1), 1] = torch.nan
        return features

    monkeypatch.setattr(stages, "extract", spoilt)
    network = load_network(finished / "detector" / "detector.safetensors")
    with pytest.raises(RunError, match=f"features of image {re.escape(name)}: got NaN or infinity .1 of"):
        stages.score_features(run, network)


@pytest.mark.parametrize("since", [{"alpha", "held-out images"}, {"held-out images"}], ids=["0.2.0", "held-out scores alone"])
def test_a_run_that_an_earlier_version_calibrated_is_calibrated_again_and_nothing_trained(finished, tmp_path, since):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    record, score = copy / "stages" / "calibrate.json", copy / "detector" / "score.json"
    old, said = json.loads(record.read_text()), json.loads(score.read_text())
    parts = {name: old["parts"][name] for name in old["parts"].keys() - since}  # what the key of that version had
    record.write_text(json.dumps(old | {"parts": parts, "key": value_hash(parts)}))
    if "alpha" in since:
        del said["calibration"]["votes"]
        score.write_text(json.dumps(said))
    bank = read_tensors(copy / "detector" / "bank.safetensors")
    bank["heldout"] = bank.pop("heldout_distance") + said["calibration"]["alpha"] * bank.pop("heldout_votes")
    write_tensors(copy / "detector" / "bank.safetensors", bank)
    with pytest.raises(RunError, match="delete score.json and run `sdood train-detector` on that run folder"):
        load_score(copy / "detector")
    outcome = run(tiny_config(), copy, "evaluate")
    assert {name for name, done in outcome.items() if done == "ran"} == {"calibrate"}  # to the same bytes: nothing after it
    assert score.read_bytes() == (finished / "detector" / "score.json").read_bytes()


def test_a_run_that_was_calibrated_by_an_earlier_version_can_still_be_looked_at(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    assert "held-out controls" in write_report(copy).read_text()
    file = copy / "detector" / "score.json"
    score = json.loads(file.read_text())
    del score["calibration"]["votes"]
    file.write_text(json.dumps(score))
    assert "held-out controls" not in write_report(copy).read_text()


def test_the_rows_say_what_the_threshold_calls_ood(finished):
    flags = {
        name: [float(row["called_ood"]) for row in read_csv(finished / "evaluation" / f"scores-{name}.csv")]
        for name in ("id", "digits", "noise")
    }
    shares = {name: 100 * sum(found) / len(found) for name, found in flags.items()}
    assert len(set(shares.values())) > 1
    rows = json.loads((finished / "metrics.json").read_text())["rows"]
    assert [row["called_ood"] for row in rows if row["method"] == "sdood"] == [shares["digits"], shares["noise"]]
    assert [row["called_id"] for row in rows if row["method"] == "sdood"] == [shares["id"]] * 2
    assert not any("called_id" in row for row in rows if row["method"] != "sdood")


def test_alpha_is_chosen_on_the_run_s_outliers_by_class_and_on_its_controls(finished):
    run = context.Context(tiny_config(), finished)
    network = load_network(finished / "detector" / "detector.safetensors")

    def features(name, heldout):
        made = OutlierSet(finished / name)
        made = made.take(run.heldout[made.sources] == heldout)
        return extract(network.backbone, made.images, device=torch.device("cpu")), made.labels

    inside, heldout = (
        extract(network.backbone, run.train.images[rows], device=torch.device("cpu")) for rows in (~run.heldout, run.heldout)
    )
    (bank, classes), (far, own), (controls, _) = (
        features("outliers", False),
        features("outliers", True),
        features("controls", True),
    )
    assert len(own.unique()) > 1 and len(controls)
    kinds = {"outlier_classes": classes, "heldout_classes": own, "heldout_controls": controls}
    expected = fit_score(inside, bank, heldout, far, ScoringConfig(), **kinds).calibration
    found = load_score(finished / "detector").calibration
    assert found.votes == pytest.approx(expected.votes) and set(found.votes) == {
        "ID",
        "outliers",
        "controls",
        "outliers of other classes",
    }
    assert found.alpha == expected.alpha and np.array(found.curve) == pytest.approx(np.array(expected.curve))
    assert [row["set"] for row in read_csv(finished / "detector" / "heldout.csv")].count("controls") == len(controls)


def test_an_inspection_with_substituted_features_runs_again(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    path = copy / "inspection" / "quality.json"
    quality = json.loads(path.read_text())
    quality["outliers"]["fidelity"]["instead_of"] = "Inception-v3 (FID)"
    path.write_text(json.dumps(quality))
    assert run(tiny_config(), copy, "inspect")["inspect"] == "ran"
    assert path.read_bytes() == (finished / "inspection" / "quality.json").read_bytes()
    assert run(tiny_config(), copy, "inspect")["inspect"] == "done"


def test_a_run_folder_tells_its_story(finished):
    for name in (
        "config.yaml",
        "run.json",
        "labels.csv",
        "diffusion/unet.safetensors",
        "outliers/imglist.txt",
        "outliers/manifest.csv",
        "controls/manifest.csv",
        "inspection/quality.json",
        "detector/detector.safetensors",
        "detector/score.json",
        "evaluation/scores-id.csv",
        "metrics.json",
    ):
        assert (finished / name).is_file(), name
    assert not list(finished.rglob("checkpoint.pt")) and not list(finished.rglob(".key"))
    rows = json.loads((finished / "metrics.json").read_text())["rows"]
    assert {row["method"] for row in rows} >= {
        "sdood",
        "sdood-distance",
        "sdood-vote",
        "sdood-g_bin",
        "distance",
        "msp",
        "vim",
        "oe-noise",
    }
    for row in rows:
        assert {"method", "seed", "ood", "group", "auroc", "aupr", "fpr95", "n_id", "n_ood"} <= row.keys()
        assert 0 <= row["auroc"] <= 100 and row["n_id"] == 30 and row["n_ood"] == 20


def test_metrics_follow_from_the_scores_of_each_image(finished):
    def scores(name):
        lines = (finished / "evaluation" / f"scores-{name}.csv").read_text().splitlines()[1:]
        return np.array([float(line.split(",")[1]) for line in lines])

    inside, outside = scores("id"), scores("digits")
    above = (outside[:, None] > inside).mean() + 0.5 * (outside[:, None] == inside).mean()
    row = next(
        r for r in json.loads((finished / "metrics.json").read_text())["rows"] if r["method"] == "sdood" and r["ood"] == "digits"
    )
    assert row["auroc"] == pytest.approx(100 * above, abs=0.05)


def test_a_finished_run_is_skipped_whole(finished):
    before = artefacts(finished)
    assert set(run(tiny_config(), finished).values()) == {"done"}
    assert artefacts(finished) == before


def test_switching_compile_makes_nothing_again(finished):
    config = tiny_config()
    switched = {name: dataclasses.replace(getattr(config, name), compile=True) for name in ("diffusion", "detector")}
    found = context.Context(dataclasses.replace(config, **switched), finished)
    assert [stage.name for stage in chosen_stages(found.config) if not is_current(stage, found)] == []


def test_the_plan_says_what_is_done(finished):
    plan = describe_plan(tiny_config(detector=DetectorConfig(epochs=1)), finished)
    cost = {line.split()[0]: line.split()[1] for line in plan.splitlines() if "->" in line}
    done = {"cluster", "train-diffusion"}  # the outliers are judged by the reference, which is a detector
    assert {name for name in cost if cost[name] == "done"} == done
    assert "3 clusters to be found" in plan


@pytest.mark.parametrize(
    ("change", "reruns"),
    [
        ({"scoring": ScoringConfig(k_vote=3)}, {"calibrate", "evaluate"}),
        ({"compare": CompareConfig(["energy"])}, {"train-comparators", "compare"}),
        (
            {"outliers": OutliersConfig(start_fraction=0.3, sampling_steps=2, sources=24, batch_size=10)},
            {"generate", "inspect", "train-detector", "calibrate", "evaluate"},
        ),
    ],
)
def test_a_changed_setting_reruns_what_depends_on_it(finished, tmp_path, change, reruns, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    with caplog.at_level("INFO", logger="sdood_plugin"):
        outcome = run(tiny_config(**change), copy)
    assert {name for name, what in outcome.items() if what == "ran"} == reruns
    assert "changed" in caplog.text


def test_another_run_makes_the_same_bytes(finished, tmp_path):
    run(tiny_config(), tmp_path / "again")
    again, before = artefacts(tmp_path / "again"), artefacts(finished)
    assert again.keys() == before.keys()
    assert [name for name in before if again[name] != before[name]] == []


def test_true_labels_decide_nothing(finished, tmp_path, monkeypatch):
    """Permuting the true labels changes no artefact: they are for the report only."""
    original = context.load_images

    def permuted(source, data, seed):
        images = original(source, data, seed)
        return images if images.labels is None else dataclasses.replace(images, labels=images.labels.roll(7))

    monkeypatch.setattr(context, "load_images", permuted)
    run(tiny_config(), tmp_path / "permuted")
    assert artefacts(tmp_path / "permuted") == artefacts(finished)


def test_test_images_decide_nothing_in_the_detector(finished, tmp_path):
    config = tiny_config()
    swapped = dataclasses.replace(config.data, test=ImagesConfig("demo", split="near", limit=25), ood=config.data.ood[1:])
    run(dataclasses.replace(config, data=swapped), tmp_path / "swapped")
    for name in ("detector.safetensors", "bank.safetensors", "score.json"):
        assert (tmp_path / "swapped" / "detector" / name).read_bytes() == (finished / "detector" / name).read_bytes()


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_run import tiny_config
from sdood_plugin.run import run
run(tiny_config(checkpoint_seconds=0.0), Path({folder!r}))
"""


def test_a_killed_run_resumes_to_the_same_bytes(finished, tmp_path):
    """Killed without warning at several places, then run to its end: every byte as if it had never been killed."""
    folder = tmp_path / "killed"
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder))
    for trigger in ("clustering/checkpoint.pt", "diffusion/checkpoint.pt", "outliers/images", "detector/checkpoint.pt"):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (folder / trigger).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(tiny_config(), folder)
    resumed, whole = artefacts(folder), artefacts(finished)
    assert [name for name in whole | resumed if resumed.get(name) != whole.get(name)] == []


def test_two_processes_make_the_same_outliers(finished, tmp_path):
    """The outlier set of two processes is that of one, byte for byte."""
    folder = tmp_path / "two"
    shutil.copytree(finished, folder)
    for name in ("outliers", "controls", "stages/generate.json"):
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tests.two_processes"]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # the launcher would take one, which rounds otherwise
    command = [*launch, "generate", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent.parent, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("AUROC") == 1, "said by one of them"
    for name in ("outliers", "controls"):
        assert artefacts(folder / name) == artefacts(finished / name)


def test_two_writers_are_refused(finished):
    import fcntl

    with (finished / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="in use by another process"):
            run(tiny_config(), finished)
    (finished / ".lock").unlink()


def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="--out"):
        run(tiny_config(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_configuration_alone_does_not_make_a_run_folder(tmp_path):
    (tmp_path / "config.yaml").write_text("theirs: 1\n")
    (tmp_path / "detector").mkdir()
    with pytest.raises(UsageError, match="--out"):
        run(tiny_config(), tmp_path)
    assert (tmp_path / "detector").is_dir() and (tmp_path / "config.yaml").read_text() == "theirs: 1\n"


def test_a_run_folder_among_its_images_is_refused(tmp_path):
    config = tiny_config()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=ImagesConfig(str(tmp_path))))
    with pytest.raises(UsageError, match="outside the images"):
        run(config, tmp_path / "out")


def test_metrics_of_another_configuration_are_left_out(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    run(tiny_config(scoring=ScoringConfig(k_distance=3)), copy, only="train-detector")
    assert json.loads((copy / "metrics.json").read_text())["rows"] == []
    run(tiny_config(), copy)
    assert artefacts(copy) == artefacts(finished)


def test_other_bytes_in_a_file_of_weights_rerun_what_reads_it(tmp_path):
    from sdood_plugin.artifacts import write_tensors
    from sdood_plugin.features import Backbone

    weights = tmp_path / "weights.safetensors"
    config = dataclasses.replace(tiny_config(), clustering=ClusteringConfig(method="kmeans", clusters=3, weights=str(weights)))
    for seed, outcome in ((0, "ran"), (0, "done"), (1, "ran")):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            write_tensors(weights, Backbone("small_cnn").state_dict())
        assert run(config, tmp_path / "out", only="cluster") == {"cluster": outcome}


def test_one_stage_runs_with_what_it_needs(tmp_path):
    outcome = run(tiny_config(), tmp_path / "one", only="train-diffusion")
    assert outcome == {"cluster": "ran", "train-diffusion": "ran"}


@pytest.mark.parametrize(
    ("lost", "stage", "after"),
    [
        ("diffusion/unet.safetensors", "train-diffusion", "generate"),
        ("controls/images/0000/0000000_0.png", "generate", "train-detector"),
    ],
)
def test_a_lost_output_is_made_again(finished, tmp_path, lost, stage, after):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / lost).unlink()
    outcome = run(tiny_config(), copy)
    assert outcome[stage] == "ran" and outcome[after] == "done"  # the same bytes again, so nothing follows
    assert artefacts(copy) == artefacts(finished)


def test_a_full_disk_leaves_earlier_stages_untouched(finished, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    before = artefacts(copy)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    config = tiny_config(scoring=ScoringConfig(k_distance=3))
    with pytest.raises(RunError, match="No space left on device"):
        run(config, copy)
    after = artefacts(copy)
    assert all(
        after[name] == before[name]
        for name in before
        if not name.startswith(("detector/", "evaluation/", "comparison/", "metrics"))
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (ImagesConfig("demo", limit=1), "training images: got 1"),
        (ImagesConfig("demo", limit=20), "at least 30"),
    ],
)
def test_too_few_images_are_named(tmp_path, data, message):
    config = tiny_config()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=data))
    with pytest.raises(RunError, match=message):
        run(config, tmp_path / "few")


def test_a_diverging_loss_stops_with_its_step(tmp_path):
    config = tiny_config()
    config = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, lr=1e30, gradient_clip=1e30))
    with pytest.raises(RunError, match=r"diffusion loss at step \d: got (nan|inf)"):
        run(config, tmp_path / "nan")
    assert (tmp_path / "nan" / "labels.csv").is_file()


def test_a_folder_of_plain_images_needs_no_labels_and_no_test_sets(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(40):
        size = (40, 30) if i % 2 else (24, 24)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    config = tiny_config()
    config = dataclasses.replace(
        config, data=DataConfig(ImagesConfig(str(tmp_path / "pictures")), image_size=16, heldout_fraction=0.2)
    )
    run(config, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["rows"] == []
    images, outliers, controls = json.loads((tmp_path / "out" / "detector" / "score.json").read_text())["calibration"]["heldout"]
    assert images == 8 and 0 < outliers == controls < 10


def test_a_side_that_the_unet_cannot_halve_is_named_before_anything_is_done(tmp_path):
    np.savez(tmp_path / "odd.npz", images=np.zeros((40, 9, 9, 3), dtype=np.uint8))
    config = tiny_config(data=DataConfig(ImagesConfig(str(tmp_path / "odd.npz")), image_size=None, heldout_fraction=0.2))
    with pytest.raises(UsageError, match="data.image_size: got 9; expected a multiple of 2, for diffusion.size tiny"):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    others = context.Context(config, tmp_path / "out")
    check_input(others, chosen_stages(config, "cluster"))  # which needs no U-Net


@pytest.mark.parametrize(("processes", "fits"), [(2, True), (3, False), (16, False)])
def test_a_batch_is_shared_evenly_or_refused(tmp_path, processes, fits):
    found = context.Context(tiny_config(), tmp_path)  # batches of 8
    found.__dict__["accelerator"] = SimpleNamespace(num_processes=processes)
    with contextlib.nullcontext() if fits else pytest.raises(UsageError, match=f"batch_size: got 8.*the {processes} processes"):
        check_input(found, chosen_stages(found.config))


@pytest.mark.parametrize(
    ("processes", "settings", "controls", "last", "message"),
    [
        (2, {"batch_size": 24}, True, None, None),
        (2, {"batch_size": 23}, True, "train-reference", "detector.batch_size: got 23; expected a multiple of the 2 processes"),
        (2, {"batch_size": 200}, True, "train-detector", None),  # all 72 images
        (
            5,
            {"batch_size": 200, "outlier_ratio": 0.0},
            False,
            "train-reference",
            "batch_size: got 72; .* the 5 processes",
        ),
        (
            2,
            {"batch_size": 24, "outlier_ratio": 0.3},
            True,
            "train-detector",
            "outliers .*: got 7; .*whose shares count",
        ),
        (
            2,
            {"batch_size": 24, "control_ratio": 0.3},
            True,
            "train-detector",
            "controls .*: got 7; .* the 2 processes",
        ),
        (2, {"batch_size": 24, "control_ratio": 0.3}, False, "train-detector", None),
        (2, {"batch_size": 24, "control_ratio": 0.3}, True, "train-reference", None),
        (1, {"batch_size": 23, "outlier_ratio": 0.3}, True, None, None),
    ],
)
def test_the_detectors_batch_is_shared_evenly_or_refused(tmp_path, processes, settings, controls, last, message):
    config = tiny_config()
    config = dataclasses.replace(
        config,
        detector=dataclasses.replace(config.detector, **settings),
        outliers=dataclasses.replace(config.outliers, controls=controls),
        diffusion=dataclasses.replace(config.diffusion, batch_size=processes),
    )
    found = context.Context(config, tmp_path)
    found.__dict__["accelerator"] = SimpleNamespace(num_processes=processes)
    with pytest.raises(UsageError, match=message) if message else contextlib.nullcontext():
        check_input(found, chosen_stages(config, last))


def test_a_finished_model_need_not_be_shared_by_the_processes_that_sample(finished):
    found = context.Context(tiny_config(), finished)  # batches of 8
    found.__dict__["accelerator"] = SimpleNamespace(num_processes=3)
    check_input(found, chosen_stages(found.config, "generate"))


def test_the_clustering_makes_its_weights_again_when_they_are_gone(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    weights = tmp_path / "run" / "clustering" / "backbone.safetensors"
    before = weights.read_bytes()
    weights.unlink()
    done = run(tiny_config(), tmp_path / "run", "train-detector")
    assert done["cluster"] == "ran" and set(done.values()) == {"ran", "done"} and done["train-detector"] == "done"
    assert weights.read_bytes() == before


def test_k_larger_than_the_bank_is_named(tmp_path):
    with pytest.raises(UsageError, match="k_distance|k nearest"):
        run(tiny_config(scoring=ScoringConfig(k_distance=500)), tmp_path / "k")


def test_a_class_with_fewer_images_than_k_is_named(tmp_path):
    with pytest.raises(RunError, match=r"class 0: got \d+ images not held out.*k_distance = 70 or more"):
        run(tiny_config(scoring=ScoringConfig(k_distance=70)), tmp_path / "clusters")
    assert (tmp_path / "clusters" / "labels.csv").is_file()  # what was done stays
    assert not (tmp_path / "clusters" / "diffusion" / "unet.safetensors").exists()
    config = tiny_config()
    labels = tmp_path / "labels.csv"
    kept = torch.nonzero(~context.Context(config, tmp_path).heldout).flatten().tolist()
    labels.write_text("index,label\n" + "".join(f"{i},{2 if i == kept[0] else i % 2}\n" for i in range(90)))
    config = dataclasses.replace(config, clustering=ClusteringConfig(method="given", labels=str(labels)))
    with pytest.raises(RunError, match=r"class 2: got 1 image not held out \(1 classes of 3 so small\)"):
        run(config, tmp_path / "given")
    assert not (tmp_path / "given").exists()  # found before anything was written


def test_global_random_state_is_left_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(tiny_config(), tmp_path / "seeds", only="train-diffusion")
    assert torch.equal(torch.rand(3), expected)


def test_controls_that_lose_their_class_are_told(caplog):
    for quality in (None, {"stay_rate": 50.0, "source_accuracy": 90.0}):
        warn_of_controls(quality)
    assert not caplog.records
    warn_of_controls({"stay_rate": 12.7, "source_accuracy": 84.7})
    assert "only 13 % of the same-class controls are seen as their class (85 % of their sources)" in caplog.text


def test_images_too_few_to_cluster_are_refused_before_anything_is_written(tmp_path):
    config = tiny_config(clustering=ClusteringConfig(method="kmeans", clusters=10, augmentation="digits"))
    for attempt in (lambda: run(config, tmp_path / "run"), lambda: describe_plan(config, tmp_path / "run")):
        with pytest.raises(RunError, match="got 90 for 10 clusters; expected at least 100"):
            attempt()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("section", "absent", "message"),
    [
        ("data", {"ood": []}, r"data.ood: got none; expected OOD test sets"),
        ("compare", {"methods": []}, r"compare.methods: got none; expected comparators"),
    ],
)
def test_without_ood_sets_or_comparators_nothing_is_compared(tmp_path, section, absent, message):
    config = tiny_config()
    config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **absent)})
    names = {stage.name for stage in chosen_stages(config)}
    assert "evaluate" in names and not names & {"train-comparators", "train-exposed", "compare"}
    with pytest.raises(UsageError, match=message):
        run(config, tmp_path / "run", "compare")
    assert not (tmp_path / "run").exists()
