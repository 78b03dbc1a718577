"""The floors of the house, enforced: who may import whom, and which names live in one room only.

The checker reads source text, so that each rule can be shown to fail on a made-up package.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rawloop"

FLOORS = (
    (
        "ground",
        (
            "errors",
            "throughput",
            "settings",
            "contracts",
            "family_protocols",
            "causes",
            "output",
            "facts",
            "machines",
            "meeting",
            "launcher",
            "waiting",
            "files",
            "layers",
            "sharding",
            "sharded_optim",
            "rounding",
            "host_memory",
            "pack",
            "dist",
            "preempt",
            "progress",
            "records",
            "versions",
            "sinks",
            "sink_process",
            "sink_libraries",
            "seed",
            "kept_weights",
            "allocations",
            "buffers",
            "moving_buffers",
            "losses",
            "in_step",
            "origin",
            "inputs",
            "containers",
            "ffmpeg",
            "frames",
            "audio",
        ),
    ),
    (
        "parts",
        (
            "precision",
            "evaluate",
            "checkpoint",
            "data",
            "families",
            "adapters",
            "optim",
            "optim_state",
            "diagnose",
            "watch",
            "report",
            "listen",
            "demo",
        ),
    ),
    ("frame", ("run", "loop", "rebuild")),
    (
        "assembly",
        (
            "config",
            "yaml_file",
            "values",
            "keys",
            "parser",
            "trainer_names",
            "translation",
            "cadences",
            "changes",
            "weights",
            "trained",
            "prompts",
            "generation",
            "exporting",
            "card",
            "listening",
            "costs",
            "compiling",
            "components",
            "sharded",
            "planning",
            "cards",
            "estimate",
            "sizing",
            "checkpoints",
            "resume",
            "kept",
            "spike_watch",
            "watched",
            "replay",
            "ready",
            "build",
            "precision_probe",
            "precision_race",
        ),
    ),
    ("door", ("cli", "__main__", "__init__")),
)
FLOOR_OF = {room: level for level, (_, rooms) in enumerate(FLOORS) for room in rooms}
PARTS, FRAME = 1, 2

# What is named -> the only places that may name it. A place is a room, or a path within the package.
ONLY_IN = {
    "torch.distributed": ("dist", "launcher", "machines", "sharding", "waiting"),
    "torch.nn.parallel.DistributedDataParallel": ("dist",),
    "torch.amp": ("precision",),
    "torch.cuda.amp": ("precision",),
    "torch.cpu.amp": ("precision",),
    "torch.autocast": ("precision", "origin", "watch/spans.py", "inputs.py"),
    "peft": ("adapters",),
    "transformers.HiggsAudio*": ("families", "demo/checkpoint.py"),
    "transformers.models": ("families", "demo/checkpoint.py"),
}
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID")


@dataclass
class Source:
    """What one file imports and names."""

    path: str  # relative to the package
    modules: set[str]  # all modules of the package
    imported: dict[str, int] = field(default_factory=dict)  # modules of the package -> line
    at_start: set[str] = field(default_factory=set)  # those that importing this file imports
    named: dict[str, int] = field(default_factory=dict)  # dotted names, resolved through the imports
    called: dict[str, int] = field(default_factory=dict)
    constants: dict[str, int] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)  # local name -> dotted name

    @property
    def module(self) -> str:
        return module_name(self.path)

    @property
    def room(self) -> str:
        return self.path.split("/")[0].removesuffix(".py")

    def read(self, text: str) -> "Source":
        """Parse the file; imports first, for names are resolved through them."""
        tree = ast.parse(text, self.path)
        starting = {id(node) for node in at_start(tree)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for dotted, local in self.origins(node):
                    self.note_import(dotted, local, node.lineno, id(node) in starting)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute | ast.Name):
                self.named.setdefault(self.resolved(node), node.lineno)
            elif isinstance(node, ast.Call):
                self.called.setdefault(self.resolved(node.func), node.lineno)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                self.constants.setdefault(node.value, node.lineno)
        return self

    def resolved(self, node: ast.AST) -> str:
        root, *rest = dotted_name(node).split(".")
        return ".".join([self.aliases.get(root, root), *rest])

    def origins(self, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
        """Yield (dotted name, local name) for each thing imported."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, alias.asname or ""
            return
        base = node.module or ""
        if node.level:
            package = self.module.split(".") if self.path.endswith("__init__.py") else self.module.split(".")[:-1]
            package = package[: len(package) - node.level + 1]
            base = ".".join([*package, *([base] if base else [])])
        for alias in node.names:
            yield f"{base}.{alias.name}", alias.asname or alias.name

    def note_import(self, dotted: str, local: str, line: int, starting: bool) -> None:
        """Note one import: of a module of the package, or of a name in one; of anything else, just its name."""
        self.named.setdefault(dotted, line)
        if local:
            self.aliases[local] = dotted
        if dotted.split(".")[0] != "rawloop":
            return
        target = dotted if dotted in self.modules else dotted.rpartition(".")[0]
        target = target or "rawloop"
        if target == self.module:
            return
        self.imported.setdefault(target, line)
        if starting:
            self.at_start.add(target)


def module_name(path: str) -> str:
    """`checkpoint/__init__.py` -> `rawloop.checkpoint`."""
    return ".".join(["rawloop", *path.removesuffix(".py").removesuffix("__init__").rstrip("/").split("/")]).rstrip(".")


def dotted_name(node: ast.AST) -> str:
    """`torch.amp.autocast` for the expression of that name; an unknown root is empty."""
    if isinstance(node, ast.Attribute):
        return f"{dotted_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def at_start(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that run when the file is imported: not inside functions, not for the type checker only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and dotted_name(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from at_start(child)


def violations(texts: dict[str, str]) -> list[str]:
    """Check a package, given as path -> source text, and say what breaks the house rules."""
    modules = {module_name(path) for path in texts}
    sources = [Source(path, modules).read(text) for path, text in texts.items()]
    found = [line for source in sources for rule in (floors, rooms, ranks, frame) for line in rule(source)]
    return found + cycles({source.module: source.at_start for source in sources})


def floors(source: Source) -> Iterator[str]:
    """A file imports only from floors below it, and from its own floor unless that is the parts."""
    if source.room not in FLOOR_OF:
        yield f"{source.path}: stands on no floor; give '{source.room}' a place in FLOORS"
        return
    level = FLOOR_OF[source.room]
    for target, line in source.imported.items():
        room = [*target.split("."), "__init__"][1]
        place = f"{source.path}:{line}: imports {target}"
        if room == source.room:
            continue
        if room not in FLOOR_OF or FLOOR_OF[room] > level:
            yield f"{place}, which is not below {FLOORS[level][0]}"
        elif FLOOR_OF[room] == PARTS == level:
            yield f"{place}: parts do not import each other"


def rooms(source: Source) -> Iterator[str]:
    """Some libraries are named in one room only. `GradScaler` counts wherever it comes from."""
    for name, line in source.named.items():
        for prefix, places in ONLY_IN.items():
            hit = f"{name}.".startswith(prefix.removesuffix("*") if prefix.endswith("*") else f"{prefix}.")
            if hit and not {source.room, source.path} & set(places):
                yield f"{source.path}:{line}: {name} belongs into {' or '.join(places)}"
        if name.split(".")[-1] == "GradScaler" and source.room != "precision":
            yield f"{source.path}:{line}: {name} belongs into precision"


def ranks(source: Source) -> Iterator[str]:
    """Only launcher.py knows the names of the launcher's variables."""
    for name in RANK_VARIABLES:
        if name in source.constants and source.path != "launcher.py":
            yield f"{source.path}:{source.constants[name]}: {name} is read by launcher.py only"


def frame(source: Source) -> Iterator[str]:
    """The loop receives finished objects: it names the classes of the parts for types, and calls none of them."""
    if FLOOR_OF.get(source.room) != FRAME:
        return
    for name, line in source.called.items():
        _, _, rest = name.partition("rawloop.")
        if rest.split(".")[0] in FLOORS[PARTS][1] and name.split(".")[-1][0].isupper():
            yield f"{source.path}:{line}: constructs {name}: the frame receives finished objects"


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """Name every module that reaches itself through imports that run at import time."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = list(graph.get(start, ()))
        while ahead:
            module = ahead.pop()
            if module not in seen:
                seen.add(module)
                ahead.extend(graph.get(module, ()))
        return seen

    return [f"{module}: is part of an import cycle" for module in sorted(graph) if module in reached(module)]


def test_the_house_stands() -> None:
    texts = {file.relative_to(PACKAGE).as_posix(): file.read_text() for file in PACKAGE.rglob("*.py")}
    assert len(texts) > 10
    assert violations(texts) == []


def package(text: str) -> dict[str, str]:
    """`a.py: x = 1 | b.py: y = 2` -> path and source text of each file."""
    return {path.strip(): code.strip() for path, code in (file.split(":", 1) for file in text.split("|"))}


BROKEN = {
    "seed.py: import rawloop.optim | optim.py:": "seed.py:1: imports rawloop.optim, which is not below ground",
    "optim.py: def f(): from rawloop.loop import train | loop.py:": "optim.py:1: imports rawloop.loop",
    "loop.py: from rawloop import config | config.py:": "loop.py:1: imports rawloop.config",
    "build.py: from rawloop.cli import main | cli/__init__.py:": "build.py:1: imports rawloop.cli",
    "build.py: from rawloop import train | __init__.py:": "build.py:1: imports rawloop, which is not below assembly",
    "data/a.py: from ..families.b import x | families/b.py:": "data/a.py:1: imports rawloop.families.b: parts do not",
    "utils.py:": "utils.py: stands on no floor",
    "loop.py: from rawloop.optim import Plan as P; P() | optim.py:": "loop.py:1: constructs rawloop.optim.Plan",
    "loop.py: import torch.distributed as dist": "torch.distributed belongs into dist",
    "evaluate.py: from torch import distributed": "torch.distributed belongs into dist",
    "cli/a.py: from torch.distributed.fsdp import FSDP": "torch.distributed.fsdp.FSDP belongs into dist",
    "seed.py: import torch; torch.distributed.barrier()": "torch.distributed.barrier belongs into dist",
    "build.py: from torch.nn.parallel import DistributedDataParallel as D": "DistributedDataParallel belongs into dist",
    "build.py: def f(): import peft": "build.py:1: peft belongs into adapters",
    "families/a.py: from peft import LoraConfig": "peft.LoraConfig belongs into adapters",
    "evaluate.py: import torch as t; t.autocast('cpu')": "torch.autocast belongs into precision",
    "loop.py: from torch import amp": "torch.amp belongs into precision",
    "loop.py: from torch.cuda import amp": "torch.cuda.amp belongs into precision",
    "build.py: from fairscale import GradScaler": "fairscale.GradScaler belongs into precision",
    "build.py: from transformers import HiggsAudioV2Config": "HiggsAudioV2Config belongs into families or demo",
    "loop.py: import os; os.environ['RANK']": "loop.py:1: RANK is read by launcher.py only",
    "cli/a.py: import os; os.getenv('WORLD_SIZE')": "cli/a.py:1: WORLD_SIZE is read by launcher.py only",
    "build.py: import os; os.getenv('TORCHELASTIC_RESTART_COUNT')": "TORCHELASTIC_RESTART_COUNT is read by launcher.py",
    "data/a.py: import rawloop.data.b | data/b.py: from rawloop.data import c | data/c.py: from . import a": (
        "rawloop.data.a: is part of an import cycle"
    ),
}


@pytest.mark.parametrize(("text", "expected"), BROKEN.items())
def test_each_rule_can_fail(text: str, expected: str) -> None:
    found = violations(package(text))
    assert any(expected in line for line in found), found


def test_types_count_as_imports() -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import rawloop.families.b"
    (found,) = violations({"data/a.py": text, "families/b.py": ""})
    assert "data/a.py:3: imports rawloop.families.b: parts do not import each other" in found


@pytest.mark.parametrize(
    "text",
    [
        "loop.py: from rawloop.dist import World; World() | dist.py: | cli/a.py: import rawloop.loop",
        "data/a.py: from rawloop.data.b import x | data/b.py: | data/__init__.py: from .a import y",
        "loop.py: from rawloop.optim import Plan, f; plan = Plan; f(plan.autocast()) | optim.py:",
        "dist.py: import torch.distributed as dist | launcher.py: import os; os.environ['RANK']",
        "adapters/lora.py: import peft | families/higgs_audio_v2.py: from transformers import HiggsAudioV2Processor",
        "precision/policy.py: import torch; torch.autocast('cpu'); torch.amp.GradScaler()",
        "data/a.py: import rawloop.data.b | data/b.py: def f(): import rawloop.data.a",
        "loop.py: print('RANK is not set, peft and torch.distributed are words in a sentence')",
    ],
)
def test_what_is_allowed_passes(text: str) -> None:
    assert violations(package(text)) == []


START = """
import runpy, sys
try:
    {code}
except SystemExit as end:
    assert not end.code, end.code
heavy = {{"torch", "transformers", "peft", "torchaudio", "numpy", "soundfile", "safetensors"}}
print("loaded:", sorted(heavy & set(sys.modules)))
"""
HELP = "sys.argv = ['rawloop', '--help']; runpy.run_module('rawloop', run_name='__main__', alter_sys=True)"


@pytest.mark.parametrize("code", ["import rawloop", HELP, "import rawloop.errors"])
def test_import_and_help_load_nothing_heavy(code: str) -> None:
    command = [sys.executable, "-c", START.format(code=code)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert "loaded: []" in run.stdout


# docs/architecture.md


PAGE = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")


def floors_of(page: str) -> dict[str, set[str]]:
    """The rooms that the page's diagram of floors shows, by floor."""
    diagram = page.partition("## Floors")[2].partition("```text\n")[2].partition("```")[0]
    found: dict[str, set[str]] = {}
    for line in diagram.splitlines():
        floor = re.match(r" (\d) +(\w+)", line)
        if floor:
            rooms = found.setdefault(floor[2], set())
        rooms |= set(re.findall(r"(\w+)(?:\.py|/)", line[15:34]))
    return found


def test_the_page_shows_every_floor_as_it_is() -> None:
    modules = {path.stem if path.suffix == ".py" else path.name for path in PACKAGE.iterdir()}
    shown = floors_of(PAGE)
    for name, rooms in FLOORS:
        there = {room for room in rooms if not room.startswith("__") and room in modules}
        assert shown[name] == there, f"docs/architecture.md, floor {name}: differ in {shown[name] ^ there}"


def test_files_that_the_page_names_exist() -> None:
    named = set(re.findall(r"[\w/]+\.py\b", PAGE.replace("NAME/", "higgs_audio_v2/").replace("NAME.py", "train.py")))
    named -= {"tests/test_floors.py", "tests/benchmarks/call_paths.py"}
    assert len(named) > 40
    assert [file for file in sorted(named) if not (PACKAGE / file).is_file()] == []


def test_the_page_has_a_short_glossary_and_twenty_answers() -> None:
    words, answers = (PAGE.partition(head)[2].partition("\n## ")[0] for head in ("## Words", "## To change X"))
    assert 10 < words.count("\n| ") - 1 <= 20
    assert answers.count("\n| ") - 1 == 20


@pytest.mark.skipif(not (PACKAGE.parent / ".git").exists(), reason="this is no clone")
def test_nothing_else_lies_at_the_top_of_the_repository() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=PACKAGE.parent, check=True, capture_output=True, text=True).stdout
    folders = {".ci", "configs", "docs", "launch", "rawloop", "tests"}
    files = {".gitignore", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.cfg"}
    assert {path.split("/")[0] for path in listed.splitlines()} == folders | files
