"""`rawloop train-higgs`: the flags of the field reports' scripts, the command they become, and two steps with them."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rawloop.config import RunConfig, parse
from rawloop.records import read_metrics

Door = Callable[..., Any]

# Field report A, B and D, letter by letter in their flags. The paths are made up.
MODEL = "--model_path bosonai/higgs-audio-v2-generation-3B-base --audio_tokenizer_path bosonai/higgs-audio-v2-tokenizer"
REPORT_A = f"""{MODEL} --train_data_file data/train.json --validation_split 0.005 --output_dir ./out
    --num_train_epochs 3 --per_device_train_batch_size 4 --per_device_eval_batch_size 2 --learning_rate 1e-5
    --warmup_steps 500 --logging_steps 50 --save_steps 10000 --eval_steps 60000 --bf16 --report_to tensorboard
    --logging_dir ./logs --use_lora --lora_rank 16 --lora_alpha 32 --lora_dropout 0.1"""
REPORT_D = f"""{MODEL} --train_data_dir "my data" --eval_data_dir data/eval --task_type zero_shot_voice_cloning
    --ref_audio_in_system_message --fp16 --gradient_accumulation_steps 4 --per_device_train_batch_size 2
    --lr_scheduler_type cosine_with_restarts --weight_decay 0.01 --max_grad_norm 0.5 --gradient_checkpointing
    --dataloader_num_workers 4 --dataloader_pin_memory false --remove_unused_columns=false --seed 7 --freeze_llm
    --freeze_audio_tower --freeze_audio_encoder_proj --ddp_find_unused_parameters False --ddp_broadcast_buffers False"""


def in_bash(command: str) -> list[str]:
    """The words of a command as bash splits it."""
    script = f"rawloop() {{ printf '%s\\0' \"$@\"; }}; {command}"
    return subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True).stdout.split("\0")[:-1]


def printed(out: str) -> list[str]:
    """The arguments of the command that was printed."""
    words = in_bash(out.partition("this is:\n")[2].partition("\nbefore it")[0])
    assert words[0] == "train"
    return words


def printed_config(out: str) -> RunConfig:
    """The config of the command that was printed."""
    return parse(printed(out)[1:], "rawloop train")[0]


@pytest.fixture
def dry(door: Door) -> Door:
    """Give `dry(line)`: what --dry-run prints, and the config of the command in it."""

    def run(line: str) -> tuple[str, RunConfig]:
        done = door("train-higgs", *shlex.split(line), "--dry-run")
        assert (done.code, done.err) == (0, ""), done.err
        return done.out, printed_config(done.out)

    return run


def test_report_a_starts_with_its_two_cadences(dry: Door) -> None:
    out, config = dry(REPORT_A)
    assert (config.checkpoint.save_every, config.evaluation.every, config.evaluation.enabled) == (10000, 60000, True)
    assert (config.data.train, config.data.eval) == ("data/train.json", None)
    assert (config.data.eval_share, config.data.eval_by, config.data.task) == (0.005, "sample", None)
    assert (config.adapter.mode, config.adapter.rank, config.adapter.alpha, config.adapter.dropout) == (
        "lora",
        16,
        32,
        0.1,
    )
    assert config.adapter.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (config.train.epochs, config.train.batch_size, config.evaluation.batch_size) == (3.0, 4, 2)
    assert (config.optim.lr, config.optim.warmup_steps, config.optim.schedule) == (1e-5, 500, "linear")
    assert (config.precision.mode, config.records.report_to, config.seed, config.output) == (
        "bf16",
        ["tensorboard"],
        42,
        "./out",
    )
    assert (config.checkpoint.keep_last, config.ddp.find_unused_parameters) == (3, "auto")
    assert "  --logging_dir ./logs: TensorBoard's files lie in tensorboard/" in out
    assert "  optim.schedule: linear (--lr_scheduler_type)" in out


@pytest.mark.parametrize("flag", ["--disable_eval", "--disable_evaluation"])
def test_evaluation_can_be_switched_off_alone(dry: Door, flag: str) -> None:
    before, after = dry(REPORT_A)[1], dry(f"{REPORT_A} {flag}")[1]
    assert (before.evaluation.enabled, after.evaluation.enabled) == (True, False)
    after.evaluation.enabled = True
    assert after == before


def test_report_d_means_what_it_meant(dry: Door) -> None:
    out, config = dry(REPORT_D)
    assert (config.data.train, config.data.eval, config.data.task) == (
        "my data",
        "data/eval",
        "zero_shot_voice_cloning",
    )
    assert (config.data.refs_in_scene, config.data.num_workers) == (True, 4)
    assert (config.precision.mode, config.adapter.mode, config.adapter.dropout) == ("amp_fp16", "full", 0.0)
    assert config.adapter.freeze[0] == "model.layers.*.self_attn.*"
    assert (config.train.accumulation, config.train.batch_size) == (4, 2)
    assert (config.optim.schedule, config.optim.weight_decay, config.optim.max_norm) == ("cosine", 0.01, 0.5)
    assert (config.ddp.find_unused_parameters, config.ddp.broadcast_buffers, config.seed) == (False, False, 7)
    assert config.model.activation_checkpointing
    assert "--freeze_audio_tower true: the model of transformers has no audio tower" in out
    prepare = in_bash(out.partition("if the data change:\n")[2])
    assert prepare[0] == "prepare"
    assert parse(prepare[1:], "rawloop prepare")[0].data.train == "my data"


def test_what_the_scripts_do_without_flags(dry: Door) -> None:
    out, config = dry(f"{MODEL} --train_data_dir data/train")
    assert (config.adapter.mode, config.evaluation.enabled) == ("full", False)
    assert (config.data.task, config.output, config.seed) == ("single_speaker_smart_voice", "./output", 42)
    assert (config.precision.mode, config.optim.lr, config.train.epochs, config.train.batch_size) == (
        "auto",
        5e-5,
        3.0,
        4,
    )
    assert "(no --eval_data_dir, --eval_data_file or --validation_split: the scripts do not evaluate then)" in out


def test_flags_that_meet_others(dry: Door) -> None:
    out, config = dry(
        f"{MODEL} --train_data_dir d --eval_data_dir e --validation_split 0.1 --lora_rank 4 --warmup_ratio 0.1"
    )
    assert (config.data.eval, config.data.eval_share, config.adapter.rank) == (None, 0.1, 16)
    assert (config.optim.warmup_steps, config.optim.warmup_ratio) == (0, 0.1)
    assert "--eval_data_dir e: validation_split is above 0, and then the scripts do not read it" in out
    assert "--lora_rank 4: without --use_lora all weights are trained" in out
    out, config = dry(
        f"{MODEL} --train_data_dir d --use_lora --freeze_llm --eval_steps 5 --eval_steps 6 --seed 3 --data.codes c"
    )
    assert (config.adapter.freeze, config.evaluation.every, config.seed, config.data.codes) == ([], 6, 3, "c")
    assert "--freeze_llm true: LoRA trains beside frozen weights anyway" in out
    assert "given twice, and the last counts: --eval_steps" in out
    _, config = dry(f"{MODEL} --train_data_dir d --optim.warmup_ratio 0.1 --optim.warmup_steps 0")  # over the default
    assert (config.optim.warmup_steps, config.optim.warmup_ratio) == (0, 0.1)
    _, config = dry(f"{MODEL} --train_data_dir d '--data.codes=my codes'")
    assert config.data.codes == "my codes"
    _, config = dry(f"{MODEL} --train_data_dir d --freeze_llm --freeze_text_head")
    assert config.adapter.freeze[-1] == "text_lm_head.*"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--use_lora", "--model_path and --train_data_dir or --train_data_file must be given"),
        (f"{MODEL} --train_data_dir d --learning_rate 1 --optim.lr 2", "--learning_rate and --optim.lr both decide"),
        (f"{MODEL} --train_data_dir d --lr 1 --foo", "--lr (did you mean 'optim.lr'?), --foo"),
        (f"{MODEL} --train_data_dir d --bf16 --fp16", "both decide 'precision.mode': keep one"),
        (f"{MODEL} --train_data_dir d --learning_rate fast", "--learning_rate is 'fast': it must be a number"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_a_line(refusal: Callable[..., str], line: str, words: str) -> None:
    assert words in refusal("train-higgs", *shlex.split(line), "--dry-run")


def test_values_that_rawloop_refuses_are_refused_before_anything_runs(door: Door) -> None:
    done = door("train-higgs", *shlex.split(f"{MODEL} --train_data_dir d --learning_rate -1"))
    assert done.code == 2
    assert "optim.lr is -1.0: it must be a number above 0" in done.err


def test_help_has_every_flag_and_needs_no_torch(door: Door) -> None:
    done = door("train-higgs", "--help")
    assert done.code == 0
    for text in ("--model_path", "model.path", "--dry-run", "--deepspeed"):
        assert text in done.out
    check = (
        "import sys; from rawloop.cli import main; main(['train-higgs', '--help']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)


@pytest.fixture
def demo_line(demo_checkpoint: Path, demo_data: Path, tmp_path: Path) -> str:
    """Flags for two steps on the demo."""
    return (
        f"--model_path {demo_checkpoint / 'model'} --audio_tokenizer_path {demo_checkpoint / 'codec'} --use_lora "
        f"--train_data_dir {demo_data / 'train'} --eval_data_dir {demo_data / 'eval'} --output_dir {tmp_path / 'run'} "
        "--max_steps 2 --per_device_train_batch_size 2 --logging_steps 1 --report_to none --device cpu "
    )


def test_without_codes_the_error_has_the_command_that_makes_them(
    door: Door, demo_line: str, demo_data: Path, tmp_path: Path
) -> None:
    codes = tmp_path / "my codes"
    done = door("train-higgs", *shlex.split(demo_line), "--data.codes", codes)
    assert done.code == 2
    found = re.search(r"has no codes yet: run `(.*)`, and then this command again", done.err)
    assert found
    command = in_bash(found[1])
    assert command[0] == "prepare"
    assert door(*command).code == 0
    config = parse(command[1:], "rawloop prepare")[0]
    assert config.data.codes == str(codes)
    assert any(codes.glob("*/codec.json"))


def losses(run: Path) -> list[tuple[Any, ...]]:
    """The losses that a run has recorded."""
    return [(line["step"], line.get("loss"), line.get("eval_loss")) for line in read_metrics(run)]


def test_two_steps_are_those_of_the_printed_command(
    door: Door, demo_line: str, demo_data: Path, tmp_path: Path
) -> None:
    done = door("train-higgs", *shlex.split(demo_line), "--data.codes", demo_data / "codes")
    assert done.code == 0, done.err
    assert "trained 2 steps, 4 samples" in done.out
    first = losses(tmp_path / "run")
    assert len(first) == 4  # two steps, and two evaluations
    shutil.rmtree(tmp_path / "run")
    assert door(*printed(done.out)).code == 0
    assert losses(tmp_path / "run") == first
    assert (tmp_path / "run" / "best" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_print_once(demo_line: str, demo_data: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "rawloop"]
    words = ["train-higgs", *shlex.split(demo_line), "--data.codes", str(demo_data / "codes")]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("this is:") == done.stdout.count("trained 2 steps, 8 samples") == 1
    assert "torchrun \\\n  --nproc_per_node=2 -m rawloop train" in done.stdout
    again = [*launch, "train-higgs", *shlex.split(demo_line), "--data.codes", str(tmp_path / "none")]
    done = subprocess.run(again, capture_output=True, text=True, timeout=280)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("rawloop train-higgs: ")]
    assert len(said) == 1  # torchrun's own table quotes it
    assert "has no codes yet" in said[0]
