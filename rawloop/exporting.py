"""A trained model as a folder that `from_pretrained` opens: weights, tokenizer, processor and chat template."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rawloop.adapters.files import write_model
from rawloop.audio import import_torchaudio
from rawloop.errors import RawloopError, UserError
from rawloop.families import load_family, local_folder, read_json
from rawloop.families.config import ModelConfig
from rawloop.files import in_words, unfinished_folder
from rawloop.trained import BOUND, DTYPES, Say, Trained, load_trained, probe_logits

KEPT = ["*.json", "*.jinja", "*.txt", "*.model"]
PROCESSOR = "processor_config.json"


def export_model(
    trained: Trained, output: Path, dtype: str, say: Say, add: Callable[[Path], None] = lambda folder: None
) -> list[str]:
    """Write a trained model, read it back, and compare its logits. A failure leaves no files.

    Args:
        trained: the model. An adapter is merged into its base in float32.
        output: the folder, which must not exist.
        dtype: of the written weights: float32, float16 or bfloat16.
        say: gets a line if the base model could not be checked.
        add: writes more files into the folder, before it gets its name.

    Returns:
        lines about what was done.

    Raises:
        UserError: the folder exists or cannot be created, or the model cannot be loaded.
        RawloopError: it cannot be written, or the written model has other logits.
    """
    if output.exists():
        raise UserError(f"--output is '{output}', which exists: name a folder that does not")
    import_torchaudio()
    family = load_family(trained.model)
    logits = probe_logits(family)
    loaded = load_trained(trained, family, say)
    model: Any = loaded.model.float()
    before = loaded.logits if loaded.logits is not None or logits is None else logits(model)
    lines = [loaded.said or f"exported {trained.name}"]
    with _unfinished(output) as partial:
        write_model(model.to(DTYPES[dtype]), partial)
        _copy_others(partial, trained.model)
        back = f"its logits were not compared, as {type(family).__name__} has no `probe` or no `logits`"
        if logits is not None:
            assert before is not None
            stored = logits(family.load_model(str(partial)).float())
            rounding = float((stored - before).abs().max() / before.abs().max())
            if not rounding <= (BOUND if dtype == "float32" else 1.0):
                raise RawloopError(
                    f"the written model has other logits ({rounding:.1e} of the largest, in {dtype}): it was removed, "
                    "because it must not be used"
                )
            back = f"read back, its logits differ by {rounding:.1e}"
        add(partial)
        partial.rename(output)
    return [*lines, f"model: {output} ({dtype}; {back})"]


@contextmanager
def _unfinished(output: Path) -> Iterator[Path]:
    """Yield a folder with a temporary name, so nobody finds an incomplete one; it is removed if it was not renamed."""
    with unfinished_folder(output) as partial:
        try:
            yield partial
        except (OSError, SafetensorError) as error:
            raise RawloopError(f"--output is '{output}', which cannot be written: {in_words(error)}") from error


def _copy_others(partial: Path, config: ModelConfig) -> None:
    """Copy the base model's tokenizer, processor and chat template. The processor names the codec of `model.codec`."""
    if Path(config.path).is_file():  # weights in a single file, for a user's own family
        return
    for file in sorted(local_folder(config.path, config.revision, KEPT).iterdir()):
        kept = any(file.match(pattern) for pattern in KEPT) and not file.name.endswith(".index.json")
        if kept and not (partial / file.name).exists():
            shutil.copy2(file, partial / file.name)
    if config.codec and (partial / PROCESSOR).is_file():
        values = read_json(partial / PROCESSOR)
        if "audio_tokenizer" in values:
            values["audio_tokenizer"]["audio_tokenizer_name_or_path"] = config.codec
            (partial / PROCESSOR).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def check_shareable(folder: Path) -> None:
    """Refuse a model whose processor names its codec by a folder of this machine, which others do not have."""
    file = folder / PROCESSOR
    named = read_json(file).get("audio_tokenizer", {}) if file.is_file() else {}
    codec = str(named.get("audio_tokenizer_name_or_path") or "")
    if codec and Path(codec).is_dir():
        raise UserError(
            f"the processor names its codec by a folder of this machine, {codec}: pass --model.codec with the hub id "
            "of the codec, such as bosonai/higgs-audio-v2-tokenizer"
        )


def push(folder: Path, repository: str) -> str:
    """Upload a folder to a private repository of the Hugging Face hub, which is created if it does not exist.

    Raises:
        RawloopError: the hub cannot be reached, or refuses it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        found = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export")
    except Exception as error:  # its client has many, and those of its HTTP library
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RawloopError(
            f"--push {repository}: the hub did not take it ({reason}); {folder} is whole, `hf auth login` and then "
            f"`hf upload {repository} {folder}` uploads it"
        ) from error
    return str(found)


def listed(folder: Path) -> list[tuple[str, int]]:
    """Return the files of a folder, with their sizes in bytes."""
    return [(path.name, path.stat().st_size) for path in sorted(folder.iterdir())]
