"""The import rules of the house (LAYOUT.md), read off the source; and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sdood_plugin

ROOT = Path(sdood_plugin.__file__).parent
LEAVES = {"errors", "randomness", "_version", "progress"}
FOUNDATION = LEAVES | {"config", "artifacts", "neighbours", "metrics"}
COMMON = FOUNDATION | {"data", "backbones", "features", "training"}
# room -> rooms it may import; its own files always
ALLOWED = {
    "errors": set(),
    "randomness": set(),
    "_version": set(),
    "progress": set(),
    "config": {"errors"},
    "artifacts": {"errors"},
    "neighbours": {"errors"},
    "metrics": {"errors"},
    "training": FOUNDATION,
    "data": FOUNDATION,
    "backbones": {"errors"},
    "features": FOUNDATION | {"data", "backbones"},
    "clustering": COMMON,
    "diffusion": COMMON,
    "detector": COMMON,
    "scoring": COMMON,
    "outliers": COMMON | {"diffusion"},
    "baselines": COMMON | {"clustering", "diffusion", "detector", "scoring", "outliers"},
    "report": {"artifacts", "errors"},
    "summary": {"artifacts", "errors"},
    "decision": COMMON | {"detector", "scoring"},
    "context": COMMON | {"clustering"},
    "stages": COMMON | {"context", "clustering", "diffusion", "detector", "scoring", "outliers"},
    "generation": COMMON | {"context", "clustering", "diffusion", "detector", "outliers"},
    "shards": COMMON | {"context", "generation", "outliers", "run", "stage_table"},
    "inspection": COMMON | {"context", "generation", "outliers", "report"},
    "evaluation": COMMON | {"context", "decision"},
    "comparison": COMMON | {"context", "stages", "clustering", "diffusion", "detector", "outliers", "baselines", "evaluation"},
    "stage_table": COMMON | {"context", "stages", "evaluation", "comparison", "generation", "inspection"},
    "run": COMMON | {"context", "clustering", "stages", "stage_table", "report"},
    "plan": COMMON | {"context", "clustering", "diffusion", "detector", "outliers", "run", "stage_table"},
}
OUTSIDE = {"cli", "__main__", "hosts", "__init__"}  # they import inward
NEVER_IMPORTED = {"cli", "plan", "hosts", "__main__"}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(name, *, type_checking=False):
    """(ours, others): dotted names below sdood_plugin and top-level names of other packages that a module imports anywhere."""
    path = MODULES[name]
    package = list(path.relative_to(ROOT).parts[:-1])
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            ours |= {".".join(name[1:]) for name in names if name[0] == "sdood_plugin"}
            others |= {name[0] for name in names if name[0] != "sdood_plugin"}
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".") if node.module else []
            if node.level == 0 and module[0] != "sdood_plugin":
                others.add(module[0])
                continue
            base = module[1:] if node.level == 0 else package[: len(package) - node.level + 1] + module
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                ours.add(whole if whole in MODULES else ".".join(base))
    return {name for name in ours if name}, others


def room(name):
    return name.split(".")[0]


def test_the_reader_of_imports_sees_what_is_there():
    # the rules below would hold of an empty list too
    assert len(MODULES) > 35
    assert imports("diffusion.sampling")[0] == {"config", "diffusion.training", "diffusion.unet", "training"}
    assert imports("data.sources")[0] == {"config", "errors", "progress", "data.demo", "data.images"}
    assert "run" in imports("cli")[0] and "stages" in imports("run")[0]  # imports within functions, and `from . import`
    assert "pytorch_ood" in imports("baselines.posthoc")[1]


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) not in OUTSIDE])
def test_every_room_imports_only_what_it_may(name):
    assert room(name) in ALLOWED, f"{room(name)} is a new room: say in LAYOUT.md and here whom it may import"
    found = {room(other) for other in imports(name)[0]} - {room(name)}
    assert found <= ALLOWED[room(name)]


@pytest.mark.parametrize("name", MODULES)
def test_nothing_imports_the_outside(name):
    found = {room(other) for other in imports(name)[0]} & NEVER_IMPORTED - {room(name)}
    if room(name) in ("cli", "__main__"):
        found -= {"plan", "cli", "hosts"}  # the command line is outside too, and starts them
    assert not found


@pytest.mark.parametrize("name", MODULES)
def test_the_core_knows_no_host(name):
    others = imports(name)[1]
    if room(name) != "hosts":
        assert "openood" not in others
        assert "pytorch_ood" not in others or room(name) == "baselines"


def test_there_is_no_cycle():
    edges = {name: imports(name)[0] & MODULES.keys() - {name} for name in MODULES}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(edges[name]):
            visit(other)
        path.pop()
        done.add(name)

    for name in MODULES:
        visit(name)
    assert done == MODULES.keys()


def test_modules_are_named_by_content_and_lie_two_levels_deep_at_most():
    for name in MODULES:
        assert not {"utils", "util", "helpers", "common", "misc"} & set(name.split("."))
        assert len(name.split(".")) <= (3 if name.startswith("hosts") else 2)


@pytest.mark.parametrize(
    "statement",
    ["import sdood_plugin", "from sdood_plugin.cli import build_parser; build_parser()", "import sdood_plugin.config"],
)
def test_importing_is_cheap(statement):
    heavy = "{'torch', 'diffusers', 'timm', 'sklearn', 'matplotlib', 'accelerate', 'torchvision'}"
    code = f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[]"
