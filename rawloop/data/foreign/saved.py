"""Data sets of Hugging Face on disk (`save_to_disk`), read with their own library, which is optional."""

from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from rawloop.data.foreign.chats import read_alpaca, read_sharegpt
from rawloop.data.foreign.entries import NO_CLIP, Entry, Found, Unusable, each, name_of, transcript, without_nulls
from rawloop.data.record import show
from rawloop.errors import UserError, first_few

SET, SETS = ("state.json", "dataset_info.json"), "dataset_dict.json"
WORDS = ("transcript", "transcription", "sentence", "text", "normalized_text", "text_normalized")
SPEAKERS = ("speaker_id", "speaker", "client_id", "speaker_name")
LANGUAGES = ("language", "locale", "lang")


class SavedSet:
    """A data set on disk: its columns, and its rows.

    Raises:
        UserError: `datasets` is not installed, the folder is damaged or has several splits, or no column fits.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / SETS).is_file():
            splits = sorted(part.name for part in folder.iterdir() if (part / SET[0]).is_file())
            named = first_few(str(folder / split) for split in splits)
            raise UserError(f"{folder} has the splits of a data set ({named}): name one of them")
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise UserError(
                f"{folder} is a data set of Hugging Face, and reading it needs {error.name}, which is not installed: "
                "run `pip install 'rawloop[datasets]'`"
            ) from error
        try:
            rows = datasets.load_from_disk(str(folder))
        except (OSError, ValueError, KeyError, TypeError) as error:  # ArrowInvalid is a ValueError
            raise UserError(f"{folder} cannot be read ({' '.join(str(error).split())}): save it again") from error
        sounds = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Audio)]
        if len(sounds) > 1:
            raise UserError(f"{folder} has several columns of audio ({', '.join(sounds)}): keep one and save it again")
        self.columns = list(rows.features)
        self.sound = sounds[0] if sounds else None
        self.rows: Any = rows.cast_column(sounds[0], datasets.Audio(decode=False)) if sounds else rows
        self.words = next((name for name in WORDS if name in self.columns), None)
        chats = {"messages": self._messages, "conversations": read_sharegpt, "instruction": read_alpaca}
        self.chat = next((read for column, read in chats.items() if column in self.columns), None)
        if not (self.words if self.sound else self.chat):
            has = f"it has the columns {first_few(self.columns, most=20)}"
            raise UserError(f"{folder} has neither audio and words ({', '.join(WORDS)}) nor chats ({has}): rename them")

    @property
    def is_text(self) -> bool:
        """Whether the rows are chats."""
        return self.sound is None

    def read(self) -> Iterator[Found]:
        """Yield the clips, or the chats."""
        if self.sound is None and self.chat is not None:
            return self.chat(self._numbered())
        return each(self._numbered(), self._clip)

    def _numbered(self) -> Iterator[tuple[str, dict[str, Any] | Unusable]]:
        for number, row in enumerate(self.rows):
            yield f"row {number}", row

    def _clip(self, place: str, row: dict[str, Any]) -> list[Entry]:
        sound = row[str(self.sound)] or {}
        path, content = sound.get("path"), sound.get("bytes")
        if not path and not content:
            raise Unusable(NO_CLIP)
        words = transcript(row[str(self.words)])
        values = without_nulls(transcript=words, language=self._first(row, LANGUAGES))
        identity = name_of(row.get("id")) or place.replace(" ", "-")
        audio = f"{place.replace(' ', '-')}{PurePath(path or '').suffix}" if content else str(path)
        return [Entry(place, identity, values, audio, self._first(row, SPEAKERS), content)]

    def _messages(self, rows: Iterator[tuple[str, dict[str, Any] | Unusable]]) -> Iterator[Found]:
        def make(place: str, row: dict[str, Any]) -> list[Entry]:
            if not isinstance(row["messages"], list) or not row["messages"]:
                raise Unusable("no conversation", f"'messages' is {show(row['messages'])}")
            return [Entry(place, name_of(row.get("id")) or place, {"messages": row["messages"]})]

        return each(rows, make)

    @staticmethod
    def _first(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
        return next(filter(None, (name_of(row.get(name)) for name in names)), None)
