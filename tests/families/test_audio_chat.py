"""Audio in, text out: inputs equal to the processor's, targets that are what the assistant says, true losses."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import torchaudio
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    GlmAsrConfig,
    GlmAsrForConditionalGeneration,
    GlmAsrProcessor,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

from rawloop.adapters.config import AdapterConfig
from rawloop.adapters.lora import add_adapter
from rawloop.audio import Segment, load_audio
from rawloop.cli import main
from rawloop.contracts import IGNORE, Audio, Batch, Family, Labels, Sample, Text, Turn
from rawloop.data.config import DataConfig
from rawloop.demo import SPEECH
from rawloop.diagnose.causality import probe
from rawloop.diagnose.mismatch import find_mismatches
from rawloop.dist import World
from rawloop.errors import BadSample, UserError
from rawloop.families import ModelConfig, load_family
from rawloop.families.audio_chat import AudioChat, ChatEncoder, Example
from rawloop.families.sample_checks import Letters, check_repeatable
from rawloop.losses import LossModule
from rawloop.records import read_events, read_metrics
from rawloop.settings import DDPConfig, SamplingConfig
from tests.real_steps import FULL, batch_of, config_of, measured, planned

CLIPS = sorted((SPEECH / "eval").glob("*.flac"))
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|pad|>")
WINDOW = 4  # seconds of features, where Whisper has 30: attention over 1,500 positions would make these tests slow
RECIPE = Path(__file__).parent.parent.parent / "configs" / "audio_chat_lora.yaml"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A small tokenizer with Qwen2-Audio's special tokens, and a token for two line breaks, as the real one has."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + 64, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(
        ["system user assistant\n\n\nWhat is said? You are a helpful assistant."] * 3, trainer
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[token for token in SPECIAL if token not in ("<|im_end|>", "<|endoftext|>")],
        clean_up_tokenization_spaces=False,
    )


def text_config(tokenizer: PreTrainedTokenizerFast, kind: str) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 400}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return {"model_type": kind, "vocab_size": len(tokenizer), **sizes, **heads}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Qwen2-Audio with random weights, its processor with the chat template of the real one."""
    folder = tmp_path_factory.mktemp("qwen2_audio")
    tokenizer = build_tokenizer()
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=WINDOW)
    Qwen2AudioProcessor(extractor, tokenizer).save_pretrained(folder)
    encoder = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    config = Qwen2AudioConfig(
        audio_config={"num_mel_bins": 16, "max_source_positions": 50 * WINDOW, **encoder},
        text_config=text_config(tokenizer, "qwen2"),
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
        dtype="float32",
    )
    torch.manual_seed(0)
    Qwen2AudioForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def family(checkpoint: Path) -> AudioChat:
    loaded = load_family(ModelConfig(path=str(checkpoint)))
    assert isinstance(loaded, AudioChat)
    return loaded


def no_codes(path: Path) -> Tensor:
    raise AssertionError(path)


def test_a_template_that_asks_for_the_time_is_told_one_date(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "dated")
    file = tmp_path / "dated" / "chat_template.jinja"
    file.write_text("{{ strftime_now('%d %b %Y') }}" + file.read_text())
    dated: Any = load_family(ModelConfig(path=str(tmp_path / "dated"), template_date="2001-02-03"))
    text = dated.processor.tokenizer.decode(dated.probe().inputs["input_ids"][0])
    assert text.startswith("03 Feb 2001")
    check_repeatable(dated.probe)
    dated.processor.chat_template = file.read_text()
    with pytest.raises(UserError, match="the samples probe become other numbers each time they are made"):
        check_repeatable(dated.probe)


def turn(role: str, *parts: str | Path, trained: bool = False) -> Turn:
    return Turn(role, tuple(Text(part) if isinstance(part, str) else Audio(part) for part in parts), trained)


def sample(*turns: Turn) -> Sample:
    return Sample("s1", turns, source="x.jsonl line 3")


def said(*clips: Path, answer: str = "Good morning.") -> Sample:
    """A conversation as transcription has it: clips and a question, and what is said."""
    return sample(turn("user", *clips, "What is said?"), turn("assistant", answer, trained=True))


TALK = (
    turn("system", "Be brief."),
    turn("user", CLIPS[0], "What is said?"),
    turn("assistant", "Yes."),
    turn("user", "And there? ", CLIPS[1], CLIPS[2]),
    turn("assistant", "No, ", "not here.", trained=True),
    turn("user", "And here? ", CLIPS[5]),
    turn("assistant", "Quiet.", trained=True),
)
ANSWERS = [
    "Good morning.",
    "Yes.",
    "A long answer, with many words in it, and then more.",
    "No",
    "Two three four.",
]


@pytest.fixture(scope="module")
def examples(family: AudioChat) -> list[Example]:
    """Eight samples of different lengths with none to two clips each, and a talk of several turns among them."""
    talks = [said(*CLIPS[k : k + k % 3], answer=ANSWERS[k % len(ANSWERS)]) for k in range(7)]
    return [family.example(one, no_codes) for one in [*talks, sample(*TALK)]]


def exact(family: Family) -> nn.Module:
    """The model in float64 throughout: transformers computes its norms in float32 whatever the weights are."""
    model = family.load_model().double()
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                whole: Any = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)  # type: ignore[arg-type]
                whole.weight = norm.weight
                setattr(parent, name, whole)
    return model.train()


def gradients(family: Family, groups: list[list[Example]]) -> dict[str, Tensor]:
    """What one optimizer step would see: the gradient of the mean over all targets, in float64."""
    model = exact(family)
    batches = [family.collate(group) for group in groups]
    count = sum(batch.targets["text"] for batch in batches)
    for batch in batches:
        (family.losses(model, batch)["text"].total / count).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two gradients, relative to the largest value of each parameter's."""
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max() / one[name].abs().max()) for name in one)


def waveform(path: Path) -> Any:
    wave, rate = soundfile.read(path, dtype="float32")
    return torchaudio.functional.resample(torch.from_numpy(wave), rate, 16000).numpy()


@pytest.mark.parametrize(
    "one", [said(CLIPS[0]), said(*CLIPS[3:6]), said(), sample(*TALK)], ids=["one", "many", "none", "talk"]
)
def test_inputs_equal_the_processors(family: AudioChat, one: Sample) -> None:
    ours = family.example(one, no_codes)
    clips = [waveform(path) for path in one.audio_paths()]
    queue = iter(clips)
    chat = [
        {
            "role": t.role,
            "content": [
                {"type": "text", "text": part.text}
                if isinstance(part, Text)
                else {"type": "audio", "audio": next(queue)}
                for part in t.parts
            ],
        }
        for t in one.turns
    ]
    text = family.processor.apply_chat_template(chat, tokenize=False)
    whole = family.processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    parts = family.processor(text=text, audio=clips or None, sampling_rate=16000, return_tensors="pt")
    for theirs in (whole, parts):
        assert torch.equal(ours.input_ids, theirs["input_ids"][0])
        assert set(ours.features) == set(theirs) - {"input_ids", "attention_mask"}
        assert all(torch.equal(ours.features[name], theirs[name]) for name in ours.features)


def test_exactly_what_a_trained_turn_says_and_its_end_are_targets(family: AudioChat) -> None:
    example = family.example(sample(*TALK), no_codes)
    tokenizer = family.processor.tokenizer
    targets = example.input_ids[example.labels != IGNORE]
    assert torch.equal(targets, example.labels[example.labels != IGNORE])
    assert tokenizer.decode(targets) == "No, not here.<|im_end|>Quiet.<|im_end|>"
    before = example.input_ids.tolist()[: (example.labels != IGNORE).nonzero()[0, 0]]
    assert tokenizer.decode(before).endswith("<|audio_eos|>\n<|im_end|>\n<|im_start|>assistant\n")
    (special,) = family.special_targets()
    assert (special.stream, special.name, special.required) == ("text", "<|im_end|>", True)
    assert (targets == special.id).sum() == 2


def test_a_batch_scores_each_target_from_the_position_before_it(family: AudioChat, examples: list[Example]) -> None:
    batch = family.collate(examples)
    ids = batch.inputs["input_ids"].flatten()
    positions, targets = batch.labels["text"]
    assert torch.equal(ids[positions + 1], targets)
    assert batch.targets == {"text": len(targets)} == {"text": sum(int((e.labels != IGNORE).sum()) for e in examples)}
    clips = sum(len(e.messages) and sum("audio" in p for m in e.messages for p in m["content"]) for e in examples)
    assert len(batch.inputs["input_features"]) == len(batch.inputs["feature_attention_mask"]) == clips == 10
    assert int((ids == family.encoder.audio_token).sum()) == sum(
        ((int(mask.sum()) - 1) // 2 + 1 - 2) // 2 + 1 for mask in batch.inputs["feature_attention_mask"]
    )


def test_losses_equal_the_models_own(family: AudioChat, examples: list[Example]) -> None:
    model = exact(family)
    batch = family.collate(examples)
    labels = torch.full_like(batch.inputs["input_ids"], IGNORE)
    labels.flatten()[batch.labels["text"].positions + 1] = batch.labels["text"].targets
    with torch.no_grad():
        ours, theirs = family.losses(model, batch)["text"], model(**batch.inputs, labels=labels)
        rows = family.logits(model, batch)["text"]
    assert ours.targets == batch.targets["text"]
    torch.testing.assert_close(ours.total / ours.targets, theirs.loss, rtol=1e-13, atol=0)
    every = theirs.logits.flatten(0, 1)[batch.labels["text"].positions]
    torch.testing.assert_close(rows, every, rtol=1e-12, atol=1e-12)
    assert float(theirs.loss) == pytest.approx(family.chance()["text"], abs=0.1)
    assert family.chance() == {"text": math.log(len(family.processor.tokenizer))}


def test_losses_are_the_cross_entropy_of_the_logits(family: AudioChat, examples: list[Example]) -> None:
    model, batch = family.load_model(), family.collate(examples)
    with torch.no_grad():
        assert find_mismatches(family.losses(model, batch), family.logits(model, batch), batch, 0.0) == {}


def test_logits_of_a_model_in_16_bits_are_float32(family: AudioChat, examples: list[Example]) -> None:
    logits = family.logits(family.load_model().bfloat16(), family.collate(examples[:2]))["text"]
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("size", [1, 2, 4])
def test_batching_and_padding_change_no_gradient(family: AudioChat, examples: list[Example], size: int) -> None:
    whole = gradients(family, [examples])
    split = gradients(family, [examples[k : k + size] for k in range(0, len(examples), size)])
    assert difference(whole, split) < 1e-12  # measured: 4e-15


def test_a_packed_row_learns_the_same(checkpoint: Path, family: AudioChat, examples: list[Example]) -> None:
    packed = load_family(ModelConfig(path=str(checkpoint)))
    assert isinstance(packed, AudioChat)
    packed.packing = True
    batch = packed.collate(examples)
    assert batch.inputs["input_ids"].shape == (1, sum(len(example.input_ids) for example in examples))
    assert difference(gradients(family, [examples]), gradients(packed, [examples])) < 1e-12
    changed, contexts = packed.perturb(batch), family.perturb(family.collate(examples)).contexts
    assert torch.equal(changed.contexts["clips"].later["text"], contexts["clips"].later["text"])
    assert probe(packed, exact(packed).eval(), batch, nullcontext)["text"].outcome() == "PASS"


def test_a_sample_without_audio(family: AudioChat, examples: list[Example]) -> None:
    silent = [e for e in examples if not e.features]
    assert len(silent) == 3
    alone = family.collate(silent)
    assert set(alone.inputs) == {"input_ids"}
    model = exact(family)
    loss = family.losses(model, alone)["text"].total
    loss.backward()  # type: ignore[no-untyped-call]
    assert bool(loss.isfinite())
    unused = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is None and p.requires_grad}
    assert unused == {"audio_tower", "multi_modal_projector"}


def step_on_a_rank(world: World, checkpoint: Path, groups: list[list[Example]]) -> dict[str, Tensor]:
    family = load_family(ModelConfig(path=str(checkpoint)))
    model = exact(family)
    module = world.wrap(LossModule(model, family.losses), DDPConfig(find_unused_parameters=True))
    batches = [family.collate(group) for group in groups]
    count = sum(batch.targets["text"] for batch in batches)
    for _ in range(2):  # the second step would hang if the first left a gradient unreduced
        model.zero_grad()
        loss = module(batches[world.rank])["text"].total * world.size / count
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_one_rank_without_audio_does_not_stop_the_other(
    family: AudioChat, checkpoint: Path, examples: list[Example], run_ranks: Callable[..., list[Any]]
) -> None:
    groups = [[e for e in examples if e.features][:2], [e for e in examples if not e.features][:2]]
    first, second = run_ranks(step_on_a_rank, checkpoint, groups, timeout=240)
    alone = gradients(family, [[*groups[0], *groups[1]]])
    assert "model.audio_tower.conv1.weight" in alone
    assert difference(alone, first) < 1e-12
    assert difference(first, second) == 0.0


def test_no_prediction_notices_a_change_behind_it(family: AudioChat, examples: list[Example]) -> None:
    model, batch = exact(family).eval(), family.collate(examples)
    changed, earlier, contexts = family.perturb(batch)
    same = batch.inputs["input_ids"] == changed.inputs["input_ids"]
    audio = family.encoder.audio_token
    assert torch.equal(batch.inputs["input_ids"] == audio, changed.inputs["input_ids"] == audio)
    with torch.no_grad():
        before, after = (family.logits(model, one)["text"] for one in (batch, changed))
    unmoved = (before - after).abs().amax(1) < 1e-12
    assert torch.equal(unmoved, earlier["text"])
    rows = batch.labels["text"].positions // same.shape[1]
    for row, example in enumerate(examples):
        count = int((example.labels != IGNORE).sum())
        assert int(earlier["text"][rows == row].sum()) == (count + 1) // 2
    with torch.no_grad():
        others = {what: family.logits(model, context.batch)["text"] for what, context in contexts.items()}
    assert torch.equal(contexts["tokens"].later["text"], ~earlier["text"])
    with_clip = torch.tensor([bool(example.features) for example in examples])
    assert torch.equal(contexts["clips"].later["text"], with_clip[rows])
    for what, other in others.items():
        moved = (before - other).abs().amax(1) > 1e-12
        assert moved[contexts[what].later["text"]].all()
    assert torch.equal((before - others["clips"]).abs().amax(1) > 1e-12, with_clip[rows])


@pytest.mark.parametrize(
    ("further", "expected"),
    [(0, "PASS"), (1, "LEAK"), (2, "LEAK"), (-1, "PASS")],
    ids=["right", "un", "wrong", "twice"],
)
def test_labels_of_another_shift(
    family: AudioChat, checkpoint: Path, examples: list[Example], further: int, expected: str
) -> None:
    """Not shifted, or to the wrong side, a prediction sees its own target; shifted twice it sees even less."""
    batch = family.collate([examples[1], examples[-1]])
    positions, targets = batch.labels["text"]
    inside = positions + further < batch.inputs["input_ids"].numel()
    labels = Labels(positions[inside] + further, targets[inside])
    batch = Batch(batch.inputs, {"text": labels}, {"text": len(labels.targets)}, batch.ids)
    assert probe(family, family.load_model(), batch, nullcontext)["text"].outcome() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_without_attention_or_ears_is_blind(
    family: AudioChat, examples: list[Example], dtype: torch.dtype
) -> None:
    with_clip, without = family.collate(examples[1:2] * 2), family.collate(examples[:1])

    def show(batch: Batch) -> tuple[str, list[str]]:
        moved = probe(family, model, batch, nullcontext)["text"]
        return moved.outcome(), [what for what, (_, size) in moved.later.items() if size <= moved.tolerance]

    model: Any = family.load_model().to(dtype)
    assert show(with_clip) == ("PASS", [])
    with torch.no_grad():
        model.model.multi_modal_projector.linear.weight.zero_()
        assert show(with_clip) == ("BLIND", ["clips"])
        assert show(without) == ("PASS", [])
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
    assert show(with_clip) == ("BLIND", ["tokens", "clips"])
    assert show(without) == ("BLIND", ["tokens"])


def test_a_mask_that_is_added_is_no_sound_to_be_changed(family: AudioChat, examples: list[Example]) -> None:
    batch = family.collate(examples)
    mask = torch.tensor([[0.0, -math.inf]])
    clips = family.perturb(replace(batch, inputs={**batch.inputs, "feature_mask": mask})).contexts["clips"].batch
    assert torch.equal(clips.inputs["feature_mask"], mask)
    assert not torch.equal(clips.inputs["input_features"], batch.inputs["input_features"])


def test_pieces_are_the_example_as_people_read_it(family: AudioChat, examples: list[Example]) -> None:
    for example in examples:
        pieces = family.pieces(example)
        assert sum(piece.positions for piece in pieces) == len(example.input_ids)
        assert sum(piece.targets for piece in pieces) == family.collate([example]).targets["text"]
    last = family.pieces(examples[-1])
    assert [(p.role, p.text) for p in last if p.targets] == [
        ("assistant", "No, not here.<|im_end|>"),
        ("assistant", "Quiet.<|im_end|>"),
    ]
    audio = [p for p in last if p.text.startswith("(audio")]
    assert {p.role for p in audio} == {"user"}
    seconds = [soundfile.info(path).duration for path in (*CLIPS[:3], CLIPS[5])]
    assert [p.positions for p in audio] == pytest.approx([25 * length for length in seconds], abs=1)
    assert (last[0].role, last[0].text) == ("system", "<|im_start|>system\nBe brief.<|im_end|>\n")


BAD = {
    "audio in a assistant turn": [turn("user", "hello"), turn("assistant", CLIPS[0], trained=True)],
    "audio in a system turn": [turn("system", CLIPS[0]), turn("user", "a"), turn("assistant", "b", trained=True)],
    "a scene turn": [turn("scene", "quiet"), turn("user", "hello"), turn("assistant", "well", trained=True)],
    "nothing to learn": [turn("user", "hello"), turn("assistant", "well")],
    "its first message is a trained assistant turn": [turn("assistant", "well", trained=True)],
    "control token <|AUDIO|>": [turn("user", "a <|AUDIO|>"), turn("assistant", "b", trained=True)],
    "control token <|im_end|>": [turn("user", "a"), turn("assistant", "b<|im_end|>", trained=True)],
    "control token <|endoftext|>": [turn("user", "a"), turn("assistant", "<|endoftext|>", trained=True)],
    "the control token <|im_end|>: take": [turn("user", "a", "<|im_", "end|>"), turn("assistant", "b", trained=True)],
    "says nothing": [turn("user", "a"), turn("assistant", " \n", trained=True)],
    "a tool turn, for which": [turn("user", "a"), turn("tool", "b"), turn("assistant", "c", trained=True)],
}


def test_of_a_segment_the_model_hears_the_segment(family: AudioChat, tmp_path: Path) -> None:
    wave, rate = soundfile.read(CLIPS[0], dtype="float32")
    soundfile.write(tmp_path / "part.wav", wave[rate // 4 : rate], rate, subtype="FLOAT")
    part = family.example(said(Segment(CLIPS[0], 0.25, 1.0).path()), no_codes)
    alone = family.example(said(tmp_path / "part.wav"), no_codes)
    assert torch.equal(part.input_ids, alone.input_ids)
    assert all(torch.equal(part.features[name], alone.features[name]) for name in alone.features)


def test_letters_that_the_tokenizer_does_not_know_are_refused(family: AudioChat) -> None:
    encoder = copy.copy(family.encoder)
    encoder.letters = Letters(copy.deepcopy(encoder.letters.tokenizer), "models/tiny")
    encoder.check(said(CLIPS[0]))
    encoder.letters.tokenizer.backend_tokenizer.normalizer = None
    encoder.letters.tokenizer.backend_tokenizer.pre_tokenizer = (
        pre_tokenizers.Whitespace()
    )  # its vocabulary has bytes, no letters
    with pytest.raises(BadSample, match=r"sample 's1' .* letters that the tokenizer of models/tiny does not know, 'ư'"):
        encoder.check(said(CLIPS[0], answer="trưa"))


@pytest.mark.parametrize("message", list(BAD))
def test_conversations_that_would_train_wrongly_are_refused_by_name(family: AudioChat, message: str) -> None:
    with pytest.raises(UserError, match=r"sample 's1' \(x.jsonl line 3\)") as caught:
        family.check(sample(*BAD[message]))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.wav", "cannot be decoded"),
        ("gone.wav", "cannot be opened: No such file"),
        ("long.wav", rf"lasts 5.00 s, the model hears clips of 0.1 to {WINDOW} s: .* never truncated"),
        ("short.wav", r"lasts 0.05 s, the model hears clips of 0.1 to"),
        ("silent.wav", "is silent"),
        ("cut.flac", "is cut short"),
    ],
)
def test_clips_that_cannot_be_heard_are_refused_by_name(
    family: AudioChat, tmp_path: Path, name: str, message: str
) -> None:
    noise = 0.1 * torch.randn(5 * 16000).numpy()
    waves = {"long.wav": noise, "short.wav": noise[:800], "silent.wav": 0 * noise[:16000]}
    (tmp_path / "text.wav").write_text("this is no audio")
    (tmp_path / "cut.flac").write_bytes(CLIPS[0].read_bytes()[:20000])
    for file, wave in waves.items():
        soundfile.write(tmp_path / file, wave, 16000)
    one = said(CLIPS[1], tmp_path / name)
    with pytest.raises(BadSample, match=rf"sample 's1' \(x.jsonl line 3\): {tmp_path / name} .*{message}"):
        family.example(one, no_codes)
    if name in ("long.wav", "short.wav"):
        with pytest.raises(BadSample, match=message):
            family.check(one, lambda path: len(waves.get(path.name, noise[:16000])))


def test_the_shortest_clip_has_positions_of_its_own(family: AudioChat, tmp_path: Path) -> None:
    """In a batch whose only clip takes one position, Qwen2-Audio would take the ids for unexpanded ones."""
    soundfile.write(tmp_path / "short.wav", 0.1 * torch.randn(1600).numpy(), 16000)
    example = family.example(said(tmp_path / "short.wav"), no_codes)
    assert int((example.input_ids == family.encoder.audio_token).sum()) == 2
    assert bool(family.losses(family.load_model(), family.collate([example]))["text"].total.isfinite())


def test_a_sample_that_is_too_long_is_refused(family: AudioChat) -> None:
    with pytest.raises(UserError, match=r"sample 's1' .*: it takes \d+ positions, the model has 400"):
        family.example(said(CLIPS[0], answer="word " * 300), no_codes)


def test_a_sample_is_measured_whole_before_training(family: AudioChat, monkeypatch: pytest.MonkeyPatch) -> None:
    def length(path: Path) -> int:
        return len(load_audio(path, 16000))

    conversations = (said(CLIPS[0], CLIPS[1], answer="Good morning."), said(), said(CLIPS[2]))
    lengths = [len(family.example(one, no_codes).input_ids) for one in conversations]
    for one, positions in zip(conversations, lengths, strict=True):
        monkeypatch.setattr(family.encoder, "max_positions", positions)
        family.check(one, length)
        monkeypatch.setattr(family.encoder, "max_positions", positions - 1)
        with pytest.raises(BadSample, match=rf"it takes {positions} positions, the model has {positions - 1}"):
            family.check(one, length)


def test_lengths_are_those_of_the_examples_or_one_more_for_a_clip(family: AudioChat) -> None:
    def length(path: Path) -> int:
        return len(load_audio(path, 16000))

    for one in (said(CLIPS[0]), said(*CLIPS[3:6]), said(), sample(*TALK)):
        exact = len(family.example(one, no_codes).input_ids)
        assert exact <= family.length(one, length) <= exact + len(one.audio_paths())


def with_template(family: AudioChat, change: Callable[[str], str]) -> ChatEncoder:
    processor = copy.copy(family.processor)
    processor.chat_template = change(processor.chat_template)
    return ChatEncoder(processor, family.encoder.audio_token, 400)


def test_templates_that_cannot_be_split_are_refused(family: AudioChat) -> None:
    with pytest.raises(UserError, match="cannot be split into prompt and answer"):
        with_template(family, lambda text: text.replace("add_generation_prompt", "false"))
    with pytest.raises(UserError, match="no control token: the model could not learn to stop"):
        with_template(family, lambda text: text.replace("<|im_end|>", "."))
    with pytest.raises(UserError, match=r"cannot be split into prompt and answer: .* the answer it goes on '"):
        with_template(family, lambda text: "{{ messages | length }}" + text)
    one = said(CLIPS[0])
    wordy = with_template(family, lambda text: "{% if messages | length > 4 %}A long talk.{% endif %}" + text)
    wordy.check(one)
    with pytest.raises(UserError, match=r"sample 's1' .* cannot be split at messages\[4\]"):
        wordy.check(sample(*TALK))
    forgetful = with_template(
        family, lambda text: text.replace("{{ content['text'] }}", "{{ content['text'] | replace('What', '') }}", 1)
    )
    with pytest.raises(UserError, match=r"sample 's1' .* drops or changes the words of messages\[0\] \(user\)"):
        forgetful.check(one)
    deaf = with_template(family, lambda text: text.replace("<|AUDIO|>", ""))
    with pytest.raises(UserError, match=r"sample 's1' .* refuses it: Found 0 <|AUDIO|> token"):
        deaf.example(one)
    with pytest.raises(UserError, match=r"the chat template of .* refuses it: 'x' is undefined"):
        with_template(family, lambda text: "{{ x.y }}" + text)
    refusal = "{% if messages | length > 4 %}{{ raise_exception('too many turns') }}{% endif %}"
    with pytest.raises(UserError, match=r"sample 's1' .* refuses it: too many turns"):
        with_template(family, lambda text: refusal + text).check(sample(*TALK))


def test_a_text_that_merges_with_its_header_is_refused(family: AudioChat) -> None:
    with pytest.raises(UserError, match=r"sample 's1' .* take blanks from the beginning of the answer"):
        family.check(said(CLIPS[0], answer="\n\nGood morning."))


def test_checkpoints_that_cannot_be_trained_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    def altered(name: str, change: Callable[[Path], object]) -> ModelConfig:
        folder = Path(shutil.copytree(checkpoint, tmp_path / name))
        change(folder)
        return ModelConfig(path=str(folder))

    def drop_head(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (head,) = (name for name in weights if name.endswith("lm_head.weight"))
        del weights[head]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def other_token(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"audio_token_index": 3}))

    with pytest.raises(UserError, match=r"lacks 1 weights, first lm_head\.weight"):
        load_family(altered("headless", drop_head)).load_model()
    with pytest.raises(UserError, match="audio token 3, the processor writes"):
        load_family(altered("token", other_token))
    with pytest.raises(
        UserError,
        match=r"whose processor_config\.json or tokenizer\.json cannot be loaded: Couldn't instantiate the backend",
    ):
        load_family(altered("torn", lambda folder: (folder / "tokenizer.json").unlink()))
    with pytest.raises(UserError, match=r"stream_weights has \['audio'\]"):
        load_family(ModelConfig(path=str(checkpoint), stream_weights={"audio": 1.0}))
    with pytest.raises(UserError, match="text to 0"):
        load_family(ModelConfig(path=str(checkpoint), stream_weights={"text": 0.0}))


def test_a_batch_key_that_the_model_would_swallow_is_refused(family: AudioChat, examples: list[Example]) -> None:
    batch = family.collate(examples[:2])
    batch.inputs["features"] = batch.inputs.pop("input_features")
    with pytest.raises(UserError, match=r"'features', which Qwen2AudioForConditionalGeneration.forward does not take"):
        family.losses(family.load_model(), batch)


@pytest.mark.parametrize("adapted", [False, True])
def test_activation_checkpointing_changes_no_gradient(checkpoint: Path, examples: list[Example], adapted: bool) -> None:
    found = []
    for recompute in (False, True):
        family = load_family(ModelConfig(path=str(checkpoint), activation_checkpointing=recompute))
        model = family.load_model().train()
        torch.manual_seed(0)
        if adapted:
            model = add_adapter(model, AdapterConfig(dropout=0.1, modules_to_save=["lm_head"]), [])
        torch.manual_seed(1)
        family.losses(model, family.collate(examples[:3]))["text"].total.backward()  # type: ignore[no-untyped-call]
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(found[0]) == set(found[1])
    assert any("lm_head" in name for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("begin", ["", "<|endoftext|>"], ids=["tokenizer_begins", "template_begins"])
def test_another_class_of_its_kind(tmp_path: Path, begin: str) -> None:
    """GLM-ASR: Llama inside, tied embeddings, the pad token as placeholder, clips in several windows, and a BOS."""
    tokenizer = build_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    single = ("<|endoftext|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [single])
    qwen = Qwen2AudioProcessor(WhisperFeatureExtractor(), tokenizer).chat_template
    template = begin + qwen.replace("<|AUDIO|>", "<|pad|>")
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=2)
    GlmAsrProcessor(extractor, tokenizer, chat_template=template).save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GlmAsrConfig(
        audio_config={"num_mel_bins": 16, **sizes},
        text_config=text_config(tokenizer, "llama"),
        audio_token_id=tokenizer.convert_tokens_to_ids("<|pad|>"),
        dtype="float32",
    )
    GlmAsrForConditionalGeneration(config).save_pretrained(tmp_path)
    family = load_family(ModelConfig(path=str(tmp_path), family="audio_chat"))
    examples = [family.example(said(*CLIPS[k : k + n]), no_codes) for k, n in ((0, 1), (1, 0), (2, 1))]
    assert [len(e.features.get("input_features", ())) for e in examples] == [1, 0, 2]
    assert all(int((e.input_ids == tokenizer.bos_token_id).sum()) == 1 for e in examples)
    assert difference(gradients(family, [examples]), gradients(family, [[e] for e in examples])) < 1e-12
    moved = probe(family, family.load_model(), family.collate(examples[2:]), nullcontext)["text"]
    assert (moved.outcome(), list(moved.later)) == ("PASS", ["tokens", "clips"])
    with pytest.raises(UserError, match="refuses it: Got 1 text but 2 audios"):
        family.example(said(*CLIPS[:2]), no_codes)


@pytest.fixture
def spoken(tmp_path: Path) -> Path:
    """A folder with train.jsonl and eval.jsonl: what is said in the bundled clips, and a question without a clip."""
    for split, number in (("train", 5), ("eval", 3)):
        (tmp_path / split).mkdir()
        records: list[list[dict[str, Any]]] = []
        for path in sorted((SPEECH / split).glob(f"{split}-en-*.flac"))[:number]:
            shutil.copy(path, tmp_path / split)
            times = {"offset": 0.2, "duration": 0.8} if len(records) == 2 else {}
            parts = [{"type": "audio", "path": path.name, **times}, {"type": "text", "text": "What is said?"}]
            records.append([{"role": "user", "content": parts}, {"role": "assistant", "content": path.stem}])
        records.append([{"role": "user", "content": f"Well, {split}?"}, {"role": "assistant", "content": "Well."}])
        lines = [json.dumps({"messages": messages}) + "\n" for messages in records]
        (tmp_path / split / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path


def test_the_recipe_runs_resumes_and_merges(
    checkpoint: Path, spoken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {
        "device": "cpu",
        "model.path": checkpoint,
        "data.train": spoken / "train",
        "data.eval": spoken / "eval",
        "data.num_workers": 1,
        "train.max_steps": 2,
        "train.batch_size": 1,
        "optim.warmup_steps": 0,
        "checkpoint.save_every": 1,
        "checks.expect_chance": True,
    }
    common = ["train", str(RECIPE), *(f"--{key}={value}" for key, value in options.items())]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main([*common, f"--output={whole}"]) == 0
    assert [line["step"] for line in read_metrics(whole) if "eval_loss" in line] == [0, 2]
    assert not [event for event in read_events(whole) if event["kind"] in ("skip", "warning", "fallback")]
    asked, used = yaml.safe_load(RECIPE.read_text()), yaml.safe_load((whole / "config.yaml").read_text())
    for group in ("adapter", "precision", "evaluation", "ddp"):
        assert used[group].items() >= asked[group].items()
    checked = [event["reason"] for event in read_events(whole) if event["kind"] == "check"]
    assert "causality: text PASS" in checked
    start = f"--resume={whole / 'checkpoints' / 'step-00000001'}"
    assert main([*common, f"--output={resumed}", start]) == 0
    adapter = "checkpoints/step-00000002/adapter/adapter_model.safetensors"
    trained = load_file(whole / adapter)
    again = load_file(resumed / adapter)
    assert set(trained) == set(again)
    assert all(torch.equal(trained[name], again[name]) for name in trained)
    assert {name for name, value in trained.items() if "lora_B" in name and "audio_tower" not in name and value.any()}
    assert not any(value.any() for name, value in trained.items() if "lora_B" in name and "audio_tower" in name)
    merged = tmp_path / "merged"
    assert main(["merge", f"--adapter={whole / Path(adapter).parent}", f"--output={merged}"]) == 0
    assert load_family(ModelConfig(path=str(merged))).load_model()
    capsys.readouterr()
    assert main(["inspect", f"{whole}/config.yaml", "--train.batch_size=3"]) == 0
    assert "(audio, " in capsys.readouterr().out


def test_clips_are_held_against_the_limits_of_the_data_before_training(
    checkpoint: Path, spoken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [f"--data.train={spoken / 'train'}", f"--data.eval={spoken / 'eval'}", "--data.max_seconds=1.5"]
    model = ["--device=cpu", f"--model.path={checkpoint}", f"--output={tmp_path / 'run'}"]
    assert main(["train", *model, *data]) == 2
    message = capsys.readouterr().err
    assert "clip(s) that cannot be used" in message
    assert "longer than data.max_seconds (1.5 s)" in message


def test_what_only_decoding_shows_is_found_before_training_and_once(
    checkpoint: Path, spoken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = sorted((spoken / "train").glob("*.flac"))
    soundfile.write(clips[0], torch.zeros(16000).numpy(), 16000)
    spoilt = bytearray(clips[1].read_bytes())
    spoilt[len(spoilt) // 2] ^= 1
    clips[1].write_bytes(spoilt)
    start = ["train", f"--config={RECIPE}", "--device=cpu", f"--model.path={checkpoint}", "--checks.expect_chance=true"]
    start += [f"--data.train={spoken / 'train'}", f"--data.eval={spoken / 'eval'}", "--optim.warmup_steps=0"]
    start += ["--train.max_steps=2", "--train.batch_size=1", "--train.accumulation=1", "--data.num_workers=0"]
    assert main([*start, f"--output={tmp_path / 'stop'}"]) == 2
    said = capsys.readouterr().err
    assert said.count("decoding: 100%") == 2  # data.eval first
    line = said.splitlines()[-1]
    assert line.startswith(f"rawloop train: 2 clip(s) that cannot be used: {clips[0]} (is silent (peak digital silence")
    assert f"{clips[1]} (cannot be decoded" in line
    assert not (tmp_path / "stop" / "events.jsonl").exists()
    assert main([*start, f"--output={tmp_path / 'skip'}", "--data.on_bad_sample=skip"]) == 0
    again = capsys.readouterr()
    left = next(line for line in again.out.splitlines() if "left out" in line)
    assert left.startswith("data.train: 2 of "), left
    assert "decoding: " not in again.err
    prepared = ["prepare", f"--model.path={checkpoint}", "--device=cpu", *start[5:7]]
    assert main([*prepared, "--data.on_bad_sample=skip"]) == 0
    assert " 0 decoded now, " in capsys.readouterr().out


def test_what_is_generated_is_prompted_as_in_training_and_stops_where_it_was_taught(family: AudioChat) -> None:
    talk = replace(sample(*TALK), id="talk")
    whole, prompt = family.example(talk, no_codes), family.encoder.prompt(talk)
    start = prompt["input_ids"].shape[1]
    assert torch.equal(prompt["input_ids"][0], whole.input_ids[:start])
    assert (whole.labels[start:] != IGNORE).any()
    assert whole.labels[start - 1] == IGNORE
    model: Any = family.load_model()
    learnt = said(CLIPS[0], answer="No, two.")
    batch = family.collate([family.example(learnt, no_codes)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        torch.autograd.backward(family.losses(model, batch)["text"].total)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    for limit, text in ((20, "No, two."), (3, "No")):
        (found,) = family.generate(model, [learnt], no_codes, [limit], SamplingConfig(temperature=0.0))
        assert str(found.text).startswith(text)
        assert found.stopped == (found.text == "No, two.")
        assert found.length <= limit


@pytest.mark.parametrize(("adapter", "recompute"), [(None, True), (FULL, False)])
def test_a_step_takes_what_is_estimated(adapter: AdapterConfig | None, recompute: bool, checkpoint: Path) -> None:
    config = config_of(checkpoint, "bf16", adapter, recompute)
    batch = batch_of(config, 200, 3)
    assert batch.inputs["input_ids"].shape[0] == len(batch.inputs["input_features"]) == 3
    assert 195 <= batch.inputs["input_ids"].shape[1] <= 205
    assert planned(config, batch).total == pytest.approx(measured(config, batch), rel=0.05)


def test_a_packed_step_is_estimated(checkpoint: Path) -> None:
    config = replace(config_of(checkpoint, "bf16"), data=DataConfig(packing=True))
    batch = batch_of(config, 200, 2)
    assert len(batch.inputs["input_ids"]) == 1
    assert planned(config, batch).total == pytest.approx(measured(config, batch), rel=0.05)
