"""The modules around a model: DDP, torch.compile, and those of other libraries."""

from collections.abc import Iterator

from torch import nn
from torch.optim import Optimizer

from rawloop.dist import find_ddp
from rawloop.inputs import unwrap


def bare_model(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, torch.compile, and wrappers whose only child is `module`, such as Fabric's."""
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def replayed_model(model: nn.Module) -> nn.Module:
    """Return the module that runs passes again: the bare model, with the wrappers next to it, which may set autocast.

    DDP and torch.compile, and what is around these, are left out.
    """
    chain = [model]
    while (inner := _inside(chain[-1])) is not None:
        chain.append(inner)
    found = chain.pop()
    while chain and unwrap(chain[-1]) is chain[-1]:
        found = chain.pop()
    return found


def bare_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that makes the updates inside one around it, such as accelerate's, Fabric's or SAM's.

    The two share their parameter groups, and a loop may step the inner one without the `step` of the outer one.
    """
    for inner in vars(optimizer).values():
        if isinstance(inner, Optimizer) and inner is not optimizer and inner.param_groups is optimizer.param_groups:
            return bare_optimizer(inner)
    return optimizer


def is_compiled(model: nn.Module) -> bool:
    """Return whether torch.compile was called on the model, on a part of it, or on what wraps it."""
    return any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules())


def outsides(model: nn.Module, bare: nn.Module) -> list[nn.Module]:
    """Return the modules whose calls are calls of the model: it, what is around it, and DDP modules made elsewhere.

    What is inside a compiled module is left out: hooks there would be compiled.
    """
    found = [*_chain(model)]
    ddp = [module for module in find_ddp(bare.parameters()) if bare_model(module) is bare]
    return list({id(module): module for module in [*ddp, *found]}.values())


def _chain(model: nn.Module) -> Iterator[nn.Module]:
    yield model
    inner = _inside(model)
    if inner is not None and "_orig_mod" not in model._modules:
        yield from _chain(inner)


def _inside(model: nn.Module) -> nn.Module | None:
    """Return the module that a wrapper is around, or None."""
    inner = unwrap(model)
    if inner is not model:
        return model._modules.get("_orig_mod") or inner
    child = getattr(model, "module", None)
    children = {id(child) for child in model.children()}
    return child if isinstance(child, nn.Module) and children == {id(child)} and not model._parameters else None
