"""Tells the layout of a source by its content. What may be two layouts is refused: a wrong guess spoils a voice."""

import json
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

from rawloop.data.foreign.chats import TALK, chat_rows, first_letter, read_alpaca, read_sharegpt
from rawloop.data.foreign.entries import Layout, text_lines
from rawloop.data.foreign.manifests import read_cuts, read_nemo, read_supervisions
from rawloop.data.foreign.saved import SET, SETS, SavedSet
from rawloop.data.foreign.speech import (
    PATH,
    SENTENCE,
    has_words_beside,
    read_common_voice,
    read_folder,
    read_ljspeech,
    sound_files,
)
from rawloop.errors import UserError, first_few

KNOWN = (
    "audio files with .txt or .lab files beside them, LJSpeech's metadata.csv, a .tsv of Common Voice beside clips/, "
    "manifests of NeMo and Lhotse, ShareGPT and Alpaca as JSON or JSONL, and a data set saved by Hugging Face datasets"
)
OWN = ("messages", "audio_file", "samples", "dataset_info")
SUFFIXES = (".json", ".jsonl", ".tsv", ".csv", ".jsonl.gz", ".json.gz")
SUPERVISIONS, RECORDINGS = "supervisions", "recordings"
LOOKED_AT = 20  # lines of a file


def detect(source: Path) -> Layout:
    """Return the layout of a folder or file.

    Raises:
        UserError: it does not exist, its layout is unknown, or it could be several.
    """
    if source.is_file():
        layout = _of_file(source)
        if layout is None:
            raise UserError(f"{source} has no layout that is known (its first lines say nothing). Known are {KNOWN}")
        return layout
    if not source.is_dir():
        raise UserError(f"{source} does not exist: name a folder or file with recordings or chats. Known are {KNOWN}")
    if (source / SETS).is_file() or all((source / name).is_file() for name in SET):
        return _saved(source)
    found: dict[str, Callable[[], Layout | None]] = {}
    for file in sorted(source.iterdir()):
        # A pair of Lhotse's manifests is found by its supervisions.
        if file.is_file() and file.name.endswith(SUFFIXES) and RECORDINGS not in file.name:
            layout = _of_file(file, strict=False)
            if layout is not None:
                found[file.name] = partial(lambda layout: layout, layout)
    if has_words_beside(source):
        found["audio files with words beside them"] = lambda: _folder(source)
    if len(found) > 1:
        raise UserError(f"{source} can be read in {len(found)} ways ({first_few(found)}): name the file that is meant")
    if found and (layout := next(iter(found.values()))()):
        return layout
    sounds = len(list(islice(sound_files(source), 1000)))
    what = f"{sounds} audio files without .txt or .lab files beside them" if sounds else "no audio files"
    listed = first_few(path.name for path in sorted(source.iterdir())) or "nothing"
    raise UserError(f"{source} has no layout that is known ({what}; it has {listed}). Known are {KNOWN}")


def _folder(folder: Path) -> Layout:
    return Layout("a folder of audio files with words beside them", folder, partial(read_folder, folder))


def _saved(folder: Path) -> Layout:
    saved = SavedSet(folder)
    return Layout("a data set of Hugging Face", folder, saved.read, saved.is_text)


def _of_file(file: Path, strict: bool = True) -> Layout | None:
    """Return the layout of a file, or None. Without `strict`, rawloop's own files are passed over."""
    if first_letter(file) == "[":
        rows = chat_rows(file)
        keys = next((set(row) for _, row in rows if isinstance(row, dict)), set())
        return _of_keys(file, keys, strict)
    for _, line in islice(text_lines(file), LOOKED_AT):
        if not isinstance(line, str):
            continue
        if line.lstrip().startswith("{"):
            keys = _keys(line)
            if keys or _keys_of_whole(file):
                return _of_keys(file, keys or _keys_of_whole(file), strict)
            continue
        if {PATH, SENTENCE} <= set(line.split("\t")):
            return Layout("a table of Common Voice", file.parent, partial(read_common_voice, file))
        if 1 <= line.count("|") <= 2 and "\t" not in line:
            return Layout("a metadata.csv of LJSpeech", file.parent, partial(read_ljspeech, file))
        if "\t" in line or "," in line:
            return None  # some other table
    return None


def _keys(line: str) -> set[str]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return set()
    return set(value) if isinstance(value, dict) else set()


def _keys_of_whole(file: Path) -> set[str]:
    """Return the keys of a file that is one JSON object over several lines."""
    return _keys(file.read_text(encoding="utf-8-sig", errors="replace")) if file.suffix == ".json" else set()


def _of_keys(file: Path, keys: set[str], strict: bool) -> Layout | None:
    """Return the layout of records with these keys, or None."""
    if "audio_filepath" in keys:
        return Layout("a manifest of NeMo", file.parent, partial(read_nemo, file))
    if {"supervisions", "recording"} & keys:
        return Layout("cuts of Lhotse", file.parent, partial(read_cuts, file))
    if "recording_id" in keys:
        return _supervisions(file)
    if not keys.isdisjoint(TALK):
        return Layout("chats of ShareGPT", file.parent, lambda: read_sharegpt(chat_rows(file)), True)
    if {"instruction", "output"} <= keys:
        return Layout("instructions of Alpaca", file.parent, lambda: read_alpaca(chat_rows(file)), True)
    if strict and not keys.isdisjoint(OWN):
        raise UserError(f"{file} has rawloop's own layout: name it as data.train; nothing is to be imported")
    return None


def _supervisions(file: Path) -> Layout:
    """Return the layout of Lhotse's supervisions; their recordings are in a file of the same name but for one word."""
    recordings = file.with_name(file.name.replace(SUPERVISIONS, RECORDINGS))
    if recordings == file or not recordings.is_file():
        raise UserError(
            f"{file} has Lhotse's supervisions, and {recordings.name} is not beside it: put the manifest of the "
            f"recordings there, with '{RECORDINGS}' in its name for '{SUPERVISIONS}'"
        )
    return Layout("supervisions of Lhotse", file.parent, partial(read_supervisions, file, recordings))
