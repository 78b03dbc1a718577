"""5,000 damaged inputs: no traceback, no hang, no silent drop. See `fuzz.py` for how, and `targets.py` for what."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

from rawloop.cli import main
from rawloop.data import DataConfig
from rawloop.data.codes import CodeCache
from rawloop.data.samples import read_samples
from rawloop.families import ModelConfig, load_family

SCRIPT = Path(__file__).with_name("fuzz.py")
AUDIO_CHAT = Path(__file__).parent.parent / "families" / "test_audio_chat.py"
INPUTS = {
    "records": 2100,
    "settings": 1200,
    "model": 600,
    "codec": 50,
    "adapter": 250,
    "cache": 500,
    "checkpoint": 300,
}


def build_chat(folder: Path) -> None:
    """Save a tiny Qwen2-Audio."""
    spec = importlib.util.spec_from_file_location("audio_chat_checkpoint", AUDIO_CHAT)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer = module.build_tokenizer()
    Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=16, chunk_length=4), tokenizer).save_pretrained(folder)
    encoder = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    config = Qwen2AudioConfig(
        audio_config={"num_mel_bins": 16, "max_source_positions": 200, **encoder},
        text_config=module.text_config(tokenizer, "qwen2"),
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
        dtype="float32",
    )
    Qwen2AudioForConditionalGeneration(config).save_pretrained(folder)


def build_base(base: Path, text: Path, text_data: Path, demo: Path, data: Path) -> None:
    """Put what is to be damaged into a folder: models, a codec, data, a cache of codes, and a run with its adapter."""
    build_chat(base / "chat")
    for name, source in (("text", text), ("text_data", text_data), ("data", data)):
        (base / name).symlink_to(source)
    (base / "higgs").symlink_to(demo / "model")
    (base / "codec").symlink_to(demo / "codec")
    config = {
        "output": str(base / "run"),
        "device": "cpu",
        "model": {"path": str(base / "text")},
        "adapter": {"rank": 2, "alpha": 4.0},
        "data": {split: str(base / "text_data" / f"{split}.jsonl") for split in ("train", "eval")},
        "train": {"batch_size": 2, "max_steps": 2, "log_every": 1},
        "evaluation": {"every": 1},
        "checkpoint": {"save_every": 1},
        "checks": {"expect_chance": True},
        "records": {"progress": False},
    }
    (base / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", "--config", str(base / "run.yaml")]) == 0
    (base / "adapter").symlink_to(base / "run" / "checkpoints" / "step-00000002" / "adapter")
    family: Any = load_family(ModelConfig(path=str(base / "higgs")))
    (base / "codec_hash").write_text(family.codec_hash())
    # Without the indexes of the runs of other tests: damage to these is no damage to the codes.
    shutil.copytree(data / "codes", base / "codes", ignore=shutil.ignore_patterns("index"))
    cache = CodeCache(data / "codes", family.codec_hash(), DataConfig())
    paths = [path for sample in read_samples(base / "data" / "train") for path in sample.audio_paths()]
    torch.save({str(path): cache(path) for path in paths}, base / "codes.pt")


@pytest.fixture(scope="module")
def base(
    tmp_path_factory: pytest.TempPathFactory,
    text_checkpoint: Path,
    text_data: Path,
    demo_checkpoint: Path,
    demo_data: Path,
) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    build_base(folder, text_checkpoint, text_data, demo_checkpoint, demo_data)
    return folder


def fuzz(kind: str, first: int, last: int, base: Path) -> dict[str, Any]:
    """Feed the inputs of these numbers, in a process of its own."""
    words = [sys.executable, str(SCRIPT), kind, "seed", str(first), str(last), str(base)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert sum(found["counts"].values()) == last - first
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", INPUTS)
def test_no_damage_ends_in_a_traceback_a_hang_or_a_silent_drop(base: Path, kind: str) -> None:
    found = fuzz(kind, 0, INPUTS[kind], base)
    told = "\n\n".join(f"{failure['input']}: {failure['said']}" for failure in found["failures"][:5])
    assert not found["failures"], f"{len(found['failures'])} failures, the first:\n{told}"
    assert found["counts"]["refused"] > 0.2 * INPUTS[kind] or kind == "settings", found["counts"]
