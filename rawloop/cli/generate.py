"""`rawloop generate RUN --text "..." --output hello.wav`: hear what a trained model says, or read what it writes."""

import sys
from os.path import expanduser
from pathlib import Path
from typing import Any

from rawloop.errors import UserError
from rawloop.families.config import ModelConfig
from rawloop.parser import Parser, add_options
from rawloop.settings import SamplingConfig


def run(argv: list[str]) -> None:
    """Generate every prompt, write the clips, and print a line for each."""
    values = _parser().read_options(argv)
    _check(values)
    model, sampling = ModelConfig(**values.model.as_dict()), SamplingConfig(**values.sampling.as_dict())

    from rawloop.generation import Request, generate  # imports torch
    from rawloop.trained import find_trained

    trained = find_trained(values.run, values.checkpoint, values.adapter, model)
    request = Request(
        texts=[values.text] if values.text else [],
        lines=Path(expanduser(values.lines)) if values.lines else None,
        output=Path(expanduser(values.output)) if values.output else None,
        reference=Path(expanduser(values.reference)) if values.reference else None,
        reference_text=values.reference_text,
        scene=values.scene,
        max_seconds=values.max_seconds,
        max_tokens=values.max_tokens,
        batch_size=values.batch_size,
        seed=values.seed,
        device=values.device,
        dtype=values.dtype,
        sampling=sampling,
    )
    for line in generate(trained, request, _say):
        print(line, flush=True)


def _parser() -> Parser:
    parser = Parser(prog="rawloop generate", description="Hear what a trained model says, or read what it writes.")
    parser.meant = {"--prompt": "--text", "--ref_audio": "--reference", "--base": "--model.path"}
    add = parser.add_argument
    add("run", type=str, nargs="?", help="folder of a run, checkpoint, adapter or model, or a hub id")
    add("--text", type=str, help="what to say")
    add("--lines", type=str, help="a file with a text on each line; or with records as in data.train (.jsonl, .json)")
    add("--output", type=str, help="the wav file, or for --lines a folder; for text a file (default: print it)")
    add("--checkpoint", type=str, help="best, latest or a checkpoint's folder of the run (default: best)")
    add("--adapter", type=str, help="folder with adapter_config.json, in place of a run")
    add("--reference", type=str, help="a clip whose voice speaks; or, for models that hear, what they hear")
    add("--reference_text", type=str, help="the words of the reference clip")
    add("--scene", type=str, help="the scene, such as quiet_room or a sentence (default: that of the training)")
    add("--max_seconds", type=float, default=30.0, help="the longest clip, in seconds")
    add("--max_tokens", type=int, default=256, help="the longest text, in tokens")
    add("--batch_size", type=int, default=8, help="prompts that are spoken at a time")
    add("--seed", type=int, default=0, help="seed of the sampling; the same prompts and seed give the same result")
    add("--device", type=str, default="auto", help="auto, cuda, mps or cpu")
    add("--dtype", type=str, default="auto", help="float32, float16 or bfloat16 (auto: as stored, on the CPU float32)")
    add_options(parser, SamplingConfig, "sampling")
    add_options(parser, ModelConfig, "model")
    return parser


def _check(values: Any) -> None:
    if bool(values.text) == bool(values.lines):
        raise UserError("give --text, or --lines with a file of texts")
    if values.scene and values.lines:
        raise UserError("--scene is given with --lines: write the records of a .jsonl file, each with its scene")
    if values.reference_text and not values.reference:
        raise UserError("--reference_text is given without --reference: name the clip that speaks these words")
    for name in ("max_seconds", "max_tokens", "batch_size"):
        if not 0 < getattr(values, name) < 1e9:
            raise UserError(f"--{name} is {getattr(values, name)}: it must be above 0")


def _say(line: str) -> None:
    print(f"rawloop generate: {line}", file=sys.stderr, flush=True)
