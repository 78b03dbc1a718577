"""`rawloop merge`: merges a LoRA adapter into its base model in float32, and compares the logits before and after."""

import sys
from os.path import expanduser
from pathlib import Path

from rawloop.cli import read_options
from rawloop.errors import UserError
from rawloop.exporting import export_model
from rawloop.trained import find_trained


def run(argv: list[str]) -> None:
    """Merge, compare, and write the merged model with the base model's other files. A failure leaves no files."""
    values = read_options("merge", argv)
    output = Path(expanduser(values.output))
    if output.exists():
        raise UserError(f"--output is '{output}', which exists: name a folder that does not")
    trained = find_trained(None, None, values.adapter, values.model)
    for line in export_model(trained, output, values.dtype, _say):
        print(line)


def _say(line: str) -> None:
    print(f"rawloop merge: {line}", file=sys.stderr, flush=True)
