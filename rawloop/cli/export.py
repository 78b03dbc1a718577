"""`rawloop export RUN --output FOLDER`: a trained model as a folder that `from_pretrained` opens, with a model card."""

import sys
from os.path import expanduser
from pathlib import Path

from rawloop.errors import UserError
from rawloop.families.config import ModelConfig
from rawloop.files import readable
from rawloop.parser import Parser, add_options

CARD = "README.md"


def run(argv: list[str]) -> None:
    """Write the model and its card; upload them if --push is given."""
    values = _parser().read_options(argv)
    if values.dry_run and not values.push:
        raise UserError("--dry_run is given without --push: it shows what --push would upload")
    output = Path(expanduser(values.output))

    from rawloop.card import model_card  # imports torch
    from rawloop.exporting import check_shareable, export_model, listed, push
    from rawloop.families import HUB_ID, read_json
    from rawloop.trained import DTYPES, find_trained

    if values.dtype not in DTYPES:
        raise UserError(f"--dtype is '{values.dtype}': it must be one of {', '.join(DTYPES)}")
    if values.push and not HUB_ID.fullmatch(values.push):
        raise UserError(f"--push is '{values.push}', which is no repository of the hub: owner/name")
    trained = find_trained(values.run, values.checkpoint, values.adapter, ModelConfig(**values.model.as_dict()))

    def add(folder: Path) -> None:
        settings = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        kind = (settings.get("architectures") or ["AutoModel"])[0]
        name = values.push or output.name
        (folder / CARD).write_text(model_card(trained, name, values.dtype, kind), encoding="utf-8")
        if values.push:
            check_shareable(folder)

    for line in export_model(trained, output, values.dtype, _say, add):
        print(line, flush=True)
    print(f"card:  {output / CARD}", flush=True)
    if values.dry_run:
        for file, size in listed(output):
            print(f"--push would upload {file} ({readable(size)}) to {values.push}", flush=True)
    elif values.push:
        print(f"pushed: {push(output, values.push)}", flush=True)


def _parser() -> Parser:
    parser = Parser(prog="rawloop export", description="Write a trained model as a folder that transformers opens.")
    parser.meant = {"--base": "--model.path", "--hub": "--push"}
    add = parser.add_argument
    add("run", type=str, nargs="?", help="folder of a run, checkpoint, adapter or model")
    add("--output", type=str, required=True, help="the folder; must not exist yet")
    add("--checkpoint", type=str, help="best, latest or a checkpoint's folder of the run (default: best)")
    add("--adapter", type=str, help="folder with adapter_config.json, in place of a run")
    add("--dtype", type=str, default="float32", help="dtype of the written weights: float32, float16 or bfloat16")
    add("--push", type=str, help="upload the folder to this private repository of the hub (owner/name)")
    add("--dry_run", action="store_true", help="write the folder, and only show what --push would upload")
    add_options(parser, ModelConfig, "model")
    return parser


def _say(line: str) -> None:
    print(f"rawloop export: {line}", file=sys.stderr, flush=True)
