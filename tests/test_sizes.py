"""Sizes that keep the package readable: lines of a file and of a function, and how deep blocks are nested."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rawloop"
LINES, FUNCTION, NESTING = 300, 60, 3
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
INNER = (ast.FunctionDef, ast.ClassDef, ast.Lambda)


def nesting(node: ast.AST, depth: int = 0) -> int:
    """The deepest block inside a function; an elif is as deep as its if, and functions inside count for themselves."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        if not isinstance(child, INNER):
            deepest = max(deepest, nesting(child, depth + (isinstance(child, BLOCKS) and not is_elif)))
    return deepest


def too_large(name: str, text: str) -> Iterator[str]:
    """Yield what is larger than it may be."""
    if (count := len(text.splitlines())) > LINES:
        yield f"{name} has {count} lines, and may have {LINES}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length, depth = (node.end_lineno or 0) - node.lineno + 1, nesting(node)
            if length > FUNCTION:
                yield f"{name}: {node.name} has {length} lines, and may have {FUNCTION}"
            if depth > NESTING:
                yield f"{name}: {node.name} nests {depth} blocks, and may nest {NESTING}"


def test_nothing_is_too_large() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 200
    found = (told for file in files for told in too_large(str(file.relative_to(PACKAGE)), file.read_text("utf-8")))
    assert list(found) == []


DEEP = """
def f(x):
    for a in x:
        if a:
            with a:
                while a:
                    pass
"""
FLAT = "def f(x):\n    if x:\n        pass\n" + "    elif x:\n        pass\n" * 9
INSIDE = """
def f(x):
    with x:
        def g(y):
            for a in y:
                if a:
                    return
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\n" * 300, []),
        ("x = 1\n" * 301, ["a.py has 301 lines, and may have 300"]),
        ("def f():\n" + "    x = 1\n" * 59, []),
        ("def f():\n" + "    x = 1\n" * 60, ["a.py: f has 61 lines, and may have 60"]),
        (DEEP, ["a.py: f nests 4 blocks, and may nest 3"]),
        (FLAT, []),
        (INSIDE, []),
    ],
)
def test_each_limit_can_fail(text: str, expected: list[str]) -> None:
    assert list(too_large("a.py", text)) == expected
