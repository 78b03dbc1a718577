"""`rawloop export RUN --output FOLDER`: a trained model as a folder that `from_pretrained` opens, with a model card."""

import sys
from os.path import expanduser
from pathlib import Path

from rawloop.cli import read_options
from rawloop.errors import UserError
from rawloop.files import readable

CARD = "README.md"


def run(argv: list[str]) -> None:
    """Write the model and its card; upload them if --push is given."""
    values = read_options("export", argv)
    output = Path(expanduser(values.output))

    from rawloop.card import model_card  # imports torch
    from rawloop.exporting import check_shareable, export_model, listed, push
    from rawloop.families import HUB_ID, read_json
    from rawloop.trained import find_trained

    if values.push and not HUB_ID.fullmatch(values.push):
        raise UserError(f"--push is '{values.push}', which is no repository of the hub: owner/name")
    trained = find_trained(values.run, values.checkpoint, values.adapter, values.model)

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


def _say(line: str) -> None:
    print(f"rawloop export: {line}", file=sys.stderr, flush=True)
