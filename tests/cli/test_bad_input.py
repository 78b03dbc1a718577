"""Bad input through the real commands: one clear line, exit code 2, no traceback, nothing written over."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rawloop.checkpoint.run_folder import MARKS

Refusal = Callable[..., str]
Ranks = Callable[..., list[Any]]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below a folder with its bytes and its time of change."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture(autouse=True)
def output(tmp_path: Path) -> Iterator[Path]:
    """The run's output folder, with a file of the user's own; it must be found as it was."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    yield folder
    assert contents(folder) == before


# -- options and files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--optim.lrr", "1"], r"unknown key 'optim\.lrr' on the command line \(did you mean 'optim\.lr'\?\)"),
        (["--optim.lr", "abc"], r"optim\.lr is 'abc' \(from the command line\): it must be a number"),
        (["--model.path", "TMP/none"], r"model\.path is '.*/none': no such folder, and not a hub id \(owner/name\)"),
        (["--model.path", "owner/none"], r"model\.path is 'owner/none': no such folder, and the hub gave no such mod"),
        (
            ["--model.codec", "owner/none"],
            r"^model\.codec is 'owner/none': no such folder, and the hub gave no such model \(.*\): .*`hf download own",
        ),
        (["--model.path", "TMP/run"], r"model\.path is '.*/run', a folder without config\.json: give a folder"),
        (["--model.path", "TMP/run.yaml"], r"model\.path is '.*', a file: give the folder of the model"),
        (["--model.family", "higs_audio_v2"], r"'higs_audio_v2' \(did you mean 'higgs_audio_v2'\?\)"),
        (["--model.attention", "fast"], r"cannot be loaded: Specified `attn_implementation=\"fast\"`"),
        (["--model.attention", "flash_attention_2"], r"cannot be loaded: FlashAttention2 has been toggled on"),
        (["--model.stream_weights.video", "1"], r"stream_weights has \['video'\]: this model has the streams audio, "),
        (["--model.stream_weights.text", "-1"], r"stream_weights\.text is -1\.0: it must be a number, and not below 0"),
        (["--adapter.target_modules", "[qproj]"], r"has 'qproj', which matches no layer of the model; near: q_proj"),
        (["--adapter.freeze", "['*']"], r"no weight of the model is trainable: adapter\.mode is lora and adapter\.fre"),
        (["--adapter.alpha", "0"], r"adapter\.alpha is 0\.0: it must be above 0"),
        (["--train.batch_size", "9"], r"one step takes 9 samples \(1 process x train\.batch_size 9 x train\.accum"),
        (["--train.batch_size", "0"], r"train\.batch_size \(0\) and train\.accumulation \(1\) must be 1 or more"),
        (["--train.max_steps", "-1"], r"train\.max_steps \(-1\) must not be below 0"),
        (["--optim.beta2", "1"], r"optim\.beta2 is 1\.0: it must be at least 0 and below 1"),
        (["--optim.eps", "0"], r"optim\.eps is 0\.0: it must be a number above 0"),
        (["--ddp.timeout", "-1"], r"ddp\.timeout is -1\.0"),
        (["--ddp.static_graph", "true", "--train.accumulation", "2"], r"ddp\.static_graph is true and train\.accumu"),
        (["--device", "gpu"], r"device is 'gpu' \(from the command line\): it must be one of 'auto', 'cuda', 'mps'"),
        (
            ["--precision.mode", "fp8"],
            r"precision\.mode is 'fp8' .*: it must be one of 'auto', 'fp32', 'bf16', 'amp_fp1",
        ),
        (
            ["--precision.fallback", "bf16"],
            r"fallback is 'bf16' \(from the command line\): it must be a list such as '\[a, b\]'",
        ),
        (
            ["--precision.fallback", "[bf16,fp8]"],
            r"is '\[bf16,fp8\]' \(from the command line\): 'fp8' in it must be one of 'fp32', 'bf16',",
        ),
        (
            ["--precision.mode", "amp_fp16", "--precision.trainable_dtype", "fp16"],
            r"which trains fp32: GradScaler refuses them .*precision\.trainable_dtype from the command line\)$",
        ),
        (["--checks.batches", "0"], r"checks\.batches is 0: it must be 1 or more; set checks\.enabled to false"),
        (
            ["--checks.allow", "[chance]"],
            r"checks\.allow is '\[chance\]' .*: 'chance' in it must be one of 'leak', 'dead', 'bl",
        ),
        (["--records.report_to", "[wandb,wandb]"], r"records\.report_to names wandb 2 times: name it once"),
        (["--resume", "latest"], r"resume is 'latest', but '.*/run' has no checkpoint: start without --resume"),
        (["--resume", "TMP/none"], r"resume is '.*/none', which is no folder: name a checkpoint's folder, such as"),
        (["--resume", ""], r"resume is empty: say 'latest' or 'auto', or name a checkpoint's folder"),
        (["--output", "TMP/run.yaml"], r"output is '.*/run\.yaml', which is a file: name a folder"),
        (["--output", "TMP/run.yaml/x"], r"output is '.*', which cannot be created: Not a directory"),
        (["--data.train", "TMP/none"], r".*/none does not exist: give a folder with metadata\.json, or a JSON or JS"),
        (["--data.train", "TMP/run"], r".*/run has neither metadata\.json nor a \.jsonl file"),
        (["--data.train", "null"], r"data\.train is not set: give a folder with metadata\.json or a JSONL file$"),
        (["--data.eval", "null"], r"data\.eval is not set: .* or switch evaluation off with --evaluation\.enabled fa"),
        (["--data.codes", "TMP/none"], r".*/none has no codes: run `rawloop prepare` first"),
        (["--data.task", "singing"], r"data\.task is 'singing', which is no task: it must be one of single_speaker_"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings(refusal: Refusal, config: Path, tmp_path: Path, arguments: list[str], line: str) -> None:
    said = refusal("train", "--config", config, *(word.replace("TMP", str(tmp_path)) for word in arguments))
    assert re.search(line, said), said


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="this machine has a GPU")
def test_no_gpu(refusal: Refusal, config: Path) -> None:
    assert "torch sees no GPU here" in refusal("train", "--config", config, "--device", "cuda")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("optim: {lrr: 1}\n", "unknown key 'optim.lrr' in FILE (did you mean 'optim.lr'?)"),
        ("train: {max_steps: many}\n", "train.max_steps is 'many' (from FILE): it must be a whole number"),
        ("- a list\n", "FILE holds a list: it must hold keys and values such as `output: runs/x`"),
        ("seed: 1\nseed: 2\n", "FILE line 2: 'seed' stands in line 1 already: keep one"),
    ],
)
def test_config_files(refusal: Refusal, tmp_path: Path, text: str, line: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    assert refusal("train", "--config", file, "--output", tmp_path / "run") == line.replace("FILE", str(file))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["evaluate", "--checkpont", "best"], r"unknown key 'checkpont' .* \(did you mean 'checkpoint'\?\)"),
        (["evaluate", "--confg", "x"], r"unknown key 'confg' .* \(did you mean 'config'\?\)"),
        (["merge", "--adapter", "x"], "^--output must be given; `rawloop merge --help` lists all options$"),
        (["merge", "--adapter=x", "--output=y", "--base", "z"], r"option '--base' \(did you mean '--model\.path'\?\)"),
        (["merge", "--adapter=x", "--output=y", "--modl.path=z"], r"option '--modl\.path' \(did you mean '--model\.pa"),
    ],
)
def test_options_of_the_command_are_suggested(refusal: Refusal, arguments: list[str], line: str) -> None:
    said = refusal(*arguments)
    assert re.search(line, said), said


def test_words_that_are_not_utf8(refusal: Refusal, config: Path) -> None:
    word = os.fsdecode(b"runs/gr\xf6\xdfe")
    said = refusal("train", "--config", config, "--output", word)
    assert said == r"the argument b'runs/gr\xf6\xdfe' is not UTF-8: rename what it names"


@pytest.mark.parametrize("command", ["train", "report", "replay", "generate", "export"])
def test_a_word_that_is_too_long_for_a_path(refusal: Refusal, command: str, tmp_path: Path) -> None:
    options: dict[str, list[str]] = {"generate": ["--text", "a"], "export": ["--output", str(tmp_path / "new")]}
    said = refusal(command, "a" * 5000, *options.get(command, []))
    assert "a name is too long for the file system (aaa" in said or said.endswith("give values as --KEY VALUE")


def test_a_mistake_that_is_made_twice_is_told_once(refusal: Refusal, config: Path) -> None:
    twice = ["--checks.enabled", "-1", "--checks.enabled", "-1"]
    said = refusal("train", "--config", config, *twice)
    assert said == "checks.enabled is '-1' (from the command line): it must be true or false"


def test_a_value_of_several_lines_gives_one(refusal: Refusal, config: Path) -> None:
    assert "model.path is 'no such model': no such folder" in refusal("train", "--model.path", "no\nsuch\nmodel")


def test_the_folder_of_another_run_is_left_alone(refusal: Refusal, config: Path, tmp_path: Path) -> None:
    for mark in MARKS:
        other = tmp_path / f"other-{mark}"
        (other / mark).mkdir(parents=True) if mark in ("best", "checkpoints") else other.mkdir()
        (other / mark / "x" if (other / mark).is_dir() else other / mark).write_text("theirs")
        before = contents(other)
        said = refusal("train", "--config", config, "--output", other)
        assert said == (
            f"output is '{other}', which already holds a run ({mark}): it has no checkpoint to resume from: "
            "pass another --output, or delete the folder"
        )
        assert contents(other) == before


# -- data --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, demo_data: Path) -> Callable[..., Path]:
    """Give `folder(*samples)`: a data folder with one clip, `a.flac`, and these samples (or other content)."""

    def write(*samples: dict[str, Any], content: Any = None) -> Path:
        data = tmp_path / "data"
        data.mkdir()
        shutil.copy2(next(iter(sorted((demo_data / "train").glob("*.flac")))), data / "a.flac")
        (data / "empty.txt").write_text(" \n")
        (data / "metadata.json").write_text(json.dumps({"samples": samples} if content is None else content))
        return data

    return write


GOOD = {"id": "a", "audio_file": "a.flac", "transcript": "Hello."}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"items": []}, "metadata.json has no 'samples' (it has the keys items): metadata.json needs a list of sam"),
        ({"samples": []}, "metadata.json has no samples: a data set needs at least one"),
        ({"samples": {"a": 1}}, "metadata.json: 'samples' is {'a': 1} (dict): it must be a list"),
        ([GOOD, 3], "metadata.json record[1] is 3 (int): it must be an object"),
        ([GOOD | {"audio_file": "b.flac"}], "1 audio file is missing: 'b.flac' of "),
        ([GOOD | {"audio_file": ""}], "samples[0] (id 'a'): 'audio_file' is missing or empty: name the clip that sp"),
        ([GOOD | {"transcript": " "}], "samples[0] (id 'a'): the transcript is missing or empty: give 'transcript'"),
        ([GOOD | {"transcript": "", "transcript_file": "empty.txt"}], "transcript_file 'empty.txt' is empty: write"),
        ([GOOD | {"transcript": None, "transcript_file": "no.txt"}], "transcript_file 'no.txt' cannot be read: No"),
        ([GOOD, GOOD], "samples[1] (id 'a') has the id of samples[0]: give every sample its own id"),
        ([GOOD | {"audio_file": "../run/notes.txt"}], "'../run/notes.txt' leaves the data folder "),
        ([GOOD | {"audio_file": "/etc/hostname"}], "'/etc/hostname' leaves the data folder "),
        ([GOOD | {"audio_file": "."}], "'.' is a folder: name a file"),
        ([GOOD | {"audio_file": 3}], "'audio_file' is 3 (int): it must be a string"),
    ],
    ids=lambda value: "" if isinstance(value, str) else json.dumps(value)[:60],
)
@pytest.mark.parametrize("command", ["prepare", "train"])
def test_metadata(
    refusal: Refusal, config: Path, folder: Callable[..., Path], command: str, content: Any, line: str
) -> None:
    listed = isinstance(content, list) and content[-1] != 3
    data = folder(*content) if listed else folder(content=content)
    said = refusal(command, "--config", config, "--data.train", data)
    if "missing: 'b.flac'" in line and command == "train":  # which needs no audio where there are codes
        assert said.startswith(f"1 clip(s) without codes and without files: {data / 'b.flac'}: restore them"), said
        return
    assert said.startswith(str(data)) or "missing" in line
    assert line in said, said


def test_an_empty_evaluation_set(refusal: Refusal, config: Path, folder: Callable[..., Path]) -> None:
    data = folder()
    assert f"{data}/metadata.json has no samples" in refusal("train", "--config", config, "--data.eval", data)
    (data / "metadata.json").unlink()
    (data / "eval.jsonl").write_text("\n")
    assert f"{data}/eval.jsonl is empty" in refusal("train", "--config", config, "--data.eval", data)
    assert f"{data}/eval.jsonl is empty" in refusal("evaluate", "--config", config, "--data.eval", data)


def test_an_audio_file_that_is_text(refusal: Refusal, config: Path, folder: Callable[..., Path], door: Any) -> None:
    data = folder(GOOD, GOOD | {"id": "b", "audio_file": "b.flac"})
    (data / "b.flac").write_text("This is no audio.")
    mine = ["--config", config, "--data.train", data, "--data.eval", data, "--data.codes", data / "codes"]
    said = refusal("prepare", *mine, code=1)
    assert re.fullmatch(
        rf"1 of 2 clips cannot be used, and 2 of 4 samples need them\. {data}/codes/report\.json names all; the first "
        rf"is {data}/b\.flac \(.+\)\. Mend them, or leave their samples out with --data\.on_bad_sample skip",
        said,
    ), said
    said = refusal("train", *mine)
    assert said.startswith(f"1 clip(s) that cannot be used: {data}/b.flac ("), said
    skipped = door("prepare", *mine, "--data.on_bad_sample", "skip")
    assert skipped.code == 0
    assert skipped.out.startswith(f"codes of 2 clips in {data}/codes: 0 encoded now, 1 already there, 1 left out")
    report = json.loads((data / "codes" / "report.json").read_text())
    assert [clip["path"] for clip in report["bad"]] == [f"{data}/b.flac"]
    assert report["left_out"] == ["b", "b"]


def test_codes_that_are_not_there(
    refusal: Refusal, config: Path, folder: Callable[..., Path], tmp_path: Path, demo_checkpoint: Path
) -> None:
    data = folder(GOOD)
    (data / "a.flac").write_bytes((data / "a.flac").read_bytes() + b" ")  # another content than the prepared clip
    said = refusal("train", "--config", config, "--data.train", data, "--train.batch_size", "1")
    assert said == f"1 clip(s) without codes: {data}/a.flac: run `rawloop prepare`"
    codec = tmp_path / "codec"
    shutil.copytree(demo_checkpoint / "codec", codec)
    weights = load_file(codec / "model.safetensors")
    next(iter(weights.values())).mul_(1.01)
    save_file(weights, codec / "model.safetensors")
    said = refusal("train", "--config", config, "--model.codec", codec)
    assert re.fullmatch(
        r".*/codes has no codes of codec \w+ \(it has \w+ at 24000 Hz\): run `rawloop prepare` with .*", said
    )


# -- other commands ----------------------------------------------------------------------------------------------


def test_evaluate(refusal: Refusal, config: Path, tmp_path: Path) -> None:
    for which in ("best", "latest"):
        said = refusal("evaluate", "--config", config, "--checkpoint", which)
        assert said == f"--checkpoint is '{which}', and there is none in {tmp_path}/run: is --output that of the run?"
    for which in ("bset", str(tmp_path)):
        said = refusal("evaluate", "--config", config, "--checkpoint", which)
        assert said.startswith(f"--checkpoint is '{which}', which is no checkpoint's folder (it has no MANIFEST.json)")
    assert refusal("evaluate", "--config", config, "--checkpoint") == "--checkpoint needs a value after it"


def test_merge(refusal: Refusal, door: Any, tmp_path: Path) -> None:
    assert refusal("merge") == "--adapter and --output must be given; `rawloop merge --help` lists all options"
    for option in ("adaptor", "checkpoint", "config"):
        done = door("merge", f"--{option}", "x")
        assert (done.code, done.out) == (2, "")
        assert done.err.splitlines() == [
            "rawloop merge: 2 mistakes (`rawloop merge --help all` lists all options):",
            f"  unknown option '--{option}' (did you mean '--adapter'?)",
            "  --adapter and --output must be given; `rawloop merge --help` lists all options",
        ]
    said = refusal("merge", "--adapter", tmp_path / "none", "--output", tmp_path / "merged")
    assert said == (
        f"--adapter is '{tmp_path}/none', which has no adapter_config.json: pass a checkpoint's adapter folder"
    )
    adapter, model = tmp_path / "v" / "best" / "adapter", tmp_path / "full" / "best" / "model"
    for file in (adapter / "adapter_config.json", model / "config.json"):
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    for folder in (tmp_path / "v" / "best", tmp_path / "v"):
        said = refusal("merge", "--adapter", folder, "--output", tmp_path / "merged")
        assert said == f"--adapter is '{folder}', which has no adapter_config.json: did you mean {adapter}?"
    for folder in (model, tmp_path / "full" / "best", tmp_path / "full"):
        said = refusal("merge", "--adapter", folder, "--output", tmp_path / "merged")
        whole = f"{model} is a whole model already: use it without merging"
        assert said == f"--adapter is '{folder}', which has no adapter_config.json: {whole}"
    said = refusal("merge", "--adapter", tmp_path / "none", "--output", tmp_path / "run")
    assert said == f"--output is '{tmp_path}/run', which exists: name a folder that does not"


def test_prepare_without_the_codec(refusal: Refusal, config: Path) -> None:
    said = refusal("prepare", "--config", config, "--model.codec", "owner/none")
    assert said.startswith("model.codec is 'owner/none': no such folder, and the hub gave no such model (")
    assert said.endswith("where there is a network, `hf download owner/none`, and set model.codec to its folder")


# -- real processes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["trian"],
            "rawloop: no command 'trian' (did you mean 'train'?); there are demo, import, prepare, inspect, plan, trai",
        ),
        pytest.param(
            ["merge", "--adapter", "x"],
            "rawloop merge: --output must be given; `rawloop merge --help` lists all options",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["train", "--optm.lr", "1"],
            "rawloop train: unknown key 'optm.lr' on the command line (did you mean 'optim.l",
            marks=pytest.mark.slow,  # it imports torch first
        ),
    ],
)
def test_in_a_process_of_its_own(arguments: list[str], line: str) -> None:
    done = subprocess.run([sys.executable, "-m", "rawloop", *arguments], timeout=240, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--train.batch_size", "5"],
            "one step takes 10 samples (2 processes x train.batch_size 5 x train.accumulation",
        ),
        (["--adapter.target_modules", "[qproj]"], "adapter.target_modules has 'qproj', which matches no layer of the"),
    ],
)
def test_on_two_ranks(ranks: Ranks, config: Path, arguments: list[str], line: str) -> None:
    start = time.monotonic()
    results = ranks("train", "--config", config, *arguments)
    assert [done.code for done in results] == [2, 2]
    assert f"rawloop train: {line}" in results[0].err
    assert not any("Traceback" in done.err for done in results)
    assert time.monotonic() - start < 240


def test_only_rank_0_sees_that_the_output_is_taken(ranks: Ranks, config: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "metrics.jsonl").write_text("theirs")
    results = ranks("train", "--config", config, "--output", taken)
    assert [done.code for done in results] == [2, 2]
    assert f"rawloop train: output is '{taken}', which already holds a run" in results[0].err
    assert [path.name for path in taken.iterdir()] == ["metrics.jsonl"]
    assert (taken / "metrics.jsonl").read_text() == "theirs"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--adapter.target_modules", "[qproj]"], "adapter.target_modules has 'qproj', which matches no layer of the"),
        (["--optim.lrr", "1"], "unknown key 'optim.lrr' on the command line"),
    ],
)
def test_under_torchrun(config: Path, arguments: list[str], line: str) -> None:
    start = time.monotonic()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "-m", "rawloop", "train", "--config", str(config), *arguments]
    done = subprocess.run(command, timeout=100, capture_output=True, text=True, check=False)
    assert done.returncode == 1  # torchrun's own
    assert f"rawloop train: {line}" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert time.monotonic() - start < 60
