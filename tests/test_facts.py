"""Facts: what all ranks must share before step 0, and what a resumed run and an evaluation must find again."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from rawloop.adapters.fingerprint import BaseFingerprint, checksum
from rawloop.audio import Segment
from rawloop.build import build_run, check_run
from rawloop.changes import MAY_DIFFER, SettingsState, compare, contents_of, flat
from rawloop.cli import main
from rawloop.config import RunConfig, parse
from rawloop.contracts import Audio, Sample, Turn
from rawloop.data.digests import digests_of
from rawloop.data.samples import read_samples
from rawloop.dist import World
from rawloop.errors import UserError
from rawloop.families import ModelConfig, load_family

Ranks = Callable[..., list[Any]]


@pytest.fixture
def config(text_checkpoint: Path, text_data: Path, tmp_path: Path) -> RunConfig:
    """A run of the tiny text model, with copies of its own of model and data in `tmp_path`."""
    shutil.copytree(text_checkpoint, tmp_path / "model")
    for split in ("train", "eval"):
        shutil.copy(text_data / f"{split}.jsonl", tmp_path)
    return of(tmp_path, "--output", str(tmp_path / "run"))


def of(folder: Path, *options: str) -> RunConfig:
    settings = {
        "device": "cpu",
        "model": {"path": str(folder / "model")},
        "adapter": {"rank": 4},
        "data": {split: str(folder / f"{split}.jsonl") for split in ("train", "eval")},
        "train": {"max_steps": 1},
        "checks": {"enabled": False},
        "records": {"progress": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return parse(["--config", str(folder / "run.yaml"), *options], "test")[0]


# -- the ranks of a run ------------------------------------------------------------------------------------------


def change_text(file: Path, line: int) -> None:
    """Another text of one record, of the same length."""
    lines = file.read_text().splitlines()
    assert "la" in lines[line]
    lines[line] = lines[line].replace("la", "al", 1)
    file.write_text("\n".join(lines) + "\n")


def swap_ids(folder: Path) -> None:
    """Another tokenizer: `a` and `b` have changed places."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))


def change_template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("{% for", "{# another #}{% for", 1))


def change_weight(folder: Path) -> None:
    """One number, far from the first ones."""
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][-1] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_theta(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings["rms_norm_eps"] = 1e-3
    (folder / "config.json").write_text(json.dumps(settings))


OTHER_NODE: dict[str, tuple[Callable[[Path], None], str]] = {
    "train": (
        lambda node: change_text(node / "train.jsonl", 5),
        r"rank 1 has samples\[5\] of data.train [0-9a-f]{8} \(from train.jsonl line 6 on\), rank 0 has",
    ),
    "eval": (lambda node: change_text(node / "eval.jsonl", 4), r"rank 1 has samples\[4\] of data.eval "),
    "tokenizer": (lambda node: swap_ids(node / "model"), "rank 1 has tokenizer "),
    "template": (lambda node: change_template(node / "model"), "rank 1 has chat template "),
    "weight": (
        lambda node: change_weight(node / "model"),
        r"rank 1 has the weight base_model.model.model.norm.weight \(32,\) [0-9a-f]{8}, rank 0 has \(32,\) ",
    ),
    "config": (lambda node: change_theta(node / "model"), "rank 1 has the model's config "),
}


def start(world: World, configs: list[RunConfig], doctor: bool) -> str:
    """What this rank is told when the run is built, each rank with its own config and on a machine of its own."""
    world = replace(world, local_rank=0)
    try:
        if doctor:
            check_run(configs[world.rank], world)
        else:
            build_run(configs[world.rank], world, lambda line: None).close()
    except UserError as error:
        return str(error)
    return ""


def starts(world: World, config: RunConfig, nodes: list[RunConfig], others: list[RunConfig]) -> list[str]:
    """What is said of ranks with copies of their own, other copies, and other settings, one start after another."""
    told = [start(world, [config, node], doctor=False) for node in nodes]
    told.append(start(world, [config, nodes[0]], doctor=True))
    return told + [start(world, [others[0], other], doctor=False) for other in others[1:]]


def test_ranks_that_differ_are_refused(run_ranks: Ranks, config: RunConfig, tmp_path: Path) -> None:
    nodes = []
    for name, (change, _) in {**OTHER_NODE, "equal": (lambda node: None, "")}.items():
        shutil.copytree(tmp_path, tmp_path / name, ignore=shutil.ignore_patterns("run*", *OTHER_NODE))
        change(tmp_path / name)
        nodes.append(of(tmp_path / name, "--output", config.output))
    nowhere = replace(config, model=replace(config.model, path=str(tmp_path / "nowhere")), output=f"{tmp_path}/other")
    other_lr = replace(nowhere, optim=replace(config.optim, lr=0.001))
    other_paths = replace(nowhere, data=replace(config.data, num_workers=3, train="elsewhere.jsonl"))
    told, also = run_ranks(starts, config, nodes, [nowhere, other_lr, other_paths])
    for (name, (_, message)), said in zip(OTHER_NODE.items(), told, strict=False):
        assert re.match(f"the ranks differ: {message}", said), name
        assert said.endswith("start every process with the same command, and the same data, model and code")
    equal, doctor, lr, paths = told[len(OTHER_NODE) :]
    assert told[:-1] == also[:-1]
    assert equal == ""
    assert doctor == told[0]
    # before the model is looked for
    assert lr.startswith(f"the ranks differ: rank 1 has optim.lr 0.001, rank 0 has {config.optim.lr}: start every")
    assert "no such folder" in paths
    assert set(flat(asdict(config))) > MAY_DIFFER


def counted(world: World, config: RunConfig) -> tuple[int, str | None]:
    """How many weights this rank has read in full, and the digest of all of them."""
    read: list[Tensor] = []

    def counting(tensor: Tensor) -> str:
        read.append(tensor)
        return checksum(tensor)

    with patch("rawloop.adapters.fingerprint.checksum", counting):
        run = build_run(config, world, lambda line: None)
    run.close()
    assert run.checkpoints is not None
    base = run.checkpoints.parts.states["base"]
    assert isinstance(base, BaseFingerprint)
    return len(read), base.weights


def test_one_process_of_a_machine_reads_all_weights(run_ranks: Ranks, config: RunConfig) -> None:
    (first, digest), (second, same) = run_ranks(counted, config)
    assert first > 10
    assert (second, same) == (0, digest)
    assert digest is not None


# -- a resumed run and an evaluation -----------------------------------------------------------------------------


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Give `told(*arguments)`: a command's exit code, and all that it says."""

    def run(*arguments: str | Path) -> tuple[int, str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, "".join(capfd.readouterr())

    return run


def test_other_contents_under_the_same_paths_are_refused(
    told: Callable[..., tuple[int, str]], config: RunConfig, tmp_path: Path
) -> None:
    options = ("--config", tmp_path / "run.yaml", "--output", config.output)
    again = ("train", *options, "--resume", "latest", "--train.max_steps", "2")
    assert told("train", *options)[0] == 0
    shutil.copytree(tmp_path, tmp_path / "before", ignore=shutil.ignore_patterns("run*"))
    digests = r"\(\w{16} then, \w{16} now\)"
    for name, message in (
        ("tokenizer", rf"the tokenizer of model.path is not the one that the checkpoint was trained with {digests}"),
        ("template", rf"the chat template of model.path is not the one that the checkpoint was trained with {digests}"),
        ("train", r"trained on other samples \(8 samples, digest \w{16} then, 8 samples, digest \w{16} in data.train"),
        ("eval", r"evaluated on other samples \(5 samples, digest \w{16} then, 5 samples, digest \w{16} in data.eval"),
        ("weight", "the frozen weights are not those that the checkpoint was trained on"),
    ):
        OTHER_NODE[name][0](tmp_path)
        code, said = told(*again)
        assert code == 2, name
        assert re.search(message, said), name
        code, said = told("evaluate", *options, "--checkpoint", "latest")
        if name in ("train", "eval"):  # what an evaluation evaluates is its own business, but no secret
            assert code == 0
            assert ("data.eval has other samples than the run was evaluated on" in said) == (name == "eval")
        else:
            assert code == 2
            assert re.search(message, said), name
        shutil.copytree(tmp_path / "before", tmp_path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "eval.jsonl", tmp_path / "moved.jsonl")
    code, said = told(*again, "--data.eval", tmp_path / "moved.jsonl")
    assert code == 0, said
    assert f"data.eval {tmp_path / 'eval.jsonl'} -> {tmp_path / 'moved.jsonl'} (the same samples)\n" in said
    assert "was measured with the earlier data.eval" not in said
    change_text(tmp_path / "eval.jsonl", 4)
    code, said = told(*again, "--train.max_steps", "3")
    assert code == 0, said
    assert re.search(
        r"\ndata.eval has other contents \(5 samples, .*\nthe best .* was measured with the earlier data.eval", said
    )


def test_a_checkpoint_that_holds_no_facts_is_compared_by_what_it_holds(config: RunConfig) -> None:
    facts = {"tokenizer": "new", "data.train": "new", "data.eval": "new"}
    stored = SettingsState(config, 1).state_dict()
    assert compare({**stored, "facts": {}}, config, 1, facts) == []
    del stored["facts"]
    assert compare(stored, config, 1, facts) == []
    other_eval = replace(config, data=replace(config.data, eval="elsewhere.jsonl"))
    there = {**stored, "facts": {"tokenizer": "new", "data.train": "new", "data.eval": "old"}}
    assert compare(there, other_eval, 1, facts)[1:] == ["data.eval has other contents (old -> new)"]


# -- samples -----------------------------------------------------------------------------------------------------


def test_a_digest_is_of_what_a_sample_is_not_of_where_it_lies(tmp_path: Path) -> None:
    def first(record: dict[str, Any], name: str = "a.jsonl") -> Sample:
        (tmp_path / name).write_text(json.dumps(record) + "\n")
        return read_samples(tmp_path / name)[0]

    def digest(record: dict[str, Any], name: str = "a.jsonl") -> str:
        return digests_of([first(record, name)], lambda path: contents)[0]

    contents = "1"
    plain, heard = {"text": "one"}, {"audio_file": "a.wav", "transcript": "one"}
    (tmp_path / "a.wav").touch()
    assert digest(plain) == digest({**plain, "id": "x"}) == digest(plain, "b.jsonl")
    base = digest(heard)
    assert re.fullmatch("[0-9a-f]{16}", base)
    others = [digest({**heard, "transcript": "two"}), digest({**heard, "mine": 1}), digest(plain)]
    contents = "2"
    assert len({base, *others, digest(heard)}) == 5


def test_segments_of_clips_without_codes_are_told_apart_by_file_and_times(
    text_checkpoint: Path, tmp_path: Path
) -> None:
    family = load_family(ModelConfig(path=str(text_checkpoint)))

    def digests() -> list[str]:
        paths = [Segment(tmp_path / "a.wav", start, 2.0).path() for start in (0.0, 1.0)]
        samples = [Sample("s", (Turn("user", (Audio(path),)),)) for path in paths]
        return list(contents_of(family, None, {"data.train": samples}).digests["data.train"])

    (tmp_path / "a.wav").write_bytes(b"a" * 1000)
    before = digests()
    (tmp_path / "a.wav").write_bytes(b"b" * 1000)
    assert len({*before, *digests()}) == 4
