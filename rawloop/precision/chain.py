"""The mode that a policy is in, the reason for it, and the modes to fall back to."""

from collections.abc import Mapping
from typing import Any

from rawloop.errors import UserError
from rawloop.precision.modes import AUTO_FALLBACK, MODES, Hardware, Name, PrecisionConfig, Weights, choose_auto


def refusal(then: str, now: str) -> str:
    """The message about a checkpoint of the mode `then` in a run of the mode `now`."""
    return (
        f"the checkpoint was trained with precision.mode '{then}', this run has '{now}': resume with --precision.mode "
        f"{then}, or start another run from these weights with --init_from CHECKPOINT --output NEW"
    )


class ModeChain:
    """The mode `name`, the `reason` for it, the modes `remaining` to fall back to, and the `history` of fallbacks.

    Args:
        config: the wanted mode and its fallbacks.
        hardware: what the device computes natively.
        resume: the policy's state in the checkpoint to resume from; the run continues in the mode of that state.

    Raises:
        UserError: the hardware computes neither the mode nor any of its fallbacks natively, or `resume` is of a mode
            that is none of them.
    """

    def __init__(self, config: PrecisionConfig, hardware: Hardware, resume: Mapping[str, Any] | None = None) -> None:
        self.config, self.hardware = config, hardware
        self.name: str = config.mode
        self.reason = f"precision.mode is '{config.mode}'"
        self.remaining: list[Name] = list(config.fallback or [])
        self.history: list[dict[str, Any]] = []
        why = f"{hardware.name} does not compute {self.name} natively"
        if not self._is_native(self.name) and not self.advance(why):
            raise UserError(
                f"precision.mode is '{config.mode}', which {hardware.name} does not compute natively: "
                f"use one of {self.modes_that_work()}, or name them in precision.fallback"
            )
        if resume is not None and resume["history"]:
            self._resume(resume)
        # `auto` is resolved later, and so is a fallback for the model's sake: loading the state compares once more.
        if resume is not None and self.name != "auto":
            other = resume["mode"] not in (self.name, *self.remaining)
            if other and resume["mode"] in MODES:  # a word that is none of them is damage, which loading finds
                raise UserError(refusal(resume["mode"], self.name))

    def _resume(self, state: Mapping[str, Any]) -> None:
        """Continue in the mode that a run fell back to, if the config names it or the run's first mode."""
        mode, trail = state["mode"], [step["from"] for step in state["history"]]
        if self.name not in ("auto", mode, trail[0]) or mode not in MODES:
            return  # another mode was asked for: loading the state will refuse it
        if not self._is_native(mode):
            raise UserError(
                f"the checkpoint was trained in {mode}, which {self.hardware.name} does not compute natively: resume "
                f"it where it is, or start a run in one of {self.modes_that_work()}"
            )
        self.history = list(state["history"])
        if self.name == mode:
            return
        chain = self.remaining
        if self.name == "auto" and self.config.fallback is None:
            chain = AUTO_FALLBACK[trail[0]]
        self.remaining = chain[chain.index(mode) + 1 :] if mode in chain else []
        self.name, self.reason = mode, state["reason"]

    def _is_native(self, mode: str) -> bool:
        return mode != "bf16" or self.hardware.bf16

    def modes_that_work(self) -> str:
        """The names of the other modes that the hardware computes natively, for messages."""
        return ", ".join(name for name in MODES if self._is_native(name) and name != self.name)

    def resolve_auto(self, weights: Weights) -> None:
        """Replace `auto` by the mode for this hardware and these weights."""
        if self.name != "auto":
            return
        self.name, why = choose_auto(self.hardware, weights)
        self.reason = f"precision.mode is 'auto': {why}"
        if self.config.fallback is None:
            self.remaining = list(AUTO_FALLBACK[self.name])
        elif self.name in self.remaining:  # nothing is tried twice
            self.remaining = self.remaining[self.remaining.index(self.name) + 1 :]
        elif self.name == "fp32":  # the last resort
            self.remaining = []

    def advance(self, why: str, entered: bool = False) -> bool:
        """Move to the next mode that the hardware computes natively. Return False if there is none.

        Args:
            why: the reason, for the user.
            entered: whether the old mode has cast the model: a resumed run must round its weights in the same way.
        """
        name = next((mode for mode in self.remaining if self._is_native(mode)), None)
        if name is None:
            return False
        self.history.append({"from": self.name, "to": name, "reason": why, "entered": entered})
        self.reason = f"fell back from {self.name}: {why}"
        self.remaining = self.remaining[self.remaining.index(name) + 1 :]
        self.name = name
        return True

    def trail(self) -> str:
        """All modes so far: `amp_fp16 -> bf16`."""
        return " -> ".join([*(step["from"] for step in self.history), self.name])
