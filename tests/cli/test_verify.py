"""`rawloop verify`: which damage it sees, what it takes for no damage, its exit codes, and that it writes nothing."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rawloop.checkpoint import placing, slots
from rawloop.checkpoint.best import BestRecord
from rawloop.checkpoint.slots import verify
from rawloop.checkpoint.writer import Contents, write_slot
from rawloop.cli import verify as command
from rawloop.errors import CheckpointError
from rawloop.pack import pack

Door = Callable[..., Any]
BEST = "step-00000005"


def write(slot: Path, step: int) -> Path:
    write_slot(slot, Contents(step, {}, {"x": pack({"step": step}), "y": pack([1.5])}, [{}], {}))
    return slot


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with three checkpoints, one of them the best, a discarded one, and a save under way."""
    folder = tmp_path / "run"
    for step in (5, 10, 20):
        slot = write(folder / "checkpoints" / slots.slot_name(step), step)
        if step == 5:
            placing.set_best(folder, slot, BestRecord("eval_loss", "min", 1.0, step))
    write(folder / "checkpoints" / "discarded" / "step-00000030", 30)
    (folder / "checkpoints" / ".tmp-step-00000040" / "state").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    return folder


def rows(out: str) -> dict[str, list[str]]:
    """The cells of each line of the table, by the name that it begins with."""
    return {line.split()[0]: line.split(maxsplit=5)[1:] for line in out.splitlines()[1:]}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def contents(folder: Path) -> dict[Path, tuple[float, bytes | None]]:
    return {p: (p.stat().st_mtime, p.read_bytes() if p.is_file() else None) for p in sorted(folder.rglob("*"))}


def test_a_run_that_is_whole(door: Door, run: Path) -> None:
    before = contents(run)
    done = door("verify", run)
    assert (done.code, done.err) == (0, "")
    table = rows(done.out)
    names = [f"checkpoints/{name}" for name in ("step-00000020", "step-00000010", BEST, "discarded/step-00000030")]
    assert list(table) == [*names, "checkpoints/.tmp-step-00000040", "4"]
    assert [table[name][0] for name in names] == ["20", "10", "5", "30"]
    assert all(table[name][1] == "2" and table[name][4] != "-" for name in names)
    ends = ["  whole", "  whole", "  whole, the best", "  whole"]
    assert all(done.out.splitlines()[k].endswith(ends[k - 1]) for k in range(1, 5))
    assert "  unfinished: being written, or left by a save that was killed" in done.out
    assert done.out.endswith("4 whole, none damaged\n")
    assert contents(run) == before


@pytest.mark.parametrize(
    ("slot", "damage", "reason"),
    [
        ("checkpoints/step-00000020", lambda slot: flip(slot / "state" / "x.json"), "state/x.json has changed since"),
        ("checkpoints/step-00000010", lambda slot: (slot / "state" / "y.json").unlink(), "state/y.json is missing"),
        (f"checkpoints/{BEST}", lambda slot: flip(slot / "MANIFEST.json"), "MANIFEST.json"),
        (f"checkpoints/{BEST}", lambda slot: (slot / "MANIFEST.json").unlink(), "never completed"),
        ("checkpoints/discarded/step-00000030", lambda slot: (slot / "MANIFEST.json").unlink(), "never completed"),
    ],
    ids=["flipped bit", "missing file", "flipped manifest", "best without manifest", "no manifest"],
)
def test_damage_is_named(door: Door, run: Path, slot: str, damage: Callable[[Path], None], reason: str) -> None:
    damage(run / slot)
    for given, whole in ((run, 3), (run / slot, 0)):
        done = door("verify", given)
        assert done.code == 1
        (row,) = [line for line in done.out.splitlines() if "DAMAGED" in line]
        name = slot if given == run else Path(slot).name
        assert row.startswith(f"{name} ")
        assert reason in row
        assert done.err == f"rawloop verify: 1 damaged ({name}), {whole} whole\n"
    assert door("verify", run / "checkpoints" / "step-00000010").code == (1 if slot.endswith("10") else 0)


def test_a_best_that_is_no_checkpoint_any_more_is_damage(door: Door, run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / BEST)
    done = door("verify", run)
    said = "rawloop verify: best points to a checkpoint that does not exist, 3 whole\n"
    assert (done.code, done.err) == (1, said)


def test_the_best_folder_of_an_older_version_is_looked_at(door: Door, run: Path) -> None:
    (run / "best").unlink()
    (run / "checkpoints" / BEST).rename(run / "best")
    assert "best " in door("verify", run).out
    flip(run / "best" / "state" / "x.json")
    assert door("verify", run).err == "rawloop verify: 1 damaged (best), 3 whole\n"


def test_what_is_no_run_is_refused(door: Door, run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for given, said in (
        (tmp_path / "none", f"'{tmp_path}/none' is no folder: name a run's folder, or one of its checkpoints"),
        (run / "config.yaml", f"'{run}/config.yaml' is no folder: name a run's folder, or one of its checkpoints"),
        (tmp_path / "empty", f"'{tmp_path}/empty' is no run, nor a checkpoint"),
        (run / "best" / "state", f"'{run}/best/state' is a part of a checkpoint: name that, '{run}/best'"),
        (run / "checkpoints", f"'{run}/checkpoints' is no run: name the run, '{run}'"),
    ):
        done = door("verify", given)
        assert (done.code, done.err) == (2, f"rawloop verify: {said}\n")
    assert door("verify").code == 2


def test_of_a_run_that_has_saved_nothing_yet_nothing_is_verified(door: Door, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    said = "rawloop verify: there is no whole checkpoint yet: nothing was verified\n"
    done = door("verify", tmp_path)
    assert (done.code, done.err) == (1, said)
    (tmp_path / "checkpoints" / ".tmp-step-00000001").mkdir(parents=True)
    done = door("verify", tmp_path)
    assert (done.code, done.err) == (1, said)
    assert "unfinished" in done.out


def test_a_slot_that_is_deleted_or_replaced_meanwhile_is_not_damaged(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that trains deletes and replaces slots while they are read here."""
    calls: list[Path] = []

    def disturbed(slot: Path) -> Any:
        calls.append(slot)
        if len(calls) == 1:
            meddle(slot)
        return verify(slot)

    def replace(slot: Path) -> None:
        write(slot, 5)
        raise CheckpointError("state/x.json has changed since it was written")

    def delete(slot: Path) -> None:
        shutil.rmtree(slot)
        raise CheckpointError("state/x.json is missing")

    monkeypatch.setattr(command, "verify", disturbed)
    meddle = replace
    found = command.examine(run / "checkpoints" / BEST)
    assert found.manifest is not None
    assert (found.verdict, found.manifest.step, len(calls)) == ("whole", 5, 2)
    calls.clear()
    meddle = delete
    assert command.examine(run / "checkpoints" / BEST).verdict == "gone"


def test_a_reader_that_has_ended_is_no_damage(run: Path) -> None:
    """As in `rawloop verify RUN | head -1`. Exit code as of a process that SIGPIPE has ended."""
    command = [sys.executable, "-m", "rawloop", "verify", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_output_that_a_full_disk_refuses_is_one_line(run: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "rawloop", "verify", str(run)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=240)
    assert (done.returncode, done.stderr) == (1, "rawloop verify: no space is left on the disk\n")


@pytest.mark.usefixtures("permissions_count")
def test_what_cannot_be_read_is_not_called_damaged(door: Door, run: Path) -> None:
    slot, manifest = run / "checkpoints" / "step-00000010", run / "checkpoints" / BEST / "MANIFEST.json"
    manifest.chmod(0)
    slot.chmod(0)
    done = door("verify", run)
    assert done.err == f"rawloop verify: 2 unreadable (checkpoints/{slot.name}, checkpoints/{BEST}), 2 whole\n"
    assert done.out.count("it cannot be read: Permission denied\n") == 2
    assert "DAMAGED" not in done.out
    assert done.code == 1
    (run / "checkpoints").chmod(0)
    done = door("verify", run)
    assert (done.code, done.err) == (2, f"rawloop verify: '{run}' cannot be read: Permission denied\n")
    run.chmod(0)
    done = door("verify", run / "best")
    assert (done.code, done.err) == (2, f"rawloop verify: '{run / 'best'}' cannot be read: Permission denied\n")
    for path in (run, run / "checkpoints", slot, manifest):
        path.chmod(0o755)
