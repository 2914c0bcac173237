"""The table and figure scripts at their smallest: what they write, that they go on where they were, that tests stay unseen."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from benchmarks import experiment, fig3, readme, table1, table2, table3
from benchmarks.experiment import read_options, with_present_sets
from benchmarks.record import summary
from sdood_plugin.artifacts import read_json, write_json
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
    assert readme.published_beside_ours({}).count("not yet") == 15 * 4 + 10 + 3
    rows = [{"method": "dn2", "ood": "cifar100", "seed": seed, "auroc": 90.0 + seed} for seed in (0, 1)]
    assert "83.3: 90.5 +- 0.7" in readme.published_beside_ours({"table1-gpu-resnet18": {"rows": rows}})
    difference = {"ours": "sdood", "ood": "near", "difference": 2.0, "n_runs": 3}
    text = readme.paired(
        [{**difference, "method": "x", "low": 1.0, "high": 3.0}, {**difference, "method": "y", "low": -1.0, "high": 3.0}]
    )
    assert "+2.0 (+1.0 to +3.0) ahead" in text and text.count("ahead") == 1
    assert "python -m benchmarks.table1" in readme.queue()
