"""Plain text as JSON records, `{"text": "..."}`: a sample of one turn, all of which is learnt."""

from dataclasses import dataclass

from rawloop.contracts import Sample, Text, Turn
from rawloop.data.keys import PLAIN, KeyCheck
from rawloop.data.record import Record, show


@dataclass
class TextReader:
    """Turns records with `text` into samples of one trained turn, whose role is text. The text is kept as it is."""

    keys: KeyCheck

    def sample(self, record: Record, identity: str) -> Sample:
        """Return the sample of a record.

        Raises:
            UserError: the text is no string, or there is nothing in it.
        """
        self.keys.check(record, record.values, PLAIN)
        text = record.values["text"]
        if not isinstance(text, str) or not text.strip():
            record.fail(
                f"'text' is {show(text)}: it must be a string with something in it; write it, or remove the sample"
            )
        turns = (Turn("text", (Text(record.speakable(text)),), trained=True),)
        return Sample(identity, turns, None, f"{record.file.name} {record.place}", record.without(PLAIN.read))
