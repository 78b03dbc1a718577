"""Listens to a model while it trains: generates fixed prompts at evaluations, and measures what it hears.

The prompts are split over the ranks. Training goes on as if nothing had happened: modes, buffers, gradients and random
streams are as before, and the number of collectives depends on nothing that a rank generates.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rawloop.buffers import untouched
from rawloop.contracts import Sample
from rawloop.dist import World
from rawloop.errors import Preempted, happening
from rawloop.family_protocols import Generated, GeneratingFamily
from rawloop.host_memory import meta_copy
from rawloop.listen.config import ListenConfig as ListenConfig
from rawloop.listen.picture import mel_picture
from rawloop.listen.sound import repetition, silence, wav_bytes
from rawloop.preempt import first_reason
from rawloop.seed import seed_all
from rawloop.sharding import lent_weights

STOPPED, RATIO, SILENCE, REPETITION = "listen/stopped", "listen/length_ratio", "listen/silence", "listen/repetition"
ERRORS, SIMILARITY, SECONDS = "listen/error_rate", "listen/similarity", "listen/seconds"
TOO_LARGE = "leave out listen.samples and listen.prompts, and hear a checkpoint by `rawloop generate RUN`"
Recognise = Callable[[Tensor, int], str]
Compare = Callable[[Tensor, Tensor, int], float]


@dataclass(frozen=True)
class Prompt:
    """What is generated at each evaluation.

    `limit` is the most frames or tokens; `expected` is their number in the sample itself, if it has them. `words` are
    to be said. `voice` are codes of the speaker, for the similarity.
    """

    sample: Sample
    limit: int
    expected: int | None = None
    words: str = ""
    voice: Tensor | None = None


@dataclass(frozen=True)
class Ears:
    """What turns codes into sound and measures it. A family that writes text needs none of it."""

    decode: Callable[[Tensor], Tensor] | None = None
    sample_rate: int = 0
    frame_rate: float = 1.0
    recognise: Recognise | None = None
    compare: Compare | None = None


@dataclass(frozen=True)
class Heard:
    """One generated turn: its measures as (sum, count) by metric, its wav file and picture, or its text."""

    place: int
    name: str
    measures: dict[str, tuple[float, int]]
    wav: bytes = b""
    picture: bytes = b""
    text: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Listener:
    """Generates the prompts of all ranks.

    Args:
        family: generates.
        model: the raw model, without DDP.
        prompts: the same on all ranks.
        codes: codes of the clips in prompts.
        ears: measures clips.
        config: how often and how long.
        every: steps between two evaluations.
        batch_size: prompts that are generated at a time.
        policy: a `PrecisionPolicy`, for the autocast of training; None means float32.
        world: the ranks.
    """

    def __init__(
        self,
        family: GeneratingFamily,
        model: nn.Module,
        prompts: Sequence[Prompt],
        codes: Callable[[Path], Tensor],
        *,
        ears: Ears,
        config: ListenConfig,
        every: int,
        batch_size: int = 4,
        policy: Any = None,
        world: World | None = None,
    ) -> None:
        self.family, self.model, self.prompts, self.codes = family, model, list(prompts), codes
        self.ears, self.config, self.every, self.policy = ears, config, every, policy
        self.batch_size = batch_size
        self.world = world or World.current()
        self.form: nn.Module | None = None

    def keep_form(self) -> None:
        """Copy the model without its numbers. Call it before the model is sharded.

        The copy has the whole weights while it generates: then each rank generates its own prompts, in as many passes
        as these take.
        """
        self.form = meta_copy(self.model).eval()

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics that every call measures."""
        found = [STOPPED]
        found += [RATIO] if any(prompt.expected for prompt in self.prompts) else []
        if self.ears.decode is not None:
            found += [SILENCE, REPETITION]
            found += [ERRORS] if self.ears.recognise and any(_plain(p.words) for p in self.prompts) else []
            found += [SIMILARITY] if self.ears.compare and any(p.voice is not None for p in self.prompts) else []
        return found

    def due(self, step: int, last: bool = False) -> bool:
        """Return whether to listen at the evaluation of this step."""
        return last or (step // self.every) % self.config.every == 0

    def listen(self, wanted: Callable[[], str | None] = lambda: None) -> tuple[dict[str, float], list[Heard]]:
        """Generate and measure, on all ranks together. Modes, buffers, gradients and random streams do not change.

        Args:
            wanted: called before each batch; if it returns a reason on any rank, listening stops.

        Returns:
            the metrics, equal on all ranks, and what was heard, in the order of the prompts.

        Raises:
            Preempted: it was stopped; raised on every rank, with the reason as its message.
            Exception: the error of any rank, on all ranks.
        """
        start, stops = time.perf_counter(), list[str]()
        with untouched(self.model, training=False), torch.no_grad(), self._whole() as model:
            share = self.world.on_all_ranks(lambda: self._listen(model, wanted, stops))
        shares = self.world.gather((share or [], next(iter(stops), None)))
        stopped = first_reason([reason for _, reason in shares])
        if stopped is not None:
            raise Preempted(stopped)
        heard = sorted((one for share, _ in shares for one in share), key=lambda one: one.place)
        seconds = self.world.from_main(time.perf_counter() - start)  # equal on all ranks
        return {**_means(heard), SECONDS: seconds}, heard

    @contextmanager
    def _whole(self) -> Iterator[nn.Module]:
        """Yield the model with whole weights, which all ranks gather together if they are sharded."""
        if self.form is None:
            yield self.model
            return
        with ExitStack() as lent:
            with happening("while the weights were gathered to listen", name_own=True, less=lambda: TOO_LARGE):
                model = lent.enter_context(lent_weights(self.form, self.model))
            yield model

    def _listen(self, model: nn.Module, wanted: Callable[[], str | None], stops: list[str]) -> list[Heard]:
        """Generate the prompts of this rank."""
        mine = list(enumerate(self.prompts))[self.world.rank :: self.world.size]
        found = []
        for start in range(0, len(mine), self.batch_size):
            if (reason := wanted()) is not None:
                stops.append(reason)
                return []
            batch = mine[start : start + self.batch_size]
            names = ", ".join(prompt.sample.id for _, prompt in batch)
            where = f"while listening, on rank {self.world.rank}, to the prompts {names}"
            with happening(where, name_own=True, less=lambda: "lower evaluation.batch_size, or listen to fewer frames"):
                seed_all(self.config.seed, batch[0][0])
                spoken = self._generate(model, [prompt for _, prompt in batch])
                found += [
                    self._measured(place, prompt, one) for (place, prompt), one in zip(batch, spoken, strict=True)
                ]
        return found

    def _generate(self, model: nn.Module, prompts: Sequence[Prompt]) -> list[Generated]:
        samples, limits = [prompt.sample for prompt in prompts], [prompt.limit for prompt in prompts]
        # A cache of another length at each position would be compiled again and again.
        compiled = any(part._compiled_call_impl is not None for part in model.modules())
        eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with eager, self.policy.autocast() if self.policy is not None else nullcontext():
            return self.family.generate(model, samples, self.codes, limits, self.config.sampling)

    def _measured(self, place: int, prompt: Prompt, one: Generated) -> Heard:
        measures = {STOPPED: (float(one.stopped), 1)}
        facts: dict[str, Any] = {"stopped": one.stopped, "length": one.length, "words": prompt.words}
        if prompt.expected:
            measures[RATIO] = (one.length / prompt.expected, 1)
        heard = Heard(place, prompt.sample.id, measures, text=one.text, facts=facts)
        if one.codes is None or self.ears.decode is None:
            return heard
        ears, sound = self.ears, self.ears.decode(one.codes)
        rate = ears.sample_rate
        measures |= {SILENCE: (silence(sound, rate), 1), REPETITION: (repetition(one.codes), 1)}
        if ears.recognise is not None and (wanted := _plain(prompt.words)):
            facts["recognised"] = ears.recognise(sound, rate) if len(sound) else ""
            measures[ERRORS] = (float(distance(_plain(facts["recognised"]), wanted)), len(wanted))
        if ears.compare is not None and prompt.voice is not None:
            alike = float(ears.compare(sound, self.ears.decode(prompt.voice), rate)) if len(sound) else 0.0
            measures[SIMILARITY] = (alike, 1)
        facts["seconds"] = one.length / ears.frame_rate
        return replace(heard, wav=wav_bytes(sound, rate), picture=mel_picture(sound, rate))


def _means(heard: Sequence[Heard]) -> dict[str, float]:
    sums: dict[str, list[tuple[float, int]]] = {}
    for one in heard:
        for name, pair in one.measures.items():
            sums.setdefault(name, []).append(pair)
    return {name: sum(total for total, _ in pairs) / sum(count for _, count in pairs) for name, pairs in sums.items()}


def _plain(words: str) -> str:
    """Return words without case, punctuation, speaker tags and repeated blanks."""
    return " ".join(re.sub(r"[^\w\s]|_", " ", re.sub(r"\[SPEAKER\d+\]", " ", words)).casefold().split())


def distance(one: str, other: str) -> int:
    """Return the least number of characters to insert, delete or replace that turn one text into another."""
    row = list(range(len(other) + 1))
    for index, letter in enumerate(one, 1):
        before, row[0] = row[0], index
        for place, wanted in enumerate(other, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (letter != wanted))
    return row[-1]
