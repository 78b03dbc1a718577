"""The demo checkpoint: a small Higgs Audio v2 with random weights, in the layout of the real checkpoint.

The quickstart and the tests load it by path, through the same code as `bosonai/higgs-audio-v2-generation-3B-base`:
model, tokenizer, processor with chat template, and codec.
"""

import json
import math
import os
import shutil
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    DacConfig,
    DacFeatureExtractor,
    GenerationConfig,
    HiggsAudioV2Config,
    HiggsAudioV2ForConditionalGeneration,
    HiggsAudioV2Processor,
    HiggsAudioV2TokenizerConfig,
    HiggsAudioV2TokenizerModel,
    HubertConfig,
    PreTrainedTokenizerFast,
)

from rawloop.demo.codec import fit_codec, one_thread
from rawloop.errors import UserError
from rawloop.files import sha256_files

STAMP = "demo.json"
PARTS = ("codec", "model")
BUILDING = ".building-"
SAMPLE_RATE = 24_000
RATIOS = (8, 5, 4, 2, 3)  # 960 samples per frame: 25 frames per second
CODEBOOKS, CODES = 8, 1024
MERGES = 512
BOS, EOS, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
AUDIO_BOS, AUDIO, DELAY = "<|audio_out_bos|>", "<|AUDIO_OUT|>", "<|reserved_special_token_6|>"
SPECIAL_TOKENS = (
    *(BOS, EOS, "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", EOT),
    *("<|audio_bos|>", "<|audio_eos|>", AUDIO_BOS, DELAY, "<|AUDIO|>", AUDIO),
    *("<|scene_desc_start|>", "<|scene_desc_end|>"),
)


def build_demo_checkpoint(folder: Path, speech: Path, seed: int = 0) -> None:
    """Write `folder/model` and `folder/codec`, fitted on `speech/train`. Other files in `folder` are not changed.

    Both are renamed into place when they are complete. On one machine, the same seed gives the same safetensors byte
    for byte. The processor finds the codec by its absolute path: build again after moving the folder. Raises UserError
    if the model or codec in `folder` is not from the demo.
    """
    folder = folder.resolve()
    for part in PARTS:
        if (folder / part).exists() and not (folder / part / STAMP).is_file():
            raise UserError(f"{folder / part} is no demo checkpoint and is not overwritten: name another folder")
    train = read_split(speech / "train")
    folder.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder)
    with tempfile.TemporaryDirectory(prefix=f"{BUILDING}{os.getpid()}-", dir=folder) as building:
        workplace = Path(building)
        codec = build_codec(seed)
        fit_codec(codec, [clip for _, clip in train], seed)
        codec.save_pretrained(workplace / "codec")
        codec.name_or_path = str(folder / "codec")
        tokenizer = build_tokenizer([text for text, _ in train])
        build_processor(tokenizer, codec).save_pretrained(workplace / "model")
        build_model(tokenizer, seed).save_pretrained(workplace / "model")
        put_in_place(workplace, folder)


def put_in_place(workplace: Path, folder: Path) -> None:
    """Rename finished parts into place. After a kill at any moment, each part is complete or absent."""
    for part in PARTS:
        (workplace / part / STAMP).write_text(_stamp(workplace / part, folder))
        if (folder / part).exists():
            (folder / part).rename(workplace / f"old-{part}")  # a deletion could leave a part without its stamp
        (workplace / part).rename(folder / part)


def clear_leftovers(folder: Path) -> None:
    """Delete the folders of killed builders."""
    for workplace in folder.glob(f"{BUILDING}*"):
        builder = workplace.name.removeprefix(BUILDING).partition("-")[0]
        if not (builder.isdecimal() and _is_alive(int(builder))):
            shutil.rmtree(workplace)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another user
        pass
    return True


def demo_is_built(folder: Path) -> bool:
    """Return whether `folder` has a complete demo checkpoint that this version of the code built there."""
    folder = folder.resolve()
    stamps = {part: folder / part / STAMP for part in PARTS}
    return all(path.is_file() and path.read_text() == _stamp(folder / part, folder) for part, path in stamps.items())


def read_split(folder: Path) -> list[tuple[str, Tensor]]:
    """Return transcript and waveform (samples,) float32 at 24 kHz of every clip in a split's `metadata.json`."""
    path = folder / "metadata.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: the demo is built from a folder with train/ and eval/, each with its own")
    clips = []
    for sample in json.loads(path.read_text(encoding="utf-8"))["samples"]:
        wave, rate = soundfile.read(folder / sample["audio_file"], dtype="float32")
        assert (rate, wave.ndim) == (SAMPLE_RATE, 1), f"{sample['audio_file']} is not mono at {SAMPLE_RATE} Hz"
        text = sample.get("transcript") or (folder / sample["transcript_file"]).read_text(encoding="utf-8")
        clips.append((text.strip(), torch.from_numpy(wave)))
    return clips


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on `texts`. Like the real tokenizer, it prepends BOS to every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + MERGES, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", f"{BOS} $A {BOS} $B", [(BOS, bos_id)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in (BOS, EOS)],
        clean_up_tokenization_spaces=False,
    )


def build_codec(seed: int) -> HiggsAudioV2TokenizerModel:
    """Return a codec at 24 kHz and 25 frames per second, with 8 codebooks of 1024 codes (2 kbps), which are zero."""
    acoustic = DacConfig(
        encoder_hidden_size=4,
        decoder_hidden_size=128,
        downsampling_ratios=list(RATIOS),
        upsampling_ratios=list(RATIOS),
        hidden_size=32,
        sampling_rate=SAMPLE_RATE,
    )
    semantic = HubertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=[16] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
    )
    bits_per_second = math.log2(CODES) * SAMPLE_RATE / math.prod(RATIOS)
    config = HiggsAudioV2TokenizerConfig(
        acoustic_model_config=acoustic,
        semantic_model_config=semantic,
        codebook_size=CODES,
        codebook_dim=16,
        target_bandwidths=[bits_per_second / 1000, CODEBOOKS * bits_per_second / 1000],
        sample_rate=SAMPLE_RATE,
    )
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HiggsAudioV2TokenizerModel(config).eval()


def build_processor(tokenizer: PreTrainedTokenizerFast, codec: Any) -> HiggsAudioV2Processor:
    """Return the processor with our chat template. It saves the path `codec.name_or_path` of the codec."""
    extractor = DacFeatureExtractor(
        feature_size=1,
        sampling_rate=SAMPLE_RATE,
        hop_length=1,  # the codec pads clips to whole frames
        padding_value=0.0,
        padding_side="right",
    )
    template = resources.files("rawloop.demo").joinpath("chat_template.jinja").read_text(encoding="utf-8")
    return HiggsAudioV2Processor(extractor, tokenizer, codec, chat_template=template)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> HiggsAudioV2ForConditionalGeneration:
    """Return the model with text head, in float32, with random weights from `seed`."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = HiggsAudioV2Config(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=40,
        num_codebooks=CODEBOOKS,
        codebook_size=CODES + 2,  # with BOS and EOS of the stream, unlike the config's default of 1024
        audio_stream_bos_id=CODES,
        audio_stream_eos_id=CODES + 1,
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOT],
        pad_token_id=ids[EOS],
        audio_token_id=ids[AUDIO],
        audio_bos_token_id=ids[AUDIO_BOS],
        audio_delay_token_id=ids[DELAY],
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
    model.generation_config = GenerationConfig(
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOT],
        pad_token_id=ids[EOS],
        ras_win_len=7,
        ras_win_max_num_repeat=2,
        use_text_head=True,
    )
    return model


def _stamp(part: Path, folder: Path) -> str:
    here = Path(__file__).parent
    recipe = sha256_files([here / "checkpoint.py", here / "codec.py", here / "chat_template.jinja"])
    sizes = {path.name: path.stat().st_size for path in sorted(part.iterdir()) if path.name != STAMP}
    return json.dumps({"recipe": recipe, "folder": str(folder), "bytes": sizes}, indent=1) + "\n"
