"""Phi-4-multimodal: what the processor writes, clips that hear no padding, its own speech adapter, and a whole run."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Phi4MultimodalConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    Phi4MultimodalProcessor,
    PreTrainedTokenizerFast,
)

from rawloop.adapters.lora import quiet
from rawloop.audio import load_audio
from rawloop.cli import main
from rawloop.contracts import IGNORE, Audio, Sample, Text, Turn
from rawloop.demo import SPEECH
from rawloop.diagnose.causality import probe
from rawloop.errors import UserError
from rawloop.families import ModelConfig, load_family
from rawloop.families.phi4_multimodal import FRAMES, SIZES, SOUND, Phi4Multimodal
from rawloop.records import read_events, read_metrics
from rawloop.settings import SamplingConfig

CLIPS = sorted((SPEECH / "eval").glob("*.flac"))
CONFIGS = Path(__file__).parent.parent.parent / "configs"
SPECIAL = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|image|>", "<|audio|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% for part in message['content'] %}"
    "{{ '<|audio|>' if part['type'] == 'audio' else part['text'] }}{% endfor %}{{ '<|end|>' }}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else eos_token }}"
)
SPEECH_LORA = r"model.layers.\d+.((self_attn.(qkv|o)_proj)|(mlp.(gate_up|down)_proj))"


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + 16, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["What is said?"] * 3, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    names = {"image_token": "<|image|>", "audio_token": "<|audio|>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=names, **ends)
    wrapped.chat_template = TEMPLATE
    return wrapped


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Phi-4-multimodal with random weights, and beside them a speech adapter, as transformers has."""
    folder = tmp_path_factory.mktemp("phi4")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    Phi4MultimodalFeatureExtractor(feature_size=16).save_pretrained(folder)
    text, end, image, audio = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>", "<|image|>", "<|audio|>"])
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    hears = {"ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "nemo_conv_channels": 8}
    config = Phi4MultimodalConfig(
        vocab_size=len(tokenizer),
        **(sizes | {"hidden_size": 32}),
        num_hidden_layers=2,
        num_key_value_heads=1,
        max_position_embeddings=400,
        original_max_position_embeddings=400,
        bos_token_id=text,
        eos_token_id=[text, end],
        pad_token_id=text,
        tie_word_embeddings=True,
        audio_config={**sizes, **hears, "num_blocks": 1, "input_size": 16, "audio_token_id": audio},
        vision_config={**sizes, "num_hidden_layers": 2, "image_size": 56, "crop_size": 56, "image_token_id": image},
        dtype="float32",
    )
    torch.manual_seed(0)
    model = Phi4MultimodalForCausalLM(config)
    model.save_pretrained(folder)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=SPEECH_LORA, task_type="CAUSAL_LM", init_lora_weights=False)
    with quiet():
        get_peft_model(model, lora).save_pretrained(folder / "speech-lora")
    file = folder / "speech-lora" / "adapter_model.safetensors"
    save_file({name.removeprefix("base_model.model."): x for name, x in load_file(file).items()}, file)
    return folder


@pytest.fixture(scope="module")
def family(checkpoint: Path) -> Phi4Multimodal:
    loaded = load_family(ModelConfig(path=str(checkpoint)))
    assert isinstance(loaded, Phi4Multimodal)
    assert type(load_family(ModelConfig(path=str(checkpoint), family="audio_chat"))) is Phi4Multimodal
    return loaded


def said(*clips: Path, answer: str = "Good morning.") -> Sample:
    question = Turn("user", (*map(Audio, clips), Text("What is said?")))
    return Sample("s1", (question, Turn("assistant", (Text(answer),), trained=True)), source="x.jsonl line 3")


def no_codes(path: Path) -> Tensor:
    raise AssertionError(path)


def test_inputs_equal_the_processors(family: Phi4Multimodal, checkpoint: Path) -> None:
    """transformers' processor wants torchvision for its images; its other parts are run as they are."""

    class WithoutImages(Phi4MultimodalProcessor):  # type: ignore[misc]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return None if name == "image_processor" else super().check_argument_for_proper_class(name, argument)

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    extractor = Phi4MultimodalFeatureExtractor.from_pretrained(checkpoint)
    theirs = WithoutImages(None, extractor, tokenizer, chat_template=tokenizer.chat_template)
    for clips in ((CLIPS[0],), (CLIPS[1], CLIPS[2]), ()):
        ours = family.example(said(*clips), no_codes)
        sounds = [{"type": "audio", "audio": load_audio(clip, 16000).numpy()} for clip in clips]
        chat = [
            {"role": "user", "content": [*sounds, {"type": "text", "text": "What is said?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Good morning."}]},
        ]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        expected = theirs.apply_chat_template(chat, **options)
        assert torch.equal(ours.input_ids, expected["input_ids"][0])
        assert set(ours.features) == ({SOUND, SIZES, FRAMES} if clips else set())
        if clips:
            assert torch.equal(ours.features[SIZES], expected[SIZES])
            heard = ours.features[FRAMES]
            assert torch.equal(expected.get(FRAMES, torch.ones_like(heard)), heard)
            for clip, length in enumerate(heard.sum(1).tolist()):
                assert torch.equal(ours.features[SOUND][clip, :length], expected[SOUND][clip, :length])


def test_exactly_what_a_trained_turn_says_and_its_end_are_targets(family: Phi4Multimodal) -> None:
    example = family.example(said(CLIPS[0]), no_codes)
    tokenizer = family.processor.tokenizer
    assert tokenizer.decode(example.input_ids[example.labels != IGNORE]) == "Good morning.<|end|>"
    assert tokenizer.decode(example.input_ids).endswith("<|assistant|>Good morning.<|end|><|endoftext|>")
    assert int((example.input_ids == family.encoder.audio_token).sum()) == int(example.features[SIZES])
    assert [special.name for special in family.special_targets()] == ["<|end|>"]


def exact(family: Phi4Multimodal) -> Any:
    """The model in float64 throughout, with weights so large that its encoder hears differences."""
    model: Any = family.load_model().double()
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                whole: Any = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
                whole.weight = norm.weight
                setattr(parent, name, whole)
    torch.manual_seed(0)
    for weight in model.model.embed_tokens_extend.audio_embed.parameters():
        if weight.dim() > 1:
            nn.init.xavier_normal_(weight)
    return model.double().train()


def test_losses_equal_the_models_own_for_a_clip_alone_and_padding_is_not_heard(family: Phi4Multimodal) -> None:
    model = exact(family)
    clips = sorted(CLIPS, key=lambda path: len(load_audio(path, 16000)))
    examples = [family.example(said(clip), no_codes) for clip in (clips[0], clips[-1])]

    def theirs(*chosen: Any) -> float:
        batch = family.collate([*chosen])
        labels = torch.full_like(batch.inputs["input_ids"], IGNORE)
        labels.flatten()[batch.labels["text"].positions + 1] = batch.labels["text"].targets
        inputs = {n: x.double() if x.is_floating_point() else x for n, x in batch.inputs.items()}
        logits = model(**inputs).logits  # its own loss is in float32
        return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"))

    def ours(*chosen: Any) -> float:
        return float(family.losses(model, family.collate([*chosen]))["text"].total)

    with torch.no_grad():
        for example in examples:
            assert ours(example) == pytest.approx(theirs(example), rel=1e-12)
        alone = ours(examples[0]) + ours(examples[1])
        assert ours(*examples) == pytest.approx(alone, rel=1e-12)
        assert theirs(*examples) != pytest.approx(alone, rel=1e-6)  # the reason for encoding clips one by one


def test_batching_and_padding_change_no_gradient(family: Phi4Multimodal) -> None:
    samples = [said(*CLIPS[k : k + k % 3]) for k in range(5)]
    examples = [family.example(sample, no_codes) for sample in [*samples, said(CLIPS[1], answer="Again.")]]

    def gradients(groups: list[list[Any]]) -> dict[str, Tensor]:
        model = exact(family)
        for group in groups:
            torch.autograd.backward(family.losses(model, family.collate(group))["text"].total)
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    whole, split = gradients([examples]), gradients([[one] for one in examples])
    assert set(whole) == set(split)
    assert any("audio_embed.encoder" in name for name in whole)
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, split[name], rtol=1e-10, atol=1e-14 * largest, msg=name)


def test_a_packed_row_has_the_same_loss(family: Phi4Multimodal, checkpoint: Path) -> None:
    packed = load_family(ModelConfig(path=str(checkpoint)))
    assert isinstance(packed, Phi4Multimodal)
    packed.packing = True
    examples = [family.example(said(*CLIPS[k : k + k % 3]), no_codes) for k in range(5)]
    model = exact(packed).eval()
    with torch.no_grad():
        rows, padded = (one.losses(model, one.collate(examples))["text"] for one in (packed, family))
    assert float(rows.total) == pytest.approx(float(padded.total), rel=1e-12)
    assert probe(packed, model, packed.collate(examples), nullcontext)["text"].outcome() == "PASS"


def test_no_prediction_notices_what_comes_later_and_each_notices_the_clip(family: Phi4Multimodal) -> None:
    batch = family.collate([family.example(said(*CLIPS[:2]), no_codes), family.example(said(CLIPS[3]), no_codes)])
    moved = probe(family, family.load_model(), batch, nullcontext)["text"]
    assert (moved.outcome(), list(moved.later)) == ("PASS", ["tokens", "clips"])


def test_what_is_generated_is_prompted_as_in_training(family: Phi4Multimodal) -> None:
    model: Any = family.load_model()
    learnt = said(*CLIPS[:2], answer="No, two.")
    batch = family.collate([family.example(learnt, no_codes)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        torch.autograd.backward(family.losses(model, batch)["text"].total)
        optimizer.step()
        optimizer.zero_grad()
    (found,) = family.generate(model.eval(), [learnt], no_codes, [20], SamplingConfig(temperature=0.0))
    assert (found.text, found.stopped) == ("No, two.", True)


def test_clips_are_refused_by_the_models_positions(family: Phi4Multimodal) -> None:
    assert family.encoder.longest == 400 * 0.08
    long, short = said(CLIPS[0]), said(CLIPS[0], CLIPS[1])
    family.check(short, lambda path: 12 * 16000)
    with pytest.raises(UserError, match=r"it takes 42\d positions, the model has 400"):
        family.check(short, lambda path: 16 * 16000)
    with pytest.raises(UserError, match=r"lasts 33\.00 s, the model hears clips of 0\.1 to 32 s"):
        family.check(long, lambda path: 33 * 16000)


def test_a_config_and_a_tokenizer_of_two_checkpoints_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    settings = json.loads((folder / "config.json").read_text())
    settings["audio_config"]["audio_token_id"] = 3
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="the model's config has the audio token 3, the processor writes"):
        load_family(ModelConfig(path=str(folder)))


@pytest.fixture
def spoken(tmp_path: Path) -> Path:
    """A folder with train and eval: what is said in some of the bundled clips, and a question without a clip."""
    for split, number in (("train", 5), ("eval", 3)):
        folder = tmp_path / split
        folder.mkdir()
        chats = [[{"role": "user", "content": "Well?"}, {"role": "assistant", "content": f"Well, {split}."}]]
        for path in sorted((SPEECH / split).glob(f"{split}-en-*.flac"))[:number]:
            shutil.copy(path, folder)
            content: Any = [{"type": "audio", "path": path.name}, {"type": "text", "text": "What is said?"}]
            chats.append([{"role": "user", "content": content}, {"role": "assistant", "content": path.stem}])
        (folder / "data.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return tmp_path


def merged_with_speech(checkpoint: Path, folder: Path) -> Path:
    command = ["merge", f"--adapter={checkpoint / 'speech-lora'}", f"--model.path={checkpoint}"]
    assert main([*command, f"--output={folder}"]) == 0
    return folder


def test_a_prompt_is_the_same_under_autocast(family: Phi4Multimodal) -> None:
    sample = Sample("a", (Turn("user", (Audio(CLIPS[0]),)), Turn("assistant", (Text("yes"),), trained=True)))
    expected = family.encoder.prompt(sample)[SOUND]
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(family.encoder.prompt(sample)[SOUND], expected)


def test_its_own_speech_adapter_is_merged(family: Phi4Multimodal, checkpoint: Path, tmp_path: Path) -> None:
    merged: Any = load_family(ModelConfig(path=str(merged_with_speech(checkpoint, tmp_path / "hears"))))
    model: Any = family.load_model()
    base = dict(model.named_parameters())
    lora = load_file(checkpoint / "speech-lora" / "adapter_model.safetensors")
    changed = 0
    for name, weight in merged.load_model().named_parameters():
        stem = name.removesuffix(".weight")
        expected = base[name]
        if f"{stem}.lora_A.weight" in lora:
            expected = expected + 2.0 * lora[f"{stem}.lora_B.weight"] @ lora[f"{stem}.lora_A.weight"]
            changed += 1
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    assert changed == 8  # four matrices of two layers


def recipe(checkpoint: Path, spoken: Path) -> list[str]:
    """The two files and the options of a run of two steps."""
    options: dict[str, Any] = {
        "device": "cpu",
        "model.path": checkpoint,
        "data.train": spoken / "train",
        "data.eval": spoken / "eval",
        "data.max_seconds": 30.0,
        "data.num_workers": 0,
        "train.max_steps": 2,
        "train.accumulation": 1,
        "optim.warmup_steps": 0,
        "checkpoint.save_every": 1,
        "checks.expect_chance": True,
    }
    recipes = [f"--config={CONFIGS / name}.yaml" for name in ("audio_chat_lora", "phi4_multimodal_lora")]
    return [*recipes, *(f"--{key}={value}" for key, value in options.items())]


LAST = "checkpoints/step-00000002/adapter"


@pytest.mark.parametrize(("mode", "found"), [("fp32", "PASS"), ("bf16", "UNSEEN"), ("native_fp16", "UNSEEN")])
def test_the_recipe_runs_two_steps(mode: str, found: str, checkpoint: Path, spoken: Path, tmp_path: Path) -> None:
    """Random weights hardly hear: clips move predictions by less than 16 bits resolve."""
    run = tmp_path / "run"
    assert main(["train", *recipe(checkpoint, spoken), f"--output={run}", f"--precision.mode={mode}"]) == 0
    assert [line["step"] for line in read_metrics(run) if "eval_loss" in line] == [0, 2]
    assert not [event for event in read_events(run) if event["kind"] in ("skip", "warning", "fallback")]
    assert f"causality: text {found}" in [event["reason"] for event in read_events(run) if event["kind"] == "check"]
    trained = load_file(run / LAST / "adapter_model.safetensors")
    moved = {name for name, value in trained.items() if "lora_B" in name and value.any()}
    assert len(moved) == 8
    assert not [name for name in moved if "embed_tokens_extend" in name]


@pytest.mark.slow
def test_a_merged_model_is_trained_resumed_heard_and_merged(
    checkpoint: Path, spoken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, resumed, chosen = tmp_path / "run", tmp_path / "resumed", recipe(checkpoint, spoken)
    chosen.append(f"--model.path={merged_with_speech(checkpoint, tmp_path / 'hears')}")
    assert main(["train", *chosen, f"--output={run}"]) == 0
    trained = load_file(run / LAST / "adapter_model.safetensors")
    again = f"--resume={run / 'checkpoints' / 'step-00000001'}"
    assert main(["train", *chosen, f"--output={resumed}", again]) == 0
    restored = load_file(resumed / LAST / "adapter_model.safetensors")
    assert all(torch.equal(value, restored[name]) for name, value in trained.items())
    capsys.readouterr()
    generated = ["generate", str(run), f"--lines={spoken / 'eval' / 'data.jsonl'}", "--max_tokens=4"]
    assert main([*generated, f"--output={tmp_path / 'answers'}"]) == 0, capsys.readouterr().err
    assert main(["merge", f"--adapter={run / LAST}", f"--output={tmp_path / 'merged'}"]) == 0
    assert load_family(ModelConfig(path=str(tmp_path / "merged"))).load_model()
    capsys.readouterr()
    read = [word for word in chosen if word.startswith(("--config", "--model", "--data.train", "--data.eval"))]
    assert main(["inspect", *read]) == 0
    assert "(audio, " in capsys.readouterr().out
