"""Any record and any bytes: samples, or one line that says why not. Nothing is dropped in silence, nothing crashes.

The inputs come from hypothesis. It draws the same ones each time, and many more in the slow test.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rawloop.audio import BadAudio, load_audio
from rawloop.data.config import DataConfig
from rawloop.data.keys import CHAT, CLIP
from rawloop.data.samples import read_samples
from rawloop.errors import UserError

FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None, print_blob=False)
MANY = settings(FEW, max_examples=3000, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

# Letters that break what is quoted, split or shown: quotes, ends of lines, right to left, emoji, half a pair, zero.
PLAIN = ["a.wav", "b c.wav", "../a.wav", "/etc/passwd", "file:///a.wav", "ünï.wav", "a.wav#t=0,9", "<audio>", "", " "]
ODD = [
    "שלום",
    "مرحبا",
    "a\nb",
    "a\u2028b",
    '"',
    "'",
    "\\",
    "🎉",
    "👩\u200d🚀",
    "\ud83d",
    "\0",
    "[SPEAKER0] Hi",
    "1e999",
]
TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(PLAIN), st.sampled_from(ODD))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
KEYS = st.sampled_from(sorted(CHAT.read | CLIP.read | {"speaker", "language", "ref_audio_path"}))
MESSAGES = st.fixed_dictionaries(
    {"role": st.one_of(st.sampled_from(["system", "user", "assistant", "tool"]), TEXTS), "content": VALUES},
    optional={"loss": VALUES, "tool_calls": VALUES},
)
GOOD: list[Any] = [
    {"audio_file": "a.wav", "transcript": "Good morning."},
    {"messages": [{"role": "user", "content": "Say one."}, {"role": "assistant", "content": "One."}]},
    {"text": "A document."},
]
RECORDS = st.one_of(
    st.sampled_from(GOOD),
    st.fixed_dictionaries(
        {"audio_file": st.just("a.wav"), "transcript": TEXTS}, optional={"scene": VALUES, "id": VALUES}
    ),
    st.fixed_dictionaries({"messages": st.lists(MESSAGES, max_size=3)}, optional={"audios": VALUES, "system": VALUES}),
    st.fixed_dictionaries({"text": TEXTS}),
    st.dictionaries(KEYS, VALUES, max_size=5),
    VALUES,
)
CONFIGS = st.builds(DataConfig, strict=st.booleans(), train_turns=st.sampled_from(["last", "all"]))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        for clip in ("a.wav", "b c.wav", "ünï.wav"):
            soundfile.write(Path(name) / clip, torch.linspace(-0.5, 0.5, 2400).numpy(), 24000)
        yield Path(name)


def check_samples(path: Path, config: DataConfig, wanted: int | None) -> None:
    """Read a data file: as many samples as it has records, each with something to learn, or one line."""
    try:
        samples = read_samples(path, config)
    except UserError as error:
        line = str(error)
        assert line.strip()
        assert len(line.splitlines()) == 1, line
        assert len(line) <= 3000
        line.encode()
        return
    assert wanted is None or len(samples) == wanted
    assert len({sample.id for sample in samples}) == len(samples)
    for sample in samples:
        assert any(turn.trained for turn in sample.turns)
        assert all(Path(str(clip).partition("#t=")[0]).is_file() for clip in sample.audio_paths())
        assert all(clip.resolve().is_relative_to(path.parent.resolve()) for clip in sample.audio_paths())


def records(folder: Path, values: list[Any], config: DataConfig, as_list: bool) -> None:
    text = json.dumps({"samples": values}) if as_list else "".join(json.dumps(value) + "\n" for value in values)
    path = folder / ("metadata.json" if as_list else "train.jsonl")
    path.write_text(text, encoding="utf-8")
    check_samples(path, config, len(values))


def lines(folder: Path, line: str, place: int) -> None:
    """A line of anything among good ones."""
    good = [json.dumps({"audio_file": "a.wav", "transcript": f"Number {n}."}) for n in range(3)]
    path = folder / "lines.jsonl"
    path.write_text("\n".join([*good[:place], line, *good[place:]]) + "\n", encoding="utf-8", errors="surrogatepass")
    check_samples(path, DataConfig(), None)


SAMPLE_LISTS = st.one_of(
    st.lists(RECORDS, min_size=1, max_size=3), st.lists(st.sampled_from(GOOD), min_size=2, max_size=6)
)


@FEW
@given(values=SAMPLE_LISTS, config=CONFIGS, as_list=st.booleans())
def test_any_records(folder: Path, values: list[Any], config: DataConfig, as_list: bool) -> None:
    records(folder, values, config, as_list)


@pytest.mark.slow
@MANY
@given(values=SAMPLE_LISTS, config=CONFIGS, as_list=st.booleans())
def test_very_many_records(folder: Path, values: list[Any], config: DataConfig, as_list: bool) -> None:
    records(folder, values, config, as_list)


@FEW
@given(line=st.text(max_size=40), place=st.integers(0, 3))
def test_any_line_among_good_ones(folder: Path, line: str, place: int) -> None:
    lines(folder, line, place)


@pytest.mark.slow
@MANY
@given(line=st.text(max_size=200), place=st.integers(0, 3))
def test_very_many_lines_among_good_ones(folder: Path, line: str, place: int) -> None:
    lines(folder, line, place)


EDITS = st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), max_size=4)  # place and value of a byte
KINDS = st.sampled_from(["wav", "flac", "ogg", "mp3"])


def damaged(clips: dict[str, bytes], kind: str, edits: list[tuple[int, int]], cut: int, more: bytes) -> None:
    """Decode a clip whose header has other bytes, that is cut, or that has something behind it."""
    data = bytearray(clips[kind])
    for place, value in edits:
        data[place] = value
    data = data[: len(data) - cut * len(data) // 100] + more
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / f"clip.{kind}"
        path.write_bytes(data)
        try:
            wave = load_audio(path, 16000, max_seconds=30.0)
        except BadAudio as error:
            line = str(error)
            assert line.strip()
            assert len(line.splitlines()) == 1, line
            assert len(line) <= 1000
            return
    assert wave.dtype is torch.float32
    assert wave.dim() == 1
    assert 0 < len(wave) <= 30 * 16000 + 1
    assert torch.isfinite(wave).all()


@pytest.fixture(scope="module")
def clips() -> dict[str, bytes]:
    """A second of sound in each format."""
    sound = torch.sin(torch.arange(16000) / 20).mul(0.3).numpy()
    found: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as name:
        for kind in ("wav", "flac", "ogg", "mp3"):
            path = Path(name) / f"a.{kind}"
            soundfile.write(path, sound, 16000)
            found[kind] = path.read_bytes()
    return found


@FEW
@given(kind=KINDS, edits=EDITS, cut=st.integers(0, 100), more=st.binary(max_size=8))
def test_any_header(clips: dict[str, bytes], kind: str, edits: list[tuple[int, int]], cut: int, more: bytes) -> None:
    damaged(clips, kind, edits, cut, more)


@pytest.mark.slow
@MANY
@given(kind=KINDS, edits=EDITS, cut=st.sampled_from([0, 0, 0, 1, 50, 99, 100]), more=st.binary(max_size=300))
def test_very_many_headers(
    clips: dict[str, bytes], kind: str, edits: list[tuple[int, int]], cut: int, more: bytes
) -> None:
    damaged(clips, kind, edits, cut, more)
