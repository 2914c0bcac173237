"""The command line: `sdood STAGE --config FILE --out DIR`, one subcommand a stage and `run` for all of them."""

from __future__ import annotations

import sys
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from ._version import __version__
from .config import RunConfig
from .errors import SdoodError, UsageError

COMMANDS = {
    "run": "all stages in order, then metrics, figures and report.html",
    "cluster": "pseudo-labels of the images (labels.csv)",
    "train-diffusion": "the class-conditional diffusion model",
    "generate": "the outlier set and its same-class controls",
    "inspect": "what the outliers are like: flips, copies, backgrounds",
    "train-detector": "the three-head detector, its banks and its calibration",
    "evaluate": "score the test sets",
    "compare": "train and score the comparators on the same images",
    "report": "draw figures and report.html of a run folder again",
}
HOST_COMMANDS = {
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
            command.add_class_arguments(RunConfig, None)
        subcommands.add_subcommand(name, command, help=text)
    for name, text in HOST_COMMANDS.items():
        command = ArgumentParser(description=f"{text[0].upper()}{text[1:]}.", exit_on_error=False, allow_abbrev=False)
        if name == "export-openood":
            command.add_argument("RUN", type=str, help="run folder with outliers")
            command.add_argument("DEST", type=str, help="where to write; may be OpenOOD's own data folder")
        subcommands.add_subcommand(name, command, help=text)
    return parser


def expand_shortcuts(arguments: Sequence[str]) -> list[str]:
    """The arguments with the shortcuts spelt out, so that explicit settings still come last and win.

    `--images X` stands for settings that replace all images of the configuration, `--labels F` for settings that replace
    its clustering; a run folder's own config.yaml is the configuration where none is given.
    """
    configs: list[str] = []
    rest: list[str] = []
    values: dict[str, str] = {}
    index = 0
    while index < len(arguments):
        name, equals, value = arguments[index].partition("=")
        if name in ("--config", "--images", "--labels", "--out"):
            if not equals and index + 1 == len(arguments):
                rest.append(name)  # the parser says what is missing
                break
            index += 0 if equals else 1
            value = value if equals else arguments[index]
            if name == "--config":
                configs += ["--config", value]
            elif name == "--out":
                rest += ["--out", value]
            values[name] = value
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
    return [*rest[:1], *configs, *shortcuts, *rest[1:]]


def run_config(chosen: Namespace) -> RunConfig:
    """The configuration in a parsed and instantiated subcommand."""
    values = {name: value for name, value in vars(chosen).items() if name in RunConfig.__dataclass_fields__}
    return RunConfig(**values)


def read_config(path: str | Path) -> RunConfig:
    """The configuration in a YAML file, checked like the command line's."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig, None)
    return run_config(parser.instantiate(parser.parse_path(str(path))))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 for a failure or 2 for wrong usage."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    try:
        spelt = expand_shortcuts(given) if given else ["--help"]
        if "--config" in spelt and not any(word.startswith("--config") for word in given):
            print("settings not given here are those of the run folder's own config.yaml", file=sys.stderr)
        parsed = parser.parse_args(spelt)
        chosen = parser.instantiate(parsed)[parsed.command]
        return _dispatch(parsed.command, chosen)
    except ArgumentError as error:
        known = given[:1] if given[0] in {**COMMANDS, **HOST_COMMANDS} else []
        return _fail(f"{' '.join(str(error).split())}; see `{' '.join(['sdood', *known, '--help'])}`", 2)
    except SdoodError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from here", 130)
    except UnicodeError as error:
        return _fail(f"{error}; configurations are UTF-8 text", 2)
    except OSError as error:
        return _fail(f"{error.filename or 'file'}: {error.strerror or error}; check the disk and the path", 1)


def _fail(message: str, code: int) -> int:
    print(f"sdood: error: {message}", file=sys.stderr)
    return code


def _dispatch(command: str, chosen: Namespace) -> int:
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("sdood_plugin").setLevel(logging.INFO)
    if command in HOST_COMMANDS:
        from .hosts.openood import doctor, export_openood

        print(doctor() if command == "doctor" else export_openood(chosen.RUN, chosen.DEST))
        return 0
    folder = Path(chosen.out)
    if command == "report":
        from .run import draw_report

        print(draw_report(folder))
        return 0
    for name, setting in (("images", "data.train.path"), ("labels", "clustering.labels")):
        if chosen[name] is not None:  # `expand_shortcuts` has spelt out those of the command line
            raise UsageError(f"{name} in the configuration", chosen[name], f"`{setting}` there", f"or give --{name}")
    config = run_config(chosen)
    if chosen.dry_run:
        from .plan import describe_plan

        print(describe_plan(config, folder, LAST_STAGE.get(command, command)))
        return 0
    from .run import run
    from .summary import summarise

    run(config, folder, LAST_STAGE.get(command, command))
    print(summarise(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
