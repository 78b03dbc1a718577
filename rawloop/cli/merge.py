"""`rawloop merge`: merges a LoRA adapter into its base model in float32, and compares the logits before and after."""

import sys
from os.path import expanduser
from pathlib import Path

from rawloop.errors import UserError
from rawloop.exporting import export_model
from rawloop.families import ModelConfig
from rawloop.parser import Parser, add_options
from rawloop.trained import DTYPES, find_trained


def run(argv: list[str]) -> None:
    """Merge, compare, and write the merged model with the base model's other files. A failure leaves no files."""
    parser = Parser(prog="rawloop merge", description="Merge a LoRA adapter into its base model.")
    of_the_base = dict.fromkeys(("--base", "--base_model", "--model"), "--model.path")
    parser.meant = {"--checkpoint": "--adapter", "--config": "--adapter", **of_the_base}
    parser.add_argument("--adapter", type=str, required=True, help="folder with adapter_config.json")
    parser.add_argument("--output", type=str, required=True, help="folder for the merged model; must not exist yet")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="dtype of the written weights")
    add_options(parser, ModelConfig, "model")
    values = parser.read_options(argv)
    output = Path(expanduser(values.output))
    if output.exists():
        raise UserError(f"--output is '{output}', which exists: name a folder that does not")
    trained = find_trained(None, None, values.adapter, ModelConfig(**values.model.as_dict()))
    for line in export_model(trained, output, values.dtype, _say):
        print(line)


def _say(line: str) -> None:
    print(f"rawloop merge: {line}", file=sys.stderr, flush=True)
