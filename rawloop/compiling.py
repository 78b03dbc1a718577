"""`model.compile`: torch.compile of a model's repeated blocks, one after the other.

Blocks are alike, so one is compiled and the others reuse its code: the start takes seconds, where it would take minutes
for the whole model. Weights keep their names, and what is between the blocks runs as before.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from rawloop.buffers import untouched
from rawloop.config import RunConfig
from rawloop.contracts import Batch
from rawloop.errors import UserError
from rawloop.losses import LossModule
from rawloop.precision.policy import PrecisionPolicy
from rawloop.rebuild import trial_loss
from rawloop.sharding import find_blocks, reset

ADVICE = "set model.compile to false"
VARIANTS = 256  # of one block: shapes, training and evaluation, kinds of attention. torch would stop at 8


def compile_blocks(
    config: RunConfig,
    module: LossModule,
    first: Callable[[], Batch],
    policy: PrecisionPolicy,
    say: Callable[[str], None],
) -> None:
    """Compile the blocks of a model in place, by a forward and backward pass on the `first` micro-batch.

    Where a block cannot be compiled in one piece, its parts are (attention, MLP). Graphs never break: with breaks a
    block can be slower than without. Numbers do not change beyond rounding. `say` gets a line about the time it took.

    Raises:
        UserError: the model has no blocks, or torch cannot compile them.
    """
    import torch._dynamo  # takes a second to import

    name, backend, start = type(module.model).__name__, config.model.compile_backend, time.perf_counter()
    blocks = find_blocks(module.model)
    if not blocks:
        raise UserError(f"model.compile is true, and {name} has no list of blocks that could be compiled: {ADVICE}")
    if backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise UserError(f"model.compile_backend is '{backend}': torch has {', '.join(known)}")
    # torch reads the gradient of each input, and hides the warning about it, but not where warnings are errors.
    hidden = "The .grad attribute of a Tensor that is not a leaf"
    warnings.filterwarnings("ignore", hidden, UserWarning, module=r"torch\._")
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    run = partial(_pass, module, first(), policy)
    parts = [part for block in blocks for part in block.children() if any(True for _ in part.parameters())]
    faults: list[str] = []
    for units in (blocks, parts):
        if (fault := _fault(units, run, backend)) is None:
            break
        faults.append(f"{_kinds(units)}: {fault}")
    else:
        raise UserError(
            f"model.compile is true, and {backend} compiles {name} neither by blocks nor by their parts in one piece "
            f"({'; '.join(faults)}): {ADVICE}"
        )
    also = f", by parts, as blocks do not compile in one piece ({faults[0]})," if faults else ""
    say(
        f"model.compile: {len(blocks)} blocks ({_kinds(units)}){also} compiled by {backend} in "
        f"{time.perf_counter() - start:.1f} s; another shape, and the first evaluation, take as long again"
    )


def _pass(module: LossModule, batch: Batch, policy: PrecisionPolicy) -> None:
    try:
        with untouched(module), policy.autocast():
            trial_loss(module, batch, policy.device).backward()  # type: ignore[no-untyped-call]
    except BaseException:
        reset(module)
        raise


def _fault(units: Sequence[nn.Module], run: Callable[[], None], backend: str) -> str | None:
    """Compile modules, each in one piece, and run them. Return why that fails, and leave them as they were, or None."""
    from torch._dynamo import error_on_graph_break
    from torch._dynamo.exc import TorchDynamoException

    for unit in units:
        unit.compile(backend=backend)  # not `fullgraph`: under the modes of a look it would fail, and not run as it is
    try:
        with error_on_graph_break(True):
            run()
    except TorchDynamoException as error:
        for unit in units:
            unit._compiled_call_impl = None
        torch.compiler.reset()
        return " ".join(str(error).strip().splitlines()[0].split())
    return None


def _kinds(units: Sequence[nn.Module]) -> str:
    return ", ".join(dict.fromkeys(type(unit).__name__.removeprefix("FSDP") for unit in units))
