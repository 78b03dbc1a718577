"""Encoding once: reuse, continuation after every kind of interruption, bad clips, and what a codec may return."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from torch import Tensor

from rawloop.audio import load_audio
from rawloop.contracts import Audio, Sample, Turn
from rawloop.data import DataConfig
from rawloop.data.accept import decode_once
from rawloop.data.codes import CodeCache
from rawloop.data.prepare import BadClips, PrepareReport, prepare
from rawloop.data.shards import codec_folder, heard_at, open_cache
from rawloop.dist import World
from rawloop.errors import Preempted, RawloopError, UserError
from rawloop.family_protocols import CodecInfo
from tests.forks import Fork, Forks

Tone = Callable[..., Path]
Encode = Callable[[Tensor], Tensor]
Run = Callable[..., PrepareReport]
ROOT = Path(__file__).parents[2]


def sample(identity: str, *paths: Path) -> Sample:
    return Sample(identity, tuple(Turn("assistant", (Audio(path),), trained=True) for path in paths))


def samples_of(paths: list[Path]) -> list[Sample]:
    return [sample(f"s{index}", path) for index, path in enumerate(paths)]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "codes"


@pytest.fixture
def run(encode: Encode, info: CodecInfo, cache: Path) -> Run:
    def go(samples: list[Sample], encode: Encode = encode, info: CodecInfo = info, **options: Any) -> PrepareReport:
        limits = {key: options.pop(key) for key in ("shard_clips", "keep_seconds") if key in options}
        return prepare(samples, encode, info, cache, DataConfig(**options), progress=False, **limits)

    return go


def test_files_that_do_not_say_where_they_end_are_named(run: Run, cache: Path, tone: Tone) -> None:
    """An ogg that was cut between two pages looks like a broadcast that was recorded."""
    whole, ogg, wav = (tone(name, seconds=4.0).resolve() for name in ("a.ogg", "b.ogg", "c.wav"))
    noise = torch.rand(96000, generator=torch.Generator().manual_seed(0)).numpy()
    soundfile.write(ogg, noise, 24000)
    content = ogg.read_bytes()
    ogg.write_bytes(content[: content.rindex(b"OggS")])
    content = wav.read_bytes()
    wav.write_bytes(content[:40] + bytes(4) + content[44:-4000])
    twin = Path(shutil.copy(ogg, ogg.with_name("d.ogg")))
    samples = samples_of([whole, ogg, wav, twin])
    assert run(samples).encoded == 3
    for _ in range(2):  # a later start finds it in the index
        line = CodeCache(cache).open_ends(samples)
        assert line is not None
        assert line.startswith("3 clip(s) do not say where they end"), line
        assert f": {ogg}, {wav}, {twin}: listen to their ends" in line, line
        assert CodeCache(cache).open_ends(samples[:1]) is None
        assert run(samples).encoded == 0


@pytest.fixture
def clips(tone: Tone) -> list[Path]:
    return [tone(f"{index}.wav", hertz=200 + 10 * index, level=0.1 * (index + 1)).resolve() for index in range(5)]


def shards(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/shard-*.safetensors"))


def test_codes_are_those_of_the_codec(run: Run, clips: list[Path], encode: Encode, cache: Path) -> None:
    report = run(samples_of(clips), shard_clips=2)
    assert (report.samples, report.clips, report.encoded, report.reused) == (5, 5, 5, 0)
    assert len(shards(cache)) == 3
    codes = CodeCache(cache)
    for path in clips:
        expected = encode(load_audio(path, 24000))
        assert torch.equal(codes(path), expected)
        assert codes(path).dtype == torch.int64
        assert codes.frames(path) == len(expected) == 10


def test_nothing_is_encoded_twice(run: Run, clips: list[Path]) -> None:
    run(samples_of(clips))
    report = run(samples_of(clips), encode=forbidden)
    assert (report.encoded, report.reused) == (0, 5)


def forbidden(waveform: Tensor) -> Tensor:
    raise AssertionError("the codec ran although all codes are cached")


def test_shared_and_copied_clips_are_encoded_once(run: Run, clips: list[Path], cache: Path) -> None:
    copy = clips[0].with_name("copy.wav")
    copy.write_bytes(clips[0].read_bytes())
    report = run([sample("a", clips[0], clips[1]), sample("b", clips[1], clips[0]), sample("c", copy)])
    assert (report.clips, report.encoded, report.reused) == (3, 2, 1)
    codes = CodeCache(cache)
    assert torch.equal(codes(copy), codes(clips[0]))


def test_only_what_was_added_is_encoded(run: Run, clips: list[Path], cache: Path) -> None:
    run(samples_of(clips[:3]))
    assert run(samples_of(clips)).encoded == 2
    CodeCache(cache).check(samples_of(clips))


def test_a_changed_file_is_encoded_again(run: Run, clips: list[Path], tone: Tone, cache: Path, encode: Encode) -> None:
    run(samples_of(clips))
    tone("0.wav", hertz=700, seconds=0.8)
    assert run(samples_of(clips)).encoded == 1
    assert torch.equal(CodeCache(cache)(clips[0]), encode(load_audio(clips[0], 24000)))


def test_a_touched_or_moved_file_is_not(run: Run, clips: list[Path], cache: Path) -> None:
    run(samples_of(clips))
    os.utime(clips[0], ns=(1, 1))
    moved = clips[1].rename(clips[1].with_name("moved.wav"))
    report = run([sample("a", clips[0]), sample("b", moved)], encode=forbidden)
    assert report.reused == 2


def test_another_codec_has_codes_of_its_own(run: Run, clips: list[Path], info: CodecInfo, cache: Path) -> None:
    other = CodecInfo("0ther" + "0" * 59, 24000, 8, 1024, 25.0)
    run(samples_of(clips))
    assert run(samples_of(clips), encode=lambda wave: torch.ones(3, 8, dtype=torch.int32), info=other).encoded == 5
    assert CodeCache(cache, other.hash)(clips[0]).tolist() == [[1] * 8] * 3
    assert CodeCache(cache, info.hash).frames(clips[0]) == 10


def test_sample_rate_of_the_codec(run: Run, clips: list[Path], cache: Path) -> None:
    lengths = []

    def encode(waveform: Tensor) -> Tensor:
        lengths.append(len(waveform))
        return torch.zeros(1, 8, dtype=torch.int64)

    run(samples_of(clips[:1]), encode=encode, info=CodecInfo("x" * 64, 16000, 8, 1024, 25.0))
    assert lengths == [6400]


@pytest.fixture
def spoiled(clips: list[Path], tone: Tone, tmp_path: Path) -> list[Sample]:
    """Eight samples, of which four need a bad clip; one of them only as its reference."""
    (tmp_path / "text.wav").write_text("no audio\n")
    tone("silent.wav", level=0)
    tone("long.wav", seconds=2)
    broken = [tmp_path / name for name in ("text.wav", "silent.wav", "long.wav")]
    bad = [sample(f"bad-{path.stem}", path) for path in broken]
    return [*bad, *samples_of(clips[:4]), sample("bad-reference", broken[1], clips[4])]


def test_stop_encodes_the_rest_and_names_all(run: Run, spoiled: list[Sample], cache: Path) -> None:
    with pytest.raises(BadClips, match=r"3 of 8 clips cannot be used, and 4 of 8 samples need them") as caught:
        run(spoiled, max_seconds=1.0)
    assert caught.value.exit_code == 1
    report = caught.value.report
    assert report.encoded == 5
    assert [(Path(clip.path).name, clip.sample) for clip in report.bad] == [
        ("text.wav", "bad-text"),
        ("silent.wav", "bad-silent"),
        ("long.wav", "bad-long"),
    ]
    assert [clip.reason.partition(":")[0] for clip in report.bad] == [
        "cannot be decoded",
        "is silent (peak digital silence, limit -60 dBFS)",
        "lasts 2.00 s, longer than data.max_seconds (1 s)",
    ]
    assert report.left_out == ["bad-text", "bad-silent", "bad-long", "bad-reference"]
    written = json.loads((cache / "report.json").read_text())
    assert [clip["path"] for clip in written["bad"]] == [clip.path for clip in report.bad]
    assert written["left_out"] == report.left_out


def test_training_on_bad_clips_is_an_error_unless_skipped(run: Run, spoiled: list[Sample], cache: Path) -> None:
    with pytest.raises(BadClips):
        run(spoiled, max_seconds=1.0)
    codes = CodeCache(cache)
    assert codes.usable(spoiled) == (spoiled, {})
    with pytest.raises(UserError, match=r"3 clip\(s\) that cannot be used: .*text.wav \(cannot be decoded: .*skip"):
        codes.check(spoiled)


def test_skip_leaves_out_exactly_those_samples(run: Run, spoiled: list[Sample], cache: Path) -> None:
    report = run(spoiled, max_seconds=1.0, on_bad_sample="skip")
    assert len(report.bad) == 3
    kept, left_out = CodeCache(cache).usable(spoiled)
    assert [sample.id for sample in kept] == ["s0", "s1", "s2", "s3"]
    assert list(left_out) == report.left_out
    assert left_out["bad-reference"].endswith("silent.wav: is silent (peak digital silence, limit -60 dBFS)")
    CodeCache(cache).check(kept)


def test_bad_clips_get_another_chance(run: Run, spoiled: list[Sample], cache: Path) -> None:
    run(spoiled, max_seconds=1.0, on_bad_sample="skip")
    with pytest.raises(BadClips) as caught:
        run(spoiled, max_seconds=5.0)  # the long one is good now, and nobody asks to skip the others
    assert len(caught.value.report.bad) == 2
    assert CodeCache(cache).usable(spoiled)[1] == {}


def test_limits_hold_for_clips_that_are_encoded_already(run: Run, clips: list[Path], tone: Tone, cache: Path) -> None:
    samples = [*samples_of(clips), sample("long", tone("long.wav", seconds=2.0).resolve())]
    run(samples)
    with pytest.raises(BadClips, match=r"1 of 6 clips.*long.wav \(lasts 2.00 s, longer than data.max_seconds \(1 s\)"):
        run(samples, encode=forbidden, max_seconds=1.0)
    assert run(samples, encode=forbidden, max_seconds=1.0, on_bad_sample="skip").left_out == ["long"]
    assert list(CodeCache(cache).usable(samples)[1]) == ["long"]
    report = run(samples, encode=forbidden, max_seconds=2.0)  # its codes were kept
    assert (report.reused, report.bad) == (6, [])
    CodeCache(cache).check(samples)


def test_a_pipe_in_the_place_of_a_clip(run: Run, clips: list[Path]) -> None:
    clips[2].unlink()
    os.mkfifo(clips[2])
    with pytest.raises(BadClips, match=r"1 of 5 clips.*2.wav \(cannot be opened: Not a regular file\)"):
        run(samples_of(clips))


def test_a_mended_clip_is_used(run: Run, spoiled: list[Sample], tone: Tone, cache: Path) -> None:
    run(spoiled, on_bad_sample="skip")
    tone("silent.wav", hertz=500)
    kept, _ = CodeCache(cache).usable(spoiled)
    with pytest.raises(UserError, match=r"silent.wav: run `rawloop prepare` again"):
        CodeCache(cache).check(kept)
    run(spoiled, on_bad_sample="skip")
    assert list(CodeCache(cache).usable(spoiled)[1]) == ["bad-text"]


def test_a_clip_that_is_gone(run: Run, clips: list[Path]) -> None:
    clips[2].unlink()
    with pytest.raises(BadClips, match=r"2.wav \(cannot be opened: No such file or directory\)"):
        run(samples_of(clips))


def test_bad_clips_are_named_as_they_are_found(
    spoiled: list[Sample], encode: Encode, info: CodecInfo, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(spoiled, encode, info, cache, DataConfig(on_bad_sample="skip"))
    error = capsys.readouterr().err
    assert "text.wav: cannot be decoded" in error
    assert "encoding: 100%" in error


def test_a_log_file_does_not_get_every_state_of_the_bar(
    clips: list[Path], encode: Encode, info: CodecInfo, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(waveform: Tensor) -> Tensor:
        time.sleep(0.15)  # a terminal's bar is drawn every 0.1 s
        return encode(waveform)

    prepare(samples_of(clips), slow, info, cache)
    states = [state for state in capsys.readouterr().err.split("\r") if state.strip()]
    assert [state[:14] for state in states] == ["encoding:   0%", "encoding: 100%"]


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(8, 10, dtype=torch.int64), r"shape \(8, 10\) .* integers of shape \(frames, 8\)"),
        (torch.zeros(80, dtype=torch.int64), r"shape \(80,\)"),
        (torch.zeros(0, 8, dtype=torch.int64), r"shape \(0, 8\)"),
        (torch.zeros(10, 8), "gave torch.float32"),
        (torch.full((10, 8), 1024), "codes from 1024 to 1024 .* lie in 0 to 1023"),
        (torch.full((10, 8), -1), "codes from -1 to -1"),
    ],
)
def test_what_is_no_code(codes: Tensor, message: str, run: Run, clips: list[Path], cache: Path) -> None:
    with pytest.raises(RawloopError, match=message):
        run(samples_of(clips), encode=lambda waveform: codes)
    assert shards(cache) == []


def test_codes_must_fit_uint16(run: Run, clips: list[Path]) -> None:
    wide = CodecInfo("w" * 64, 24000, 1, 100_000, 25.0)
    with pytest.raises(RawloopError, match=r"0 to 65535"):
        run(samples_of(clips), encode=lambda waveform: torch.full((10, 1), 65536), info=wide)
    run(samples_of(clips), encode=lambda waveform: torch.full((10, 1), 65535), info=wide)


def test_an_error_of_the_codec_loses_nothing(run: Run, clips: list[Path], encode: Encode) -> None:
    def failing(waveform: Tensor) -> Tensor:
        if float(waveform.max()) > 0.35:
            raise torch.OutOfMemoryError("no memory")
        return encode(waveform)

    with pytest.raises(RawloopError, match=r"^no memory \(while encoding .*3.wav, 0.4 s\): lower data.max_seconds$"):
        run(samples_of(clips), encode=failing)
    assert run(samples_of(clips)).encoded == 2


def test_the_beginning_of_a_shard_is_kept(run: Run, clips: list[Path], encode: Encode, cache: Path) -> None:
    """A codec that fails at the third clip stands for a kill at that moment; what was kept before is used."""
    run(samples_of(clips))
    expected = contents(cache)
    shutil.rmtree(cache)
    for number in (1, 2):

        def failing(waveform: Tensor, number: int = number) -> Tensor:
            if float(waveform.max()) > 0.15 + 0.1 * number:
                raise SystemExit
            return encode(waveform)

        with pytest.raises(SystemExit):
            run(samples_of(clips), encode=failing, keep_seconds=0.0)
        assert [path.name for path in cache.glob("*/part-*")] == ["part-00000.safetensors"]
        assert shards(cache) == []
    report = run(samples_of(clips))
    assert (report.encoded, report.reused) == (2, 3)
    assert contents(cache) == expected


def test_a_run_that_has_failed_goes_on_with_its_plan(run: Run, clips: list[Path], encode: Encode, cache: Path) -> None:
    run(samples_of(clips), shard_clips=2)
    expected = contents(cache)
    shutil.rmtree(cache)

    def failing(waveform: Tensor) -> Tensor:
        if float(waveform.max()) > 0.35:
            raise torch.OutOfMemoryError("no memory")
        return encode(waveform)

    with pytest.raises(RawloopError, match="no memory"):
        run(samples_of(clips), encode=failing, shard_clips=2)
    assert len(shards(cache)) == 1
    assert run(samples_of(clips)).encoded == 2
    assert contents(cache) == expected


def test_a_damaged_part_or_plan_only_costs_time(run: Run, clips: list[Path], encode: Encode, cache: Path) -> None:
    def failing(waveform: Tensor) -> Tensor:
        if float(waveform.max()) > 0.35:
            raise torch.OutOfMemoryError("no memory")
        return encode(waveform)

    for name in ("part-00000.safetensors", "plan.json"):
        with pytest.raises(RawloopError, match="no memory"):
            run(samples_of(clips), encode=failing)
        (path,) = cache.glob(f"*/{name}")
        path.write_bytes(path.read_bytes()[:-9])
        assert run(samples_of(clips)).encoded == 5
        CodeCache(cache).check(samples_of(clips))
        shutil.rmtree(cache)


def test_clips_that_were_changed_between_two_starts_get_another_plan(
    run: Run, clips: list[Path], encode: Encode, cache: Path, tone: Tone
) -> None:
    def failing(waveform: Tensor) -> Tensor:
        if float(waveform.max()) > 0.45:
            raise torch.OutOfMemoryError("no memory")
        return encode(waveform)

    with pytest.raises(RawloopError, match="no memory"):
        run(samples_of(clips), encode=failing, shard_clips=2)
    assert len(shards(cache)) == 2
    tone("0.wav", hertz=700, seconds=0.8)
    added = tone("added.wav", hertz=800).resolve()
    report = run(samples_of([added, *clips]))
    assert (report.encoded, report.reused) == (3, 3)
    codes = CodeCache(cache)
    assert all(torch.equal(codes(path), encode(load_audio(path, 24000))) for path in [added, *clips])
    assert not list(cache.glob("*/plan.json"))
    assert not list(cache.glob("*/part-*"))


def contents(cache: Path) -> dict[str, bytes]:
    """The files of the cache's codes, by name."""
    return {path.name: path.read_bytes() for path in cache.glob("*/*") if path.is_file()}


def prepare_share(world: World, clips: list[Path], cache: Path, info: CodecInfo) -> tuple[int, int]:
    def encode(waveform: Tensor) -> Tensor:
        frames = waveform[: len(waveform) // 960 * 960].reshape(-1, 8, 120)
        return (frames.abs().mean(dim=-1) * 1023).long()

    report = prepare(samples_of(clips), encode, info, cache, DataConfig(), progress=False, shard_clips=2, world=world)
    return report.encoded, report.reused


def test_two_processes_write_what_one_does(
    tone: Tone, info: CodecInfo, cache: Path, run: Run, run_ranks: Callable[..., list[Any]]
) -> None:
    clips = [
        tone(f"{index:02}.wav", level=0.1, hertz=200 + index % 9).resolve() for index in range(11)
    ]  # two are equal
    run(samples_of(clips), shard_clips=2)
    expected = contents(cache)
    shutil.rmtree(cache)
    assert run_ranks(prepare_share, clips, cache, info) == [(11, 0)] * 2
    assert contents(cache) == expected
    assert run_ranks(prepare_share, clips, cache, info) == [(0, 11)] * 2
    assert contents(cache) == expected


def test_a_lost_shard_is_encoded_again(run: Run, clips: list[Path], cache: Path) -> None:
    run(samples_of(clips), shard_clips=2)
    shards(cache)[0].unlink()
    with pytest.raises(RawloopError, match=r"shard-00000.safetensors is damaged \(the file is gone\)"):
        CodeCache(cache).check(samples_of(clips))
    assert run(samples_of(clips)).encoded == 2
    CodeCache(cache).check(samples_of(clips))


def test_two_writers_at_once(run: Run, clips: list[Path], info: CodecInfo, cache: Path) -> None:
    with open_cache(cache, info), pytest.raises(UserError, match=r"another `rawloop prepare` writes to"):
        run(samples_of(clips))
    run(samples_of(clips))


def test_a_folder_that_cannot_be_made(run: Run, clips: list[Path], cache: Path) -> None:
    cache.write_text("a file in the way")
    with pytest.raises(UserError, match=r"cannot be written .* set --data.codes to another folder"):
        run(samples_of(clips))


def test_folder_of_another_codec_with_the_same_beginning(
    run: Run, clips: list[Path], info: CodecInfo, cache: Path
) -> None:
    run(samples_of(clips))
    twin = replace(info, hash=info.hash[:16] + "1" * 48)
    with pytest.raises(RawloopError, match=r"has codes of"):
        run(samples_of(clips), info=twin)


def test_decoded_once_for_models_that_take_no_codes(
    clips: list[Path], tone: Tone, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent, spoilt = tone("silent.wav", level=0).resolve(), tone("spoilt.flac", seconds=1.0).resolve()
    content = bytearray(spoilt.read_bytes())
    content[len(content) // 2] ^= 1  # in the middle of a frame: no header tells of it
    spoilt.write_bytes(content)
    samples = [*samples_of(clips), sample("silent", clips[0], silent), sample("spoilt", spoilt), Sample("text", ())]
    config = DataConfig(max_seconds=1.5)
    heard = decode_once(samples, cache, 16000, config)
    assert [heard.frames(path) for path in clips] == [6400] * 5
    assert heard.usable(samples) == (samples, {})
    with pytest.raises(
        UserError, match=r"2 clip\(s\) that cannot be used: .*silent.wav \(is silent.*spoilt.flac \(.*decoded"
    ):
        heard.check(samples)
    kept, left_out = decode_once(samples, cache, 16000, replace(config, on_bad_sample="skip")).usable(samples)
    assert [one.id for one in kept] == ["s0", "s1", "s2", "s3", "s4", "text"]
    assert list(left_out) == ["silent", "spoilt"]
    assert capsys.readouterr().err.count("decoding: 100%") == 1
    tone("0.wav", seconds=2.0)
    with pytest.raises(UserError, match=r"0.wav \(lasts 2.00 s, longer than data.max_seconds \(1.5 s\)\)"):
        decode_once(samples, cache, 16000, config).check(samples[:1])
    assert capsys.readouterr().err.count("decoding: 100%") == 1
    decode_once(samples, cache, 16000, DataConfig()).check(samples[:1])
    with pytest.raises(UserError, match=r"0.wav \(lasts 2.00 s, longer than data.max_seconds \(1.5 s\)\)"):
        decode_once(samples, cache, 16000, config).check(samples[:1])
    assert decode_once(samples, cache, 24000, config).frames(clips[1]) == 9600


def test_codes_and_decoded_clips_lie_side_by_side(run: Run, clips: list[Path], cache: Path) -> None:
    run(samples_of(clips))
    heard = decode_once(samples_of(clips), cache, 16000, DataConfig())
    assert (heard.frames(clips[0]), CodeCache(cache).frames(clips[0])) == (6400, 10)


def test_one_process_decodes_and_the_others_wait(clips: list[Path], cache: Path) -> None:
    with ThreadPoolExecutor(1) as pool, open_cache(cache, heard_at(16000)):
        waiting = pool.submit(decode_once, samples_of(clips), cache, 16000, DataConfig())
        time.sleep(0.2)
        assert not waiting.done()
    assert waiting.result().frames(clips[0]) == 6400


WORKER = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has switched off in what runs beside it
from rawloop.contracts import Audio, Sample, Turn
from rawloop.family_protocols import CodecInfo
from rawloop.data.prepare import prepare

def encode(waveform):
    time.sleep(0.03)
    frames = waveform[: len(waveform) // 960 * 960].reshape(-1, 8, 120)
    print("encoded", flush=True)
    return (frames.abs().mean(dim=-1) * 1023).long()

paths = sorted(Path(sys.argv[1]).glob("*.wav"))
samples = [Sample(path.name, (Turn("assistant", (Audio(path),), True),)) for path in paths]
info = CodecInfo("c0dec" + "0" * 59, 24000, 8, 1024, 25.0)
report = prepare(samples, encode, info, sys.argv[2], progress=False, shard_clips=int(sys.argv[3]))
print("report", report.encoded, report.reused, flush=True)
"""


@pytest.fixture
def worker(forks: Forks, tmp_path: Path, cache: Path) -> Iterator[Callable[[int], Fork]]:
    """Give `worker(shard_clips)`: a process that prepares all clips slowly and prints a line per encoded clip."""
    started: list[Fork] = []

    def start(shard_clips: int) -> Fork:
        started.append(forks.start("-c", WORKER, tmp_path, cache, str(shard_clips), finalize=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
    forks.wait(started)


def test_killed_in_the_middle(
    forks: Forks, tone: Tone, worker: Callable[[int], Fork], run: Run, encode: Encode, cache: Path
) -> None:
    clips = [tone(f"{index:02}.wav", hertz=200 + index).resolve() for index in range(24)]
    first = worker(4)
    first.wait_for(10 * "encoded\n")
    first.kill()
    forks.wait([first], 60)
    assert first.code == -signal.SIGKILL
    encoded = first.text("out").count("encoded")
    whole = encoded // 4 * 4
    (codec_folder(cache, CodeCache(cache).codec) / "shard-00099.safetensors.part").write_text("half written")
    report = run(samples_of(clips))
    assert report.clips == 24
    assert report.reused in (whole, whole - 4)  # the last shard may have been killed between its codes and its rows
    assert report.encoded == 24 - report.reused
    assert not list(cache.glob("*/*.part"))
    codes = CodeCache(cache)
    codes.check(samples_of(clips))
    assert all(torch.equal(codes(path), encode(load_audio(path, 24000))) for path in clips)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_stopped_in_the_middle(
    forks: Forks, number: signal.Signals, tone: Tone, worker: Callable[[int], Fork], run: Run, cache: Path
) -> None:
    clips = [tone(f"{index:02}.wav", hertz=200 + index).resolve() for index in range(24)]
    first = worker(1000)
    first.wait_for(6 * "encoded\n")
    os.kill(first.pid, number)
    forks.wait([first], 60)
    error = first.text("err")
    assert first.code == (-number if number == signal.SIGINT else 1), error
    said = "KeyboardInterrupt" if number == signal.SIGINT else f"Preempted: stopped by {number.name}; encoded clips"
    assert said in error
    assert "report" not in first.text("out")
    encoded = first.text("out").count("encoded")
    assert encoded < 24
    report = run(samples_of(clips))
    assert (report.reused, report.encoded) == (encoded, 24 - encoded)  # not one clip is lost


def test_a_handler_that_goes_on_does_not_make_it_a_success(run: Run, clips: list[Path], encode: Encode) -> None:
    def encode_and_signal(waveform: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGTERM)
        return encode(waveform)

    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        with pytest.raises(Preempted, match=r"stopped by SIGTERM; encoded clips are kept"):
            run(samples_of(clips), encode=encode_and_signal)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert run(samples_of(clips)).encoded == 4


def test_signal_handlers_are_put_back(run: Run, clips: list[Path]) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    run(samples_of(clips))
    assert [signal.getsignal(number) for number in numbers] == before


def test_decoding_goes_on_while_the_codec_works(run: Run, clips: list[Path], encode: Encode) -> None:
    """Results come in order whatever the threads do."""
    seen = []

    def slow(waveform: Tensor) -> Tensor:
        time.sleep(0.01)
        seen.append(round(float(waveform.max()), 1))
        return encode(waveform)

    run(samples_of(clips), encode=slow)
    assert seen == [0.1, 0.2, 0.3, 0.4, 0.5]
