"""Functions of torch that tell when they are called, and methods of one object that are replaced for a time."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def listening(owner: Any, name: str, listener: Callable[..., Any]) -> Iterator[None]:
    """Call `listener` before each call of a function of torch, with its arguments.

    What it returns, if not None, is called afterwards, with whether the function succeeded, and its result.

    All listeners share one wrapper, so that they may leave in any order.
    """
    wrapper = getattr(owner, name)
    if not hasattr(wrapper, "listeners"):
        wrapper = _announcing(wrapper)
        setattr(owner, name, wrapper)
    wrapper.listeners.append(listener)
    try:
        yield
    finally:
        wrapper.listeners.remove(listener)
        if not wrapper.listeners and getattr(owner, name) is wrapper:
            setattr(owner, name, wrapper.__wrapped__)


def _announcing(function: Any) -> Any:
    @functools.wraps(function)
    def announced(*args: Any, **kwargs: Any) -> Any:
        done = [listener(*args, **kwargs) for listener in announced.listeners]  # type: ignore[attr-defined]
        succeeded, result = False, None
        try:
            result = function(*args, **kwargs)
            succeeded = True
            return result
        finally:
            for after in filter(None, done):
                after(succeeded, result)

    announced.listeners = []  # type: ignore[attr-defined]
    return announced


@contextmanager
def wrapped(thing: Any, name: str, around: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """Call `around(call)` in place of a method of one object; `call()` is the method itself."""
    original, own = getattr(thing, name), vars(thing).get(name)
    active = True

    def method(*args: Any, **kwargs: Any) -> Any:
        return around(lambda: original(*args, **kwargs)) if active else original(*args, **kwargs)

    setattr(thing, name, method)
    try:
        yield
    finally:
        active = False
        if vars(thing).get(name) is method:
            delattr(thing, name) if own is None else setattr(thing, name, own)


@contextmanager
def applied(around: Callable[[Any, Callable[..., Any], Any, Any], Any]) -> Iterator[None]:
    """Call `around(function, call, args, kwargs)` in place of `apply` of each `torch.autograd.Function`."""
    owner: Any = torch.autograd.Function
    original = vars(owner)["apply"]
    active = True

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(original.__func__, cls)
        return around(cls, call, args, kwargs) if active else call(*args, **kwargs)

    replaced = classmethod(apply)
    owner.apply = replaced
    try:
        yield
    finally:
        active = False
        if vars(owner)["apply"] is replaced:
            owner.apply = original
