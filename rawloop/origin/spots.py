"""Places in a pass, and the first one that makes numbers which are not finite."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor


class Spot(NamedTuple):
    """A place in the forward pass.

    Args:
        number: counts the operations of the pass; -1 for a module whose own kernels are not operations of torch.
        operation: such as `torch.log`, or the class of the module.
        module: the path of the innermost module; empty for the model itself.
        inside: whether a module of the model was running.
        line: the line of code outside torch; empty if unknown.
    """

    number: int
    operation: str
    module: str
    inside: bool
    line: str


NOWHERE = Spot(-1, "", "", False, "")


@dataclass
class Call:
    """One operation with copies of its arguments, to run it again.

    `gradients` are those of its outputs; `weights` names the arguments that are weights of the model, by their position
    in `floats_in((args, kwargs))`.
    """

    func: Any
    args: Any
    kwargs: Any
    weights: dict[int, str]
    outputs: list[Tensor] = field(default_factory=list)
    gradients: dict[int, Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class Origin:
    """A place with finite inputs and an output or gradient that is not finite.

    Args:
        phase: forward or backward.
        operation: `torch.log`; in backward the name of the autograd node, such as `sqrt`.
        spot: the place in the forward pass.
        kind: `nan` or `inf`.
        dtype: of the tensor that is not finite.
        given: the name of a weight, buffer or input that contained them from the start.
        mask: it blocks positions with infinities, which is right unless something makes NaN from it.
        blocked: the operation makes it from the infinities of a mask.
        later: the operation that stumbles over the zero which a division has made of the infinity; empty without one.
        order: counts the autograd nodes in the order in which they run.
        gradient: the largest finite magnitude of the gradient that the operation received; NaN in forward.
        parameter: the leaf whose gradient it is, if nodes have made finite gradients and their sum or a hook has not.
        hook: the function that changes a finite gradient to one that is not; empty if no hook is known.
        narrow: a 16-bit dtype that an operation of the pass has made; None if there was none.
        call: the operation with its arguments, to run it again; None if it cannot be captured.
    """

    phase: Literal["forward", "backward"]
    operation: str
    spot: Spot
    kind: str
    dtype: torch.dtype
    given: str = ""
    mask: bool = False
    blocked: bool = False
    later: str = ""
    order: int = 0
    gradient: float = math.nan
    parameter: str = ""
    hook: str = ""
    narrow: torch.dtype | None = None
    call: Call | None = None
