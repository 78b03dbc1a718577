"""Finds where numbers stop to be finite: the first operation with finite inputs and an output or gradient that is not.

`find_origin` runs a pass under a recorder of operations, modules and autograd nodes, and `reason` says why in words.
`damaged` finds weights and buffers, `guilty_rows` the samples. Code that runs recorded operations names the user's line
in `current_line`.
"""

from rawloop.origin.find import (
    Damage,
    Rows,
    batch_size,
    damaged,
    find_origin,
    gradients_of,
    guilty_rows,
    is_finite,
    is_finite_in,
)
from rawloop.origin.forward import current_line
from rawloop.origin.spots import Origin
from rawloop.origin.words import Reason, reason

__all__ = [
    "Damage",
    "Origin",
    "Reason",
    "Rows",
    "batch_size",
    "current_line",
    "damaged",
    "find_origin",
    "gradients_of",
    "guilty_rows",
    "is_finite",
    "is_finite_in",
    "reason",
]
