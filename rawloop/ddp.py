"""DistributedDataParallel: its switches, wrapping, and weights that a batch leaves without a gradient."""

import gc
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from inspect import signature
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rawloop.errors import UserError
from rawloop.settings import DDPConfig as DDPConfig


def wrap_in_ddp(module: nn.Module, config: DDPConfig) -> nn.Module:
    """Return `module` in DDP over the default process group; `auto` looks for unused parameters."""
    # torch 2.13 renames broadcast_buffers and warns about the old name
    renamed = "forward_sync_buffers" in signature(DistributedDataParallel.__init__).parameters
    buffers: Any = {"forward_sync_buffers" if renamed else "broadcast_buffers": config.broadcast_buffers}
    return DistributedDataParallel(
        module,
        find_unused_parameters=bool(config.find_unused_parameters),
        gradient_as_bucket_view=config.gradient_as_bucket_view,
        static_graph=config.static_graph,
        **buffers,
    )


def unwrap_ddp(module: nn.Module) -> nn.Module:
    """Return the module inside DDP, or the module itself where there is no DDP."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def find_ddp(weights: Iterable[nn.Parameter]) -> list[DistributedDataParallel]:
    """Find the DDP modules over any of these weights, whoever has built them (accelerate, Fabric, your own script)."""
    wanted = {id(weight) for weight in weights}
    kinds = [DistributedDataParallel, *DistributedDataParallel.__subclasses__()]
    # DDP leaves no trace on weights or on the module inside it, but each instance refers to its class
    found = [thing for kind in kinds for thing in gc.get_referrers(kind) if type(thing) is kind]
    return [ddp for ddp in found if any(id(weight) in wanted for weight in ddp.parameters())]


def no_sync(module: nn.Module, wanted: bool) -> AbstractContextManager[Any]:
    """Return a context in which a DDP module keeps its gradients local, if `wanted` and if it is DDP at all."""
    if wanted and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


def decide_find_unused(config: DDPConfig, unused: Sequence[Sequence[str]]) -> tuple[DDPConfig, str | None]:
    """Decide on `find_unused_parameters` from the parameters that the first batch left unused.

    Args:
        config: true, false or auto.
        unused: names of the trained parameters that got no gradient, by rank, as all ranks have gathered them.

    Returns:
        the config with true or false, and a sentence for the user if there is something to say.

    Raises:
        UserError: it is false, and DDP would wait for ever or let the ranks drift apart.
    """
    everywhere = [name for name in unused[0] if all(name in names for names in unused)]
    partly = sorted({name for names in unused for name in names} - set(everywhere))
    several = len(unused) > 1
    found = _in_words(everywhere, " on any rank" if several else "") + _in_words(partly, " on some ranks")
    if not found:
        return replace(config, find_unused_parameters=config.find_unused_parameters is True), None
    what = f"the first batch gives no gradient to {' and to '.join(found)}"
    if config.find_unused_parameters is False and several:
        raise UserError(
            f"ddp.find_unused_parameters is false, and {what}: DDP would wait for ever, or let the ranks drift apart. "
            "Set it to true or auto, or freeze these weights (adapter.freeze)"
        )
    advice = "weights that no batch uses are never trained: freeze them (adapter.freeze), or check the data"
    return replace(config, find_unused_parameters=True), f"{what}; {advice}"


def _in_words(names: list[str], where: str) -> list[str]:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"{len(names)} trained weights{where} ({', '.join(names[:5])}{more})"] if names else []
