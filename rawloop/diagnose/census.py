"""The label census: how much of each role is a target, and whether required tokens are among the targets.

No loss shows a stop token that is masked out of the labels: the loss is as good, and the model forgets how to stop.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch

from rawloop.contracts import Batch, Family, Special, has
from rawloop.diagnose.shared import looking_at, table

GIVEN = frozenset(("system", "scene", "user"))
INSTRUCTIONS = frozenset(("system", "scene"))  # before the conversation; generation has to repeat them
MOST_SHOWN, WIDTH = 3, 160  # instructions; characters of each


@dataclass
class Census:
    """Counts over some samples.

    `roles` maps (role, stream) to positions and targets, `codebooks` a stream to the targets that a position can have,
    and `specials` a special token to how often it is a target, per codebook. `silent` has samples without any target,
    `instructions` how many samples begin with each text of system and scene.
    """

    samples: int = 0
    roles: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    codebooks: dict[str, int] = field(default_factory=dict)
    specials: dict[Special, list[int]] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)
    instructions: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "Census") -> "Census":
        """Join the counts of two ranks."""
        total = Census(self.samples + other.samples, dict(self.roles), {**self.codebooks, **other.codebooks})
        for key, (positions, targets) in other.roles.items():
            known = total.roles.get(key, (0, 0))
            total.roles[key] = (known[0] + positions, known[1] + targets)
        total.specials = {special: list(counts) for special, counts in self.specials.items()}
        for special, counts in other.specials.items():
            known_counts = total.specials.get(special, [0] * len(counts))
            total.specials[special] = [a + b for a, b in zip(known_counts, counts, strict=True)]
        total.silent = [*self.silent, *other.silent]
        total.instructions = self.instructions + other.instructions
        return total

    def missing(self) -> list[str]:
        """Return a clause for every required token that is never a target, in at least one codebook."""
        return [f"{_named(s)}{_where(self.specials[s])}" for s in self._lacking()[0]]

    def unseen(self) -> list[str]:
        """Return a clause for every required token whose role no sample has."""
        return [f"{_named(s)}, which ends the role {' or '.join(s.roles)}" for s in self._lacking()[1]]

    def undecided(self) -> bool:
        """Return whether more samples could show a required token that is missing here."""
        missing, unseen = self._lacking()
        return bool(unseen) or any(not special.roles for special in missing)

    def _lacking(self) -> tuple[list[Special], list[Special]]:
        """Return the required tokens that are no targets: missing ones, and those whose role no sample has."""
        here = {role for role, _ in self.roles}
        lacking = [special for special, counts in self.specials.items() if special.required and not all(counts)]
        unseen = [special for special in lacking if special.roles and here.isdisjoint(special.roles)]
        return [special for special in lacking if special not in unseen], unseen

    def prompts(self) -> dict[str, int]:
        """Return the number of targets in system, scene and user turns, by role: these should not be learnt."""
        found: dict[str, int] = {}
        for (role, _), (_, targets) in self.roles.items():
            if targets and not GIVEN.isdisjoint(role.split("+")):
                found[role] = found.get(role, 0) + targets
        return found

    def lines(self) -> list[str]:
        """Return the census as tables."""
        roles: list[list[object]] = [["role", "stream", "positions", "targets", "masked"]]
        for (role, stream), (positions, targets) in self.roles.items():
            masked = 1 - targets / (positions * self.codebooks[stream])
            roles.append([role, stream, f"{positions:,}", f"{targets:,}", f"{masked:.1%}"])
        missing, unseen = self._lacking()
        specials: list[list[object]] = [["special token", "stream", "id", "times a target", ""]]
        for special, counts in self.specials.items():
            wanted = "" if not special.required else "required"
            wanted += ", MISSING" if special in missing else ", not seen" if special in unseen else ""
            specials.append([special.name, special.stream, special.id, _short(counts), wanted])
        head = f"label census of {self.samples} samples"
        silent = [f"no target in any stream: {', '.join(self.silent)}"] if self.silent else []
        tables = [*(table("llrrr", roles) if self.roles else []), *silent, *self._instructions()]
        return [head, *tables, *(["", *table("llrll", specials)] if self.specials else [])]

    def _instructions(self) -> list[str]:
        shown = self.instructions.most_common(MOST_SHOWN)
        lines = [f"{count} of {self.samples} samples begin with: {_cut(text)}" for text, count in shown]
        more = len(self.instructions) - len(shown)
        return [*lines, f"{more} other beginnings"] if more else lines

    def as_json(self) -> dict[str, Any]:
        """Return the content of census.json."""
        roles = [
            {"role": role, "stream": stream, "positions": positions, "targets": targets}
            for (role, stream), (positions, targets) in self.roles.items()
        ]
        specials = [{**special._asdict(), "targets": counts} for special, counts in self.specials.items()]
        return {
            "samples": self.samples,
            "without_targets": self.silent,
            "instructions": dict(self.instructions),
            "codebooks": self.codebooks,
            "roles": roles,
            "specials": specials,
        }


def take_census(family: Family, examples: Iterable[Any], batches: Sequence[Batch]) -> Census:
    """Count the targets of examples, and of the batches that were collated from them in the same order.

    Counts by role need the family's method `pieces`, special tokens need `special_targets`.
    """
    census = Census()
    for batch in batches:
        for stream, labels in batch.labels.items():
            census.codebooks[stream] = labels.targets.shape[1] if labels.targets.dim() == 2 else 1
    for example, name in zip(examples, (name for batch in batches for name in batch.ids), strict=True):
        census.samples += 1
        with looking_at([name]):
            learnt = _count_roles(census, family, example)
        census.silent += [] if learnt else [name]
    for special in family.special_targets() if batches and has(family, "special_targets") else ():
        counts = torch.zeros(census.codebooks.setdefault(special.stream, 1), dtype=torch.int64)
        for batch in (batch for batch in batches if special.stream in batch.labels):
            found = torch.eq(batch.labels[special.stream].targets, special.id)
            counts += found.view(len(found), census.codebooks[special.stream]).sum(0).cpu()
        census.specials[special] = counts.tolist()
    return census


def _count_roles(census: Census, family: Family, example: Any) -> int:
    """Count an example by role, and return its number of targets."""
    if not has(family, "pieces"):
        return sum(family.collate([example]).targets.values())
    pieces = family.pieces(example)
    for piece in pieces:
        positions, targets = census.roles.get((piece.role, piece.stream), (0, 0))
        census.roles[piece.role, piece.stream] = (positions + piece.positions, targets + piece.targets)
        census.codebooks.setdefault(piece.stream, 1)  # a stream without weight has positions and no labels
    text = "".join(piece.text for piece in takewhile(lambda piece: piece.role in INSTRUCTIONS, pieces))
    if text:
        census.instructions[text] += 1
    return sum(piece.targets for piece in pieces)


def _cut(text: str) -> str:
    text = text.strip().replace("\n", "↵")
    return text if len(text) <= WIDTH else f"{text[:WIDTH]} ... ({len(text):,} characters)"


def _named(special: Special) -> str:
    return f"'{special.name}' (id {special.id} of the stream '{special.stream}')"


def _where(counts: Sequence[int]) -> str:
    empty = [str(codebook) for codebook, count in enumerate(counts) if not count]
    if len(counts) == 1:
        return ""
    return " in any codebook" if len(empty) == len(counts) else f" in codebook {', '.join(empty)}"


def _short(counts: Sequence[int]) -> str:
    """Return `16`, `16 in each of 8`, or all counts if codebooks differ."""
    if len(counts) == 1:
        return f"{counts[0]:,}"
    return f"{counts[0]:,} in each of {len(counts)}" if len(set(counts)) == 1 else " ".join(map(str, counts))
