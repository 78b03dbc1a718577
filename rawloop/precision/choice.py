"""Which mode a policy is in, why, and which modes are left: `precision.mode` and its chain of fallbacks."""

from collections.abc import Mapping
from typing import Any

from rawloop.errors import UserError
from rawloop.precision.modes import AUTO_FALLBACK, MODES, Hardware, Name, PrecisionConfig, Weights, choose_auto


def refusal(then: str, now: str) -> str:
    """What to say of a checkpoint of the mode `then` in a run of the mode `now`."""
    return (
        f"the checkpoint was trained with precision.mode '{then}', this run has '{now}': resume with --precision.mode "
        f"{then}, or start another run from these weights with --init_from CHECKPOINT --output NEW"
    )


class Choice:
    """The mode `name`, the `reason` for it, the modes `left` after it, and the `history` of those that were left.

    Args:
        config: the wanted mode and its fallbacks.
        hardware: what the device is.
        resume: a policy's state, of a run that goes on in the mode that it had fallen back to.

    Raises:
        UserError: the hardware computes neither the mode nor any of its fallbacks natively, or it is not in them that
            the run goes on.
    """

    def __init__(self, config: PrecisionConfig, hardware: Hardware, resume: Mapping[str, Any] | None = None) -> None:
        self.config, self.hardware = config, hardware
        self.name: str = config.mode
        self.reason = f"precision.mode is '{config.mode}'"
        self.left: list[Name] = list(config.fallback or [])
        self.history: list[dict[str, Any]] = []
        if not self._computed(self.name) and not self.advance(f"{hardware.name} does not compute {self.name} natively"):
            raise UserError(
                f"precision.mode is '{config.mode}', which {hardware.name} does not compute natively: "
                f"use one of {self.modes_that_work()}, or name them in precision.fallback"
            )
        if resume is not None and resume["history"]:
            self._resume(resume)
        # What `auto` is and whether a fallback is needed is known later; loading the state looks again.
        if resume is not None and self.name != "auto":
            other = resume["mode"] not in (self.name, *self.left)
            if other and resume["mode"] in MODES:  # a word that is none of them is damage, which loading finds
                raise UserError(refusal(resume["mode"], self.name))

    def _resume(self, state: Mapping[str, Any]) -> None:
        """Go on in the mode that a run fell back to, if this config is the run's, or has followed it there."""
        mode, trail = state["mode"], [step["from"] for step in state["history"]]
        if self.name not in ("auto", mode, trail[0]) or mode not in MODES:
            return  # another mode was asked for: loading the state will refuse it
        if not self._computed(mode):
            raise UserError(
                f"the checkpoint was trained in {mode}, which {self.hardware.name} does not compute natively: resume "
                f"it where it is, or start a run in one of {self.modes_that_work()}"
            )
        self.history = list(state["history"])
        if self.name == mode:
            return
        left = self.left
        if self.name == "auto" and self.config.fallback is None:
            left = AUTO_FALLBACK[trail[0]]
        self.left = left[left.index(mode) + 1 :] if mode in left else []
        self.name, self.reason = mode, state["reason"]

    def _computed(self, mode: str) -> bool:
        return mode != "bf16" or self.hardware.bf16

    def modes_that_work(self) -> str:
        """The names of the other modes that the hardware computes natively, for messages."""
        return ", ".join(name for name in MODES if self._computed(name) and name != self.name)

    def settle(self, weights: Weights) -> None:
        """Make a mode out of `auto`, from the hardware and the model's weights."""
        if self.name != "auto":
            return
        self.name, why = choose_auto(self.hardware, weights)
        self.reason = f"precision.mode is 'auto': {why}"
        if self.config.fallback is None:
            self.left = list(AUTO_FALLBACK[self.name])
        elif self.name in self.left or self.name == "fp32":  # nothing is tried twice, and nothing after the last resort
            self.left = self.left[self.left.index(self.name) + 1 :] if self.name in self.left else []

    def advance(self, why: str, entered: bool = False) -> bool:
        """Go on in the next mode of the chain that the hardware computes; False if none is left.

        Args:
            why: the reason, for people.
            entered: whether the mode that is left had cast the model: a resumed run must round alike.
        """
        computed = [mode for mode in self.left if self._computed(mode)]
        if not computed:
            return False
        name = computed[0]
        self.history.append({"from": self.name, "to": name, "reason": why, "entered": entered})
        self.reason = f"fell back from {self.name}: {why}"
        self.left = self.left[self.left.index(name) + 1 :]
        self.name = name
        return True

    def trail(self) -> str:
        """All modes so far: `amp_fp16 -> bf16`."""
        return " -> ".join([*(step["from"] for step in self.history), self.name])
