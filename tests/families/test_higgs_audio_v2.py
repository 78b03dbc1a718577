"""Higgs Audio v2: inputs equal to the processor's, labels that are right where the processor's are not, true losses."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from torch import Tensor
from transformers import HiggsAudioV2ForConditionalGeneration, HiggsAudioV2Processor

from rawloop.contracts import IGNORE, Audio, Batch, Sample, Text, Turn
from rawloop.data import DataConfig
from rawloop.data.samples import read_samples
from rawloop.demo import SPEECH
from rawloop.diagnose.causality import probe
from rawloop.errors import BadSample, UserError
from rawloop.families import ModelConfig, head, load_family
from rawloop.families.higgs_audio_v2 import HiggsAudioV2
from rawloop.families.higgs_audio_v2.examples import HiggsEncoder

TASKS = [
    "single_speaker_smart_voice",
    "zero_shot_voice_cloning",
    "multi_speaker_smart_voice",
    "multi_speaker_voice_cloning",
]
EOS = 1025


@pytest.fixture(scope="module")
def family(demo_checkpoint: Path) -> HiggsAudioV2:
    loaded = load_family(ModelConfig(path=str(demo_checkpoint / "model")))
    assert isinstance(loaded, HiggsAudioV2)
    return loaded


@pytest.fixture(scope="module")
def model(family: HiggsAudioV2) -> Any:
    return family.load_model().eval()


@pytest.fixture(scope="module")
def processor(demo_checkpoint: Path) -> Any:
    return HiggsAudioV2Processor.from_pretrained(demo_checkpoint / "model")


@pytest.fixture(scope="module")
def codes(family: HiggsAudioV2) -> Callable[[Path], Tensor]:
    _, encode = family.load_codec(torch.device("cpu"))
    known: dict[Path, Tensor] = {}

    def get(path: Path) -> Tensor:
        if path not in known:
            known[path] = encode(torch.from_numpy(soundfile.read(path, dtype="float32")[0]))
        return known[path]

    return get


def samples(task: str, refs_in_scene: bool = False) -> list[Sample]:
    found = [s for s in read_samples(SPEECH / "eval", DataConfig(refs_in_scene=refs_in_scene)) if s.task == task]
    assert len(found) >= 2, task
    return found[:2]


def by_processor(processor: Any, family: HiggsAudioV2, batch: list[Sample], **options: Any) -> dict[str, Tensor]:
    """What transformers makes of the same conversations, with the waveforms themselves."""
    chats = [family.encoder.conversation(sample) for sample in batch]
    for chat in chats:
        for message in chat:
            for part in message["content"]:
                if part["type"] == "audio":
                    part["audio"] = soundfile.read(part.pop("path"), dtype="float32")[0]
    options = {"tokenize": True, "return_dict": True, "sampling_rate": 24000, "return_tensors": "pt", **options}
    result: dict[str, Tensor] = processor.apply_chat_template(chats, **options)
    return result


CASES = [*((task, False) for task in TASKS), ("multi_speaker_voice_cloning", True)]


@pytest.mark.parametrize(("task", "refs_in_scene"), CASES)
def test_inputs_equal_the_processors(
    family: HiggsAudioV2, processor: Any, codes: Callable[[Path], Tensor], task: str, refs_in_scene: bool
) -> None:
    batch = samples(task, refs_in_scene)
    theirs = by_processor(processor, family, batch)
    ours = family.encoder.pad([family.example(sample, codes) for sample in batch], side="left")
    for name in ("input_ids", "attention_mask", "audio_input_ids", "audio_input_ids_mask"):
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize(("task", "refs_in_scene"), CASES)
def test_labels_differ_from_the_processors_exactly_where_intended(
    family: HiggsAudioV2, processor: Any, codes: Callable[[Path], Tensor], task: str, refs_in_scene: bool
) -> None:
    batch = samples(task, refs_in_scene)
    theirs = by_processor(processor, family, batch, output_labels=True)
    examples = [family.example(sample, codes) for sample in batch]
    ours = family.encoder.pad(examples, side="left")
    references = torch.zeros_like(ours["audio_labels"], dtype=torch.bool)
    for row, sample in enumerate(batch):
        lengths = [len(codes(path)) + 9 for path in sample.audio_paths()]
        references[row, : sum(lengths[:-1])] = True
    audio, text = ours["audio_labels"], ours["labels"]
    # audio: the stop token is a target (theirs masks it), references are none (theirs trains them), codes are the same
    stops = (audio == EOS).sum(1)
    assert (stops == 1).all(), "one stop token per codebook and trained clip"
    assert (theirs["audio_labels"] != EOS).all()
    assert (audio[references] == IGNORE).all()
    if "cloning" in task:
        assert (theirs["audio_labels"][references] != IGNORE).any()
    same = ~references & (audio != EOS)
    assert torch.equal(audio[same], theirs["audio_labels"][same])
    # text: only what the model must say after its clip; theirs trains prompts, users' words and delay placeholders
    for row, sample in enumerate(batch):
        said = family.tokenizer.convert_ids_to_tokens(text[row][text[row] != IGNORE].tolist())
        assert said == ["<|audio_eos|>", "<|eot_id|>"], sample.id
    assert (theirs["labels"] != IGNORE).sum() > (text != IGNORE).sum()


def test_the_stop_token_of_each_codebook_is_one_frame_later_than_that_of_the_one_before(family: HiggsAudioV2) -> None:
    clip = torch.arange(5 * 8).view(5, 8)
    inputs, labels = family.encoder.delayed(clip, trained=True)
    assert inputs.shape == labels.shape == (5 + 2 + 7, 8)
    for k in range(8):
        assert labels[:, k].tolist() == [IGNORE] * (k + 1) + [*clip[:, k].tolist(), EOS] + [IGNORE] * (7 - k)
        assert inputs[:, k].tolist() == [1024] * (k + 1) + clip[:, k].tolist() + [EOS] * (8 - k)
    assert (family.encoder.delayed(clip, trained=False)[1] == IGNORE).all()


def test_losses_equal_the_models_own_on_our_labels(
    family: HiggsAudioV2, model: Any, codes: Callable[[Path], Tensor]
) -> None:
    examples = [family.example(s, codes) for task in TASKS for s in samples(task)[:1]]
    batch = family.collate(examples)
    with torch.no_grad():
        ours = family.losses(model, batch)
        padded = family.encoder.pad(examples)
        sums = {}
        for stream, keys in {"audio": ("audio_labels",), "text": ("labels",)}.items():
            labels = {key: padded[key] for key in keys}
            sums[stream] = model(**batch.inputs, **labels, num_items_in_batch=1).loss
    for stream in ("audio", "text"):
        torch.testing.assert_close(ours[stream].total, sums[stream], rtol=1e-5, atol=0)
    audio = ours["audio"]
    assert audio.parts is not None
    torch.testing.assert_close(audio.parts.sum(), audio.total)
    assert sum(audio.part_targets) == audio.targets == int((padded["audio_labels"] != IGNORE).sum())
    assert ours["text"].targets == 2 * len(examples)
    assert float(audio.total) / audio.targets == pytest.approx(6.93, abs=0.15)  # chance, ln 1026


def test_padding_and_batching_change_nothing(family: HiggsAudioV2, model: Any, codes: Callable[[Path], Tensor]) -> None:
    exact = family.load_model().double().eval()
    examples = [family.example(s, codes) for task in TASKS for s in samples(task)[:1]]
    with torch.no_grad():
        whole = family.losses(exact, family.collate(examples))
        single = [family.losses(exact, family.collate([example])) for example in examples]
    for stream in ("audio", "text"):
        total = sum(float(losses[stream].total) for losses in single)
        assert float(whole[stream].total) == pytest.approx(total, rel=1e-13)
        assert whole[stream].targets == sum(losses[stream].targets for losses in single)


def test_a_packed_row_learns_the_same_and_its_examples_do_not_see_each_other(
    demo_checkpoint: Path, family: HiggsAudioV2, codes: Callable[[Path], Tensor]
) -> None:
    packed = load_family(ModelConfig(path=str(demo_checkpoint / "model")))
    assert isinstance(packed, HiggsAudioV2)
    packed.packing = True
    exact = packed.load_model().double().eval()
    examples = two_of_each(family, codes)
    batch = packed.collate(examples)
    assert batch.inputs["input_ids"].shape == (1, sum(len(example.input_ids) for example in examples))
    with torch.no_grad():
        padded, rows = family.losses(exact, family.collate(examples)), packed.losses(exact, batch)
    for stream in ("audio", "text"):
        assert float(rows[stream].total) == pytest.approx(float(padded[stream].total), rel=1e-13)
        assert rows[stream].targets == padded[stream].targets
    moved = probe(packed, exact, batch, nullcontext)
    assert {stream: movement.outcome() for stream, movement in moved.items()} == {"audio": "PASS", "text": "PASS"}


def test_packing_is_refused_where_examples_would_see_each_other(
    demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = load_family(ModelConfig(path=str(demo_checkpoint / "model")))
    assert isinstance(family, HiggsAudioV2)
    family.packing = True
    # its attention is told nothing of the positions
    monkeypatch.setattr(
        "transformers.models.higgs_audio_v2.modeling_higgs_audio_v2.create_causal_mask", lambda **inputs: None
    )
    with pytest.raises(UserError, match=r"see later words or other documents of their row, .* set data.packing to fal"):
        family.load_model()


def test_losses_in_chunks_are_those_of_all_logits(
    family: HiggsAudioV2, codes: Callable[[Path], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = family.load_model().double()
    batch = family.collate([family.example(s, codes) for task in TASKS for s in samples(task)[:2]])
    found: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
    for whole in (2**40, 0):
        monkeypatch.setattr(head, "WHOLE", whole)
        monkeypatch.setattr(head, "FEWEST", 2)
        exact.zero_grad()
        losses = family.losses(exact, batch)
        (losses["audio"].total + losses["text"].total).backward()  # type: ignore[no-untyped-call]
        found.append((losses, {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}))
    (full, right), (chunked, gradients) = found
    for stream in full:
        torch.testing.assert_close(chunked[stream], full[stream], rtol=1e-12, atol=0.0)
    assert gradients.keys() == right.keys()
    for name, gradient in right.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-9, msg=name)


def test_every_prediction_sees_only_its_past(family: HiggsAudioV2, model: Any, codes: Callable[[Path], Tensor]) -> None:
    """Changing the last frame's code must not move the loss of any earlier frame, and must move its own."""
    sample = samples("single_speaker_smart_voice")[0]
    clip = codes(sample.audio_paths()[0])
    changed = clip.clone()
    changed[-1, 0] = (changed[-1, 0] + 1) % 1024
    with torch.no_grad():
        first, second = (
            family.logits(model, family.collate([family.example(sample, lambda _, c=c: c)]))["audio"]  # type: ignore[misc]
            for c in (clip, changed)
        )
    frame = len(clip) - 1  # row of codebook 0's last code; the code itself is input from the next row on
    assert torch.equal(first[: frame + 1], second[: frame + 1])
    assert not torch.equal(first[frame + 1], second[frame + 1])


def test_a_text_weight_of_zero_leaves_the_head_out(demo_checkpoint: Path, codes: Callable[[Path], Tensor]) -> None:
    audio_only = load_family(ModelConfig(path=str(demo_checkpoint / "model"), stream_weights={"text": 0.0}))
    model: Any = audio_only.load_model()
    assert model.text_lm_head is None
    batch = audio_only.collate([audio_only.example(samples(TASKS[0])[0], codes)])
    assert set(audio_only.losses(model, batch)) == {"audio"} == set(batch.targets)


def test_the_codec_gives_the_processors_codes(
    family: HiggsAudioV2, processor: Any, codes: Callable[[Path], Tensor]
) -> None:
    path = samples(TASKS[0])[0].audio_paths()[0]
    info, _ = family.load_codec(torch.device("cpu"))
    assert (info.sample_rate, info.codebooks, info.codebook_size, info.frame_rate) == (24000, 8, 1024, 25.0)
    assert info.hash == family.codec_hash()
    wave = soundfile.read(path, dtype="float32")[0]
    inputs = processor.feature_extractor(wave, sampling_rate=24000, return_tensors="pt")
    theirs = processor.audio_tokenizer.encode(inputs["input_values"]).audio_codes[0].T
    assert torch.equal(codes(path), theirs)


def turn(role: str, *parts: Text | Audio, trained: bool = False) -> Turn:
    return Turn(role, parts, trained)


CLIP = Audio(Path("a.wav"))
BAD = {
    "is plain text": [turn("text", Text("hello"), trained=True)],
    "no clip to learn": [turn("user", Text("hello")), turn("assistant", CLIP)],
    "must be exactly one clip": [turn("user", Text("hello")), turn("assistant", Text("well"), CLIP, trained=True)],
    "audio in a user turn": [turn("user", Text("like"), CLIP), turn("assistant", CLIP, trained=True)],
    "control token <|AUDIO_OUT|>": [turn("user", Text("a <|AUDIO_OUT|>")), turn("assistant", CLIP, trained=True)],
    "control token <|eot_id|>": [turn("user", Text("a<|eot_id|>b")), turn("assistant", CLIP, trained=True)],
    "the control token <|eot_id|>: take": [
        turn("user", Text("a<|eot"), Text("_id|>b")),
        turn("assistant", CLIP, trained=True),
    ],
    "the control token <|audio_eos|>: ": [
        turn("user", Text("a<|audio "), Text(" _eos|>b")),  # the template strips each part
        turn("assistant", CLIP, trained=True),
    ],
    "a clip to learn and no words that it speaks": [turn("assistant", CLIP, trained=True)],
    "no words that it speaks": [
        turn("system", Text("s")),
        turn("user", Text(" ")),
        turn("assistant", CLIP, trained=True),
    ],
    "and no words": [turn("user", Text("a")), turn("assistant", CLIP), turn("assistant", CLIP, trained=True)],
    "a scene turn in place 2": [
        turn("user", Text("a")),
        turn("assistant", CLIP),
        turn("scene", Text("b")),
        turn("user", Text("c")),
        turn("assistant", CLIP, trained=True),
    ],
    "has a tool turn, for which": [
        turn("user", Text("a")),
        turn("tool", Text("b")),
        turn("assistant", CLIP, trained=True),
    ],
}


@pytest.mark.parametrize("message", list(BAD))
def test_conversations_that_would_train_wrongly_are_refused_by_name(family: HiggsAudioV2, message: str) -> None:
    sample = Sample("s1", tuple(BAD[message]), source="x.jsonl line 3")
    with pytest.raises(UserError, match=r"sample 's1' \(x.jsonl line 3\)") as caught:
        family.check(sample)
    assert message in str(caught.value)


def test_tools_are_refused(family: HiggsAudioV2) -> None:
    turns = (turn("user", Text("hello")), turn("assistant", CLIP, trained=True))
    with pytest.raises(UserError, match="has tools, for which this family of models has no place"):
        family.check(Sample("s1", turns, tools=[{"type": "function"}]))
    calls = (turns[0], Turn("assistant", (CLIP,), True, {"tool_calls": [{}], "name": "x"}))
    with pytest.raises(UserError, match="has tool_calls, for which this family of models has no place"):
        family.check(Sample("s1", calls))


def test_a_template_that_drops_the_transcript_is_refused(family: HiggsAudioV2) -> None:
    tokenizer = copy.copy(family.tokenizer)
    encoder = HiggsEncoder(family.settings, tokenizer)
    sample = Sample("s1", (turn("user", Text("hello")), turn("assistant", CLIP, trained=True)), source="x")
    encoder.check(sample, lambda _: 10)
    tokenizer.chat_template = family.tokenizer.chat_template.replace("{{- item.text | trim -}}", "")
    said = r"sample 's1' \(x\): the chat template of .* drops or changes the words of messages\[1\] \(user\)"
    with pytest.raises(UserError, match=said):
        HiggsEncoder(family.settings, tokenizer).check(sample, lambda _: 10)
    with pytest.raises(UserError, match=said):  # what of other samples of its shape was not seen
        encoder.example(sample, lambda _: torch.zeros(10, 8, dtype=torch.int64))


def test_codes_and_lengths_that_do_not_fit_are_refused(family: HiggsAudioV2) -> None:
    sample = Sample("s1", (turn("user", Text("hello")), turn("assistant", CLIP, trained=True)), source="x")
    with pytest.raises(UserError, match=r"codes of a.wav are \(10, 4\).* 8 codebooks of 1024"):
        family.example(sample, lambda _: torch.zeros(10, 4, dtype=torch.int64))
    with pytest.raises(UserError, match="largest value of 1024"):
        family.example(sample, lambda _: torch.full((10, 8), 1024))
    limit = family.settings.max_position_embeddings
    with pytest.raises(UserError, match=rf"it takes \d+ positions, the model has {limit}"):
        family.example(sample, lambda _: torch.zeros(limit, 8, dtype=torch.int64))


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_measured_whole_before_training(
    family: HiggsAudioV2, task: str, codes: Callable[[Path], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = samples(task)[0]
    length = len(family.example(sample, codes).input_ids)

    def frames(path: Path) -> int:
        return len(codes(path))

    monkeypatch.setattr(family.settings, "max_position_embeddings", length)
    family.check(sample, frames)
    monkeypatch.setattr(family.settings, "max_position_embeddings", length - 1)
    with pytest.raises(BadSample, match=rf"it takes {length} positions, the model has {length - 1}: shorten its text"):
        family.check(sample, frames)


def test_a_batch_key_that_the_model_would_swallow_is_refused(
    family: HiggsAudioV2, model: Any, codes: Callable[[Path], Tensor]
) -> None:
    batch = family.collate([family.example(samples(TASKS[0])[0], codes)])
    batch.inputs["audio_ids"] = batch.inputs.pop("audio_input_ids")
    with pytest.raises(
        UserError, match=r"has 'audio_ids', which HiggsAudioV2Model.forward does not take.*audio_input_ids"
    ):
        family.losses(model, batch)


def test_checkpoints_that_cannot_be_trained_are_refused(demo_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder, and not a hub id"):
        load_family(ModelConfig(path="/no/such/model"))
    with pytest.raises(UserError, match=r"without config\.json"):
        load_family(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "higgs_audio"}')
    with pytest.raises(UserError, match=r"a Higgs Audio v2 in the format of its authors' own code"):
        load_family(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_family(ModelConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match=r"stream_weights has \['speech'\]"):
        load_family(ModelConfig(path=str(demo_checkpoint / "model"), stream_weights={"speech": 1.0}))
    with pytest.raises(UserError, match="cannot be imported"):
        load_family(ModelConfig(path=str(demo_checkpoint / "model"), family="no.such:Family"))


def test_a_checkpoint_without_text_head_is_not_trained_from_random_numbers(
    demo_checkpoint: Path, tmp_path: Path
) -> None:
    bare = HiggsAudioV2ForConditionalGeneration.from_pretrained(demo_checkpoint / "model")
    bare.save_pretrained(tmp_path)
    for file in (demo_checkpoint / "model").iterdir():
        if not (tmp_path / file.name).exists():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="no text head"):
        load_family(ModelConfig(path=str(tmp_path))).load_model()
    load_family(ModelConfig(path=str(tmp_path), stream_weights={"text": 0.0})).load_model()


@pytest.mark.parametrize("adapted", [False, True])
def test_activation_checkpointing_changes_no_gradient(
    demo_checkpoint: Path, codes: Callable[[Path], Tensor], adapted: bool
) -> None:
    from rawloop.adapters.config import AdapterConfig
    from rawloop.adapters.lora import add_adapter

    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        family = load_family(ModelConfig(path=str(demo_checkpoint / "model"), activation_checkpointing=recompute))
        model = family.load_model().train()
        if adapted:
            model = add_adapter(model, AdapterConfig(dropout=0.1), [])
        batch = family.collate([family.example(samples(TASKS[0])[0], codes)])
        torch.manual_seed(1)
        losses = family.losses(model, batch)
        torch.stack([loss.total for loss in losses.values()]).sum().backward()  # type: ignore[no-untyped-call]
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert set(gradients[0]) == set(gradients[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-6)


# -- what the checks ask -----------------------------------------------------------------------------------------


def two_of_each(family: HiggsAudioV2, codes: Callable[[Path], Tensor]) -> list[Any]:
    return [family.example(sample, codes) for task in TASKS for sample in samples(task)]


def test_the_stop_tokens_are_required_and_what_nobody_says_is_shown(
    family: HiggsAudioV2, demo_checkpoint: Path
) -> None:
    specials = {(special.stream, special.name): special for special in family.special_targets()}
    required = {key for key, special in specials.items() if special.required}
    assert required == {("audio", "EOS"), ("text", "<|audio_eos|>"), ("text", "<|eot_id|>")}
    assert {key for key in specials if key not in required} == {
        ("audio", "BOS"),
        ("text", "<|reserved_special_token_6|>"),
    }
    assert specials["audio", "EOS"].id == EOS
    assert family.tokenizer.convert_ids_to_tokens(specials["text", "<|eot_id|>"].id) == "<|eot_id|>"
    audio_only = load_family(ModelConfig(path=str(demo_checkpoint / "model"), stream_weights={"text": 0.0}))
    assert {special.stream for special in audio_only.special_targets()} == {"audio"}
    assert set(audio_only.chance()) == {"audio"}


def test_chance_is_the_loss_of_uniform_logits(
    family: HiggsAudioV2, model: Any, codes: Callable[[Path], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = family.collate(two_of_each(family, codes)[:1])
    with torch.no_grad():
        flat = {stream: torch.zeros_like(rows) for stream, rows in family.logits(model, batch).items()}
    monkeypatch.setattr(family, "logits", lambda *_: flat)
    losses = family.losses(model, batch)
    for stream, chance in family.chance().items():
        assert float(losses[stream].total) / losses[stream].targets == pytest.approx(chance, rel=1e-6)


@pytest.mark.parametrize(("task", "refs_in_scene"), CASES)
def test_pieces_add_up_to_the_example_and_name_who_speaks(
    family: HiggsAudioV2, codes: Callable[[Path], Tensor], task: str, refs_in_scene: bool
) -> None:
    for sample in samples(task, refs_in_scene):
        example = family.example(sample, codes)
        pieces = family.pieces(example)
        assert sum(piece.positions for piece in pieces) == len(example.input_ids)
        targets = family.collate([example]).targets
        for stream in family.streams:
            assert sum(piece.targets for piece in pieces if piece.stream == stream) == targets[stream]
        clips = [piece for piece in pieces if piece.stream == "audio"]
        assert [piece.text for piece in clips] == [
            f"clip of {len(codes(path))} frames" for path in sample.audio_paths()
        ]
        assert [piece.targets > 0 for piece in clips] == [False] * (len(clips) - 1) + [True]
        assert [p.text for p in pieces if p.stream == "text" and p.targets] == ["<|audio_eos|><|eot_id|>"]
        whole = "".join(piece.text for piece in pieces if piece.stream == "text")
        placeholder = family.tokenizer.convert_ids_to_tokens(family.settings.audio_token_id)
        chat = family.tokenizer.apply_chat_template(family.encoder.conversation(sample), tokenize=False)
        assert whole == chat.replace(placeholder, "")
        assert pieces[0].role == "system"
        assert {piece.role for piece in pieces} >= {"system", "user", "assistant"}
        assert all(piece.role == "scene" for piece in clips[:-1]) == (refs_in_scene or len(clips) == 1)


def test_without_the_text_stream_no_piece_of_text_has_targets(
    demo_checkpoint: Path, codes: Callable[[Path], Tensor]
) -> None:
    audio_only = load_family(ModelConfig(path=str(demo_checkpoint / "model"), stream_weights={"text": 0.0}))
    pieces = audio_only.pieces(audio_only.example(samples(TASKS[0])[0], codes))
    assert [piece.stream for piece in pieces if piece.targets] == ["audio"]


def test_perturbing_changes_all_from_the_middle_on_and_nothing_before(
    family: HiggsAudioV2, codes: Callable[[Path], Tensor]
) -> None:
    batch = family.collate(two_of_each(family, codes))
    other, earlier, contexts = family.perturb(batch)
    ids, changed = batch.inputs["input_ids"], batch.inputs["input_ids"] != other.inputs["input_ids"]
    audio = torch.isin(ids, torch.tensor([family.settings.audio_token_id, family.settings.audio_delay_token_id]))
    codes_changed = batch.inputs["audio_input_ids"] != other.inputs["audio_input_ids"]
    assert torch.equal(codes_changed.any(2), codes_changed.all(2))
    assert int(other.inputs["audio_input_ids"].max()) < family.settings.codebook_size
    changed[audio] = codes_changed.all(2)[batch.inputs["audio_input_ids_mask"]]
    others = other.inputs["input_ids"]
    assert torch.equal(audio, torch.isin(others, ids[audio]))  # no place for a code is lost, none is added
    length = ids.shape[1]
    for row, columns in enumerate(changed):
        cut = int(columns.nonzero()[0])
        assert columns[cut:].all()
        stream = family.streams[row % 2]
        own = batch.labels[stream].positions + 1
        own = own[own // length == row] % length
        assert cut == int(own[(len(own) - 1) // 2])
        for stream, labels in batch.labels.items():
            mine = labels.positions // length == row
            assert torch.equal(earlier[stream][mine], labels.positions[mine] % length < cut)
    assert all(flags.any() and not flags.all() for flags in earlier.values())
    ((what, (context, later)),) = contexts.items()
    assert what == "tokens and codes"
    assert torch.equal((context.inputs["input_ids"] == ids)[~audio], changed[~audio])
    same_codes = context.inputs["audio_input_ids"] == batch.inputs["audio_input_ids"]
    assert torch.equal(same_codes.all(2)[batch.inputs["audio_input_ids_mask"]], changed[audio])
    assert all(torch.equal(later[stream], ~flags) for stream, flags in earlier.items())


def test_a_perturbed_batch_shows_what_each_prediction_sees(
    family: HiggsAudioV2, model: Any, codes: Callable[[Path], Tensor]
) -> None:
    batch = family.collate(two_of_each(family, codes)[:2])
    other, earlier, contexts = family.perturb(batch)
    with torch.no_grad():
        first, second = family.logits(model, batch), family.logits(model, other)
        third = family.logits(model, contexts["tokens and codes"].batch)
    for stream, flags in earlier.items():
        assert torch.equal(first[stream][flags], second[stream][flags])
        for changed in (second, third):
            moved = (first[stream][~flags] != changed[stream][~flags]).flatten(1).any(1)
            assert moved.all()


@pytest.mark.parametrize("further", [1, 2, -1])
def test_labels_of_another_shift_are_placed_by_their_own_tokens(
    family: HiggsAudioV2, codes: Callable[[Path], Tensor], further: int
) -> None:
    """Predicted from further right, a target is seen by its own prediction, and counts as earlier all the same."""
    batch = family.collate(two_of_each(family, codes)[:2])
    right = family.perturb(batch).earlier
    moved = {stream: pair._replace(positions=pair.positions + further) for stream, pair in batch.labels.items()}
    wrong = family.perturb(Batch(batch.inputs, moved, batch.targets, batch.ids)).earlier
    for stream in family.streams:
        assert torch.equal(right[stream], wrong[stream])
