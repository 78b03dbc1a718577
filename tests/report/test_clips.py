"""The page of a data set: every unusual kind, players as far as there is room, rare letters by name."""

import re
from typing import Any

from rawloop.report import clips
from rawloop.report.clips import data_page, name_of

FLAGS = {kind: f"what {kind} means" for kind in ("unread", "fast", "slow", "clipped", "silent", "edges", "loudness")}
EVIL = "<script>alert('\u202bשלום 🙂')</script>"


def clip(number: int, *flags: str, **changes: Any) -> dict[str, Any]:
    sound = {"seconds": 1.0 + number / 9, "rms": -20.0, "peak": -3.0, "clipped": 0.0, "silence": 0.1}
    times = {"before": 0.0, "after": 0.0, "speed": 10.0 + number}
    words = {"id": f"id{number}", "path": f"/d/{number}.wav", "words": EVIL, "characters": 30, "flags": list(flags)}
    return {**words, **sound, **times, **changes}


def report(*found: dict[str, Any]) -> dict[str, Any]:
    letters = {"a": [100, "id0"], "\u00a0": [1, "id1"], "ı": [2, "id2"]}
    return {"hours": 0.5, "usual": {"seconds": 1.5, "rms": -20.0}, "flags": FLAGS, "letters": letters, "clips": found}


def test_every_kind_has_its_worst_clips_and_players() -> None:
    fast = [clip(number, "fast", "silent", silence=0.5 + number / 99) for number in range(20)]
    unread = {"id": "x", "path": "/d/x.wav", "words": "w", "flags": ["unread"], "unread": "cannot be decoded: no audio"}
    page = data_page("my data", report(*fast, unread), lambda path: ("audio/mpeg", path.encode()))
    assert "<script" not in page
    assert "21 clips are unusual" in page
    assert page.count("<audio") == 4  # a clip is in the page once
    assert page.index("19.wav") < page.index("18.wav") < page.index("8.wav")
    assert "The 12 worst of 20; the JSON file beside this page has all." in page
    assert "cannot be decoded: no audio" in page
    assert page.count("<svg") == 4
    assert "U+00A0 no-break space" in page
    assert "ı U+0131 latin small letter dotless i" in page
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", page)


def test_a_page_has_no_more_sound_than_there_is_room(monkeypatch: Any) -> None:
    monkeypatch.setattr(clips, "ROOM", 250)
    found = [clip(number, "slow") for number in range(4)]
    assert data_page("d", report(*found), lambda path: ("audio/mpeg", bytes(100))).count("<audio") == 2
    assert data_page("d", report(*found), lambda path: None).count("<audio") == 0


def test_a_good_data_set_says_so() -> None:
    page = data_page("d", report(clip(1), clip(2)), lambda path: None)
    assert "No clip is unusual." in page
    assert "What is unusual" not in page


def test_letters_that_cannot_be_seen_have_their_names() -> None:
    assert name_of("\u200f") == "U+200F right-to-left mark"
    assert name_of("\n") == "U+000A"
