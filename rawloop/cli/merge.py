"""`rawloop merge`: a LoRA adapter into its base model, in float32, with the logits compared before and after."""

import shutil
from pathlib import Path
from typing import Any

import torch

from rawloop.adapters import base_of, merge_adapter, write_model
from rawloop.audio import import_torchaudio
from rawloop.checkpoint import verify
from rawloop.checkpoint.manifest import NAME as MANIFEST
from rawloop.config import Parser, add_options
from rawloop.errors import RawloopError, UserError
from rawloop.families import ModelConfig, load_family, local_folder

BOUND = 1e-4  # of the largest logit; float32 rounding gives about 1e-6
KEPT = ["*.json", "*.jinja", "*.txt", "*.model"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def run(argv: list[str]) -> None:
    """Merge, compare, and write the merged model beside the base model's other files.

    Raises:
        CheckpointError: the adapter is a checkpoint's, which is damaged.
        RawloopError: the merged logits differ from those of base plus adapter by more than `BOUND`; nothing is written.
    """
    parser = Parser(prog="rawloop merge", description="Merge a LoRA adapter into its base model.")
    parser.meant = {"--checkpoint": "--adapter", "--config": "--adapter"}
    parser.add_argument("--adapter", type=str, required=True, help="folder with adapter_config.json")
    parser.add_argument("--output", type=str, required=True, help="folder for the merged model; must not exist yet")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="dtype of the written weights")
    add_options(parser, ModelConfig, "model")
    values = parser.parse_args(argv)
    adapter, output = Path(values.adapter).expanduser(), Path(values.output).expanduser()
    if output.exists():
        raise UserError(f"--output is '{output}', which exists: name a folder that does not")
    check_folder(adapter)
    if (adapter.parent / MANIFEST).exists():
        verify(adapter.parent)
    import_torchaudio()
    base, revision = base_of(adapter)
    path = values.model.path or base
    if not path:
        raise UserError(f"--adapter is '{adapter}', which does not name its base model: pass --model.path")
    chosen = {"path": path, "revision": values.model.revision or revision}
    config = ModelConfig(**{**values.model.as_dict(), **chosen})
    family = load_family(config)
    batch = family.probe()

    @torch.no_grad()
    def logits(model: torch.nn.Module) -> torch.Tensor:
        return torch.cat([rows.flatten() for rows in family.logits(model.eval(), batch).values()])

    merged, before, difference = merge_adapter(family.load_model().float(), adapter, logits)
    if not difference <= BOUND:
        raise RawloopError(
            f"the merged model's logits differ from base plus adapter by {difference:.1e} of the largest logit, "
            f"more than {BOUND:.0e}: nothing was written"
        )
    partial = _write(merged, output, DTYPES[values.dtype], config)
    stored = logits(family.load_model(str(partial)).float())
    rounding = float((stored - before).abs().max() / before.abs().max())
    if values.dtype == "float32" and not rounding <= BOUND:
        raise RawloopError(f"what was written to {partial} gives other logits ({rounding:.1e}): it is not to be used")
    partial.rename(output)
    print(f"merged {adapter} into {config.path}: logits differ by {difference:.1e} of the largest (bound {BOUND:.0e})")
    print(f"model: {output} ({values.dtype}; read back, its logits differ by {rounding:.1e})")


def check_folder(adapter: Path) -> None:
    """Refuse a folder beside the adapter's that people take for it, naming the right one.

    Raises:
        UserError: it is a checkpoint's or a run's folder, or holds a whole model.
    """
    if (adapter / "adapter_config.json").is_file():
        return
    for inside in ("adapter", "best/adapter"):
        if (adapter / inside / "adapter_config.json").is_file():
            raise UserError(
                f"--adapter is '{adapter}', which has no adapter_config.json: did you mean {adapter / inside}?"
            )
    for inside in (".", "model", "best/model"):
        if (adapter / inside / "config.json").is_file():
            raise UserError(
                f"--adapter is '{adapter}', and {adapter / inside} is a whole model already: it needs no merging, use "
                "it as it is"
            )


def _write(merged: Any, output: Path, dtype: torch.dtype, config: ModelConfig) -> Path:
    """Write the model under a temporary name, so that a half-written one is never found, and return its folder."""
    partial = output.with_name(f".tmp-{output.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_model(merged.to(dtype), partial)
        if Path(config.path).is_file():  # weights that a family of the user's own reads
            return partial
        # tokenizer, processor, chat template
        for file in sorted(local_folder(config.path, config.revision, KEPT).iterdir()):
            kept = any(file.match(pattern) for pattern in KEPT) and not file.name.endswith(".index.json")
            if kept and not (partial / file.name).exists():
                shutil.copy2(file, partial / file.name)
    except OSError as error:
        raise UserError(f"--output is '{output}', which cannot be written: {error.strerror or error}") from error
    return partial
