"""Replay: a fresh process gives the recorded losses and gradients bit for bit, and bad capsules get clear words."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rawloop.adapters.config import AdapterConfig
from rawloop.build import build_run
from rawloop.cli.replay import run as replay_command
from rawloop.config import RunConfig
from rawloop.dist import World
from rawloop.errors import RawloopError, TrainingError
from rawloop.files import signed_json
from rawloop.loop import train
from rawloop.precision.config import PrecisionConfig
from rawloop.watch.capsule import Capsule, read_facts, read_states, write_capsule
from tests.forks import Forks
from tests.kept_runs import kept_by


@pytest.fixture
def capsule(kept_run: Path) -> Path:
    """A capsule of a healthy step of one rank. Read it only."""
    return kept_run / "capsules" / "step-00000002-rank0"


def test_a_fresh_process_gives_the_same_bits(capsule: Path, forks: Forks) -> None:
    done = forks.run("-m", "rawloop", "replay", capsule, "--bisect", check=True)
    assert "the replay is equal, bit for bit" in done.stdout
    assert "finding: something is wrong" in done.stdout
    assert done.stdout.count("equal bit for bit") == 3
    assert "share of the squared gradient norm" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "amp_fp16", "native_fp16", "full native_fp16", "full bf16"])
def test_every_mode_gives_the_same_bits(
    text_run: RunConfig,
    tmp_path: Path,
    capsys: Any,
    run_ranks: Callable[..., list[Any]],
    mode: str,
    checkpointing: bool,
    ranks: int,
) -> None:
    how, name = mode.split() if " " in mode else ("lora", mode)
    config = replace(
        text_run,
        output=str(tmp_path),
        adapter=AdapterConfig(mode="full") if how == "full" else text_run.adapter,
        model=replace(text_run.model, activation_checkpointing=checkpointing),
        optim=replace(text_run.optim, lr=1e-2),
        precision=PrecisionConfig(mode=name),  # type: ignore[arg-type]
        train=replace(text_run.train, batch_size=2 // ranks),
    )
    paths = [kept_by(World(), config)] if ranks == 1 else run_ranks(kept_by, config)
    for path in paths:
        capsys.readouterr()
        replay_command([str(path), "--device", "cpu"])
        assert "the replay is equal, bit for bit" in capsys.readouterr().out


def copied(capsule: Path, to: Path) -> Path:
    return Path(shutil.copytree(capsule, to / capsule.name))


def forged(path: Path, **facts: Any) -> Path:
    """Write other facts into a capsule's manifest, with a right digest."""
    body = json.loads((path / "MANIFEST.json").read_bytes())
    body.pop("sha256")
    (path / "MANIFEST.json").write_bytes(signed_json({**body, **facts}))
    return path


def said(*arguments: str | Path) -> str:
    """The message of a replay that is refused."""
    with pytest.raises(RawloopError) as caught:
        replay_command([str(argument) for argument in arguments])
    return f"{caught.value.exit_code} {caught.value}"


def test_a_capsule_of_another_format_names_its_writer(capsule: Path, tmp_path: Path) -> None:
    text = said(forged(copied(capsule, tmp_path), format=2))
    assert text.startswith("2 ")
    assert "has format 2, and this version of rawloop reads 1: replay it with the version that wrote it" in text


def test_flipped_bits_are_damage_and_the_finding_is_told(capsule: Path, tmp_path: Path, capsys: Any) -> None:
    path = copied(capsule, tmp_path)
    content = bytearray((path / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "weights.safetensors").write_bytes(content)
    text = said(path)
    assert text.startswith("1 ")
    assert "weights.safetensors has changed since it was written" in text
    assert "something is wrong" in capsys.readouterr().out
    (path / "weights.safetensors").unlink()
    assert "weights.safetensors is missing" in said(path)
    manifest = (path / "MANIFEST.json").read_bytes()
    (path / "MANIFEST.json").write_bytes(manifest.replace(b'"step": 2', b'"step": 3'))
    assert "its own digest does not match" in said(path)
    (path / "MANIFEST.json").write_bytes(manifest[:100])
    assert "cannot be read" in said(path)


def test_a_path_without_a_capsule_names_those_below(capsule: Path, tmp_path: Path) -> None:
    assert f"there is no capsule at '{tmp_path}' (no MANIFEST.json)" in said(tmp_path)
    assert "it has step-00000002-rank0: name one of them" in said(capsule.parent)
    assert said(tmp_path / "nothing").startswith("2 ")


def test_a_missing_base_model_is_named(capsule: Path, tmp_path: Path) -> None:
    path = copied(capsule, tmp_path)
    text = (path / "config.yaml").read_text()
    config = text.replace(next(line for line in text.splitlines() if line.startswith("  path: ")), "  path: gone/away")
    (path / "config.yaml").write_text(config)
    size, sha = len(config.encode()), hashlib.sha256(config.encode()).hexdigest()
    files = json.loads((path / "MANIFEST.json").read_bytes())["files"]
    forged(path, files={**files, "config.yaml": {"size": size, "sha256": sha}})
    text = said(path, "--device", "cpu")
    assert text.startswith("2 ")
    assert "gone/away" in text


def test_one_of_eight_ranks_is_replayed_alone(capsule: Path, tmp_path: Path, capsys: Any) -> None:
    facts = read_facts(capsule)
    path = forged(copied(capsule, tmp_path), rank=5, world_size=8, gradients={})
    assert facts["world_size"] == 1
    replay_command([str(path), "--device", "cpu"])
    out = capsys.readouterr().out
    assert "rank 5 of 8" in out
    assert "this rank's batches only" in out
    assert "gradients: none were recorded" in out


def test_another_mode_shows_how_much_the_mode_does(capsule: Path, capsys: Any) -> None:
    replay_command([str(capsule), "--device", "cpu", "--precision", "bf16"])
    out = capsys.readouterr().out
    assert "the replay differs" in out
    assert "off by" in out
    assert "--precision is 'fp8'" in said(capsule, "--precision", "fp8")


def test_a_capsule_without_weights_takes_those_of_its_checkpoint(capsule: Path, tmp_path: Path, capsys: Any) -> None:
    facts = read_facts(capsule)
    assert facts["follows"].endswith("step-00000002")
    state = read_states(capsule, facts)
    small = Capsule({name: facts[name] for name in facts if name not in ("files", "left_out")})
    small.states = {name: state(name) for name in ("passes", "base")}
    small.texts = {"config.yaml": (capsule / "config.yaml").read_text()}
    replay_command([str(write_capsule(tmp_path / "small", small, 10**9)), "--device", "cpu"])
    assert "the replay is equal, bit for bit" in capsys.readouterr().out
    small.facts["follows"] = str(tmp_path / "gone")
    replay_command([str(write_capsule(tmp_path / "none", small, 10**9)), "--device", "cpu"])
    caught = capsys.readouterr()
    assert "the base model's are taken" in caught.err
    assert "its weights are not those of the step" in caught.out


def test_the_origin_of_what_is_not_finite_is_named(text_run: RunConfig, tmp_path: Path, capsys: Any) -> None:
    precision = PrecisionConfig(mode="fp32", max_skips=1)
    run = build_run(replace(text_run, output=str(tmp_path), precision=precision), World(), lambda line: None)
    name, weight = next(iter(run.policy.trained.weights.items()))
    weight.data[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="rawloop replay"):
        train(run)
    run.close()
    replay_command([str(tmp_path / "capsules" / "step-00000000-rank0"), "--device", "cpu", "--bisect"])
    out = capsys.readouterr().out
    assert "the replay is equal, bit for bit" in out
    assert name in out.replace("\n", "")
