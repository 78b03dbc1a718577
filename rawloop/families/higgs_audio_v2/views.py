"""Higgs Audio v2 for checks and for people: tokens that must be learnt, an example in pieces, changed inputs."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from rawloop.contracts import IGNORE, Batch, Perturbed, Piece, Special
from rawloop.families.higgs_audio_v2.examples import Example
from rawloop.families.shared import perturbed, rows_of

TEXT_STOPS = ("<|audio_eos|>", "<|eot_id|>")


def special_targets(settings: Any, tokenizer: Any, streams: Sequence[str]) -> list[Special]:
    """Stop tokens, which must be learnt, and the tokens beside them that must not be, for the census to show."""
    said = ("assistant",)
    found = [
        Special("audio", "EOS", settings.audio_stream_eos_id, required=True, roles=said),
        Special("audio", "BOS", settings.audio_stream_bos_id, required=False),
    ]
    if "text" in streams:
        ids = zip(TEXT_STOPS, map(tokenizer.convert_tokens_to_ids, TEXT_STOPS), strict=True)
        found += [Special("text", name, number, required=True, roles=said) for name, number in ids]
        delay = settings.audio_delay_token_id
        found.append(Special("text", tokenizer.convert_ids_to_tokens(delay), delay, required=False))
    return found


def pieces(example: Example, settings: Any, tokenizer: Any, streams: Sequence[str]) -> list[Piece]:
    """Cut an example where the role or the stream changes, or learning begins or ends."""
    ids = example.input_ids.tolist()
    audio = _placeholders(example.input_ids, settings).tolist()
    learnt = ((example.labels != IGNORE) & ("text" in streams)).tolist()
    keys = list(zip(_roles(ids, tokenizer), audio, learnt, strict=True))
    found: list[Piece] = []
    frame = 0
    for (role, is_audio, is_learnt), run in groupby(range(len(ids)), key=keys.__getitem__):
        places = list(run)
        count = len(places)
        if is_audio:
            targets = int((example.audio_labels[frame : frame + count] != IGNORE).sum())
            frame += count
            text = f"clip of {count - 1 - settings.num_codebooks} frames"  # without BOS, EOS and the delay
            found.append(Piece(role, "audio", text, count, targets))
        else:
            text = tokenizer.decode(ids[places[0] : places[-1] + 1], skip_special_tokens=False)
            found.append(Piece(role, "text", text, count, count if is_learnt else 0))
    return found


def _roles(ids: list[int], tokenizer: Any) -> list[str]:
    """Return the role of every position; a scene stands inside the system turn."""
    names = ("<|start_header_id|>", "<|end_header_id|>", "<|scene_desc_start|>", "<|scene_desc_end|>")
    head, head_end, scene, scene_end = (tokenizer.convert_tokens_to_ids(name) for name in names)
    turn, role = "", ""
    roles: list[str] = []
    for place, token in enumerate(ids):
        if token == head:
            turn = role = tokenizer.decode(ids[place + 1 : ids.index(head_end, place)]).strip()
        elif token == scene:
            role = "scene"
        roles.append(role)
        if token == scene_end:
            role = turn
    first = next(filter(None, roles), "")
    return [role or first for role in roles]  # the token that begins a text stands before the first header


def perturb(batch: Batch, settings: Any) -> Perturbed:
    """Change every token and code from the middle of a stream's targets on, or before it; see `shared.perturbed`."""
    ids, frames, real = (batch.inputs[name] for name in ("input_ids", "audio_input_ids", "audio_input_ids_mask"))
    places, other_text = _placeholders(ids, settings), _other_text(ids, settings)
    size = settings.codebook_size
    codes = frames.new_full((ids.numel(), frames.shape[2]), IGNORE)
    codes[places.flatten()] = frames[real]

    def change(where: Tensor) -> dict[str, Tensor]:
        where, other = where.view_as(ids), frames.clone()
        # codes of changed placeholders, in the order in which the model fills them
        other[real] = torch.where(where[places][:, None], (frames[real] + size // 2) % size, frames[real])
        return {"input_ids": torch.where(where & ~places, other_text, ids), "audio_input_ids": other}

    return perturbed(batch, {"audio": codes, "text": ids.flatten()}, rows_of(ids), "tokens and codes", change)


def _placeholders(ids: Tensor, settings: Any) -> Tensor:
    return torch.eq(ids, settings.audio_token_id) | torch.eq(ids, settings.audio_delay_token_id)


def _other_text(ids: Tensor, settings: Any) -> Tensor:
    """Return another token for every one, no placeholder of audio, so that the batch keeps its shape."""
    size: int = settings.vocab_size
    other = (ids + 1) % size
    for _ in range(2):  # the placeholders may stand side by side
        other = torch.where(_placeholders(other, settings), (other + 1) % size, other)
    return other
