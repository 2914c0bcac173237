"""The command line: errors in one line, exit codes, shortcuts, dry run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sdood_plugin import Detector
from sdood_plugin.cli import expand_shortcuts, main, read_config
from sdood_plugin.config import ImagesConfig, OODConfig, RunConfig
from sdood_plugin.errors import UsageError

ROOT = Path(__file__).parent.parent
TINY = [
    "--clustering.clusters",
    "3",
    "--clustering.pretext_steps",
    "2",
    "--clustering.pretext_batch_size",
    "8",
    "--diffusion.size",
    "tiny",
    "--diffusion.steps",
    "2",
    "--diffusion.batch_size",
    "4",
    "--outliers.sampling_steps",
    "1",
    "--outliers.batch_size",
    "20",
    "--detector.epochs",
    "1",
    "--data.image_size",
    "16",
    "--data.heldout_fraction",
    "0.2",
    "--device",
    "cpu",
]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "out"),
        (["--detector.epoch", "5"], "--detector.epoch"),
        (["--detector.epochs", "five"], "detector.epochs"),
        (["--outliers.start_fraction", "1.5"], "outliers.start_fraction: got 1.5"),
        (["--outliers.start_fraction", "0"], "outliers.start_fraction: got 0"),
        (["--outliers.start_fraction", "0.9"], "diffusion.max_start_fraction"),
        (["--outliers.guidance_weight", "-1.5"], "outliers.guidance_weight: got -1.5"),
        (["--clustering.clusters", "1"], "clustering.clusters: got 1"),
        (["--config", "no-such.yml"], "no-such.yml"),
        (["--data.train.path", "no-such-folder"], "no-such-folder"),
        (["--device", "cuda"], "cuda"),
        (["--labels", "no-such.csv"], "no-such.csv"),
        (["--detector.weights", "no-such.safetensors"], "detector.weights: got no-such.safetensors"),
        (["--scoring.k_distance", "100000"], "scoring.k_distance: got 100000"),
        (["--images"], "--images"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, said, tmp_path, capsys):
    if said == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    out = [] if said == "out" else ["--out", str(tmp_path / "out")]
    assert main(["run", *out, *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error and error.startswith("sdood: error: ")
    assert not (tmp_path / "out").exists()  # nothing that a corrected command would remember


def test_the_ood_sets_of_a_later_file_or_word_replace_those_of_an_earlier_one(tmp_path, capsys):
    sets = {
        "first": "[{name: a, group: near, images: {path: a, root: r, split: test, limit: 5}}]",
        "second": "[{name: b, group: far, images: {path: b}}]",
    }
    for name, ood in sets.items():
        (tmp_path / f"{name}.yml").write_text(f"data: {{ood: {ood}}}\n")
    first = ["run", "--config", str(tmp_path / "first.yml")]
    for later in (["--config", str(tmp_path / "second.yml")], ["--data.ood", sets["second"]]):
        with pytest.raises(SystemExit):
            main([*first, *later, "--print_config"])
        printed = yaml.safe_load(capsys.readouterr().out)["data"]["ood"]
        (tmp_path / "both.yml").write_text(yaml.safe_dump({"data": {"ood": printed}}))
        assert read_config(tmp_path / "both.yml").data.ood == (OODConfig("b", "far", ImagesConfig("b")),)


def test_unknown_keys_in_a_file_are_named(tmp_path, capsys):
    (tmp_path / "bad.yml").write_text("detector: {epochz: 3}\n")
    assert main(["run", "--config", str(tmp_path / "bad.yml"), "--out", str(tmp_path / "out")]) == 2
    assert "detector.epochz" in capsys.readouterr().err


def test_a_section_without_settings_is_named(tmp_path, capsys):
    (tmp_path / "bad.yml").write_text("seed: 1\ndetector:\n  # lr: 0.1\n")
    assert main(["run", "--config", str(tmp_path / "bad.yml"), "--out", str(tmp_path / "out")]) == 2
    assert "detector in the configuration: got nothing; expected its settings" in capsys.readouterr().err
    with pytest.raises(UsageError, match="detector in the configuration: got nothing"):
        read_config(tmp_path / "bad.yml")


@pytest.mark.parametrize(("name", "instead"), [("images", "data.train.path"), ("labels", "clustering.labels")])
def test_shortcuts_of_the_command_line_are_refused_in_a_file(name, instead, tmp_path, capsys):
    (tmp_path / "bad.yml").write_text(f"{name}: mine\n")
    assert main(["run", "--config", str(tmp_path / "bad.yml"), "--out", str(tmp_path / "out")]) == 2
    assert instead in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_configuration_that_is_no_text_is_refused(tmp_path, capsys):
    (tmp_path / "bad.yml").write_bytes(b"\xff\xfe\x00")
    assert main(["run", "--config", str(tmp_path / "bad.yml"), "--out", str(tmp_path / "out")]) == 2
    assert "UTF-8" in capsys.readouterr().err


def test_failures_while_working_are_exit_code_1(pictures, tmp_path, capsys):
    (pictures / "07.png").write_bytes((pictures / "07.png").read_bytes()[:200])
    assert main(["run", "--images", str(pictures), "--out", str(tmp_path / "out"), *TINY]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "07.png" in error and "remove or replace" in error


def test_a_name_that_is_no_utf8_is_told(pictures, tmp_path, capsys):
    (pictures / "07.png").rename(os.fsdecode(os.fsencode(pictures) + b"/b\xe4r.png"))
    assert main(["run", "--images", str(pictures), "--out", str(tmp_path / "out"), *TINY]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "a name in UTF-8; rename the file" in error and "configuration" not in error


def test_no_write_permission_is_named(pictures, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(["run", "--images", str(pictures), "--out", str(tmp_path / "file" / "out"), *TINY]) == 1
    assert "in the way" not in (error := capsys.readouterr().err) and "write permission" in error


def test_dry_run_tells_the_plan_and_writes_nothing(pictures, tmp_path, capsys):
    assert main(["run", "--images", str(pictures), "--out", str(tmp_path / "out"), "--dry-run", *TINY]) == 0
    plan = capsys.readouterr().out
    assert "training images   40" in plan and "train-diffusion" in plan and "total" in plan
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures"]


def test_a_folder_of_pictures_becomes_a_detector_and_a_report(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["run", "--images", str(pictures), "--out", str(out), *TINY]) == 0
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 4 and "No OOD test sets" in page
    assert str(out / "report.html") in capsys.readouterr().out
    detector = Detector.load(out)
    images = detector.load_images(pictures)
    scores, flags = detector.decide(images.images)
    assert scores.shape == (40,) and torch.equal(flags, scores > detector.threshold)
    noise = torch.randint(256, (30, 3, 16, 16), dtype=torch.uint8)
    one_by_one = torch.cat([detector.score(image[None]) for image in noise])
    torch.testing.assert_close(detector.score(noise), one_by_one, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected uint8"):
        detector.score(noise[:, :, :8])
    # the run folder remembers its configuration, so nothing is left to do
    assert main(["train-detector", "--out", str(out)]) == 0
    assert main(["report", "--out", str(out)]) == 0


def test_images_given_replace_those_of_the_configuration():
    spelt = expand_shortcuts(["run", "--data.ood", "[x]", "--images", "mine", "--config", "a.yml", "--out=o"])
    assert spelt[:3] == ["run", "--config", "a.yml"]
    assert spelt.index("mine") < len(spelt) - spelt[::-1].index("--data.ood") - 1  # what is explicit comes last and wins
    assert spelt[-2:] == ["--out", "o"] and "--images" not in spelt


def test_the_mode_of_generate_has_a_short_name():
    spelt = expand_shortcuts(["generate", "--mode", "other", "--outliers.mode", "blend", "--config", "a.yml", "--out", "o"])
    assert spelt == ["generate", "--config", "a.yml", "--outliers.mode", "other", "--outliers.mode", "blend", "--out", "o"]
    assert expand_shortcuts(["generate", "--mode=same"]) == ["generate", "--outliers.mode", "same"]
    assert expand_shortcuts(["run", "--mode", "other"]) == ["run", "--mode", "other"]  # which the parser refuses


@pytest.mark.parametrize("command", ["generate", "run"])
def test_a_mode_that_is_none_is_refused(command, tmp_path, capsys):
    assert main([command, "--mode", "sideways", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert ("sideways" if command == "generate" else "unrecognized") in error.lower() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.yml")))
def test_every_configuration_is_valid(name):
    assert isinstance(read_config(ROOT / "configs" / name), RunConfig)


def test_help_is_quick_and_imports_no_torch():
    code = (
        "import sys\nfrom sdood_plugin.cli import main\n"
        "try:\n    main(['run', '--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules and 'sklearn' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--outliers.guidance_weight" in done.stdout and "diffusers' guidance_scale is 1 + w" in " ".join(done.stdout.split())
