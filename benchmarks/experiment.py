"""What the table and figure scripts share: sizes, settings, run folders, and results that survive being cut off.

A table is made by `sdood_plugin.run.run` and by nothing else: its stages read test images only after the score is fixed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.handover import in_words, pack, unpack
from benchmarks.paired import add_pairs, read_scores
from benchmarks.record import RESULTS, earlier, write_result
from sdood_plugin.artifacts import atomic_path, read_json, value_hash
from sdood_plugin.cli import build_parser, run_config
from sdood_plugin.comparison import Comparators
from sdood_plugin.config import ImagesConfig, OODConfig, RunConfig, as_dict
from sdood_plugin.context import Context
from sdood_plugin.run import locked, run
from sdood_plugin.stage_table import BY_NAME

ROOT = Path(__file__).parent.parent
Rows = list[dict[str, Any]]

# the embedded data, a few steps of everything: what the smoke tests run
TINY = """--data.train.limit 240 --data.test.limit 60 --clustering.method kmeans --clustering.pretext_steps 3
--clustering.pretext_batch_size 32 --diffusion.size tiny --diffusion.steps 4 --diffusion.batch_size 8 --outliers.sampling_steps 2
--outliers.sources 120 --detector.epochs 1 --detector.batch_size 32 --compare.fake_it_steps 2""".split()


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line of a table says.

    Attributes:
        script: Name of the script and of its result.
        size: tiny, cpu or gpu.
        seeds: Seeds, one after the other.
        data: Folder that stands for `data` in the configurations.
        suffix: Ends the names of run folders and of the result.
        until: Stage after which a run stops, None for whole runs.
        method: Comparator to train and stop there, None for all that `until` says.
        start_from: Name of another result whose run folders are copied where this one has none.
        overrides: Settings that replace those of the size, as on `sdood run`'s command line.
    """

    script: str
    size: str
    seeds: list[int]
    data: Path
    suffix: str
    until: str | None
    method: str | None
    start_from: str | None
    overrides: list[str]

    @property
    def name(self) -> str:
        """Name of the result file."""
        return f"{self.script}-{self.size}{self.suffix}"

    @property
    def results(self) -> Path:
        """Where results and figures go; those of the tiny size say nothing and stay out of the repository."""
        return ROOT / "runs" / "benchmarks" if self.size == "tiny" else RESULTS

    @property
    def result(self) -> Path:
        """The result file."""
        return self.results / f"{self.name}.json"

    def folder(self, seed: int) -> Path:
        """The run folder of a seed."""
        return ROOT / "runs" / "benchmarks" / f"{self.name}-{seed}"


def read_options(
    script: str, description: str | None, arguments: Sequence[str] | None, seeds: Sequence[int] = (0, 1, 2)
) -> Options:
    """Read a table's command line; what is no option of it is a setting such as `--data.train.limit 2000`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "cpu", "gpu"], required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder laid out like OpenOOD's data")
    parser.add_argument("--suffix", default="", help="ends the names of run folders and of the result file")
    parser.add_argument(
        "--until", choices=list(BY_NAME), help="stop each run after this stage, for short slots (table1, table1_openood)"
    )
    parser.add_argument("--method", help="train this one comparator and stop (table1, table1_openood)")
    parser.add_argument("--start-from", help="begin with a copy of the run folders of this result, e.g. table1-gpu-resnet18")
    parser.add_argument("--threads", type=int, help="CPU threads")
    known, overrides = parser.parse_known_args(arguments)
    if known.threads:
        import torch

        torch.set_num_threads(known.threads)
    seeds = known.seeds[:1] if known.size == "tiny" else known.seeds
    return Options(
        script, known.size, list(seeds), known.data, known.suffix, known.until, known.method, known.start_from, overrides
    )


def configuration(options: Options, sizes: Mapping[str, Sequence[str]]) -> RunConfig:
    """The settings of a size: a list of YAML files (below configs/) and overrides, then the command line's own.

    Paths that start with `data/` lie in `options.data`.
    """
    given = [word for word in sizes[options.size] if not word.endswith(".yml")]
    files = [word for word in sizes[options.size] if word.endswith(".yml")]
    configs = [word for file in files for word in ("--config", str(ROOT / "configs" / file))]
    parser = build_parser()
    parsed = parser.parse_args(["run", *configs, "--out", "unused", "--report", "false", *given, *options.overrides])
    config = run_config(parser.instantiate(parsed)["run"])
    data = config.data
    ood = [dataclasses.replace(one, images=_placed(one.images, options)) for one in data.ood]
    test = None if data.test is None else _placed(data.test, options)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(data, train=_placed(data.train, options), test=test, ood=ood),
        clustering=dataclasses.replace(config.clustering, weights=_moved(config.clustering.weights, options)),
        detector=dataclasses.replace(config.detector, weights=_moved(config.detector.weights, options)),
    )


def _moved(path: str | None, options: Options) -> str | None:
    return str(options.data / path.removeprefix("data/")) if path is not None and path.startswith("data/") else path


def _placed(images: ImagesConfig, options: Options) -> ImagesConfig:
    return dataclasses.replace(images, path=str(_moved(images.path, options)), root=_moved(images.root, options))


def with_given_labels(config: RunConfig) -> RunConfig:
    """The configuration with true labels; the embedded data's detector starts from random weights then, at a rate for those."""
    detector = dataclasses.replace(config.detector, lr=2e-3) if config.data.train.path == "demo" else config.detector
    return dataclasses.replace(config, clustering=dataclasses.replace(config.clustering, method="given"), detector=detector)


def with_present_sets(config: RunConfig, wanted: Sequence[OODConfig], options: Options) -> tuple[RunConfig, list[str]]:
    """The configuration with those OOD sets that are there, and the names of those that are not."""
    placed = [dataclasses.replace(one, images=_placed(one.images, options)) for one in wanted]
    there = [one for one in placed if one.images.path == "demo" or Path(one.images.path).exists()]
    absent = [one.name for one in placed if one not in there]
    return dataclasses.replace(config, data=dataclasses.replace(config.data, ood=there)), absent


def data_facts(config: RunConfig, folder: Path, absent: Sequence[str] = ()) -> dict[str, Any]:
    """What images a result is of: sets, counts, and the sets that were wanted and are not here."""
    context = Context(config, folder)
    sets = {"train": (config.data.train, context.train), "test": (config.data.test, context.test)}
    sets |= {ood.name: (ood.images, context.ood[ood.name]) for ood in config.data.ood}
    counts = {name: len(images) for name, (_, images) in sets.items() if images is not None}
    sources = {
        name: f"{where.path} {where.split}".removesuffix(" train") for name, (where, _) in sets.items() if where is not None
    }
    return {"data": counts, "data_sources": sources, "absent": list(absent)}


def cells(
    options: Options,
    config: RunConfig,
    wanted: Sequence[dict[str, Any]],
    work: Callable[[int, dict[str, Any]], Rows],
    facts: Callable[[list[int]], Mapping[str, Any]],
) -> Rows:
    """Do `work(seed, cell)` for every seed and cell, writing the result after each; what a cut-off run finished is kept.

    Args:
        options: The command line.
        config: Settings all cells share; rows made under others are done again.
        wanted: What tells the cells apart, columns of their rows.
        work: Makes the rows of one cell.
        facts: Further entries of the file, from the seeds that have rows.

    Returns:
        All rows, each with its seed and its cell's columns.
    """
    rows, spent = _earlier(options, config)
    for seed, cell in _missing(options, wanted, rows):
        own = dataclasses.replace(config, seed=seed)
        with handed_over(options.folder(seed), own, options.start_from, options.size == "gpu"):
            rows += [{**cell, "seed": seed, **row} for row in work(seed, cell)]
        done = list(dict.fromkeys(row["seed"] for row in rows))
        write_result(options.name, as_dict(config), done, rows, facts=facts(done), spent_s=spent, **_written(options, config))
    return rows


def methods_table(options: Options, config: RunConfig, absent: Sequence[str], published: Sequence[Sequence[Any]]) -> Rows:
    """A whole run a seed: the rows of our scores and of the comparators, and ours minus theirs on the same images.

    The result holds what there is after each seed, and after each slot of a run that goes stage by stage (`--until`) and
    comparator by comparator (`--method`).

    Args:
        options: The command line.
        config: The settings.
        absent: OOD sets that were wanted and are not here.
        published: The published table, to stand beside.
    """
    rows, spent = _earlier(options, config)
    rows = [row for row in rows if row["seed"] not in options.seeds]
    for seed in options.seeds:
        own, folder = dataclasses.replace(config, seed=seed), options.folder(seed)
        with handed_over(folder, own, options.start_from, options.size == "gpu"):
            if options.method is None:
                run(own, folder, options.until)
            else:
                train_comparator(own, folder, options.method)
        files = [folder / stage / "rows.json" for stage in ("evaluation", "comparison")]
        rows += [row for file in files if file.exists() for row in read_json(file)]
        done = list(dict.fromkeys(row["seed"] for row in rows))
        facts = {**data_facts(config, folder, absent), "published": list(published)}
        write_result(options.name, as_dict(config), done, rows, facts=facts, spent_s=spent, **_written(options, config))
        scored = [own for own in (begun(options, seed) for seed in done) if (own / "comparison" / "scores-id.csv").exists()]
        add_pairs(options.result, [{ood.name: read_scores(own, ood.name) for ood in config.data.ood} for own in scored])
    return rows


def _earlier(options: Options, config: RunConfig) -> tuple[Rows, float]:
    return earlier(options.result, as_dict(config), options.data)


def _written(options: Options, config: RunConfig) -> dict[str, Any]:
    """Where a table's result goes, its device and its data: arguments of `write_result`."""
    return {"folder": options.results, "device": config.device, "data_root": options.data}


def train_comparator(config: RunConfig, folder: Path, method: str) -> None:
    """Train one comparator as the stage of all of them would, which then finds it there."""
    run(config, folder, "train-reference")
    context = Context(config, folder)
    with locked(folder, context.is_main):
        Comparators(context, folder / "comparators").fit([method])


@contextlib.contextmanager
def handed_over(folder: Path, config: RunConfig, start_from: str | None, hand_over: bool) -> Iterator[None]:
    """Around the work on a run folder: what an earlier slot left is unpacked, what this one finished is packed, cut off or not.

    Scores that were made under other settings are removed.

    Args:
        folder: The run folder.
        config: Its settings.
        start_from: Result whose run folder of this seed is copied where nothing is known of this one.
        hand_over: Whether to unpack and pack.
    """
    if not folder.exists():
        _begin(folder, config.seed, start_from, hand_over)
    told = folder / "run.json"
    if told.exists() and read_json(told)["config_sha256"] != value_hash(as_dict(config)):
        for stage in ("evaluation", "comparison"):
            (folder / stage / "rows.json").unlink(missing_ok=True)
    try:
        yield
    finally:
        if hand_over and folder.exists():
            print(in_words(folder.name, pack(folder, RESULTS / "handover")))


def begun(options: Options, seed: int) -> Path:
    """The run folder of a seed, made of what an earlier slot kept of it where it is not there."""
    folder = options.folder(seed)
    if not folder.exists():
        _begin(folder, seed, None, options.size == "gpu")
    return folder


def _begin(folder: Path, seed: int, start_from: str | None, hand_over: bool) -> None:
    """Fill a run folder that is not there with what is known of it, else with that of `start_from`."""
    store, other = RESULTS / "handover", f"{start_from}-{seed}"
    if hand_over and (store / f"{folder.name}.json").exists():
        unpack(store, folder.name, folder)
    elif start_from is not None and folder.with_name(other).exists():
        shutil.copytree(folder.with_name(other), folder)
    elif start_from is not None and (store / f"{other}.json").exists():
        unpack(store, other, folder)
    elif start_from is not None:
        print(f"{other}: neither a run folder nor a handover of it; {folder.name} begins anew")


def _missing(options: Options, wanted: Sequence[dict[str, Any]], rows: Rows) -> Iterator[tuple[int, dict[str, Any]]]:
    for seed in options.seeds:
        for cell in wanted:
            if not any({**row, **cell, "seed": seed} == row for row in rows):
                yield seed, cell


@contextlib.contextmanager
def drawn(options: Options, size: tuple[float, float]) -> Iterator[Any]:
    """A matplotlib figure that becomes figures/NAME.png beside the results when the block ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    yield figure
    with atomic_path(options.results.parent / "figures" / f"{options.name}.png") as temporary:
        figure.savefig(temporary, bbox_inches="tight", dpi=130)
