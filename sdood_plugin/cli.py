"""The command line: `sdood STAGE --config FILE --out DIR`, one subcommand a stage and `run` for all of them."""

from __future__ import annotations

import sys
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from ._version import __version__
from .config import RunConfig, SelectionConfig
from .errors import SdoodError, UsageError
from .progress import speaks

COMMANDS = {
    "run": "all stages in order, then metrics, figures and report.html",
    "cluster": "pseudo-labels of the images (labels.csv)",
    "train-reference": "the classifier of real images alone that judges outliers and carries comparators",
    "train-diffusion": "the class-conditional diffusion model",
    "generate": "the outlier set and its same-class controls",
    "inspect": "what the outliers are like: flips, copies, backgrounds, distances; grids of a run's set or of any FOLDER",
    "train-detector": "the three-head detector, its banks and its calibration",
    "evaluate": "score the test sets",
    "compare": "train and score the comparators on the same images",
    "report": "draw figures and report.html of a run folder again",
}
FOLDER_COMMANDS = {
    "score": "score images with a run's detector and say which of them are OOD (a CSV, most OOD first)",
    "select": "make a subset of an outlier set, without generating again",
    "export-outliers": "write an outlier set as one .npz or as tar files for webdataset",
    "export-openood": "write a run as OpenOOD data, lists and YAMLs, and print the commands that start it",
    "doctor": "say what of OpenOOD can be imported and the pip line for what is missing",
}
LAST_STAGE = {"run": None, "train-detector": "calibrate"}  # the others end with the stage of their own name
EPILOG = """a first run on your own images:  sdood run --images FOLDER --out runs/mine
a killed run goes on where it was when the same command is given again;
a later call on the same --out needs no --config: the run folder remembers it"""


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's, with the epilog's lines kept."""


def build_parser() -> ArgumentParser:
    """The parser of all subcommands; every one takes the whole configuration."""
    parser = ArgumentParser(
        prog="sdood",
        description="Semantic-discrepant outliers by diffusion, and the OOD detector trained on them.",
        epilog=EPILOG,
        formatter_class=_HelpFormatter,
        version=__version__,
        exit_on_error=False,
        allow_abbrev=False,
    )
    subcommands = parser.add_subcommands(dest="command", required=True)
    for name, text in COMMANDS.items():
        usage = f"sdood {name} --out DIR" + (
            "" if name == "report" else " [--images FOLDER | --config FILE] [--SETTING VALUE ...]"
        )
        command = ArgumentParser(
            usage=usage, description=f"{text[0].upper()}{text[1:]}.", exit_on_error=False, allow_abbrev=False
        )
        if name != "report":
            command.add_argument("--config", action="config", help="YAML file; given more than once, the last one wins")
        command.add_argument("--out", type=str, required=True, help="run folder")
        if name != "report":
            command.add_argument(
                "--dry-run", action="store_true", help="print plan, sizes and an estimate of the time; write nothing"
            )
            command.add_argument(
                "--images", type=str, help="folder of images (or imglist, CIFAR batches, .npz) in place of the config's data"
            )
            command.add_argument("--labels", type=str, help="CSV with `path` or `index` and `label` in place of clustering")
            if name == "inspect":
                command.add_argument("FOLDER", type=str, nargs="?", help="an outlier set; without it that of the run")
                command.add_argument(
                    "--quality", action="store_true", help="FID, KID, precision and recall: --inspection.features inception"
                )
            if name == "generate":
                command.add_argument("--mode", type=str, help="other, same, away, blend or blend-own: --outliers.mode")
                command.add_argument("--preview", type=int, help="only draw this many triplets, as preview.png of the run folder")
                command.add_argument("--shard", type=str, help="i/n: only make the i-th of n parts, below RUN/shards")
                command.add_argument("--merge", action="store_true", help="put the shards below RUN/shards together")
            if name == "compare":
                command.add_argument("--method", type=str, help="one comparator in place of the config's; may be repeated")
            command.add_class_arguments(RunConfig, None)
        subcommands.add_subcommand(name, command, help=text)
    for name, text in FOLDER_COMMANDS.items():
        command = ArgumentParser(description=f"{text[0].upper()}{text[1:]}.", exit_on_error=False, allow_abbrev=False)
        if name == "export-openood":
            command.add_argument("RUN", type=str, help="run folder with outliers")
            command.add_argument("DEST", type=str, help="where to write; may be OpenOOD's own data folder")
        if name == "score":
            command.add_argument("--out", type=str, required=True, help="run folder with a detector")
            command.add_argument("--images", type=str, required=True, help="folder of images, imglist, CIFAR batches or .npz")
            command.add_argument("--csv", type=str, help="file to write; scores.csv in the run folder without it")
        if name == "export-outliers":
            command.add_argument("FOLDER", type=str, help="an outlier set")
            command.add_argument("--to", type=str, required=True, help="x.npz, or a new folder for tar files")
        if name == "select":
            command.add_argument("FOLDER", type=str, help="an outlier set")
            command.add_argument("DEST", type=str, help="folder of the subset; new or empty")
            command.add_argument("--keep", type=str, required=True, help="kinds to keep, with commas: stay,flip,ambiguous")
            command.add_class_arguments(SelectionConfig, None, skip={"keep"})
        subcommands.add_subcommand(name, command, help=text)
    return parser


def expand_shortcuts(arguments: Sequence[str]) -> list[str]:
    """The arguments with the shortcuts spelt out, so that explicit settings still come last and win.

    `--images X` stands for settings that replace all images of the configuration, `--labels F` for settings that replace
    its clustering, `--method M`, which may be repeated, for the list of comparators, `--mode M` of `generate` for what
    guidance points to; a run folder's own config.yaml is the configuration where none is given.
    """
    if arguments[0] == "score":
        return list(arguments)  # its images are no settings
    configs: list[str] = []
    rest: list[str] = []
    methods: list[str] = []
    values: dict[str, str] = {}
    index = 0
    while index < len(arguments):
        name, equals, value = arguments[index].partition("=")
        if name in ("--config", "--images", "--labels", "--out", "--method") or (name, arguments[0]) == ("--mode", "generate"):
            if not equals and index + 1 == len(arguments):
                rest.append(name)  # the parser says what is missing
                break
            index += 0 if equals else 1
            value = value if equals else arguments[index]
            if name == "--config":
                configs += ["--config", value]
            elif name == "--out":
                rest += ["--out", value]
            elif name == "--method":
                methods.append(value)
            values[name] = value
        elif name == "--quality" and arguments[0] == "inspect":
            values[name] = ""
        else:
            rest.append(arguments[index])
        index += 1
    remembered = Path(values.get("--out", "")) / "config.yaml"
    if not configs and "--out" in values and remembered.is_file() and rest[:1] != ["report"]:
        configs = ["--config", str(remembered)]
    shortcuts: list[str] = []
    if "--images" in values:
        shortcuts += [
            "--data.train.path",
            values["--images"],
            "--data.train.root",
            "null",
            "--data.train.split",
            "train",
            "--data.train.limit",
            "null",
            "--data.test",
            "null",
            "--data.ood",
            "[]",
        ]
    if "--labels" in values:
        shortcuts += ["--clustering.method", "given", "--clustering.labels", values["--labels"]]
    if methods:
        shortcuts += ["--compare.methods", f"[{','.join(methods)}]"]
    if "--mode" in values:
        shortcuts += ["--outliers.mode", values["--mode"]]
    if "--quality" in values:
        shortcuts += ["--inspection.features", "inception"]
    return [*rest[:1], *configs, *shortcuts, *rest[1:]]


def run_config(chosen: Namespace) -> RunConfig:
    """The configuration in a parsed and instantiated subcommand."""
    values = {name: value for name, value in vars(chosen).items() if name in RunConfig.__dataclass_fields__}
    return RunConfig(**values)


def read_config(path: str | Path) -> RunConfig:
    """The configuration in a YAML file, checked like the command line's."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig, None)
    parsed = parser.parse_path(str(path))
    _require_sections(parsed)
    return run_config(parser.instantiate(parsed))


def _require_sections(parsed: Namespace) -> None:
    """Make sure that no section is there without its settings, as one is in YAML whose lines were all taken out.

    Raises:
        UsageError: One is.
    """
    for name in RunConfig.__dataclass_fields__:
        if name in parsed and parsed[name] is None:
            raise UsageError(f"{name} in the configuration", "nothing", "its settings", "give some, or take the line out")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 for a failure or 2 for wrong usage."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    try:
        spelt = expand_shortcuts(given) if given else ["--help"]
        if "--config" in spelt and not any(word.startswith("--config") for word in given):
            print("settings not given here are those of the run folder's own config.yaml", file=sys.stderr)
        parsed = parser.parse_args(spelt)
        _require_sections(parsed[parsed.command])
        chosen = parser.instantiate(parsed)[parsed.command]
        return _dispatch(parsed.command, chosen)
    except ArgumentError as error:
        known = given[:1] if given[0] in {**COMMANDS, **FOLDER_COMMANDS} else []
        return _fail(f"{' '.join(str(error).split())}; see `{' '.join(['sdood', *known, '--help'])}`", 2)
    except SdoodError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from here", 130)
    except UnicodeDecodeError as error:
        return _fail(f"{error}; configurations are UTF-8 text", 2)
    except UnicodeEncodeError as error:
        return _fail(f"text {error.object[error.start : error.end]!r}: {error.reason}; rename the file or folder", 2)
    except OSError as error:
        return _fail(f"{error.filename or 'file'}: {error.strerror or error}; check the disk and the path", 1)


def _fail(message: str, code: int) -> int:
    print(f"sdood: error: {message}", file=sys.stderr)
    return code


def _dispatch(command: str, chosen: Namespace) -> int:
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("sdood_plugin").setLevel(logging.INFO if speaks() else logging.WARNING)
    if command in FOLDER_COMMANDS:
        print(_on_folders(command, chosen))
        return 0
    folder = Path(chosen.out)
    if command == "report":
        from .run import draw_report

        print(draw_report(folder))
        return 0
    for name, setting in (("images", "data.train.path"), ("labels", "clustering.labels"), ("mode", "outliers.mode")):
        if chosen.get(name) is not None:  # `expand_shortcuts` has spelt out those of the command line
            raise UsageError(f"{name} in the configuration", chosen[name], f"`{setting}` there", f"or give --{name}")
    config = run_config(chosen)
    if chosen.get("FOLDER") is not None:
        from .inspection import inspect_folder

        print(inspect_folder(config, Path(chosen.FOLDER), folder))
        return 0
    if command == "generate" and not chosen.dry_run and (part := _part_of_generate(config, folder, chosen)):
        print(part)
        return 0
    if chosen.dry_run:
        from .plan import describe_plan

        print(describe_plan(config, folder, LAST_STAGE.get(command, command)))
        return 0
    from .run import run
    from .summary import summarise

    run(config, folder, LAST_STAGE.get(command, command))
    if speaks():
        print(summarise(folder))
    return 0


def _part_of_generate(config: RunConfig, folder: Path, chosen: Namespace) -> Path | None:
    """What `generate` does short of the whole stage: what it wrote, or None."""
    given = [name for name in ("preview", "shard", "merge") if chosen[name]]
    if len(given) > 1:
        raise UsageError("generate", " and ".join(f"--{name}" for name in given), "one of them", "give one at a time")
    if chosen.preview is None and not given:
        return None
    from .shards import draw_preview, generate_shard, merge_shards, parse_shard

    if chosen.shard:
        return generate_shard(config, folder, parse_shard(chosen.shard))
    return merge_shards(config, folder) if chosen.merge else draw_preview(config, folder, chosen.preview)


def _on_folders(command: str, chosen: Namespace) -> str:
    """The commands that need no configuration; what they have to say."""
    if command == "score":
        from .decision import score_folder

        return score_folder(Path(chosen.out), chosen.images, Path(chosen.csv or Path(chosen.out) / "scores.csv"))
    if command == "select":
        from .outliers.subset import select_set

        config = SelectionConfig(
            [kind.strip() for kind in chosen.keep.split(",")], chosen.flip_confidence, chosen.duplicate_distance
        )
        return select_set(Path(chosen.FOLDER), Path(chosen.DEST), config)
    if command == "export-outliers":
        from .outliers.export import export_set

        return export_set(Path(chosen.FOLDER), Path(chosen.to))
    from .hosts.openood import doctor, export_openood

    return doctor() if command == "doctor" else export_openood(chosen.RUN, chosen.DEST)


if __name__ == "__main__":
    sys.exit(main())
