"""Weights that are not finite, or that no initialisation and no training gives, by name."""

import re
from collections.abc import Iterable, Iterator
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rawloop.errors import first_few
from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.held import Evidence, held_by_optimizers, measurable, module_of, norms, read
from rawloop.watch.subject import Detector, StepRecord, Subject

# Matrices of one kind and shape differ by less than 10 times between the layers of pretrained models.
SIBLINGS_DIFFER = 30.0
SIBLINGS = 3  # with fewer, the odd one is not known
# The gain of a linear layer is its rms times sqrt(inputs): 0.6 to 2 at initialisation, up to about 6 in GPT-2.
GAIN, GAIN_OF_ALL = 8.0, 50.0
LARGEST = 1e4  # a few products of this size leave the range of FP16; a flipped exponent bit gives more
MATRIX = 2  # dimensions larger than 1: norms, biases and scales may be all ones or zeros
LORA = re.compile(r"(.*)\.lora_(?:embedding_)?([AB])\b(.*)")


class Size(NamedTuple):
    """A tensor's name and the size of its numbers."""

    name: str
    tensor: Tensor
    rms: float
    amax: float

    @property
    def gain(self) -> float:
        """The factor by which a linear layer enlarges its inputs' rms."""
        return float(self.rms * self.tensor.shape[1] ** 0.5)


class UnsoundWeights(Detector):
    """Finds weights and buffers that are not finite, before step 0 and on probing steps, and absurd weights before it.

    Kinds: `weights_not_finite`, `buffers_not_finite`, `weights_absurd`, `weights_all_zero`, `weights_constant`.
    """

    def __init__(self) -> None:
        self._finite_at: int | None = None  # the last step after which all weights were finite

    def start(self, subject: Subject) -> Iterable[Finding]:
        """Look at every weight and buffer, reading the device three times."""
        named = [(name, p.detach()) for name, p in subject.model.named_parameters() if measurable(p)]
        amax = read(norms([tensor for _, tensor in named], float("inf")))
        damaged = [pair for pair, value in zip(named, amax, strict=True) if not value < float("inf")]
        if damaged:
            yield not_finite(damaged, len(named), 0, subject.world.rank, Cause("model", DAMAGED, advice=RELOAD))
        yield from damaged_buffers(subject)
        rms = [norm / t.numel() ** 0.5 for norm, (_, t) in zip(read(norms([t for _, t in named], 2)), named)]
        sizes = [Size(name, t, r, a) for (name, t), r, a in zip(named, rms, amax, strict=True) if a < float("inf")]
        modules = dict(subject.model.named_modules())
        linear = {f"{name}.weight" for name, module in modules.items() if isinstance(module, nn.Linear)}
        yield from absurd(sizes, linear, subject.world.rank)
        yield from zeros(sizes, trained_names(subject), subject.world.rank)
        yield from constant(subject, sizes)

    def end(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Look at the weights again, reading the device once."""
        if not record.probing:
            return
        named = [(name, p.detach()) for name, p in subject.model.named_parameters() if measurable(p)]
        amax = read(norms([tensor for _, tensor in named], float("inf")))
        damaged = [pair for pair, value in zip(named, amax, strict=True) if not value < float("inf")]
        if not damaged:
            self._finite_at = record.step
            return
        cause = damaged_by(record)
        finding = not_finite(damaged, len(named), record.step, subject.world.rank, cause)
        finding.since = None if self._finite_at is None else self._finite_at + 1
        yield finding


DAMAGED = "the weights were not finite when the watch began"
RELOAD = "Load an earlier checkpoint, or download the model again: no loss can be finite with these weights"


def damaged_by(record: StepRecord) -> Cause:
    """Return the likely cause of weights that are not finite after a step."""
    norm = record.grad_norm
    evidence: Evidence = {} if norm is None else {"grad_norm": norm}
    if norm is not None and norm < float("inf") and record.applied:
        what = "finite gradients were turned into weights that are not finite by the optimizer's update"
        return Cause("optimizer", what, evidence=evidence, advice="Look at its eps, learning rate and state dtype")
    if norm is not None and not norm < float("inf") and record.applied:
        what = "gradients that are not finite were given to the optimizer, which wrote them into the weights"
        advice = "Skip such steps (a GradScaler does, or test the norm before step()), and start from earlier weights"
        return Cause("optimizer", what, evidence=evidence, advice=advice)
    what = "an earlier update, or something else since the last look, has written them"
    return Cause("not known", what, evidence=evidence, advice="Start from earlier weights, and probe more often")


def not_finite(damaged: list[tuple[str, Tensor]], total: int, step: int, rank: int, cause: Cause) -> Finding:
    """Return the finding for weights that are not finite."""
    name, tensor = damaged[0]
    count, where, value = first_damaged(tensor, ~tensor.isfinite())
    evidence: Evidence = {"damaged numbers": count, "of": tensor.numel(), "first index": where, "value": value}
    cause = Cause(
        cause.whose,
        cause.what,
        Place(phase="update", module=module_of(name), parameter=name),
        {**evidence, **cause.evidence},
        cause.advice,
    )
    what = f"{len(damaged)} of {total} weights are not finite: {first_few(n for n, _ in damaged)}"
    return Finding("weights_not_finite", what, (cause,), step, rank)


def first_damaged(tensor: Tensor, bad: Tensor) -> tuple[int, str, str]:
    """Return how many numbers are damaged, the index of the first, and its value."""
    index = tuple(torch.nonzero(bad)[0].tolist())
    return int(bad.sum()), str(list(index)), str(float(tensor[index]))


def damaged_buffers(subject: Subject) -> Iterator[Finding]:
    """Yield a finding for buffers with NaN or +inf. Masks contain -inf."""
    named = [(name, b) for name, b in subject.model.named_buffers() if measurable(b)]
    flags = read([(b.isnan() | (b == float("inf"))).any() for _, b in named])
    damaged = [pair for pair, flag in zip(named, flags, strict=True) if flag]
    if not damaged:
        return
    name, buffer = damaged[0]
    count, where, value = first_damaged(buffer, buffer.isnan() | (buffer == float("inf")))
    evidence: Evidence = {"damaged numbers": count, "of": buffer.numel(), "first index": where, "value": value}
    place = Place(module=module_of(name), tensor=name)
    what = f"{len(damaged)} of {len(named)} buffers are not finite: {first_few(n for n, _ in damaged)}"
    cause = Cause("model", "the buffers were not finite when the watch began", place, evidence, RELOAD)
    yield Finding("buffers_not_finite", what, (cause,), 0, subject.world.rank)


def absurd(sizes: list[Size], linear: set[str], rank: int) -> Iterator[Finding]:
    """Yield a finding for each matrix whose numbers are far from its siblings', or too large for anything."""
    kinds: dict[tuple[object, ...], list[Size]] = {}
    matrices = [size for size in sizes if is_matrix(size.tensor) and size.amax > 0]
    for size in matrices:
        kinds.setdefault(kind_of(size), []).append(size)
    gains = [size for size in matrices if size.name in linear]
    for size in matrices:
        siblings = [other.rms for other in kinds[kind_of(size)] if other is not size]
        others = [other.gain for other in gains if other is not size] if size.name in linear else []
        usual = median(siblings) if len(siblings) >= SIBLINGS - 1 else 0.0
        far = usual and max(size.rms / usual, usual / size.rms) > SIBLINGS_DIFFER
        is_linear = size.name in linear
        loud = is_linear and len(others) > 0 and size.gain > GAIN and size.gain > SIBLINGS_DIFFER * median(others)
        if not (far or loud or size.amax > LARGEST or (is_linear and size.gain > GAIN_OF_ALL)):
            continue
        evidence: Evidence = {"rms": size.rms, "largest": size.amax}
        if usual:
            evidence["median rms of its siblings in other layers"] = usual
        if is_linear:
            evidence |= {"gain": size.gain} | (
                {"median gain of the other linear layers": median(others)} if others else {}
            )
        advice = "Compare it with the checkpoint that it came from; a scale was applied twice, or a number was damaged"
        place = Place(module=module_of(size.name), parameter=size.name)
        what = f"the numbers of {size.name} have a size that no initialisation and no training gives"
        yield Finding("weights_absurd", what, (Cause("model", what, place, evidence, advice),), 0, rank)


def kind_of(size: Size) -> tuple[object, ...]:
    """Return what matrices of different layers have in common: the name without the layer's number, and the shape."""
    return re.sub(r"\d+", "#", size.name), tuple(size.tensor.shape)


def is_matrix(tensor: Tensor) -> bool:
    """Whether at least two dimensions are larger than 1."""
    return sum(length > 1 for length in tensor.shape) >= MATRIX


def trained_names(subject: Subject) -> set[str]:
    """Return the names of the weights that are trained, under masters too."""
    held = {one.name for one in held_by_optimizers(subject)}
    return held | {name for name, p in subject.model.named_parameters() if p.requires_grad}


def zeros(sizes: list[Size], trained: set[str], rank: int) -> Iterator[Finding]:
    """Yield a finding for each matrix that is all zero though its siblings are not, and for dead LoRA pairs.

    A matrix without siblings may start at zero by design (the last of a residual branch, a head): that is ordinary.
    """
    by_name = {size.name: size for size in sizes}
    alive = {kind_of(size) for size in sizes if size.amax > 0}
    for size in sizes:
        if size.amax > 0 or not is_matrix(size.tensor):
            continue
        pair = LORA.fullmatch(size.name)
        if pair:
            name = size.name.replace(f"lora_{pair[2]}", "lora_B", 1) if pair[2] == "A" else ""
            name = name.replace("lora_embedding_A", "lora_embedding_B")
            partner = by_name.get(name)
            if pair[2] == "B" or partner is None or partner.amax > 0:
                continue
            what = "both matrices of this adapter are zero, so neither ever gets a gradient"
            advice = "Start A at random and B at zero"
        elif kind_of(size) in alive:
            what = "this matrix is all zero, and its siblings in other layers are not"
            advice = "Look whether the checkpoint has this weight, and under which name"
        elif size.name in trained and not any(kind_of(size) == kind_of(o) for o in sizes if o is not size):
            what, advice = "this trained matrix begins at zero", "Nothing to do if it is meant so"
        else:
            continue
        place = Place(module=module_of(size.name), parameter=size.name)
        ordinary = what.startswith("this trained")
        cause = Cause("model", what, place, {"numbers": size.tensor.numel()}, advice)
        yield Finding("weights_all_zero", f"{size.name} is all zero", (cause,), 0, rank, ordinary=ordinary)


def constant(subject: Subject, sizes: list[Size]) -> Iterator[Finding]:
    """Yield a finding for each trained matrix of a layer whose numbers are all equal and not zero."""
    layers = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
    owners = {f"{n}.weight" for n, module in subject.model.named_modules() if isinstance(module, layers)}
    wanted = owners & trained_names(subject)
    chosen = [size for size in sizes if size.name in wanted and is_matrix(size.tensor) and size.amax > 0]
    ranges = read([torch.stack(torch.aminmax(size.tensor)) for size in chosen])
    for size, (low, high) in zip(chosen, ranges, strict=True):
        if low == high:
            place = Place(module=module_of(size.name), parameter=size.name)
            what = "all numbers of this matrix are equal, so its units get equal gradients and stay equal"
            cause = Cause(
                "model", what, place, {"value": low, "numbers": size.tensor.numel()}, "Initialise it at random"
            )
            yield Finding("weights_constant", f"{size.name} is constant", (cause,), 0, subject.world.rank)
