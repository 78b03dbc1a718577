"""Builds the listener of a run: its prompts, and what measures the clips."""

from collections.abc import Callable
from dataclasses import replace
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rawloop.components import Data
from rawloop.config import RunConfig
from rawloop.contracts import Family, Sample, Text
from rawloop.data.batches import Draw
from rawloop.dist import World
from rawloop.errors import UserError, nearest
from rawloop.families import imported
from rawloop.families.loading import library_errors
from rawloop.family_protocols import GeneratingFamily, SpeakingFamily
from rawloop.listen.config import ListenConfig
from rawloop.listen.listener import Ears, Listener, Prompt, Recognise
from rawloop.precision.policy import PrecisionPolicy
from rawloop.prompts import encoder_of, samples_in
from rawloop.seed import preserved_rng

PREFIX = "listen/"
SHORTEST = 10  # frames or tokens that a clip or text may have at least


def build_listener(
    config: RunConfig, data: Data, model: nn.Module, policy: PrecisionPolicy, world: World
) -> Listener | None:
    """Build the listener, or return None without prompts. Random streams do not change.

    Raises:
        UserError: the model cannot generate, a prompt does not fit it, or the best metric is not measured.
    """
    family, wanted = data.family, config.evaluation.best_metric
    if not config.listen.enabled:
        if wanted.startswith(PREFIX):
            raise UserError(f"evaluation.best_metric is '{wanted}', and there is no prompt: set listen.samples")
        return None
    if not config.evaluation.enabled:
        raise UserError("listen has prompts, and evaluation.enabled is false: the model is heard at evaluations")
    if not isinstance(family, GeneratingFamily):
        raise UserError(
            f"listen has prompts, and the family {type(family).__name__} has no method `generate` (docs/listening.md)"
        )
    with preserved_rng():
        ears = _ears(config.listen, family, world.device)
        prompts, codes = _prompts(config, data, family, ears.frame_rate, world.device)
        listener = Listener(
            family,
            model,
            prompts,
            codes,
            ears=ears,
            config=config.listen,
            every=config.evaluation.every,
            batch_size=config.evaluation.batch_size,
            policy=policy,
            world=world,
        )
    if wanted.startswith(PREFIX):
        _check_best(wanted, listener, config.listen)
    return listener


def _check_best(wanted: str, listener: Listener, config: ListenConfig) -> None:
    if wanted not in listener.metrics:
        raise UserError(
            f"evaluation.best_metric is '{wanted}', which listening does not measure{nearest(wanted, listener.metrics)}"
            f": it measures {', '.join(listener.metrics)}"
        )
    if config.every > 1:
        raise UserError(
            f"evaluation.best_metric is '{wanted}', and listen.every is {config.every}: set it to 1, so that every "
            "evaluation measures it"
        )


def _ears(config: ListenConfig, family: Family, device: torch.device) -> Ears:
    if not isinstance(family, SpeakingFamily):
        return Ears()
    codec, decode = family.load_decoder(device)
    compare = imported(config.similarity, "listen.similarity") if config.similarity else None
    recognise = recogniser(config.transcriber, device) if config.transcriber else None
    return Ears(decode, codec.sample_rate, codec.frame_rate, recognise, compare)


def recogniser(name: str, device: torch.device) -> Recognise:
    """Return the user's function, or one that runs a model of transformers; see `ListenConfig.transcriber`.

    Raises:
        UserError: there is no such function or model.
    """
    if ":" in name:
        recognise: Recognise = imported(name, "listen.transcriber")
        return recognise
    from transformers import pipeline

    with library_errors(name, "model", "listen.transcriber"):
        heard: Any = pipeline("automatic-speech-recognition", model=expanduser(name), device=device)

    def recognised(sound: Tensor, sample_rate: int) -> str:
        return str(heard({"raw": sound.numpy(), "sampling_rate": sample_rate})["text"])

    return recognised


def _prompts(
    config: RunConfig, data: Data, family: Family, frame_rate: float, device: torch.device
) -> tuple[list[Prompt], Callable[[Path], Tensor]]:
    """Return the prompts, those of data.eval first, and a function that returns the codes of their clips."""
    listen, cache = config.listen, data.cache
    samples = data.samples["data.eval"]
    pick = samples.references(config.data, config.seed)
    own = [pick(Draw(index, epoch=0)) if pick else samples[index] for index in range(min(listen.samples, len(samples)))]
    known = {path for sample in own for path in sample.audio_paths()}
    encode = encoder_of(family, device)
    speaks = isinstance(family, SpeakingFamily)
    most = round(listen.max_seconds * frame_rate) if speaks else listen.max_tokens
    prompts = [_of_data(sample, data, speaks, most, listen.longest) for sample in own]
    if listen.prompts:
        given = samples_in(Path(expanduser(listen.prompts)), family, config.data)
        prompts += [Prompt(sample, most, words=_words(sample)) for sample in given]

    def codes(path: Path) -> Tensor:
        return cache(path) if cache is not None and path in known else encode(path)

    return prompts, codes


def _of_data(sample: Sample, data: Data, speaks: bool, most: int, longest: float) -> Prompt:
    """Return a sample of the data as a prompt, with the length of its own clip or answer."""
    voice = None
    if speaks:
        assert data.cache is not None
        last = max(index for index, turn in enumerate(sample.turns) if turn.trained)
        voice = data.cache(sample.turns[last].clips[-1].path)
        expected = len(voice)
    else:
        sample, answer = _halved(sample) if sample.is_text else (sample, _answer(sample))
        tokenizer: Any = getattr(data.family, "tokenizer", None) or data.family.processor.tokenizer  # type: ignore[attr-defined]
        expected = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
    limit = min(most, max(SHORTEST, round(longest * expected)))
    return Prompt(sample, limit, expected or None, _words(sample), voice)


def _halved(sample: Sample) -> tuple[Sample, str]:
    """Return a plain text as a prompt of its first half, and the other half."""
    words = sample.turns[0].words
    middle = max(1, len(words) // 2)
    return replace(sample, turns=(replace(sample.turns[0], parts=(Text(words[:middle]),)),)), words[middle:]


def _answer(sample: Sample) -> str:
    return next(turn.words for turn in reversed(sample.turns) if turn.trained)


def _words(sample: Sample) -> str:
    """Return the words of the last turn before the one that is generated."""
    last = max(index for index, turn in enumerate(sample.turns) if turn.trained)
    return next((turn.words for turn in reversed(sample.turns[:last]) if turn.words), "")
