"""Batch keys against a model's forward signature.

Models of transformers 5 take `**kwargs` and swallow a keyword that they do not know: `label_ids` instead of `labels`
gives `loss=None`, not an error. So keys are matched by explicit parameter name, once per model.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from rawloop.errors import UserError, nearest


def check_inputs(forward: Callable[..., Any], names: Iterable[str], owner: str) -> None:
    """Refuse batch keys that `forward` has no parameter of that very name for.

    Raises:
        UserError: naming the key, the nearest parameter and the model.
    """
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [name for name, parameter in inspect.signature(forward).parameters.items() if parameter.kind in kinds]
    for name in names:
        if name not in known:
            raise UserError(
                f"the batch has '{name}', which {owner}.forward does not take{nearest(name, known)}: "
                f"its parameters are {', '.join(known)}"
            )
