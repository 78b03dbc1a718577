"""docs/failures.md and the gallery agree: every module is on the page, and its headings quote what the tests show."""

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "failures.md"
LINK = re.compile(r"\[(tests/failures/[a-z0-9_]+\.py)\]\(\.\./(tests/failures/[a-z0-9_]+\.py)\)")


def sections() -> dict[str, str]:
    """The page's sections of the second level, by heading."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def modules(section: str) -> list[str]:
    links = LINK.findall(section)
    assert all(shown == target for shown, target in links)
    return [shown for shown, _ in links]


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_module_of_the_gallery_has_its_section() -> None:
    own = {f"tests/failures/{file.name}" for file in HERE.glob("test_*.py")} - {f"tests/failures/{Path(__file__).name}"}
    shown = [module for section in sections().values() for module in modules(section)]
    assert sorted(shown) == sorted(own)  # each once, and none that does not exist


@pytest.mark.parametrize("heading", sections())
def test_what_a_heading_quotes_occurs_in_its_module(heading: str) -> None:
    (module,) = modules(sections()[heading])
    text = " ".join((HERE / Path(module).name).read_text(encoding="utf-8").split())  # docstrings break lines
    quoted = re.findall(r"(`{1,2})(.+?)\1(?!`)", heading)
    for _, message in quoted:
        kind = re.match(r"[A-Z]\w+(?:Error|Exception): ", message)
        assert message[kind.end() if kind else 0 :] in text, message
        assert kind is None or kind.group().removesuffix(": ") in text
    body = sections()[heading]
    for part in ("**Shown by**", "**Why.**", "**rawloop**"):
        assert body.count(part) == 1, part


def test_the_table_of_contents_lists_every_section_in_order() -> None:
    opening = PAGE.read_text(encoding="utf-8").split("\n## ")[0]
    entries = re.findall(r"^- \[(.+)\]\(#(.+)\)$", opening, flags=re.MULTILINE)
    assert entries == [(heading, anchor(heading)) for heading in sections()]
