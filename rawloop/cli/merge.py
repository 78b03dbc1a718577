"""`rawloop merge`: a LoRA adapter into its base model, in float32, with the logits compared before and after."""

import shutil
from pathlib import Path
from typing import Any

import torch

from rawloop.adapters import base_of, merge_adapter
from rawloop.config import Parser, add_options
from rawloop.data.audio import import_torchaudio
from rawloop.errors import RawloopError, UserError
from rawloop.families import ModelConfig, load_family

BOUND = 1e-4  # of the largest logit; float32 rounding gives about 1e-6
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def run(argv: list[str]) -> None:
    """Merge, compare, and write the merged model beside the base model's other files.

    Raises:
        RawloopError: the merged logits differ from those of base plus adapter by more than `BOUND`; nothing is written.
    """
    parser = Parser(prog="rawloop merge", description="Merge a LoRA adapter into its base model.")
    parser.add_argument("--adapter", type=str, required=True, help="folder with adapter_config.json")
    parser.add_argument("--output", type=str, required=True, help="folder for the merged model; must not exist yet")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="dtype of the written weights")
    add_options(parser, ModelConfig, "model")
    values = parser.parse_args(argv)
    adapter, output = Path(values.adapter).expanduser(), Path(values.output).expanduser()
    if output.exists():
        raise UserError(f"--output is '{output}', which exists: name a folder that does not")
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(
            f"--adapter is '{adapter}', which has no adapter_config.json: give a checkpoint's adapter folder"
        )
    import_torchaudio()
    config = ModelConfig(**{**values.model.as_dict(), "path": values.model.path or base_of(adapter)})
    family = load_family(config)
    batch = family.probe()

    def logits(model: torch.nn.Module) -> torch.Tensor:
        return torch.cat([rows.flatten() for rows in family.logits(model.eval(), batch).values()])

    merged, difference = merge_adapter(family.load_model().float(), adapter, logits)
    if not difference <= BOUND:
        raise RawloopError(
            f"the merged model's logits differ from base plus adapter by {difference:.1e} of the largest logit, "
            f"more than {BOUND:.0e}: nothing was written"
        )
    _write(merged, output, DTYPES[values.dtype], config.path)
    print(f"merged {adapter} into {config.path}: logits differ by {difference:.1e} of the largest (bound {BOUND:.0e})")
    print(f"model: {output} ({values.dtype})")


def _write(merged: Any, output: Path, dtype: torch.dtype, base: str) -> None:
    """Write the model under a temporary name and rename it, so that a half-written one is never found."""
    partial = output.with_name(f".tmp-{output.name}")
    shutil.rmtree(partial, ignore_errors=True)
    merged.to(dtype).save_pretrained(partial)
    for file in sorted(_folder(base).iterdir()):  # tokenizer, processor, chat template
        kept = file.suffix in (".json", ".jinja", ".txt", ".model") and not file.name.endswith(".index.json")
        if kept and not (partial / file.name).exists():
            shutil.copy2(file, partial / file.name)
    partial.rename(output)


def _folder(base: str) -> Path:
    if Path(base).expanduser().is_dir():
        return Path(base).expanduser()
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(base, ignore_patterns=["*.safetensors", "*.bin"]))
