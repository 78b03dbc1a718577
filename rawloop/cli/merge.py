"""`rawloop merge`: merges a LoRA adapter into its base model in float32, and compares the logits before and after."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rawloop.adapters.files import write_model
from rawloop.adapters.merge import base_of, load_base, merge_adapter
from rawloop.audio import import_torchaudio
from rawloop.checkpoint.slots import MANIFEST, verify
from rawloop.contracts import has
from rawloop.errors import RawloopError, UserError
from rawloop.families import ModelConfig, load_family, local_folder
from rawloop.files import in_words
from rawloop.parser import Parser, add_options

BOUND = 1e-4  # of the largest logit; float32 rounding gives about 1e-6
KEPT = ["*.json", "*.jinja", "*.txt", "*.model"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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
    adapter, output = Path(expanduser(values.adapter)), Path(expanduser(values.output))
    if output.exists():
        raise UserError(f"--output is '{output}', which exists: name a folder that does not")
    slot = adapter.resolve().parent
    if (slot / MANIFEST).exists():
        verify(slot)
    import_torchaudio()
    base, revision = base_of(adapter)
    path = values.model.path or base
    if not path:
        raise UserError(f"--adapter is '{adapter}', which does not name its base model: pass --model.path")
    chosen = {"path": path, "revision": values.model.revision or revision}
    config = ModelConfig(**{**values.model.as_dict(), **chosen})
    family = load_family(config)
    compared = has(family, "probe", "logits")
    batch = family.probe() if compared else None

    @torch.no_grad()
    def logits(model: torch.nn.Module) -> torch.Tensor:
        if batch is None:
            return torch.ones(1)  # compares as equal
        return torch.cat([rows.flatten() for rows in family.logits(model.eval(), batch).values()])

    base_model, said = load_base(adapter, family.load_model, path, chosen["revision"])
    if said:
        print(f"rawloop merge: {said}", file=sys.stderr, flush=True)
    merged, before, difference = merge_adapter(base_model.float(), adapter, logits)
    if not difference <= BOUND:
        raise RawloopError(
            f"the merged model's logits differ from base plus adapter by {difference:.1e} of the largest logit, "
            f"more than {BOUND:.0e}: nothing was written"
        )
    with _unfinished(output) as partial:
        _write(merged, partial, DTYPES[values.dtype], config)
        stored = logits(family.load_model(str(partial)).float())
        rounding = float((stored - before).abs().max() / before.abs().max())
        if not rounding <= (BOUND if values.dtype == "float32" else 1.0):
            raise RawloopError(
                f"the written model has other logits ({rounding:.1e} of the largest, in {values.dtype}): it was "
                "removed, because it must not be used"
            )
        partial.rename(output)
    said = f"logits differ by {difference:.1e} of the largest (bound {BOUND:.0e})"
    back = f"read back, its logits differ by {rounding:.1e}"
    if not compared:
        said = back = f"its logits were not compared, as {type(family).__name__} has no `probe` or no `logits`"
    print(f"merged {adapter} into {config.path}: {said}")
    print(f"model: {output} ({values.dtype}; {back})")


@contextmanager
def _unfinished(output: Path) -> Iterator[Path]:
    """Yield a folder with a temporary name, so nobody finds an incomplete one; it is removed if it was not renamed."""
    partial = output.with_name(f".tmp-{output.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output is '{output}', which cannot be created: {error.strerror}") from error
    try:
        yield partial
    except (OSError, SafetensorError) as error:
        raise RawloopError(f"--output is '{output}', which cannot be written: {in_words(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(merged: Any, partial: Path, dtype: torch.dtype, config: ModelConfig) -> None:
    """Write the model, and the base model's tokenizer, processor and chat template."""
    write_model(merged.to(dtype), partial)
    if Path(config.path).is_file():  # weights in a single file, for a user's own family
        return
    for file in sorted(local_folder(config.path, config.revision, KEPT).iterdir()):
        kept = any(file.match(pattern) for pattern in KEPT) and not file.name.endswith(".index.json")
        if kept and not (partial / file.name).exists():
            shutil.copy2(file, partial / file.name)
