"""Weights that are not finite, or that no initialisation and no training gives, by name."""

import math
import re
from collections.abc import Iterator, Mapping
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rawloop.errors import first_few
from rawloop.watch.findings import Finding, Place, Whose
from rawloop.watch.held import Evidence, held_by_optimizers, largest, measurable, place_of, read, rms_of, told
from rawloop.watch.subject import Detector, StepRecord, Subject

# Matrices of one kind and shape differ by less than 10 times between the layers of pretrained models.
SIBLINGS_DIFFER = 30.0
SIBLINGS = 3  # with fewer, the odd one is not known
# The gain of a linear layer is its rms times sqrt(inputs): 0.6 to 2 at initialisation, up to about 6 in GPT-2.
GAIN, GAIN_OF_ALL = 8.0, 50.0
LARGEST = 1e4  # a few products of this size leave the range of FP16; a flipped exponent bit gives more
MATRIX = 2  # dimensions larger than 1: norms, biases and scales may be all ones or zeros
BUFFER = "buffer "  # before the name of one
RELOAD = "Load an earlier checkpoint, or download the model again: no loss can be finite with these numbers"
LAYERS = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)


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

    @property
    def kind(self) -> tuple[object, ...]:
        """What matrices of different layers have in common: the name without the layer's number, and the shape."""
        return re.sub(r"\d+", "#", self.name), tuple(self.tensor.shape)


class UnsoundWeights(Detector):
    """Finds weights and buffers that are not finite or absurd before step 0, and weights not finite on probing steps.

    Kinds: `weights_not_finite`, `weights_absurd`, `weights_constant`.
    """

    def __init__(self) -> None:
        self._finite_at: int | None = None  # the last step after which all weights were finite

    def start(self, subject: Subject) -> Iterator[Finding]:
        """Look at every weight and buffer, reading the device four times."""
        weights = measurable_weights(subject)
        tensors = list(weights.values())
        sizes = [*map(Size, weights, tensors, rms_of(tensors), largest(tensors))]
        damaged = {size.name: size.tensor for size in sizes if not size.amax < math.inf} | damaged_buffers(subject)
        if damaged:
            yield not_finite(subject, damaged, StepRecord(0), "when the watch began", ("model", "", RELOAD))
        matrices = [one for one in sizes if one.amax < math.inf and sum(n > 1 for n in one.tensor.shape) >= MATRIX]
        yield from absurd(subject, [size for size in matrices if size.amax > 0])
        yield from constant(subject, matrices)

    def end(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        """Look at the weights again, reading the device once."""
        if not record.probing:
            return
        weights = measurable_weights(subject)
        sizes = zip(weights.items(), largest([*weights.values()]), strict=True)
        damaged = {name: tensor for (name, tensor), amax in sizes if not amax < math.inf}
        if not damaged:
            self._finite_at = record.step
            return
        good = self._finite_at
        when = "since the watch began" if good is None else f"between the ends of steps {good} and {record.step}"
        since = None if good is None else good + 1
        yield not_finite(subject, damaged, record, f"{when}: ", damaged_by(record), since)


def measurable_weights(subject: Subject) -> dict[str, Tensor]:
    """Return the model's weights by name."""
    return {name: p.detach() for name, p in subject.model.named_parameters() if measurable(p)}


def damaged_buffers(subject: Subject) -> dict[str, Tensor]:
    """Return the buffers with NaN or +inf, by `buffer NAME`. Masks contain -inf."""
    named = [(name, buffer) for name, buffer in subject.model.named_buffers() if measurable(buffer)]
    flags = read([(buffer.isnan() | (buffer == math.inf)).any() for _, buffer in named])
    return {f"{BUFFER}{name}": buffer for (name, buffer), flag in zip(named, flags, strict=True) if flag}


def damaged_by(record: StepRecord) -> tuple[Whose, str, str]:
    """Return who is likely to have written weights that are not finite in a step, how, and what to do."""
    if record.grad_norm is None or not record.applied:
        why = "an earlier update, or something else since the last look, has written them"
        return "not known", why, "Start from earlier weights, and probe more often"
    if record.grad_norm < math.inf:
        why = "finite gradients were turned into weights that are not finite by the optimizer's update"
        return "optimizer", why, "Look at its eps, learning rate and state dtype"
    why = "gradients that are not finite were given to the optimizer, which wrote them into the weights"
    advice = "Skip such steps (a GradScaler does, or test the norm before step()), and start from earlier weights"
    return "optimizer", why, advice


def not_finite(
    subject: Subject, damaged: Mapping[str, Tensor], record: StepRecord, when: str, why: tuple[Whose, str, str],
    since: int | None = None,
) -> Finding:  # fmt: skip
    """Return the finding for weights or buffers that are not finite; its evidence is of the first one."""
    name, tensor = next(iter(damaged.items()))
    is_buffer = name.startswith(BUFFER)
    bad = tensor.isnan() | (tensor == math.inf) if is_buffer else ~tensor.isfinite()
    index = tuple(torch.nonzero(bad)[0].tolist())
    evidence: Evidence = {"damaged numbers": int(bad.sum()), "of": tensor.numel(), "first index": str([*index])}
    evidence |= {"value": str(float(tensor[index]))}
    evidence |= {} if record.grad_norm is None else {"grad_norm": record.grad_norm}
    place = Place(tensor=name.removeprefix(BUFFER)) if is_buffer else place_of(name)
    whose, how, advice = why
    number = len([*subject.model.parameters(), *subject.model.buffers()])
    what = f"{len(damaged)} of {number} weights and buffers are not finite ({first_few(damaged)}) {when}{how}"
    return told(subject, record.step, "weights_not_finite", whose, what, place, evidence, advice, since=since)


def absurd(subject: Subject, matrices: list[Size]) -> Iterator[Finding]:
    """Yield a finding for each matrix whose numbers are far from its siblings', or too large for anything."""
    linear = {f"{name}.weight" for name, module in subject.model.named_modules() if isinstance(module, nn.Linear)}
    kinds: dict[object, list[Size]] = {}
    for size in matrices:
        kinds.setdefault(size.kind, []).append(size)
    for size in matrices:
        evidence: Evidence = {"rms": size.rms, "largest": size.amax}
        wrong = size.amax > LARGEST
        siblings = [other.rms for other in kinds[size.kind] if other is not size]
        if len(siblings) >= SIBLINGS - 1:
            usual = evidence["median rms of its siblings in other layers"] = median(siblings)
            wrong |= max(size.rms / usual, usual / size.rms) > SIBLINGS_DIFFER
        if size.name in linear:
            evidence["gain"] = size.gain
            wrong |= size.gain > GAIN_OF_ALL
            if others := [other.gain for other in matrices if other.name in linear and other is not size]:
                usual = evidence["median gain of the other linear layers"] = median(others)
                wrong |= size.gain > max(GAIN, SIBLINGS_DIFFER * usual)
        if wrong:
            what = f"the numbers of {size.name} have a size that no initialisation and no training gives"
            advice = "Compare it with its checkpoint: a scale was applied twice, or a number was damaged"
            yield told(subject, 0, "weights_absurd", "model", what, place_of(size.name), evidence, advice)


def constant(subject: Subject, matrices: list[Size]) -> Iterator[Finding]:
    """Yield a finding for each matrix that is all zero though its siblings are not, and for each LoRA pair of zeros.

    The matrix of a trained layer may not have equal numbers of another value either. A matrix without siblings may
    start at zero by design, as the last of a residual branch or a head.
    """
    layers = {f"{name}.weight" for name, module in subject.model.named_modules() if isinstance(module, LAYERS)}
    trained = {one.name for one in held_by_optimizers(subject)}
    trained |= {name for name, p in subject.model.named_parameters() if p.requires_grad}
    chosen = [size for size in matrices if size.amax == 0 or size.name in layers & trained]
    ranges = read([torch.stack(torch.aminmax(size.tensor)) for size in chosen])
    equal = {size.name: size for size, (low, high) in zip(chosen, ranges, strict=True) if low == high}
    alive = {size.kind for size in matrices if size.amax > 0}
    for name, size in equal.items():
        partner = equal.get(re.sub(r"lora_(embedding_)?A", r"lora_\1B", name))
        if size.amax > 0:
            what = "has equal numbers only, so its units get equal gradients and stay equal"
            advice = "Initialise it at random"
        elif re.search(r"lora_(embedding_)?[AB]\b", name):
            if partner is None or partner is size or partner.amax > 0:  # one of the two starts at zero
                continue
            what = "and the other matrix of this adapter are zero, so neither ever gets a gradient"
            advice = "Start A at random and B at zero"
        elif size.kind in alive:
            what = "is all zero, and its siblings in other layers are not"
            advice = "Look whether the checkpoint has this weight, and under which name"
        else:
            continue
        evidence: Evidence = {"value": size.amax, "numbers": size.tensor.numel()}
        yield told(subject, 0, "weights_constant", "model", f"{name} {what}", place_of(name), evidence, advice)
