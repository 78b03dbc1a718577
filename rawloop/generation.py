"""Generates from a trained model: prompts with the tokens of training in, wav files or texts out."""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from rawloop.audio import import_torchaudio
from rawloop.contracts import Family, Sample
from rawloop.errors import UserError
from rawloop.families import load_family
from rawloop.family_protocols import GeneratingFamily, SpeakingFamily
from rawloop.files import in_words, replace_file
from rawloop.launcher import choose_device
from rawloop.listen.sound import write_wav
from rawloop.prompts import Reference, encoder_of, prompts_of, samples_in
from rawloop.seed import seed_all
from rawloop.settings import SamplingConfig
from rawloop.trained import DTYPES, Trained, load_trained

DEMO = "demo.json"  # in the folder of the demo's model
Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to generate; `cli/model_options.py` has texts and defaults. `output` is a folder if there are `lines`."""

    texts: list[str]
    lines: Path | None
    output: Path | None
    reference: Path | None
    reference_text: str | None
    scene: str | None
    max_seconds: float
    max_tokens: int
    batch_size: int
    seed: int
    device: str
    dtype: str
    sampling: SamplingConfig


def generate(trained: Trained, request: Request, say: Say) -> Iterator[str]:
    """Generate every prompt. Yields a line for each clip that was written, or each text.

    An adapter is merged into its base first, as `rawloop export` does. `say` gets lines about the model.

    Raises:
        UserError: the model cannot generate, or a prompt does not fit it.
    """
    device = choose_device(request.device, 0)
    import_torchaudio()
    family = load_family(trained.model)
    if not isinstance(family, GeneratingFamily):
        raise UserError(f"the family {type(family).__name__} has no method `generate` (docs/listening.md)")
    if isinstance(family, SpeakingFamily) and request.output is None:
        raise UserError("--output must be given: the wav file, or a folder for the clips of --lines")
    samples = _samples(request, family, trained)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    loaded = load_trained(trained, family, say)
    say(loaded.said or f"loaded {trained.name}")
    if (Path(trained.model.path) / DEMO).is_file():
        say("the demo has random weights and a decoder that was never trained: expect noise")
    model = loaded.model.to(device, _dtype(request.dtype, device, loaded.model))
    seed_all(request.seed, 0)
    do = _speak if isinstance(family, SpeakingFamily) else _write
    yield from do(request, family, model, samples, device)


def _samples(request: Request, family: Family, trained: Trained) -> list[Sample]:
    reference = None
    if request.reference is not None:
        if not request.reference.is_file():
            raise UserError(f"--reference is '{request.reference}': there is no such file")
        reference = Reference(request.reference, request.reference_text)
    if request.lines is not None:
        return samples_in(request.lines, family, trained.data, reference)
    return prompts_of(request.texts, family, trained.data, reference, request.scene)


def _dtype(name: str, device: torch.device, model: Any) -> torch.dtype:
    """Return the dtype to generate in: on a GPU that of the stored model, on the CPU float32."""
    if name != "auto":
        return DTYPES[name]
    return torch.float32 if device.type == "cpu" else getattr(model.config, "dtype", None) or model.dtype


def _speak(request: Request, family: Any, model: Any, samples: list[Sample], device: torch.device) -> Iterator[str]:
    assert request.output is not None
    codec, decode = family.load_decoder(device)
    codes = encoder_of(family, device)
    limit = max(1, round(request.max_seconds * codec.frame_rate))
    names = [request.output / f"{number:03d}-{_plain(sample.id)}.wav" for number, sample in enumerate(samples, 1)]
    files = names if request.lines else [request.output]
    for start in range(0, len(samples), request.batch_size):
        batch = samples[start : start + request.batch_size]
        spoken = family.generate(model, batch, codes, [limit] * len(batch), request.sampling)
        for one, file in zip(spoken, files[start:], strict=False):
            write_wav(file, decode(one.codes), codec.sample_rate)
            end = "stopped by itself" if one.length else "stopped at once, before any sound"
            end = end if one.stopped else f"did not stop (--max_seconds {request.max_seconds:g})"
            yield f"{file}: {one.length / codec.frame_rate:.2f} s, {end}"


def _plain(name: str) -> str:
    """Return the id of a sample as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", name)[:60]


def _write(request: Request, family: Any, model: Any, samples: list[Sample], device: torch.device) -> Iterator[str]:
    codes, texts = encoder_of(family, device), []
    for sample in samples:
        (one,) = family.generate(model, [sample], codes, [request.max_tokens], request.sampling)
        texts.append(one.text or "")
        if request.output is None:
            yield texts[-1]
    if request.output is not None:
        try:
            replace_file(request.output, "\n".join(texts) + "\n")
        except OSError as error:
            raise UserError(f"--output is '{request.output}', which cannot be written: {in_words(error)}") from error
        yield f"{request.output}: {len(texts)} text(s)"
