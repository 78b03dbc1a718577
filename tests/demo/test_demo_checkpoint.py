"""The demo checkpoint loads as the real one does, is the same every time, and is never left half-built."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import soundfile
import torch
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    DacFeatureExtractor,
    HiggsAudioV2ForConditionalGeneration,
    HiggsAudioV2Processor,
)

from rawloop.demo import SPEECH
from rawloop.demo.checkpoint import (
    BUILDING,
    PARTS,
    SPECIAL_TOKENS,
    STAMP,
    build_demo_checkpoint,
    clear_leftovers,
    demo_is_built,
    put_in_place,
    read_split,
)
from rawloop.errors import UserError


@pytest.fixture(scope="module")
def model(demo_checkpoint: Path) -> HiggsAudioV2ForConditionalGeneration:
    return HiggsAudioV2ForConditionalGeneration.from_pretrained(demo_checkpoint / "model", use_text_head=True)


@pytest.fixture(scope="module")
def processor(demo_checkpoint: Path) -> HiggsAudioV2Processor:
    return AutoProcessor.from_pretrained(demo_checkpoint / "model")


def conversation(clip: object) -> list[dict[str, object]]:
    return [
        {"role": "system", "content": [{"type": "text", "text": "Generate audio following instruction."}]},
        {"role": "user", "content": [{"type": "text", "text": "The boats come home at dusk."}]},
        {"role": "assistant", "content": [{"type": "audio", "audio": clip}]},
    ]


def test_model_loads_by_path_in_float32_with_its_text_head(model: HiggsAudioV2ForConditionalGeneration) -> None:
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.text_lm_head is not None
    assert model.config.codebook_size == 1026
    assert model.config.num_codebooks == 8
    assert 3e6 < sum(parameter.numel() for parameter in model.parameters()) < 6e6


def test_ids_of_the_config_are_those_of_the_tokenizer(
    model: HiggsAudioV2ForConditionalGeneration, processor: HiggsAudioV2Processor
) -> None:
    config, tokenizer = model.config, processor.tokenizer
    names = {
        "<|AUDIO_OUT|>": config.audio_token_id,
        "<|audio_out_bos|>": config.audio_bos_token_id,
        "<|reserved_special_token_6|>": config.audio_delay_token_id,
        "<|begin_of_text|>": config.bos_token_id,
        "<|eot_id|>": config.eos_token_id,
        "<|end_of_text|>": config.pad_token_id,
    }
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in names} == names
    assert tokenizer.pad_token_id == config.pad_token_id
    assert len(tokenizer) == config.vocab_size


def test_generation_config_has_what_generate_reads(model: HiggsAudioV2ForConditionalGeneration) -> None:
    config = model.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        model.config.bos_token_id,
        model.config.eos_token_id,
        model.config.pad_token_id,
    )
    assert (config.ras_win_len, config.ras_win_max_num_repeat, config.use_text_head) == (7, 2, True)


def test_tokenizer_returns_every_text_and_keeps_special_tokens_whole(demo_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint / "model")
    for text in ["Hello, world!", *(text for split in ("train", "eval") for text, _ in read_split(SPEECH / split))]:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id  # as the real tokenizer does: a trap for who encodes in pieces
        assert tokenizer.decode(ids[1:]) == text
    assert all(len(tokenizer(token, add_special_tokens=False).input_ids) == 1 for token in SPECIAL_TOKENS)
    assert set(SPECIAL_TOKENS) <= set(tokenizer.all_special_tokens)


def test_processor_finds_the_codec_and_turns_a_clip_into_delayed_codes(
    demo_checkpoint: Path, processor: HiggsAudioV2Processor
) -> None:
    assert processor.audio_tokenizer.name_or_path == str(demo_checkpoint / "codec")
    clip, _ = soundfile.read(SPEECH / "eval" / "eval-en-01.flac", dtype="float32")
    with torch.no_grad():
        inputs = processor.apply_chat_template(
            conversation(clip), tokenize=True, return_dict=True, processor_kwargs={"return_tensors": "pt"}
        )
        codes = processor.audio_tokenizer.encode(torch.from_numpy(clip)[None, None]).audio_codes[0].T
    frames = len(codes) + 2 + 7  # begin and end of the stream, and the delay of the last codebook
    assert inputs["audio_input_ids"].shape == (1, frames, 8)
    for book in range(8):
        row = inputs["audio_input_ids"][0, :, book]
        assert torch.equal(row[book + 1 : book + 1 + len(codes)], codes[:, book])
        assert (row[: book + 1] == 1024).all()
        assert (row[book + 1 + len(codes) :] == 1025).all()
    ids = inputs["input_ids"][0]
    assert (ids == processor.audio_token_id).sum() == frames - 7
    assert (ids == processor.audio_delay_token_id).sum() == 7
    assert (ids == processor.tokenizer.bos_token_id).sum() == 1


def test_model_generates_and_the_processor_decodes(
    model: HiggsAudioV2ForConditionalGeneration, processor: HiggsAudioV2Processor
) -> None:
    turns = conversation(None)[:2]
    inputs = processor.apply_chat_template(
        turns,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt"},
    )
    with torch.no_grad():
        made = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert made.shape == (1, 24, 8)
    assert processor.decode(made).ndim == 1


def test_feature_extractor_loads_from_the_model_folder(demo_checkpoint: Path) -> None:
    assert DacFeatureExtractor.from_pretrained(demo_checkpoint / "model").sampling_rate == 24_000


@pytest.fixture(scope="module")
def built_again(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build over the rest of a checkpoint whose weights are gone, beside a file of somebody else."""
    folder = tmp_path_factory.mktemp("again")
    (folder / "model").mkdir()
    shutil.copy(demo_checkpoint / "model" / "demo.json", folder / "model")
    (folder / "notes.txt").write_text("keep me")
    assert not demo_is_built(folder)
    before = torch.random.get_rng_state()
    torch.set_num_threads(2)  # the number of threads makes no difference, and is left as it was
    build_demo_checkpoint(folder, SPEECH)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == 2
    return folder


@pytest.mark.slow
def test_built_again_it_is_the_same_to_the_byte(demo_checkpoint: Path, built_again: Path) -> None:
    for name in ("codec/model.safetensors", "model/model.safetensors", "model/tokenizer.json", "model/config.json"):
        assert (built_again / name).read_bytes() == (demo_checkpoint / name).read_bytes()
    assert sorted(path.name for path in built_again.iterdir()) == ["codec", "model", "notes.txt"]


def test_is_built_means_complete_and_in_its_place(demo_checkpoint: Path, tmp_path: Path) -> None:
    assert demo_is_built(demo_checkpoint)
    assert not demo_is_built(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(demo_checkpoint, copy)
    assert not demo_is_built(copy)  # its processor would look for the codec in the old place


@pytest.mark.parametrize("damage", ["model/model.safetensors", "codec/config.json", "model/demo.json"])
def test_a_damaged_checkpoint_is_not_built(built_again: Path, damage: str) -> None:
    path, aside = built_again / damage, built_again / "aside"
    path.rename(aside)
    try:
        assert not demo_is_built(built_again)
        path.write_bytes(aside.read_bytes()[:-1])
        assert not demo_is_built(built_again)
    finally:
        aside.replace(path)
    assert demo_is_built(built_again)


def test_somebody_elses_model_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="model is no demo checkpoint and is not overwritten"):
        build_demo_checkpoint(tmp_path, SPEECH)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "config.json"]


def test_speech_without_metadata_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train/metadata\.json is missing"):
        build_demo_checkpoint(tmp_path / "demo", tmp_path)
    assert not (tmp_path / "demo").exists()


def finished(workplace: Path, size: int) -> Path:
    """Parts as a builder leaves them before they get their names."""
    for part in PARTS:
        (workplace / part).mkdir(parents=True)
        for number in range(3):
            (workplace / part / f"{number}.bin").write_bytes(bytes(size))
    return workplace


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("moment", range(1, 6))
def test_killed_while_the_parts_get_their_names(moment: int, tmp_path: Path) -> None:
    """Killed at each rename and once behind the last: parts are whole or not there, and the next build goes through."""
    put_in_place(finished(tmp_path / "first", 10), tmp_path)
    assert demo_is_built(tmp_path)

    def build() -> None:
        rename, calls = Path.rename, 0

        def killed(self: Path, target: Path) -> Path:
            nonlocal calls
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, target)

        Path.rename = killed  # type: ignore[method-assign, assignment]
        put_in_place(finished(tmp_path / f"{BUILDING}{os.getpid()}-x", 20), tmp_path)

    process = multiprocessing.get_context("fork").Process(target=build)
    process.start()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if moment < 5 else 0)
    assert demo_is_built(tmp_path) == (moment in (1, 3, 5))  # one recipe makes the same parts each time
    assert all((tmp_path / part / STAMP).is_file() for part in PARTS if (tmp_path / part).exists())
    clear_leftovers(tmp_path)
    assert not list(tmp_path.glob(f"{BUILDING}*"))
    put_in_place(finished(tmp_path / f"{BUILDING}{os.getpid()}-y", 30), tmp_path)
    assert demo_is_built(tmp_path)
    clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.glob(f"{BUILDING}*")] == [f"{BUILDING}{os.getpid()}-y"]  # of a living one
