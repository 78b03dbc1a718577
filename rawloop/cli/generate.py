"""`rawloop generate RUN --text "..." --output hello.wav`: hear what a trained model says, or read what it writes."""

import sys
from os.path import expanduser
from pathlib import Path

from rawloop.cli import read_options


def run(argv: list[str]) -> None:
    """Generate every prompt, write the clips, and print a line for each."""
    values = read_options("generate", argv)

    from rawloop.generation import Request, generate  # imports torch
    from rawloop.trained import find_trained

    trained = find_trained(values.run, values.checkpoint, values.adapter, values.model)
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
        sampling=values.sampling,
    )
    for line in generate(trained, request, _say):
        print(line, flush=True)


def _say(line: str) -> None:
    print(f"rawloop generate: {line}", file=sys.stderr, flush=True)
