"""The read side of the cache: look-ups, files that changed or moved, damage, several codecs, worker processes."""

import multiprocessing
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rawloop.audio import Segment, load_audio
from rawloop.contracts import Audio, Sample, Turn
from rawloop.data import DataConfig, codes_folder
from rawloop.data.codes import CodeCache
from rawloop.data.prepare import prepare
from rawloop.errors import RawloopError, UserError
from rawloop.family_protocols import CodecInfo

Tone = Callable[..., Path]
Encode = Callable[[Tensor], Tensor]


def sample(*paths: Path) -> Sample:
    return Sample("s", tuple(Turn("assistant", (Audio(path),), trained=True) for path in paths))


@pytest.fixture
def data(tmp_path: Path, tone: Tone) -> Path:
    """A data folder with eight clips."""
    for index in range(8):
        tone(f"data/{index}.wav", seconds=0.2 + 0.04 * index, hertz=200 + 10 * index)
    return (tmp_path / "data").resolve()


@pytest.fixture
def clips(data: Path) -> list[Path]:
    return sorted(data.glob("*.wav"))


@pytest.fixture
def folder(data: Path, clips: list[Path], encode: Encode, info: CodecInfo) -> Path:
    """The cache of the eight clips, in the data folder, in shards of three."""
    cache = codes_folder(DataConfig(train=str(data)))
    prepare([sample(*clips)], encode, info, cache, progress=False, shard_clips=3)
    return cache


def test_info_of_the_codec(folder: Path, info: CodecInfo) -> None:
    assert CodeCache(folder).codec == info


def test_stored_as_uint16(folder: Path) -> None:
    shard = next(folder.glob("*/shard-00000.safetensors"))
    with safe_open(shard, "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert {(tensor.dtype, tensor.shape[1]) for tensor in tensors} == {(torch.uint16, 8)}
    assert len(tensors) == 3


def test_a_link_to_a_clip(folder: Path, clips: list[Path], data: Path) -> None:
    (data / "link.wav").symlink_to(clips[0])
    codes = CodeCache(folder)
    assert torch.equal(codes(data / "link.wav"), codes(clips[0]))


def test_clip_without_codes(folder: Path, tone: Tone) -> None:
    other = tone("data/other.wav", hertz=900)
    with pytest.raises(UserError, match=r"1 clip\(s\) without codes: .*other.wav: run `rawloop prepare`"):
        CodeCache(folder)(other)


def test_check_counts_what_is_missing(folder: Path, clips: list[Path], tone: Tone) -> None:
    others = [tone(f"data/other{index}.wav", hertz=900 + index) for index in range(7)]
    with pytest.raises(UserError) as caught:
        CodeCache(folder).check([sample(*clips, *others), sample(others[0])])
    message = str(caught.value)
    assert message.startswith("7 clip(s) without codes: ")
    assert "other4.wav and 2 more" in message
    assert "other5" not in message
    assert "\n" not in message


def test_codes_have_an_identity(folder: Path, clips: list[Path], data: Path) -> None:
    cache = CodeCache(folder)
    assert len({cache.identity(clip) for clip in clips}) == len(clips)
    moved = data.rename(data.parent / "moved")
    assert CodeCache(moved / folder.relative_to(data)).identity(moved / clips[3].name) == cache.identity(clips[3])


def test_changed_clip(folder: Path, clips: list[Path], tone: Tone) -> None:
    codes = CodeCache(folder)
    tone("data/3.wav", hertz=999, seconds=1.0)
    with pytest.raises(UserError, match=r"1 clip\(s\) changed since they were encoded: .*3.wav: .*prepare` again"):
        codes(clips[3])
    with pytest.raises(UserError, match=r"changed since they were encoded"):
        codes.check([sample(*clips)])


def test_changed_clip_of_the_same_size(folder: Path, clips: list[Path]) -> None:
    content = bytearray(clips[3].read_bytes())
    content[-2] ^= 1
    clips[3].write_bytes(content)
    os.utime(clips[3], ns=(5, 5))
    with pytest.raises(UserError, match=r"changed since they were encoded"):
        CodeCache(folder)(clips[3])


def test_touched_clip(folder: Path, clips: list[Path], encode: Encode) -> None:
    os.utime(clips[3], ns=(5, 5))
    codes = CodeCache(folder)
    codes.check([sample(*clips)])
    assert torch.equal(codes(clips[3]), encode(load_audio(clips[3], 24000)))


def test_swapped_clips_give_the_codes_of_their_contents(folder: Path, clips: list[Path], encode: Encode) -> None:
    first, second = clips[0].read_bytes(), clips[1].read_bytes()
    clips[0].write_bytes(second)
    clips[1].write_bytes(first)
    codes = CodeCache(folder)
    assert torch.equal(codes(clips[0]), encode(load_audio(clips[0], 24000)))
    assert codes.frames(clips[0]) == 6


def test_moved_with_its_data(folder: Path, data: Path, clips: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = CodeCache(folder)(clips[2])
    monkeypatch.setattr("rawloop.data.codes.content_hash", lambda path: pytest.fail("nothing has to be hashed"))
    moved = data.rename(data.with_name("elsewhere"))
    codes = CodeCache(moved / folder.name)
    codes.check([sample(*moved.glob("*.wav"))])
    assert torch.equal(codes(moved / "2.wav"), expected)


def test_moved_without_its_data(folder: Path, clips: list[Path], tmp_path: Path) -> None:
    expected = CodeCache(folder)(clips[2])
    codes = CodeCache(folder.rename(tmp_path / "codes"))
    codes.check([sample(*clips)])
    assert torch.equal(codes(clips[2]), expected)


def test_audio_that_is_gone_is_not_needed(folder: Path, clips: list[Path]) -> None:
    expected = CodeCache(folder)(clips[2])
    clips[2].unlink()
    codes = CodeCache(folder)
    codes.check([sample(*clips)])
    assert torch.equal(codes(clips[2]), expected)


def test_moved_with_clips_that_lie_beside_the_training_data(
    tmp_path: Path, tone: Tone, encode: Encode, info: CodecInfo
) -> None:
    train, held_out = tone("set/train/a.wav").resolve(), tone("set/eval/b.wav", hertz=300).resolve()
    prepare([sample(train, held_out)], encode, info, tmp_path / "set" / "train" / "codes", progress=False)
    moved = (tmp_path / "set").rename(tmp_path / "elsewhere").resolve()
    (moved / "train" / "a.wav").unlink()
    (moved / "eval" / "b.wav").unlink()
    codes = CodeCache(moved / "train" / "codes")
    codes.check([sample(moved / "train" / "a.wav", moved / "eval" / "b.wav")])
    assert codes.frames(moved / "eval" / "b.wav") == 10


def test_limits_hold_for_clips_that_are_encoded_already(folder: Path, clips: list[Path]) -> None:
    """The clips last 0.2, 0.24, ... 0.48 s, which is 5, 6, ... 12 frames."""
    samples = [Sample(path.stem, sample(path).turns) for path in clips]
    limited = DataConfig(min_seconds=0.3, max_seconds=0.4)
    codes = CodeCache(folder, config=limited)
    assert codes.usable(samples) == (samples, {})
    with pytest.raises(
        UserError, match=r"2 clip\(s\) that cannot be used: .*0.wav \(lasts 0.200 s, shorter than data.min"
    ):
        codes.check(samples)
    kept, left_out = CodeCache(folder, config=replace(limited, on_bad_sample="skip")).usable(samples)
    assert [s.id for s in kept] == ["1", "2", "3", "4", "5", "6"]  # one frame more or less is rounding
    assert left_out["7"].endswith("7.wav: lasts 0.48 s, longer than data.max_seconds (0.4 s)")
    CodeCache(folder, config=limited).check(kept)
    CodeCache(folder, config=DataConfig(min_seconds=0.2, max_seconds=0.48)).check(samples)


def test_no_codes_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none has no codes: run `rawloop prepare` first, or set --data.codes"):
        CodeCache(tmp_path / "none")


@pytest.fixture
def second(folder: Path, clips: list[Path], encode: Encode) -> CodecInfo:
    """A second codec with codes in the same cache."""
    other = CodecInfo("5econd" + "0" * 58, 24000, 8, 1024, 25.0)
    prepare([sample(*clips)], lambda wave: encode(wave).flip(0), other, folder, progress=False)
    return other


def test_several_codecs(folder: Path, second: CodecInfo, info: CodecInfo, clips: list[Path]) -> None:
    with pytest.raises(UserError, match=r"codes of several codecs \(5econd0000000000 at 24000 Hz, c0dec00000000000"):
        CodeCache(folder)
    assert CodeCache(folder, second.hash).codec == second
    assert CodeCache(folder, info.hash[:10]).codec == info
    assert not torch.equal(CodeCache(folder, info.hash)(clips[7]), CodeCache(folder, second.hash)(clips[7]))


def test_unknown_codec(folder: Path) -> None:
    with pytest.raises(UserError, match=r"has no codes of codec feed \(it has c0dec00000000000 at 24000 Hz\)"):
        CodeCache(folder, "feed")


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def read_all(codes: CodeCache, clips: list[Path]) -> None:
    for path in clips:
        codes(path)


def test_every_flipped_bit_of_the_codes_is_found(folder: Path, clips: list[Path]) -> None:
    shard = next(folder.glob("*/shard-00000.safetensors"))
    start = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    for position in range(start, shard.stat().st_size, 37):
        flip(shard, position)
        codes = CodeCache(folder)
        with pytest.raises(RawloopError, match=r"shard-00000.safetensors is damaged \(the codes of .*delete it"):
            read_all(codes, clips)
        flip(shard, position)
    CodeCache(folder)(clips[0])


def test_truncated_shard(folder: Path, clips: list[Path]) -> None:
    shard = next(folder.glob("*/shard-00000.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    codes = CodeCache(folder)
    with pytest.raises(RawloopError, match=r"shard-00000.safetensors is damaged"):
        read_all(codes, clips)


def test_truncated_shard_is_seen_at_the_start(folder: Path, clips: list[Path]) -> None:
    shard = next(folder.glob("*/shard-00001.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(
        RawloopError, match=r"shard-00001.safetensors is damaged \(its header promises \d+ bytes, it has"
    ):
        CodeCache(folder).check([sample(*clips)])


@pytest.mark.parametrize("keep", [0, 100, -1])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_shard_that_is_cut_short_while_it_is_read(keep: int, folder: Path, clips: list[Path]) -> None:
    """Mapped, it would kill the process with SIGBUS: hence another process."""

    def read() -> None:
        codes = CodeCache(folder)
        codes.check([sample(*clips)])
        codes(clips[0])
        os.truncate(shard, keep if keep >= 0 else shard.stat().st_size - 10)
        with pytest.raises(RawloopError, match=r"shard-00000.safetensors is damaged"):
            read_all(codes, clips[:3])

    shard = next(folder.glob("*/shard-00000.safetensors"))
    process = multiprocessing.get_context("fork").Process(target=read)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_damage_anywhere_is_one_line(folder: Path, clips: list[Path]) -> None:
    """400 caches with bytes changed, cut out or put in: either the right codes or one line, and nothing else."""
    random = Random(0)
    right = [CodeCache(folder)(path) for path in clips]
    files = sorted(file for file in folder.glob("*/*") if not file.name.endswith("lock"))
    refused = []
    for _ in range(400):
        file = random.choice(files)
        whole = file.read_bytes()
        spoilt, place = bytearray(whole), random.randrange(min(len(whole), random.choice((40, len(whole)))))
        change = random.choice((bytes([random.randrange(256)]), b"", b"9" * 5000, b"[" * 3000, b"\x00", b"null"))
        spoilt[place : place + random.choice((1, 1, 8))] = change
        file.write_bytes(spoilt)
        try:
            codes = CodeCache(folder, config=DataConfig())
            codes.check([sample(*clips)])
            assert all(torch.equal(codes(path), expected) for path, expected in zip(clips, right, strict=True))
        except RawloopError as error:
            refused.append(str(error))
        file.write_bytes(whole)
    assert len(refused) > 200
    assert not any("\n" in line for line in refused)


@pytest.mark.parametrize(
    "content",
    ["[1, 2", "{}", "1", '["a\\u0000"]', '["a", "b"]', '["a", 1]\n["b"', '["a", "b", 1, 2, 3, 4, 5, 6, 7, 8, 9]'],
)
def test_damaged_index(content: str, folder: Path) -> None:
    next(folder.glob("*/files-00001.jsonl")).write_text(content)
    with pytest.raises(RawloopError, match=r"files-00001.jsonl is damaged .* run `rawloop prepare` again"):
        CodeCache(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "speed": 2}'])
def test_damaged_codec_file(content: str, folder: Path) -> None:
    next(folder.glob("*/codec.json")).write_text(content)
    with pytest.raises(RawloopError, match=r"codec.json is damaged"):
        CodeCache(folder)


def test_other_format(folder: Path) -> None:
    next(folder.glob("*/codec.json")).write_text('{"format": 2}')
    with pytest.raises(RawloopError, match=r"codec.json is of another format"):
        CodeCache(folder)


class Codes(Dataset[Tensor]):
    def __init__(self, cache: CodeCache, clips: list[Path]) -> None:
        self.cache, self.clips = cache, clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Tensor:
        return self.cache(self.clips[index])


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_worker_processes(context: str, folder: Path, clips: list[Path]) -> None:
    codes = CodeCache(folder)
    expected = [codes(path) for path in clips]
    loader = DataLoader(Codes(codes, clips), batch_size=None, num_workers=2, multiprocessing_context=context)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(loader, expected, strict=True))


def test_pickled_after_use(folder: Path, clips: list[Path]) -> None:
    codes = CodeCache(folder)
    assert torch.equal(pickle.loads(pickle.dumps(codes))(clips[0]), codes(clips[0]))


def test_names_that_are_not_utf8(tmp_path: Path, tone: Tone, encode: Encode, info: CodecInfo) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 \xe2\x80\xa8.wav"))
    tone("a.wav").rename(odd)
    prepare([sample(odd)], encode, info, tmp_path / "codes", progress=False)
    codes = CodeCache(tmp_path / "codes")
    codes.check([sample(odd)])
    assert codes.frames(odd) == 10


def test_segments_of_one_recording_have_codes_of_their_own(
    tmp_path: Path, tone: Tone, encode: Encode, info: CodecInfo
) -> None:
    talk = tone("data/talk.flac", seconds=1.0).resolve()
    first, second, rest = (Segment(talk, *times).path() for times in ((0.0, 0.4), (0.4, 0.6), (0.6, None)))
    cache = tmp_path / "codes"
    report = prepare([sample(talk, first, second, rest)], encode, info, cache, progress=False)
    assert (report.encoded, report.bad) == (4, [])
    codes = CodeCache(cache)
    codes.check([sample(first, second, rest)])
    assert [codes.frames(path) for path in (talk, first, second, rest)] == [25, 10, 5, 10]
    assert torch.equal(codes(second), encode(load_audio(second, 24000)))
    assert prepare([sample(first, second, rest)], encode, info, cache, progress=False).encoded == 0

    moved = talk.rename(talk.with_name("moved.flac"))
    assert torch.equal(CodeCache(cache)(Segment(moved, 0.4, 0.6).path()), codes(second))
    with pytest.raises(UserError, match=r"1 clip\(s\) without codes: .*moved.flac#t=0.4,0.7: "):
        CodeCache(cache).check([sample(Segment(moved, 0.4, 0.7).path())])
    tone("data/moved.flac", seconds=1.0, hertz=500)
    prepare([sample(Segment(moved, 0.4, 0.6).path())], encode, info, cache, progress=False)
    tone("data/moved.flac", seconds=1.0, hertz=900)
    with pytest.raises(UserError, match=r"changed since they were encoded: .*moved.flac#t=0.4,0.6"):
        CodeCache(cache).check([sample(Segment(moved, 0.4, 0.6).path())])
