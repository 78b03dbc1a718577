"""What all tests share: one thread, no network, a fixed seed, a watch for leaks, and fixtures that start processes.

A test file is no package and cannot import this one: take the fixtures by name, with the types
`Callable[..., list[Any]]` for `run_ranks` and `tests.forks.Forks` for `forks`.
"""

import ctypes
import json
import os
import pickle
import random
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from tests.forks import Fork, Forks

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "OMP_NUM_THREADS": "1",  # read by torch when it is imported; bitwise comparisons need a fixed number
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",  # else tokenizers warn in every forked data worker
}
RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GRACE = 5.0  # seconds in which what a test has ended may disappear
SET_BY_LIBRARIES = ("PYTEST_", "TORCHINDUCTOR_CACHE_DIR")  # torch sets the latter with its first optimizer


def pytest_configure() -> None:
    """Settle the environment before any test file imports torch; child processes inherit it."""
    os.environ.update(SETTINGS)
    inherited = os.environ.get("PYTHONPATH", "")  # scripts that tests start are to use the package that is tested
    if str(ROOT) not in inherited.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), inherited]))
    for name in RANK_NAMES:  # tests started by a launcher are no ranks of it
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed every generator that is loaded, and return the seed."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:  # never imported here: tests of the light modules stay light
        sys.modules["torch"].manual_seed(0)
        sys.modules["torch"].set_num_threads(1)
    return 0


@pytest.fixture(autouse=True)
def no_leaks(seed: int) -> Iterator[None]:
    """Fail a test that leaves behind a process group, an environment variable, a thread or a child process."""
    environment, threads, children = dict(os.environ), set(threading.enumerate()), set(child_processes())
    yield
    leaks = [*end_process_group(), *restore_environment(environment)]
    leaks += [f"thread {thread.name}" for thread in threading.enumerate() if outlives(thread, threads)]
    leaks += end_children(children)
    if leaks:
        pytest.fail("the test leaves behind: " + "; ".join(leaks), pytrace=False)


def end_process_group() -> list[str]:
    """End the default process group, if there is one, and say so."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return []
    distributed.destroy_process_group()
    return ["a process group"]


def restore_environment(before: dict[str, str]) -> list[str]:
    """Put the environment back to what it was, and name each variable that had changed."""
    after = dict(os.environ)
    changed = [name for name in {*before, *after} if before.get(name) != after.get(name)]
    changed = sorted(name for name in changed if not name.startswith(SET_BY_LIBRARIES))
    for name in changed:
        os.environ.pop(name, None)
        if name in before:
            os.environ[name] = before[name]
    return [f"environment variable {name}={after.get(name)!r}" for name in changed]


def outlives(thread: threading.Thread, before: set[threading.Thread]) -> bool:
    """Whether a test started this thread and it goes on. Daemon threads die with the process."""
    if thread in before or thread.daemon:
        return False
    thread.join(GRACE)
    return thread.is_alive()


def descendants() -> list[int]:
    """The ids of all descendants, from the lists that Linux keeps: psutil reads every process of the machine (2 ms)."""
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        return [process.pid for process in psutil.Process().children(recursive=True)]
    found, parents = [], [os.getpid()]
    while parents:
        for listed in Path(f"/proc/{parents.pop()}/task").glob("*/children"):
            with suppress(OSError):  # the parent has ended meanwhile
                children = list(map(int, listed.read_text().split()))
                found += children
                parents += children
    return found


def child_processes() -> list[psutil.Process]:
    """All descendants, without the helper of multiprocessing that lives as long as this process on purpose."""
    found = []
    for number in descendants():
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            process = psutil.Process(number)
            if not any("multiprocessing.resource_tracker" in word for word in process.cmdline()):
                found.append(process)
    return found


def end_children(before: set[psutil.Process]) -> list[str]:
    """Kill the descendants that a test has left running, and name them."""
    _, alive = psutil.wait_procs([process for process in child_processes() if process not in before], timeout=GRACE)
    names = []
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            names.append(f"process {' '.join(process.cmdline())[:200]!r}")
            process.kill()
    return names


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the demo checkpoint, built once for all pytest-xdist workers. Read it, never write into it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # each worker has a folder of its own inside the session's
    folder, complete = base / "demo_checkpoint", base / "demo_checkpoint.complete"
    with FileLock(base / "demo_checkpoint.lock"):
        if not complete.exists():
            from rawloop.demo.checkpoint import build_demo_checkpoint

            build_demo_checkpoint(folder, ROOT / "rawloop" / "demo" / "speech")
            complete.touch()
    return folder


@pytest.fixture(scope="session")
def demo_data(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a part of the bundled speech, 8 clips in `train` and 5 in `eval`, and its `codes`. Read it only."""

    from rawloop.data import DataConfig
    from rawloop.data.splits import prepare_codes
    from rawloop.families import ModelConfig, load_family

    folder = tmp_path_factory.mktemp("demo_data")
    for split, number in (("train", 8), ("eval", 5)):
        copy_speech(ROOT / "rawloop" / "demo" / "speech" / split, folder / split, number)
    data = DataConfig(train=str(folder / "train"), eval=str(folder / "eval"), codes=str(folder / "codes"))
    prepare_codes(data, load_family(ModelConfig(path=str(demo_checkpoint / "model"))))
    return folder


@pytest.fixture
def demo_config(tmp_path: Path, demo_checkpoint: Path, demo_data: Path) -> Callable[..., Path]:
    """Give `demo_config(group={key: value}, ...)`: a file with a run on the demo, without a bar, a line per step."""

    def write(**groups: dict[str, Any]) -> Path:
        settings: dict[str, Any] = {
            "device": "cpu",
            "model": {"path": str(demo_checkpoint / "model")},
            "data": {split: str(demo_data / split) for split in ("train", "eval", "codes")},
            "train": {"log_every": 1},
            "records": {"progress": False},
        }
        for name, values in groups.items():
            settings[name] = {**settings.get(name, {}), **values}
        file = tmp_path / "run.yaml"
        file.write_text(json.dumps(settings))
        return file

    return write


CHATML = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CONTROL = {"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}


@pytest.fixture(scope="session")
def text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama with random weights and a tokenizer with ChatML as its template. Read it only.

    A token is a character, a control token, or two newlines. A text begins with BOS, a chat does not.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = models.BPE({token: i for i, token in enumerate([*alphabet, "ĊĊ"])}, [("Ċ", "Ċ")])
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", *CONTROL["extra_special_tokens"]])
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [bos])
    folder = tmp_path_factory.mktemp("text_checkpoint")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **CONTROL)
    wrapped.chat_template = CHATML
    wrapped.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=wrapped.bos_token_id,
        eos_token_id=wrapped.eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train.jsonl (8 records) and eval.jsonl (5): plain texts and chats of different lengths."""
    folder = tmp_path_factory.mktemp("text_data")
    for split, number, mark in (("train", 8, "."), ("eval", 5, "!")):  # no sample stands in both
        asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Say one to three{mark}"}]
        answers = ["One.", "One, two.", "One, two, three."]
        records: list[dict[str, Any]] = [{"messages": [*asked, {"role": "assistant", "content": a}]} for a in answers]
        records += [{"text": f"{split} {k}: " + "la " * k} for k in range(number - len(answers))]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def text_run(text_checkpoint: Path, text_data: Path) -> Any:
    """The `RunConfig` of `tests.kept_runs`, on the tiny Llama."""
    from tests.kept_runs import config_of

    return config_of(text_checkpoint, text_data)


@pytest.fixture(scope="session")
def kept_run(text_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of that run with a checkpoint at step 2, whose update is in the capsule of an alarm. Read it only."""
    from rawloop.checkpoint.config import CheckpointConfig
    from tests.kept_runs import alarm, go

    folder = tmp_path_factory.mktemp("kept_run")
    go(replace(text_run, output=str(folder), checkpoint=CheckpointConfig(save_every=2)), change=alarm)
    return folder


def copy_speech(source: Path, target: Path, number: int) -> None:
    """Copy a folder of speech with so many of its samples, evenly chosen, so that all languages are among them."""
    shutil.copytree(source, target)
    samples = json.loads((source / "metadata.json").read_text(encoding="utf-8"))["samples"]
    chosen = [samples[k * len(samples) // number] for k in range(number)]
    (target / "metadata.json").write_text(json.dumps({"samples": chosen}), encoding="utf-8")


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Give `forks.run(*arguments)`, `forks.start(...)`: Python programs in processes that have the imports already."""
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture
def run_ranks(
    forks: Forks, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Callable[..., list[Any]]:
    """Give `run_ranks(function, *arguments, world_size=2, timeout=240)`: real processes in a gloo group.

    Each process calls `function(world, *arguments)` with its open `rawloop.dist.World`. The function stands at the top
    level of a test file; arguments and results travel by pickle. Returns the results in order of rank, or raises what
    the first failing rank raised, with that rank's traceback as a note. No process outlives the call.
    """

    def run(function: Callable[..., Any], *arguments: Any, world_size: int = 2, timeout: float = 240.0) -> list[Any]:
        folder = tmp_path_factory.mktemp("ranks")
        job = {
            "module": function.__module__,
            "path": str(Path(function.__code__.co_filename).resolve()),
            "function": function.__name__,
            "arguments": pickle.dumps(arguments),
            "timeout": timeout,
            "filters": pytestconfig.getini("filterwarnings"),
        }
        (folder / "job.pickle").write_bytes(pickle.dumps(job))
        processes = start_ranks(forks, folder, world_size)
        forks.wait(processes, timeout, grace=2 * GRACE)
        return collect_ranks(folder, processes)

    return run


def free_port() -> int:
    """A port that nobody has, below those that Linux gives to outgoing connections, so that none of them takes it."""
    while True:
        port = 20000 + int.from_bytes(os.urandom(2)) % 12000  # not `random`, which is seeded alike in all workers
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def start_ranks(forks: Forks, folder: Path, world_size: int) -> list[Fork]:
    """Start one process per rank; what rank N prints goes to its log."""
    port = free_port()
    processes = []
    for rank in range(world_size):
        values = map(str, (rank, world_size, rank, world_size, "127.0.0.1", port))
        environment = dict(zip(RANK_NAMES, values, strict=True))
        processes.append(forks.start(ROOT / "tests" / "rank_main.py", folder, str(rank), env=environment))
    return processes


def collect_ranks(folder: Path, processes: list[Fork]) -> list[Any]:
    """Return the ranks' results, or raise the earliest failure."""
    for process in processes:
        sys.stdout.write(process.text("out") + process.text("err"))
    outcomes = {
        int(file.stem.removeprefix("rank")): pickle.loads(file.read_bytes()) for file in folder.glob("rank*.pickle")
    }
    errors = {rank: outcome for rank, outcome in outcomes.items() if outcome["kind"] == "error"}
    if errors:
        rank, first = min(errors.items(), key=lambda item: item[1]["moment"])
        first["value"].add_note(f"rank {rank}:\n{first['text']}")
        raise first["value"]
    missing = [
        f"rank {rank} (exit code {process.code})" for rank, process in enumerate(processes) if rank not in outcomes
    ]
    if missing:
        raise TimeoutError(f"ended without a result, or killed after the time limit: {', '.join(missing)}")
    return [outcomes[rank]["value"] for rank in range(len(processes))]


VERSION = 0x20080522  # of capset(2), with 64 bits of capabilities
OVERRIDES = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH


class Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@pytest.fixture
def permissions_count() -> Iterator[None]:
    """Take from root, in this thread and those that it starts, what lets it pass over permissions."""
    if os.getuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root passes over permissions here")
    libc, header, sets = ctypes.CDLL(None), Header(VERSION, 0), (Sets * 2)()
    assert libc.capget(ctypes.byref(header), sets) == 0
    before = sets[0].effective
    sets[0].effective = before & ~OVERRIDES
    assert libc.capset(ctypes.byref(header), sets) == 0
    yield
    sets[0].effective = before
    assert libc.capset(ctypes.byref(header), sets) == 0
