"""Writes docs/messages.md: the fixed words of rawloop's messages, by the page that is about them.

    python tests/message_index.py

The messages are the texts with which the source raises its errors, found in the syntax tree. What is filled in is
written as `…`. `tests/test_messages.py` compares the page with the source.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "messages.md"
ERRORS = frozenset(
    {"UserError", "RawloopError", "CheckpointError", "TrainingError", "LostRank", "BadSample", "BadAudio", "Unusable"}
    | {"LibraryError", "library_error", "InterruptedUpdate", "fail"}
)
FEWEST = 3  # words of a message
HEAD = (
    "# Messages\n\nWhich page is about a message: search here for its words. `…` stands for what is filled in, such as "
    "a name or a number. Messages that only quote a library are not listed. The errors of other trainers are in "
    "[failures.md](failures.md).\n"
)
# The page of each part, by the beginning of its path in the package; the longest that fits counts.
PAGES = {
    "adapters/": "checkpoints.md",
    "audio.py": "data.md",
    "buffers.py": "checkpoints.md",
    "build.py": "architecture.md",
    "cards.py": "plan.md",
    "changes.py": "checkpoints.md",
    "checkpoint": "checkpoints.md",
    "cli/": "../README.md",
    "cli/doctor.py": "correctness.md",
    "cli/evaluate.py": "checkpoints.md",
    "cli/export.py": "listening.md",
    "cli/generate.py": "listening.md",
    "cli/import.py": "data.md",
    "cli/inspect.py": "correctness.md",
    "cli/launch_check.py": "launching.md",
    "cli/merge.py": "checkpoints.md",
    "cli/plan.py": "plan.md",
    "cli/precision.py": "debugging.md",
    "cli/prepare.py": "data.md",
    "cli/replay.py": "debugging.md",
    "cli/report.py": "debugging.md",
    "cli/verify.py": "checkpoints.md",
    "compiling.py": "recipes.md",
    "components.py": "families.md",
    "config.py": "../README.md",
    "containers.py": "data.md",
    "data/": "data.md",
    "demo/": "../README.md",
    "diagnose/": "correctness.md",
    "dist.py": "launching.md",
    "estimate.py": "plan.md",
    "evaluate.py": "correctness.md",
    "exporting.py": "listening.md",
    "families/": "families.md",
    "ffmpeg.py": "data.md",
    "files.py": "checkpoints.md",
    "frames.py": "data.md",
    "generation.py": "listening.md",
    "host_memory.py": "checkpoints.md",
    "inputs.py": "embedding.md",
    "kept": "debugging.md",
    "launcher.py": "launching.md",
    "listen": "listening.md",
    "loop.py": "correctness.md",
    "losses.py": "families.md",
    "moving_buffers.py": "checkpoints.md",
    "machines.py": "launching.md",
    "meeting.py": "launching.md",
    "optim": "embedding.md",
    "origin/": "debugging.md",
    "output.py": "checkpoints.md",
    "pack.py": "checkpoints.md",
    "parser.py": "../README.md",
    "planning.py": "data.md",
    "precision": "precision.md",
    "preempt.py": "checkpoints.md",
    "prompts.py": "listening.md",
    "ready.py": "architecture.md",
    "rebuild.py": "precision.md",
    "records.py": "embedding.md",
    "replay.py": "debugging.md",
    "rounding.py": "precision.md",
    "report/": "debugging.md",
    "resume.py": "checkpoints.md",
    "run.py": "embedding.md",
    "seed.py": "checkpoints.md",
    "settings.py": "../README.md",
    "sink": "loggers.md",
    "sharding.py": "sharding.md",
    "sizing.py": "plan.md",
    "spike_watch.py": "debugging.md",
    "trained.py": "listening.md",
    "translation/": "from-trainer.md",
    "versions.py": "checkpoints.md",
    "waiting.py": "launching.md",
    "watch": "debugging.md",
    "weights.py": "checkpoints.md",
    "yaml_file.py": "../README.md",
}


def page_of(file: str) -> str | None:
    """Return the page of a file of the package."""
    fitting = [start for start in PAGES if file.startswith(start)]
    return PAGES[max(fitting, key=len)] if fitting else None


def words_of(node: ast.expr) -> str | None:
    """Return the text of a string or f-string, or None for another expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(words_of(part) or "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return f"{words_of(node.left) or '…'}{words_of(node.right) or '…'}"
    return None


def messages(source: str) -> Iterator[str]:
    """Yield the messages that a module raises, in the order of its lines."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        text = words_of(node.args[0]) if name in ERRORS else None
        text = " ".join((text or "").split())
        if len(text.replace("…", " ").split()) >= FEWEST:
            yield text


def index() -> dict[str, list[str]]:
    """Return the messages of all modules, by page and in alphabetical order. An unknown module is under its name."""
    found: dict[str, set[str]] = {}
    package = ROOT / "rawloop"
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package).as_posix()
        for text in messages(file.read_text(encoding="utf-8")):
            found.setdefault(page_of(name) or name, set()).add(text)
    return {page: sorted(texts, key=str.casefold) for page, texts in sorted(found.items())}


def written() -> str:
    """Return the page."""
    parts = [HEAD]
    for page, texts in index().items():
        parts += [f"\n## [{page.removeprefix('../')}]({page})\n\n", *(f"- {quoted(text)}\n" for text in texts)]
    return "".join(parts)


def quoted(text: str) -> str:
    """Return a text as code."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")
