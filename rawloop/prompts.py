"""Prompts for generation: lines of text become samples whose last turn the model is to fill, as in training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rawloop.audio import BadAudio, load_audio
from rawloop.contracts import Audio, Family, Sample, Text, Turn
from rawloop.data.config import DataConfig
from rawloop.data.keys import KeyCheck
from rawloop.data.metadata import MetadataReader
from rawloop.data.record import Files, Record
from rawloop.data.samples import read_samples
from rawloop.data.splits import no_codes
from rawloop.errors import UserError
from rawloop.family_protocols import CodecFamily, HearingFamily, SpeakingFamily
from rawloop.files import in_words, read_text

DATA = (".json", ".jsonl")
ANSWER = Turn("assistant", (Text("."),), trained=True)  # stands where the model's answer will be


@dataclass(frozen=True)
class Reference:
    """A clip for the prompt: the voice to speak in, or what is to be heard. `text` are the words that it speaks."""

    clip: Path
    text: str | None = None


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank.

    Raises:
        UserError: it cannot be read, or has no line.
    """
    try:
        lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = in_words(error) if isinstance(error, OSError) else f"it is not UTF-8 (byte {error.start})"
        raise UserError(f"'{path}' cannot be read: {why}") from error
    if not lines:
        raise UserError(f"'{path}' has no line: write each text to generate on a line of its own")
    return lines


def prompts_of(
    texts: Sequence[str], family: Family, data: DataConfig, reference: Reference | None = None, scene: str | None = None
) -> list[Sample]:
    """Return a sample for each text, which the family has checked. The last turn of each is to be generated.

    Args:
        texts: what a model of speech is to say, or what a model of text is asked.
        family: the family of the model.
        data: how the model's training data was read: its scene, and whether references are in the scene.
        reference: a clip for every prompt.
        scene: the scene of every prompt, in place of `data.default_scene`.

    Raises:
        UserError: a text, the reference or the scene does not fit the model.
    """
    make = _spoken if isinstance(family, SpeakingFamily) else _written
    samples = [make(text, index, family, data, reference, scene) for index, text in enumerate(texts)]
    for sample in samples:
        family.check(sample)
    return samples


def samples_in(path: Path, family: Family, data: DataConfig, reference: Reference | None = None) -> list[Sample]:
    """Return the prompts in a file: lines of text; or records as in training, in a .json or .jsonl file."""
    if path.suffix.lower() not in DATA:
        return prompts_of(read_lines(path), family, data, reference)
    samples = read_samples(path, replace(data, allow_outside=True), check_files=False)
    for sample in samples:
        family.check(sample)
    return samples


def _spoken(
    text: str, index: int, family: Family, data: DataConfig, reference: Reference | None, scene: str | None
) -> Sample:
    """Return the sample that a record of a metadata.json with these words becomes."""
    values: dict[str, Any] = {"audio_file": "generated", "transcript": text}
    if scene is not None:
        values["scene"] = scene
    if reference is not None:
        values |= {"ref_audio_file": str(reference.clip.absolute())}
        values |= {"ref_transcript": reference.text} if reference.text else {}
    reader = MetadataReader(replace(data, task=None), Files(Path(), allow_outside=True, check=False), KeyCheck())
    return reader.sample(Record(values, Path("the prompt"), f"{index + 1}"), _name(index))


def _written(
    text: str, index: int, family: Family, data: DataConfig, reference: Reference | None, scene: str | None
) -> Sample:
    """Return a question, or a text to be continued if the model has no chat template."""
    if scene is not None:
        raise UserError(f"a scene is given, and {type(family).__name__} generates text: leave it out")
    heard = isinstance(family, HearingFamily)
    if reference is not None and not heard:
        raise UserError(f"a reference clip is given, and {type(family).__name__} hears nothing: leave it out")
    tokenizer = getattr(family, "tokenizer", None)
    if not heard and tokenizer is not None and tokenizer.chat_template is None:
        return Sample(_name(index), (Turn("text", (Text(text),), trained=True),), source=f"prompt {index + 1}")
    parts = (*((Audio(reference.clip),) if reference else ()), Text(text))
    return Sample(_name(index), (Turn("user", parts), ANSWER), source=f"prompt {index + 1}")


def _name(index: int) -> str:
    return f"line {index + 1}"


def encoder_of(family: Family, device: torch.device) -> Callable[[Path], Tensor]:
    """Return a function that encodes a clip with the family's codec, which is loaded at the first call.

    Its result is (frames, codebooks) int64; each clip is encoded once. Raises UserError for a clip that cannot be used.
    """
    if not isinstance(family, CodecFamily):
        return no_codes
    load = cache(family.load_codec)

    @cache
    def codes(path: Path) -> Tensor:
        info, encode = load(device)
        try:
            return encode(load_audio(Path(expanduser(path)), info.sample_rate, frame_rate=info.frame_rate))
        except BadAudio as reason:
            raise UserError(f"the reference clip {path} {reason}") from reason

    return codes
