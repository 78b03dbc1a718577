"""The state of optimizers and schedulers for checkpoints: by parameter name, with the options of every group.

torch stores optimizer state by position, and a scheduler does not store the learning rate that it has set. Both can
resume wrongly without an error.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rawloop.errors import CheckpointError, UserError, first_few
from rawloop.sharded_optim import state_for
from rawloop.sharding import is_sharded

# options for how this machine computes an update; loading does not change them
IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")
# options that schedule-free optimizers count with: state, also where a config sets the others
COUNTERS = ("k", "weight_sum", "lr_max", "scheduled_lr", "train_mode")


class NamedOptimizerState:
    """An optimizer's state for checkpoints, by parameter name instead of by position.

    Positions shift when a parameter is frozen or added; names show what is missing. The options of each parameter group
    (lr, betas, the counters of schedule-free optimizers, ...) are part of the state.

    Args:
        optimizer: the optimizer. Its parameters may be replaced later, for example by a precision policy.
        named: returns (name, parameter) for all parameters of the optimizer. It is called at each save and load,
            because a fallback may have replaced the parameters.
        restore_options: whether to store and restore the options of the groups. False if a config sets them; then only
            `COUNTERS` are.

    Raises:
        UserError: `optimizer` is no optimizer, or `named` cannot be called.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        named: Callable[[], Iterable[tuple[str, nn.Parameter]]],
        *,
        restore_options: bool = True,
    ) -> None:
        if not isinstance(optimizer, Optimizer) or not callable(named):
            raise UserError(
                "NamedOptimizerState takes an optimizer and a function that returns its named parameters, such as "
                f"model.named_parameters without (): it got {type(optimizer).__name__} and {type(named).__name__}"
            )
        self.optimizer, self.named, self.restore_options = optimizer, named, restore_options

    def _groups(self) -> list[dict[str, nn.Parameter]]:
        """Return the parameters of each group by name.

        Raises:
            UserError: the optimizer has state, or trains parameters, without a name.
        """
        names, state = {id(parameter): name for name, parameter in self.named()}, self.optimizer.state
        groups = [group["params"] for group in self.optimizer.param_groups]
        trained = [p for params in groups for p in params if p.requires_grad or state.get(p)]
        nameless = sum(id(parameter) not in names for parameter in trained)
        if nameless:
            raise UserError(
                f"{nameless} of the {len(trained)} parameters that the optimizer trains have no name in `named` of "
                "NamedOptimizerState: hand in the named_parameters of the model that it trains; with a "
                "PrecisionPolicy hand in policy.named_parameters, and call policy.adopt(optimizer) before"
            )
        others = [key for key in state if not isinstance(key, torch.Tensor)]
        if others:
            raise UserError(
                f"{type(self.optimizer).__name__} has state for {others[0]!r}, which is no parameter: "
                "NamedOptimizerState stores the state of parameters and the options of their groups"
            )
        return [{names[id(p)]: p for p in params if id(p) in names} for params in groups]

    def state_dict(self) -> dict[str, Any]:
        """Return `groups`, each with its options and the shapes of its parameters by name, and `state` by name.

        Raises:
            UserError: the optimizer has state, or trains parameters, without a name.
        """
        groups, state = self._groups(), self.optimizer.state
        stored = []
        for named, group in zip(groups, self.optimizer.param_groups, strict=True):
            kept = set(group) - {"params", "param_names"} if self.restore_options else set(group) & set(COUNTERS)
            options = {key: plain(value) for key, value in group.items() if key in kept}
            shapes = {name: list(p.shape) for name, p in named.items()}
            stored.append({"params": shapes, "options": options})
        return {
            "groups": stored,
            "state": {name: dict(state[p]) for named in groups for name, p in named.items() if state.get(p)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore state and options, in their stored dtypes (torch's own loader casts to the parameter's dtype).

        Raises:
            CheckpointError: the groups, names or shapes differ from the optimizer's.
        """
        groups = self._groups()
        if not isinstance(state.get("groups"), list):
            state = _with_groups(state, groups)
        _check_groups([group["params"] for group in state["groups"]], groups)
        for named, group, stored in zip(groups, self.optimizer.param_groups, state["groups"], strict=True):
            options = stored["options"]
            _set_options(group, {k: v for k, v in options.items() if self.restore_options or k in COUNTERS})
            for name, parameter in named.items():
                self.optimizer.state.pop(parameter, None)  # a parameter without stored state had none
                if name in state["state"]:
                    self.optimizer.state[parameter] = self._restored(state["state"][name], parameter, group)

    def _restored(self, values: dict[str, Any], parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Any]:
        # torch has the step counter of a fused or capturable optimizer on the device, of any other on the CPU
        step = parameter.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
        places = {key: step if key == "step" else parameter.device for key in values}
        restored = {key: _laid_out(_placed(value, places[key]), parameter) for key, value in values.items()}
        if getattr(self.optimizer, "is_paged", False):  # of bitsandbytes, whose paged memory is of its own kind
            paged: Any = self.optimizer
            for key in {"state1", "state2"} & restored.keys():
                restored[key] = paged.get_state_buffer(parameter, dtype=restored[key].dtype).copy_(restored[key])
        return state_for(restored, parameter)


def _with_groups(state: Mapping[str, Any], groups: list[dict[str, nn.Parameter]]) -> dict[str, Any]:
    """Add the groups to an optimizer state of rawloop 0.1, which has only an entry for each trained weight."""
    stored: list[dict[str, Any]] = [{"params": {}, "options": {}} for _ in groups]
    for name, values in state.items():
        index = next((index for index, named in enumerate(groups) if name in named), 0)
        shapes = [list(value.shape) for value in values.values() if isinstance(value, torch.Tensor) and value.ndim]
        known = [list(groups[index][name].shape)] if name in groups[index] else [[]]
        stored[index]["params"][name] = [*shapes, *known][0]
    return {"groups": stored, "state": {name: values for name, values in state.items() if values}}


def _set_options(group: dict[str, Any], options: Mapping[str, Any]) -> None:
    for key, value in options.items():
        current = group.get(key)
        if key in IMPLEMENTATION:
            continue
        if isinstance(current, torch.Tensor):  # a captured graph or a scheduler refers to this tensor
            current.copy_(torch.as_tensor(value))
        else:
            group[key] = value


def _check_groups(stored: list[Mapping[str, list[int]]], groups: list[dict[str, nn.Parameter]]) -> None:
    """Raise CheckpointError if names, groups or shapes of the stored parameters differ from the optimizer's."""
    then = {name: index for index, named in enumerate(stored) for name in named}
    now = {name: index for index, named in enumerate(groups) for name in named}
    extra, missing = sorted(then.keys() - now.keys()), sorted(now.keys() - then.keys())
    if extra or missing:
        raise CheckpointError(
            f"optimizer state does not fit the model: {len(missing)} weights have none {missing[:3]}, "
            f"{len(extra)} are not in the model or not trained {extra[:3]}"
        )
    moved = [f"{name} from group {then[name]} to {now[name]}" for name in now if then[name] != now[name]]
    if moved or len(stored) != len(groups):
        raise CheckpointError(
            f"the optimizer's parameter groups differ from the checkpoint's: {len(stored)} then, {len(groups)} now; "
            f"{len(moved)} weights have moved {moved[:3]}. Build the groups as before, because each has its options"
        )
    for index, named in enumerate(groups):
        for name, parameter in named.items():
            if list(parameter.shape) != stored[index][name]:
                raise CheckpointError(
                    f"optimizer state of {name} has shape {tuple(stored[index][name])}, the weight has "
                    f"{tuple(parameter.shape)}"
                )


def _placed(value: Any, device: torch.device) -> Any:
    """Copy the tensors of a nested state value to `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {key: _placed(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_placed(item, device) for item in value)
    return value


def _laid_out(value: Any, parameter: nn.Parameter) -> Any:
    """Return state of a weight in the weight's order in memory, on which fused optimizers rely."""
    if getattr(value, "shape", None) != parameter.shape or is_sharded(parameter):
        return value
    own = torch.empty_like(parameter, dtype=value.dtype)
    return value if value.stride() == own.stride() else own.copy_(value)


class SchedulerState:
    """The state of a torch learning-rate scheduler, for checkpoints.

    A scheduler does not store the learning rates that it has set. Save it together with a `NamedOptimizerState` of its
    optimizer, which stores them.

    Raises:
        UserError: `scheduler` is no torch scheduler.
    """

    def __init__(self, scheduler: LRScheduler) -> None:
        if not isinstance(scheduler, LRScheduler):
            raise UserError(f"SchedulerState takes a torch LRScheduler: it got a {type(scheduler).__name__}")
        self.scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state as JSON values and tensors."""
        state: dict[str, Any] = plain(self.scheduler.state_dict())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the scheduler's state.

        Raises:
            CheckpointError: the state belongs to another kind of scheduler.
        """
        stored = _unpacked(state)
        names = sorted(self.scheduler.state_dict().keys() ^ stored.keys())
        if names:
            raise CheckpointError(
                f"the checkpoint's scheduler is not a {type(self.scheduler).__name__}: {first_few(names)} differ; "
                "build the scheduler that the run was trained with"
            )
        self.scheduler.load_state_dict(stored)


def plain(value: Any) -> Any:
    """Return a value with Python's numbers and with string keys only. MultiStepLR has a Counter with int keys."""
    if isinstance(value, Counter) or (isinstance(value, dict) and not all(isinstance(key, str) for key in value)):
        return {"pairs": [[plain(key), plain(item)] for key, item in value.items()], "type": type(value).__name__}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    if isinstance(value, bool | torch.Tensor):
        return value
    if isinstance(value, Integral):  # also a number of numpy
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"pairs", "type"}:
        pairs = {key: _unpacked(item) for key, item in value["pairs"]}
        return Counter(pairs) if value["type"] == "Counter" else pairs
    if isinstance(value, dict):
        return {key: _unpacked(item) for key, item in value.items()}
    return type(value)(map(_unpacked, value)) if isinstance(value, list | tuple) else value
