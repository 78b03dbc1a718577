"""`rawloop export`: a folder that transformers opens and that says what the run says; nothing is pushed unasked."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, HiggsAudioV2ForConditionalGeneration, LlamaForCausalLM

from rawloop.cli import main

Door = Callable[..., Any]
Refusal = Callable[..., str]


@pytest.fixture(scope="module")
def exported(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported best checkpoint. Read it only."""
    folder = tmp_path_factory.mktemp("exported") / "voice"
    assert main(["export", str(demo_run), "--output", str(folder)]) == 0
    return folder


def test_transformers_opens_it_and_it_says_what_the_run_says(
    door: Door, demo_run: Path, exported: Path, tmp_path: Path
) -> None:
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(exported, use_text_head=True)
    assert model.dtype == torch.float32
    assert type(AutoProcessor.from_pretrained(exported)).__name__ == "HiggsAudioV2Processor"
    words = ("--text", "Hello.", "--device", "cpu", "--max_seconds", "0.4", "--scene", "A small room.")
    for name, place in {"run": demo_run, "export": exported}.items():
        assert door("generate", place, *words, "--output", tmp_path / f"{name}.wav").code == 0
    assert (tmp_path / "run.wav").read_bytes() == (tmp_path / "export.wav").read_bytes()


def test_the_card_tells_of_the_run_and_names_no_folder(demo_run: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text(encoding="utf-8")
    best = json.loads((demo_run / "best.json").read_text())
    assert "Fine-tuned with LoRA of rank 4 and alpha 8 on q_proj" in card
    for row in (
        f"| best eval_loss | {best['value']:.4f} at step 3 |",
        "| data.train | train: 8 samples, digest ",
        "| data.default_scene | A small room. |",
        f"| versions | rawloop 0.1.0, torch {torch.__version__}, ",
        "(frozen weights ",
        'HiggsAudioV2ForConditionalGeneration.from_pretrained("voice"',
    ):
        assert row in card, row
    assert str(demo_run.parent) not in card
    assert "base_model:" not in card  # it is no hub id


def test_a_dry_run_shows_what_a_push_would_upload_and_a_push_needs_the_hub(
    door: Door, refusal: Refusal, demo_run: Path, tmp_path: Path
) -> None:
    codec = ("--model.codec", "owner/codec")  # with the demo's own, a folder of this machine, it is refused
    asked = ("export", demo_run, "--dtype", "bfloat16", "--push", "owner/voice")
    assert "names its codec by a folder of this machine" in refusal(*asked, "--output", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    done = door(*asked, *codec, "--dry_run", "--output", tmp_path / "b")
    assert done.code == 0, done.err
    assert "--push would upload model.safetensors (" in done.out
    assert "pushed" not in done.out
    named = json.loads((tmp_path / "b" / "processor_config.json").read_text())["audio_tokenizer"]
    assert named["audio_tokenizer_name_or_path"] == "owner/codec"
    said = refusal(*asked, *codec, "--output", tmp_path / "c", code=1)  # offline, as all tests are
    assert said.startswith("--push owner/voice: the hub did not take it (")
    assert (tmp_path / "c" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_hub_that_is_not_reached_is_told_in_a_line(text_checkpoint: Path, tmp_path: Path) -> None:
    nobody = {
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_TOKEN": "none",
    }
    words = ["export", str(text_checkpoint), "--output", str(tmp_path / "out"), "--push", "owner/x"]
    command, environment = [sys.executable, "-m", "rawloop", *words], {**os.environ, **nobody}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert done.stderr.splitlines()[-1].startswith("rawloop export: --push owner/x: the hub did not take it (")
    assert (tmp_path / "out" / "README.md").is_file()


def test_a_model_that_was_trained_in_full_is_exported_with_its_tokenizer(
    door: Door, text_checkpoint: Path, text_data: Path, tmp_path: Path
) -> None:
    data = {f"data.{split}": text_data / f"{split}.jsonl" for split in ("train", "eval")}
    settings = {"model.path": text_checkpoint, "output": tmp_path / "run", "adapter.mode": "full", **data}
    settings |= {"device": "cpu", "train.max_steps": 1, "checks.expect_chance": True}
    assert door("train", *(f"--{key}={value}" for key, value in settings.items())).code == 0
    done = door("export", tmp_path / "run", "--checkpoint", "latest", "--output", tmp_path / "text")
    assert done.code == 0, done.err
    assert done.out.startswith(f"exported {tmp_path / 'run' / 'checkpoints' / 'step-00000001'}\n")
    weights = LlamaForCausalLM.from_pretrained(tmp_path / "text").state_dict()
    base = LlamaForCausalLM.from_pretrained(text_checkpoint).state_dict()
    assert any(not torch.equal(weights[name], base[name]) for name in base)
    assert "Fine-tuned in full, in float32." in (tmp_path / "text" / "README.md").read_text(encoding="utf-8")
    assert AutoTokenizer.from_pretrained(tmp_path / "text").chat_template


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("RUN", "--output", "EXISTS"), "which exists: name a folder that does not"),
        (
            ("RUN", "--output", "x", "--dtype", "int8"),
            "--dtype is 'int8': it must be one of 'float32', 'float16', 'bfloat16'",
        ),
        (
            ("RUN", "--output", "x", "--push", "voice"),
            "--push is 'voice', which is no repository of the hub: owner/name",
        ),
        (("RUN", "--output", "x", "--dry_run"), "--dry_run is given without --push"),
        (("RUN", "--output", "x", "--checkpoint", "nope"), "--checkpoint is 'nope', which is no checkpoint's folder"),
        (("--output", "x"), "name one model"),
    ],
)
def test_a_mistake_is_one_line(
    refusal: Refusal, demo_run: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    places = {"RUN": demo_run, "EXISTS": tmp_path}
    assert said in refusal("export", *(places.get(word, word) for word in words))
