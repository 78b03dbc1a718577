"""Speech of Higgs Audio v2: from a prompt to codes, by transformers' `generate`, and out of the delay pattern.

The processor's `batch_decode` turns a stop code that is left in the last frames into code 1023, which is heard as a
breath. Here a clip ends before its first frame with a marker in any codebook, and no marker is decoded.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rawloop.contracts import Sample
from rawloop.families.generating import generation_config, room
from rawloop.families.higgs_audio_v2.examples import Example, HiggsEncoder
from rawloop.family_protocols import Generated
from rawloop.losses import without_adapter
from rawloop.settings import SamplingConfig

# The settings of the authors' generation script. At a temperature of 0.3, as in their README, the stop token is hardly
# ever drawn.
DEFAULTS = {
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 0.95,
    "ras_win_len": 7,
    "ras_win_max_num_repeat": 2,
}


def speak(
    encoder: HiggsEncoder,
    model: nn.Module,
    samples: Sequence[Sample],
    codes: Callable[[Path], Tensor],
    limits: Sequence[int],
    sampling: SamplingConfig,
) -> list[Generated]:
    """Generate the last trained clip of each sample, in one batch; see `GeneratingFamily.generate`."""
    base, settings = without_adapter(model), encoder.settings
    prompts = []
    for sample in samples:
        with sample.named_in_errors():
            prompts.append(encoder.prompt(sample, codes))
            room(1, len(prompts[-1].input_ids), settings.max_position_embeddings)
    config = generation_config(base, sampling, DEFAULTS, [settings.eos_token_id])
    edges = settings.num_codebooks + 1  # BOS, EOS and the delay
    longest = max(len(prompt.input_ids) for prompt in prompts)
    config.max_new_tokens = room(max(limits) + edges, longest, settings.max_position_embeddings)
    inputs = {name: x.to(base.device) for name, x in _inputs(encoder, prompts).items()}
    with torch.no_grad():
        frames = base.generate(**inputs, generation_config=config).cpu()
    before = inputs["audio_input_ids"].shape[1] if "audio_input_ids" in inputs else 0
    found = []
    for sample, row, limit in zip(samples, frames[:, before:], limits, strict=True):
        spoken, stopped = undelayed(row, settings)
        stopped = stopped and len(spoken) <= limit
        found.append(Generated(sample.id, stopped, min(len(spoken), limit), codes=spoken[:limit]))
    return found


def _inputs(encoder: HiggsEncoder, prompts: Sequence[Example]) -> dict[str, Tensor]:
    """Pad prompts on the left. transformers takes no clips at all from a batch without references."""
    padded = encoder.pad(list(prompts), side="left")
    names = ["input_ids", "attention_mask"]
    if padded["audio_input_ids"].shape[1]:
        names += ["audio_input_ids", "audio_input_ids_mask"]
    return {name: padded[name] for name in names}


def undelayed(frames: Tensor, settings: Any) -> tuple[Tensor, bool]:
    """Take generated frames out of the delay pattern.

    Args:
        frames: (steps, codebooks) int64, from the frame with BOS in all codebooks on.
        settings: the model's config.

    Returns:
        the (frames, codebooks) codes before the first frame that has a marker or is incomplete, and whether that frame
        has a stop code.
    """
    codebooks = frames.shape[1]
    rows = max(0, len(frames) - codebooks)
    place = torch.arange(rows)[:, None] + torch.arange(codebooks) + 1
    codes = frames.gather(0, place)
    stops = (codes == settings.audio_stream_eos_id).any(1)
    marked = (stops | (codes >= settings.audio_stream_bos_id).any(1)).nonzero()
    end = int(marked[0]) if len(marked) else rows
    return codes[:end], bool(len(marked)) and bool(stops[end])
