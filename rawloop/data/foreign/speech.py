"""Recordings with a file of words beside each, and the tables of LJSpeech and of Common Voice."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from rawloop.data.foreign.entries import (
    BROKEN_LINE,
    NO_CLIP,
    Entry,
    Found,
    LeftOut,
    Unusable,
    each,
    name_of,
    text_lines,
    transcript,
    without_nulls,
)
from rawloop.files import read_text

SOUNDS = (
    ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".mp4", ".aac", ".webm", ".wma", ".amr", ".aif", ".aiff",
    ".au", ".caf", ".w64",
)  # fmt: skip
WORDS = (".txt", ".lab")
WAVS, CLIPS = "wavs", "clips"
PATH, SENTENCE = "path", "sentence"  # the columns of a Common Voice table
LANGUAGE = "locale"


def sound_files(folder: Path) -> Iterator[Path]:
    """Yield the audio files at any depth, by name; not those in hidden folders."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SOUNDS and not hidden and not path.is_dir():
            yield path


def has_words_beside(folder: Path) -> bool:
    """Return whether an audio file of the folder has a file of words beside it."""
    return any(path.with_suffix(suffix).is_file() for path in sound_files(folder) for suffix in WORDS)


def read_folder(folder: Path) -> Iterator[Found]:
    """Yield the clips of a folder with `.txt` or `.lab` files. The first folders inside it count as speakers."""
    taken: set[Path] = set()
    for path in sound_files(folder):
        place = path.relative_to(folder).as_posix()
        try:
            words = _words_beside(path)
            taken |= {path.with_suffix(suffix) for suffix in WORDS}
            speaker = place.split("/")[0] if "/" in place else None
            yield Entry(place, place, {"transcript": words}, str(path.absolute()), speaker)
        except Unusable as error:
            taken |= {path.with_suffix(suffix) for suffix in WORDS}
            yield LeftOut(place, error.reason, error.detail)
    for path in sorted(folder.rglob("*")):
        if path.suffix in WORDS and path not in taken and not path.name.startswith("."):
            yield LeftOut(path.relative_to(folder).as_posix(), "words without audio")


def _words_beside(path: Path) -> str:
    found: dict[str, str] = {}
    for suffix in WORDS:
        file = path.with_suffix(suffix)
        if not file.exists():
            continue
        try:
            found[suffix] = read_text(file).strip()
        except UnicodeDecodeError as error:
            raise Unusable("words are not UTF-8", f"{file.name}, byte {error.start}") from error
        except OSError as error:
            raise Unusable("words cannot be read", f"{file.name}: {error.strerror}") from error
    if not found:
        raise Unusable("no words beside it", f"{path.stem}.txt or {path.stem}.lab")
    if len(set(found.values())) > 1:
        raise Unusable("two transcripts", "its .txt and its .lab differ")
    return transcript(next(iter(found.values())))


def read_ljspeech(file: Path) -> Iterator[Found]:
    """Yield the clips of a `metadata.csv` of LJSpeech: `id|words|normalized words`, the clips in `wavs`."""
    return each(text_lines(file), partial(_ljspeech, file.parent))


def _ljspeech(folder: Path, place: str, line: str) -> list[Entry]:
    columns = line.split("|")  # quotes are letters here
    if len(columns) not in (2, 3):
        raise Unusable(BROKEN_LINE, f"it has {len(columns)} columns: an id, the words, and maybe the normalized words")
    name = columns[0].strip()
    if not name:
        raise Unusable(NO_CLIP)
    words = transcript(next((text for text in columns[:0:-1] if text.strip()), ""))
    return [Entry(place, name, {"transcript": words}, _wav(folder, name))]


def _wav(folder: Path, name: str) -> str:
    """Return the path of a clip of LJSpeech, which is named without its folder and often without its suffix."""
    names = [f"{name}.wav", name, *(name + suffix for suffix in sorted(SOUNDS))]
    found = (f"{part}/{one}" for part in (WAVS, ".") for one in names if Path(one).suffix.lower() in SOUNDS)
    return next((path for path in found if (folder / path).is_file()), f"{WAVS}/{names[0]}")


def read_common_voice(file: Path) -> Iterator[Found]:
    """Yield the clips of a table of Common Voice: tabs between columns, the clips in `clips`."""
    lines = text_lines(file)
    head = next(lines)[1]
    assert isinstance(head, str), "the head of the table was read to detect it"
    return each(lines, partial(_common_voice, head.split("\t")))


def _common_voice(head: Sequence[str], place: str, line: str) -> list[Entry]:
    columns = line.split("\t")  # quotes are letters here
    if len(columns) != len(head):
        raise Unusable(BROKEN_LINE, f"it has {len(columns)} columns, the head has {len(head)}")
    row = dict(zip(head, columns, strict=True))
    if not row[PATH].strip():
        raise Unusable(NO_CLIP)
    values = without_nulls(transcript=transcript(row[SENTENCE]), language=name_of(row.get(LANGUAGE)))
    name = row[PATH].strip()
    return [Entry(place, name, values, f"{CLIPS}/{name}", name_of(row.get("client_id")))]
