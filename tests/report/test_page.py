"""A page loads nothing, escapes all text, and is written completely or not at all."""

import re
from pathlib import Path

import pytest

from rawloop.errors import UserError
from rawloop.report import page
from rawloop.report.page import Clip, Figure, Note, Section, Table, render, write_page
from rawloop.report.plots import Line, draw_lines

EVIL = "<script src='http://evil.example/x.js'>&\"$x$"


def everything(text: str) -> str:
    """A page with the text in every place that takes text."""
    lines = [Line(text, [0, 1], [1.0, 2.0]), Line("other", [0, 1], [1.0, float("nan")], 1)]
    section = Section(
        text,
        [Note(text, "alarm", text)],
        [draw_lines(text, lines), Figure(text, "<svg></svg>", [("#000", text)], text)],
        [Table([text, "n"], [[text, 1234], [None, 0.123456789]], text)],
        [Clip(text, "data:audio/wav;base64,AAAA")],
    )
    return render(text, [section], [Note(text)])


def loaded(html: str) -> list[str]:
    """What a browser would fetch, besides data: URIs and parts of the page itself."""
    found = re.findall(
        r"""\b(?:src|href|data|action|poster|srcset)\s*=\s*["']?([^"'>\s]*)""", re.sub(r">[^<]*", ">", html)
    )
    found += re.findall(r"url\(([^)]*)\)|@import\s+(\S+)", html)
    flat = [part for item in found for part in ([item] if isinstance(item, str) else item) if part]
    return [part for part in flat if not part.startswith(("#", "data:"))]


def test_all_text_is_escaped_and_nothing_is_loaded() -> None:
    html = everything(EVIL)
    assert "<script" not in html.lower()
    assert html.count("&lt;script") == 15
    assert loaded(html) == []
    assert "http" not in everything("a")  # not even the names of namespaces
    assert loaded("<img src=http://x><link href='//y'><style>a{b:url(http://z)}</style>") == [
        "http://x",
        "//y",
        "http://z",
    ]


def test_a_page_fits_a_phone() -> None:
    html = everything("a")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert "font: 16px/1.5" in html
    assert "prefers-color-scheme: dark" in html
    assert not re.search(r"<svg[^>]*\b(width|height)=", html)  # they follow the width of the page


def test_numbers_in_tables() -> None:
    html = everything("a")
    assert '<td class="number">1,234</td>' in html
    assert '<td class="number">0.123457</td>' in html
    assert "<td>None</td>" in html


def test_empty_sections_are_left_out() -> None:
    assert "<h2>" not in render("a", [Section("b")])


@pytest.mark.parametrize(("missing", "said"), [
    (["jinja2"], "Jinja2, which is not installed"),
    (["jinja2", "matplotlib"], "Jinja2 and matplotlib, which are not installed"),
])  # fmt: skip
def test_a_missing_package_is_named(missing: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    page.check_packages()
    monkeypatch.setattr(page, "find_spec", lambda name: None if name in missing else name)
    with pytest.raises(UserError, match=r"pip install 'rawloop\[report\]'") as caught:
        page.check_packages()
    assert said in str(caught.value)


@pytest.mark.usefixtures("permissions_count")
def test_where_a_page_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "closed").mkdir(mode=0o500)
    for name, said in (
        ("metrics.jsonl", r"must end in \.html or \.htm"),
        ("folder.html", "which is a folder"),
        ("none/a.html", "there is no folder"),
        ("closed/a.html", "cannot be written to .* no permission"),
    ):
        with pytest.raises(UserError, match=said):
            write_page(tmp_path / name, "<html>")
    write_page(tmp_path / "a.html", "old")
    write_page(tmp_path / "a.html", "ü \udcff")  # a name of a file that is not UTF-8
    assert (tmp_path / "a.html").read_bytes() == "ü ?".encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "closed", "folder.html"]
