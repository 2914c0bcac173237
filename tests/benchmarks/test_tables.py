"""The table and figure scripts at their smallest: what they write, that they go on where they were, that tests stay unseen."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

from benchmarks import experiment, fig3, readme, table1, table2
from benchmarks.experiment import read_options, with_present_sets
from benchmarks.record import summary
from sdood_plugin.artifacts import read_json
from sdood_plugin.config import ImagesConfig, OODConfig, RunConfig
from sdood_plugin.context import Context

SCRIPTS = ("table1", "table1_openood", "table2", "table3", "table4", "fig2", "fig3")
FEW = "--data.train.limit 120 --data.test.limit 30 --outliers.sources 40 --compare.methods [distance,multi-class]".split()


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    (tmp_path / "configs").symlink_to(Path(__file__).parents[2] / "configs")
    return tmp_path / "runs" / "benchmarks"


def test_table1_writes_what_a_result_must_say_and_reads_test_images_after_the_score_is_fixed(place, monkeypatch):
    seen = []

    def spy(name):
        whole = getattr(Context, name)

        def images(self):
            fixed = (self.folder / "detector" / "score.json").exists() and (self.folder / "comparators").exists()
            seen.append((name, fixed or checking))
            return whole.fget(self) if isinstance(whole, property) else whole.func(self)

        monkeypatch.setattr(Context, name, property(images))

    from sdood_plugin import run as running

    check, checking = running.check_input, False

    def checked(context):  # reads every image once, to refuse bad input before work; it decides nothing
        nonlocal checking
        checking = True
        check(context)
        checking = False

    monkeypatch.setattr(running, "check_input", checked)
    spy("ood")
    spy("test")
    rows = table1.main(["--size", "tiny", *FEW])
    result = read_json(place / "table1-tiny.json")
    for name in (
        "command",
        "config_sha256",
        "device",
        "versions",
        "seeds",
        "wall_s",
        "data",
        "absent",
        "published",
        "paired",
        "summary",
    ):
        assert name in result
    assert result["rows"] == rows and {row["method"] for row in rows} >= {"sdood", "distance", "multi-class"}
    assert {row["method"] for row in result["paired"]} == {"distance", "multi-class", "multi-class-cosine"}
    assert seen and all(late for _, late in seen)


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


def test_a_figure_is_drawn_from_its_result_alone(place):
    fig3.main(["--size", "tiny", *FEW])
    figure = place.parent / "figures" / "fig3-tiny.png"
    figure.unlink()
    for folder in place.glob("fig3-tiny-*"):
        folder.rename(place / "gone")
    fig3.draw(read_json(place / "fig3-tiny.json"), read_options("fig3", "", ["--size", "tiny"]))
    assert figure.exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_table_script_has_no_way_to_images_but_a_run(script):
    tree = ast.parse((Path(experiment.__file__).parent / f"{script}.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not names & {"load_images", "draw_demo", "load_dataset", "sources", "demo", "read_images"}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "ood" not in attributes or script in ("fig3", "table1", "table1_openood")  # of the configuration, never of a Context
    assert "Context" not in names or script in ("fig2", "table4")  # which take training images; table4 its ID test images


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
