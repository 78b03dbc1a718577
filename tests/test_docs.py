"""README and docs are run: Python blocks, JSON examples, and the README's commands on the demo checkpoint."""

import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from rawloop.data.samples import read_samples
from rawloop.demo import SPEECH
from rawloop.records import read_events, read_metrics
from rawloop.watch.findings import Whose
from tests.forks import Forks

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SETUP = ("launch/quickstart.sh", "launch/test.sh")  # the two commands that install; run by CI and by every newcomer


def blocks(language: str) -> list[tuple[str, str]]:
    """Every fenced block of a language, with the name of its page."""
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(page.name, block) for page in PAGES for block in fence.findall(page.read_text(encoding="utf-8"))]


def python_blocks() -> list[Any]:
    """The blocks of all pages; some are slow tests."""

    def is_slow(page: str, code: str) -> bool:  # it trains for some seconds, or tests/families/test_own.py runs it
        return page == "embedding.md" or "class Whisper" in code

    return [pytest.param(*one, marks=pytest.mark.slow if is_slow(*one) else ()) for one in blocks("python")]


@pytest.mark.parametrize(("page", "code"), python_blocks())
def test_python_blocks_run(page: str, code: str, forks: Forks, tmp_path: Path) -> None:
    strict = "import warnings; warnings.simplefilter('error')\n"
    forks.run("-c", strict + code, cwd=tmp_path, finalize=True, check=True)


@pytest.mark.parametrize(("page", "text"), blocks("json"))
def test_json_examples_are_read_as_data(page: str, text: str, tmp_path: Path) -> None:
    for name in "abcd":
        shutil.copy(SPEECH / "eval" / "eval-en-02.flac", tmp_path / f"{name}.wav")
    (tmp_path / "a.txt").write_text("The words of a.", encoding="utf-8")
    file = tmp_path / ("metadata.json" if "samples" in json.loads(text) else "data.jsonl")
    file.write_text(text if file.suffix == ".json" else text.strip(), encoding="utf-8")
    found = [sample.task for sample in read_samples(tmp_path)]
    assert found in ([None], re.findall(r"^\| (\w+) \| [abcd] ", (ROOT / "docs" / "data.md").read_text(), re.MULTILINE))


def test_no_link_of_the_pages_is_broken() -> None:
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", prose):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_only_the_setup_commands_and_one_recipe_stand_in_bash_blocks() -> None:
    first, second = (code for _, code in blocks("bash"))
    assert all(command in first for command in SETUP)
    assert "rawloop prepare" in second


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_readmes_recipe_runs(demo_checkpoint: Path, tmp_path: Path) -> None:
    """The README's commands, letter by letter, on a recipe whose model, sizes and device are the demo's."""
    recipe = yaml.safe_load((ROOT / "configs" / "higgs_lora.yaml").read_text(encoding="utf-8"))
    recipe["model"] |= {"path": str(demo_checkpoint / "model"), "codec": str(demo_checkpoint / "codec")}
    recipe["train"] |= {"batch_size": 2, "max_steps": 2, "log_every": 1}
    recipe["data"]["num_workers"] = 1
    recipe["device"] = "cpu"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "higgs_lora.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    shutil.copytree(SPEECH / "train", tmp_path / "my_recordings")
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    _, commands = (code for _, code in blocks("bash"))
    environment = {**os.environ, "NPROC": "2"}
    script = ["bash", "-euo", "pipefail", "-c", commands]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "eval_loss" in done.stdout
    assert (tmp_path / "hello.wav").stat().st_size > 44  # a wav's header
    assert (tmp_path / "models" / "voice" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "voice" / "best" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_family_of_the_page_is_trained_by_the_pages_commands(tmp_path: Path) -> None:
    """The page's class, file and commands, letter by letter: the console script and torchrun both find the class."""
    write_family(tmp_path)
    done = run_console(next(code for page, code in blocks("console") if page == "families.md"), tmp_path)
    assert "[[train 7: la la la la la la la ]]" in done.stdout  # inspect
    assert "resumed from runs/charlm/checkpoints/step-00000020 at step 20" in done.stdout
    best = {}
    for run, steps in (("charlm", [0, 10, 20, 30]), ("two", [0, 10, 20])):
        metrics = read_metrics(tmp_path / "runs" / run)
        losses = {line["step"]: float(line["eval_loss"] or "nan") for line in metrics if "eval_loss" in line}
        best[run] = min(losses.values())
        assert list(losses) == steps
        assert losses[0] == pytest.approx(math.log(257), rel=0.05)
        assert losses[20] < 0.6 * losses[0]
        events = read_events(tmp_path / "runs" / run)
        assert [e["reason"] for e in events if e["kind"] == "check"][1:] == [
            "first loss: text 5.6284 CHANCE",
            "causality: text PASS",
        ]
        assert not [e for e in events if e["kind"] in ("warning", "skip", "fallback")]
    evaluated = json.loads(done.stdout[done.stdout.rindex("\n{") :])
    assert evaluated["eval_loss"] == pytest.approx(best["charlm"], rel=1e-6)


def write_family(folder: Path) -> None:
    """Write the family of docs/families.md, its config, and a few texts."""
    for language, name in (("python", "charlm.py"), ("yaml", "charlm.yaml")):
        code = next(code for page, code in blocks(language) if page == "families.md")
        (folder / name).write_text(code, encoding="utf-8")
    for split, number in (("train", 8), ("eval", 5)):
        records = [json.dumps({"text": f"{split} {k}: " + "la " * k}) + "\n" for k in range(number)]
        (folder / f"{split}.jsonl").write_text("".join(records), encoding="utf-8")


def run_console(commands: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a block of commands in a folder."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
    script = ["bash", "-euo", "pipefail", "-c", commands]
    done = subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def session(number: int) -> dict[str, list[str]]:
    """The blocks of the session of this number on docs/debugging.md, by language."""
    page = (ROOT / "docs" / "debugging.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", page, flags=re.MULTILINE)[number]
    found = re.findall(r"^```(\w+)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return {kind: [code for language, code in found if language == kind] for kind, _ in found}


def assert_shown(blocks_of_text: list[str], printed: str) -> None:
    """Look for the parts of text blocks, which `...` divides, in what was printed. Fractions and spaces may differ."""

    def plain(text: str) -> str:
        return " ".join(re.sub(r"#+", "#", re.sub(r"\d+\.\d+(e[+-]\d+)?", "#", text)).split())  # bars too

    for part in [part for block in blocks_of_text for part in re.split(r"^\.\.\.\n", block, flags=re.MULTILINE)]:
        assert plain(part) in plain(printed), f"{part}\nis not in\n{printed}"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_session_of_a_nan_loss(tmp_path: Path) -> None:
    shown = session(1)
    (tmp_path / "train.py").write_text(shown["python"][0], encoding="utf-8")
    done = run_console(shown["console"][0], tmp_path)
    assert_shown(shown["text"][1:], done.stdout + done.stderr)  # the first block is the loop without a watch


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_session_of_fp16(tmp_path: Path) -> None:
    shown = session(2)
    write_family(tmp_path)
    done = run_console(shown["console"][0], tmp_path)
    assert_shown(shown["text"], done.stdout + done.stderr)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_session_of_a_smooth_curve(tmp_path: Path) -> None:
    shown = session(3)
    write_family(tmp_path)
    done = run_console(shown["console"][0], tmp_path)
    (tmp_path / "alarms.py").write_text(shown["python"][0], encoding="utf-8")
    script = run_console("python alarms.py", tmp_path)
    assert_shown(shown["text"], done.stdout + done.stderr + script.stdout)
    assert "first apart from wrong at step 10" in (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "the graph is cut between" in (tmp_path / "runs" / "wrong" / "report.html").read_text(encoding="utf-8")
    capsules = "\n".join(
        code for page, code in blocks("console") if page == "debugging.md" and "runs/wrong/cap" in code
    )
    assert "equal, bit for bit" in run_console(capsules, tmp_path).stdout


def test_the_tables_of_findings_have_every_kind_of_the_code() -> None:
    page = (ROOT / "docs" / "debugging.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|.*\|.*\|$", page, re.MULTILINE)
    assert len(listed) == len(set(listed))
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "rawloop" / "watch").glob("*.py")]
    made, written = set.union(*map(kinds_of, trees)), set.union(*map(strings_of, trees))
    assert made <= {*listed}
    assert {*listed} <= written


FAULTS = {*get_args(Whose)}


def strings_of(tree: ast.AST) -> set[str]:
    """All strings in a module."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {node.value for node in nodes if isinstance(node.value, str)}


def values_of(node: ast.expr) -> set[str]:
    """The strings that an expression may be."""
    if isinstance(node, ast.IfExp):
        return values_of(node.body) | values_of(node.orelse)
    return {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()


def kinds_of(tree: ast.AST) -> set[str]:
    """The kinds of findings in a module: arguments of what makes findings, `kind = ...`, and tuples with a fault."""
    makers = {"Finding": 0, "finding": 0, "_finding": 2, "told": 1}  # -> the place of the kind
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            method = isinstance(node.func, ast.Attribute)
            name = getattr(node.func, "attr" if method else "id", "")
            place = 0 if method else makers.get(name, 0)
            found |= values_of(node.args[place]) if name in makers and len(node.args) > place else set()
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).lower() == "kind":
            found |= values_of(node.value) - {"list", "tuple"}  # those are kinds of containers
        elif isinstance(node, ast.Return | ast.Yield) and isinstance(node.value, ast.Tuple):
            inside = set[str]().union(*map(values_of, node.value.elts))
            found |= {word for word in inside if re.fullmatch("[a-z]+_[a-z_]+", word)} if inside & FAULTS else set()
    return found
