"""Generation with transformers' own `generate`, for the families of its models."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rawloop.contracts import Sample
from rawloop.errors import UserError
from rawloop.family_protocols import Generated
from rawloop.losses import without_adapter
from rawloop.settings import SamplingConfig

# transformers' names -> ours
NAMES = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "ras_win_len": "ras_window",
    "ras_win_max_num_repeat": "ras_repeats",
}


def generation_config(model: Any, sampling: SamplingConfig, defaults: Mapping[str, Any], stops: Sequence[int]) -> Any:
    """Return a copy of a model's generation config with the settings of `sampling`.

    `defaults` hold, by transformers' names, for what neither of them sets. `stops` are the ids of tokens that end a
    turn, besides those of the model.
    """
    config = copy.deepcopy(model.generation_config)
    for name, value in defaults.items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    for name, ours in NAMES.items():
        if (value := getattr(sampling, ours)) is not None:
            setattr(config, name, value)
    if sampling.temperature is not None:
        config.do_sample = sampling.temperature > 0
    if not config.do_sample:  # greedy search reads none of these, and transformers warns of them
        config.temperature = config.top_k = config.top_p = None
    if getattr(config, "ras_win_len", None) == 0:
        # transformers would put the model's own setting in place of None; in one frame nothing is drawn twice
        config.ras_win_len, config.ras_win_max_num_repeat = 1, 2
    own = config.eos_token_id
    config.eos_token_id = sorted({*stops, *([own] if isinstance(own, int) else own or ())})
    config.pad_token_id = config.eos_token_id[0] if config.pad_token_id is None else config.pad_token_id
    config.max_length = None  # max_new_tokens is the limit
    return config


def room(limit: int, prompt: int, positions: int | None) -> int:
    """Return how many positions may be generated after a prompt, at most `limit`.

    Raises:
        UserError: the model has no position left.
    """
    if positions is not None and prompt >= positions:
        raise UserError(
            f"the prompt takes {prompt} positions, the model has {positions}: shorten its text or its reference clips"
        )
    return limit if positions is None else min(limit, positions - prompt)


def generate_text(
    model: nn.Module,
    samples: Sequence[Sample],
    encode: Callable[[Sample], dict[str, Tensor]],
    tokenizer: Any,
    stops: Sequence[int],
    positions: int | None,
    limits: Sequence[int],
    sampling: SamplingConfig,
) -> list[Generated]:
    """Generate text for one sample after the other. `encode` returns the inputs of a prompt, in a batch of one."""
    base = without_adapter(model)
    settings = generation_config(base, sampling, {}, stops)
    found = []
    for sample, limit in zip(samples, limits, strict=True):
        with sample.named_in_errors():
            inputs = encode(sample)
            length = inputs["input_ids"].shape[1]
            settings.max_new_tokens = room(limit, length, positions)
        inputs = {n: x.to(base.device, base.dtype if x.is_floating_point() else None) for n, x in inputs.items()}
        with torch.no_grad():
            tokens = base.generate(**inputs, generation_config=settings)[0, length:].tolist()
        stopped = bool(tokens) and tokens[-1] in settings.eos_token_id
        tokens = tokens[:-1] if stopped else tokens
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        found.append(Generated(sample.id, stopped, len(tokens), text=text))
    return found
