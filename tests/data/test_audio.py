"""Decoding, mixing, resampling; every reason why a clip cannot be used; and a torchaudio that does not load."""

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import soundfile
import torch

from rawloop.audio import BadAudio, Segment, load_audio
from rawloop.files import sha256_file
from rawloop.frames import _mp3_frame

Tone = Callable[..., Path]
ROOT = Path(__file__).parents[2]


def frequency(waveform: torch.Tensor, rate: int) -> float:
    """The strongest frequency in Hz."""
    return float(torch.fft.rfft(waveform).abs().argmax()) * rate / len(waveform)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 24000, 44100, 48000, 96000])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_rate_and_channels(rate: int, channels: int, tone: Tone) -> None:
    waveform = load_audio(tone("a.wav", seconds=0.5, rate=rate, channels=channels), 24000)
    assert waveform.dtype == torch.float32
    assert waveform.shape == (12000,)
    assert frequency(waveform, 24000) == pytest.approx(220, abs=2)
    assert float(waveform[2000:10000].abs().max()) == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.wav", {"subtype": "FLOAT"}),
        ("a.wav", {"subtype": "DOUBLE"}),
        ("a.wav", {"subtype": "PCM_24"}),
        ("a.wav", {"subtype": "PCM_U8"}),
        ("a.flac", {}),
        ("a.ogg", {}),
        ("a.opus", {"format": "OGG", "subtype": "OPUS"}),
        ("a.mp3", {}),
        ("no suffix", {"format": "WAV"}),
    ],
)
def test_formats(name: str, options: dict[str, str], tone: Tone) -> None:
    waveform = load_audio(tone(name, seconds=1.0, **options), 24000)
    assert abs(len(waveform) - 24000) <= 2400  # lossy formats pad
    assert frequency(waveform, 24000) == pytest.approx(220, abs=2)


def test_mono_at_the_right_rate_is_untouched(tone: Tone) -> None:
    path = tone("a.wav", subtype="FLOAT")
    stored, _ = soundfile.read(path, dtype="float32")
    assert torch.equal(load_audio(path, 24000), torch.from_numpy(stored))


def test_channels_are_averaged(tmp_path: Path) -> None:
    left = 0.5 * torch.sin(torch.arange(24000) / 20)
    soundfile.write(tmp_path / "a.wav", torch.stack((left, 0 * left), dim=1).numpy(), 24000, subtype="FLOAT")
    assert torch.allclose(load_audio(tmp_path / "a.wav", 24000), left / 2)


def test_text_named_wav(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("these are words, not sounds\n" * 50)
    with pytest.raises(BadAudio, match=r"^cannot be decoded: .*[Ff]ormat not recognised"):
        load_audio(tmp_path / "a.wav", 24000)


def test_file_without_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.wav").touch()
    with pytest.raises(BadAudio, match=r"^cannot be decoded"):
        load_audio(tmp_path / "a.wav", 24000)


def test_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(BadAudio, match=r"^cannot be opened: No such file or directory"):
        load_audio(tmp_path / "a.wav", 24000)


def test_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(BadAudio, match=r"^cannot be opened: Is a directory"):
        load_audio(tmp_path, 24000)


@pytest.mark.parametrize("keep", [0.02, 0.5])
def test_flac_that_was_cut_short(keep: float, tone: Tone) -> None:
    path = tone("a.flac", seconds=2.0)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(BadAudio, match=r"^(cannot be decoded|is cut short)"):
        load_audio(path, 24000)


@pytest.mark.parametrize("name", ["a.wav", "a.mp3"])
def test_what_was_cut_short_is_not_taken_for_whole(name: str, tone: Tone) -> None:
    path = tone(name, seconds=2.0)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadAudio, match=r"^is cut short: its header promises 2.0\d s, it has (1.0\d|0.9\d) s$"):
        load_audio(path, 24000)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
def test_files_that_were_cut_in_their_header(name: str, tone: Tone) -> None:
    path = tone(name, seconds=2.0)
    content = path.read_bytes()
    for length in range(1, 200):
        path.write_bytes(content[:length])
        with pytest.raises(BadAudio) as caught:
            load_audio(path, 24000)
        assert " -" not in str(caught.value), length


@pytest.mark.parametrize("name", ["AIFF", "AU", "W64"])
def test_other_formats_that_were_cut_short(name: str, tone: Tone) -> None:
    path = tone("a", seconds=2.0, format=name)
    assert len(load_audio(path, 24000)) == 48000
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadAudio, match=r"^is cut short: its header promises 9\d+ bytes, it has 4\d+$"):
        load_audio(path, 24000)


def without_xing(path: Path) -> Path:
    """Take the header frame off an mp3: what is left are complete frames of audio."""
    content = path.read_bytes()
    frame = _mp3_frame(content)
    assert frame is not None
    assert b"Xing" in content[: frame.length] or b"Info" in content[: frame.length]
    path.write_bytes(content[frame.length :])
    return path


ID3V1 = b"TAG" + bytes(124) + b"\xff"
ID3V2 = b"ID3\x03\x00\x00\x00\x00\x00\x10" + bytes(16)


APE = bytes(20) + b"APETAGEX" + (2000).to_bytes(4, "little") + (52).to_bytes(4, "little") + bytes(16)  # no header


@pytest.mark.parametrize("behind", [b"", ID3V1, b"APETAGEX" + bytes(24) + ID3V1, bytes(300), APE, APE + ID3V1])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_an_mp3_without_a_length_is_whole(mode: str, behind: bytes, tone: Tone) -> None:
    path = without_xing(tone("a.mp3", seconds=2.0, bitrate_mode=mode, compression_level=0.5))
    path.write_bytes(ID3V2 + path.read_bytes() + behind)
    assert len(load_audio(path, 24000)) / 24000 == pytest.approx(2.07, abs=0.03)  # with the encoder's padding


def test_an_mp3_whose_header_was_never_completed(tone: Tone) -> None:
    path = tone("a.mp3", seconds=2.0)
    content = path.read_bytes()
    place = content.index(b"Xing") + 8
    path.write_bytes(content[:place] + bytes(4) + content[place + 4 :])
    assert len(load_audio(path, 24000)) / 24000 == pytest.approx(2.07, abs=0.05)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadAudio, match=r"^is cut short"):
        load_audio(path, 24000)


def test_an_mp3_that_gets_quiet_is_read_to_its_end(tmp_path: Path) -> None:
    """Its first frames are large, so that its length is guessed too short from them."""
    noise = torch.randn(24000, generator=torch.Generator().manual_seed(0))
    wave = torch.cat((0.2 * noise, 1e-4 * noise, 1e-4 * noise, 0.2 * noise))
    options = {"bitrate_mode": "VARIABLE", "compression_level": 0.5}
    soundfile.write(tmp_path / "a.mp3", wave.numpy(), 24000, **options)
    path = without_xing(tmp_path / "a.mp3")
    assert soundfile.info(path).frames < 3 * 24000
    content = path.read_bytes()
    frame = _mp3_frame(content)
    assert frame is not None
    count = frame.length.to_bytes(2) + (4 * 24000 // 576 + 2).to_bytes(4)
    vbri = (content[:4] + bytes(32) + b"VBRI" + bytes(8) + count).ljust(frame.length, b"\0")  # Fraunhofer's header
    for before in (b"", vbri):
        path.write_bytes(before + content)
        heard = load_audio(path, 24000)
        assert len(heard) / 24000 == pytest.approx(4.05, abs=0.05)
        assert float(heard[-20000:].abs().max()) > 0.2


def test_an_mp3_cut_in_the_middle_of_a_frame(tone: Tone) -> None:
    path = without_xing(tone("a.mp3", seconds=2.0))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadAudio, match=r"^is cut short after 2.0\d s: its last frame has \d+ of \d+ bytes"):
        load_audio(path, 24000)


def without_total(content: bytes) -> bytes:
    """A flac whose header does not say how many samples there are."""
    return content[:21] + bytes([content[21] & 0xF0]) + bytes(4) + content[26:]


@pytest.mark.parametrize("behind", [b"", ID3V1, bytes(300)])
@pytest.mark.parametrize("channels", [1, 8])
def test_a_flac_without_a_length(channels: int, behind: bytes, tone: Tone) -> None:
    path = tone("a.flac", seconds=2.0, channels=channels)
    expected = load_audio(path, 24000)
    path.write_bytes(without_total(path.read_bytes()) + behind)
    assert torch.equal(load_audio(path, 24000, max_seconds=2.0), expected)
    with pytest.raises(BadAudio, match=r"lasts 2.00 s, longer than data.max_seconds \(1.9 s\)"):
        load_audio(path, 24000, max_seconds=1.9)
    path.write_bytes(path.read_bytes()[: -len(behind) - 1])
    with pytest.raises(BadAudio, match=r"^is cut short"):
        load_audio(path, 24000)


@pytest.mark.parametrize("total", [0, 20000, 50000])
def test_a_flac_with_a_wrong_length(total: int, tone: Tone) -> None:
    path = tone("a.flac", seconds=2.0)
    content = path.read_bytes()
    path.write_bytes(content[:22] + total.to_bytes(4) + content[26:])
    if total == 0:
        assert len(load_audio(path, 24000)) == 48000
        return
    with pytest.raises(BadAudio, match=rf"promises {total / 24000:.2f} s"):
        load_audio(path, 24000)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.opus", "a.mp3"])
def test_joined_files_are_not_read_to_the_first_end_only(name: str, tone: Tone) -> None:
    options = {"format": "OGG", "subtype": "OPUS"} if name == "a.opus" else {}
    path = tone(name, seconds=1.0, **options)
    path.write_bytes(2 * path.read_bytes())
    with pytest.raises(BadAudio, match=r"^(has a second|goes on for 1.\d\d s after the end).*joined, split them"):
        load_audio(path, 24000)


def test_joined_mp3s_without_headers_are_read_to_the_last_end(tone: Tone) -> None:
    path = without_xing(tone("a.mp3", seconds=1.0))
    alone = len(load_audio(path, 24000))
    path.write_bytes(path.read_bytes() + ID3V2 + path.read_bytes())
    assert len(load_audio(path, 24000)) / 24000 == pytest.approx(2 * alone / 24000, abs=0.03)
    other = without_xing(tone("b.mp3", seconds=1.0, rate=16000))
    path.write_bytes(path.read_bytes() + other.read_bytes())
    with pytest.raises(BadAudio, match=r"has a second mp3 stream after its audio"):
        load_audio(path, 24000)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
def test_what_is_no_audio_behind_the_end(name: str, tone: Tone) -> None:
    path = tone(name, seconds=1.0)
    path.write_bytes(path.read_bytes() + b"\x01what is this?" * 20)
    with pytest.raises(BadAudio, match=r"after its audio"):
        load_audio(path, 24000)


@pytest.mark.parametrize("riff", [bytes(4), b"\xff" * 4, None])
def test_a_wav_that_was_never_closed_is_read_to_its_end(riff: bytes | None, tone: Tone) -> None:
    """A program that writes to a pipe, or dies, leaves a length of 0 in the header."""
    path = tone("a.wav", seconds=1.0)
    whole, content = load_audio(path, 24000), path.read_bytes()
    unclosed = content[:4] + (content[4:8] if riff is None else riff) + content[8:40] + bytes(4) + content[44:]
    path.write_bytes(unclosed)
    assert torch.equal(load_audio(path, 24000), whole)
    path.write_bytes(unclosed + content)
    with pytest.raises(BadAudio, match="has a second wav file after its audio"):
        load_audio(path, 24000)


@pytest.mark.parametrize("pad", [b"", b"\0", b"\x80", b"\xff"])
def test_a_wav_of_odd_length_before_another_chunk(pad: bytes, tone: Tone) -> None:
    path = tone("a.wav", seconds=1.0, subtype="PCM_U8")
    content = path.read_bytes()
    length = (23999).to_bytes(4, "little")
    path.write_bytes(content[:40] + length + content[44 : 44 + 23999] + pad + b"LIST\x04\0\0\0INFO")
    assert len(load_audio(path, 24000)) == 23999


def test_a_wav_that_cannot_be_sought_in(tone: Tone) -> None:
    path = tone("a.wav", seconds=2.0, rate=8000, subtype="GSM610")
    whole = load_audio(path, 8000)
    assert len(whole) == pytest.approx(16000, abs=320)
    assert torch.equal(load_audio(Segment(path, 0.5, 1.0).path(), 8000), whole[4000:8000])


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_an_ogg_that_was_cut_short(keep: float, tone: Tone) -> None:
    path = tone("a.ogg", seconds=2.0)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(BadAudio, match=r"^is cut short: its last ogg page is not whole"):
        load_audio(path, 24000)


def ogg_checksum(page: bytes) -> int:
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value >> 31 else 0)) & 0xFFFFFFFF
    return value


def test_an_ogg_without_an_end_mark_is_whole(tone: Tone) -> None:
    """As broadcasts are recorded."""
    path = tone("a.ogg", seconds=2.0)
    whole, content = load_audio(path, 24000), path.read_bytes()
    start = content.rindex(b"OggS")
    page = content[start : start + 5] + bytes([content[start + 5] & ~4]) + content[start + 6 :]
    page = page[:22] + bytes(4) + page[26:]
    path.write_bytes(content[:start] + page[:22] + ogg_checksum(page).to_bytes(4, "little") + page[26:])
    assert torch.equal(load_audio(path, 24000)[: len(whole)], whole)
    path.write_bytes(path.read_bytes() + b"what is this?" * 20)
    with pytest.raises(BadAudio, match="is damaged: no ogg page at byte"):
        load_audio(path, 24000)


APE_HEADER = b"APETAGEX" + (2000).to_bytes(4, "little") + (32).to_bytes(4, "little") + bytes(7) + b"\xa0" + bytes(8)


@pytest.mark.parametrize(
    "tag",
    [
        APE_HEADER + APE_HEADER.replace(b"\xa0", b"\x80"),
        b"ID3\x04\0\x10" + bytes(3) + b"\x08" + bytes(8) + b"3DI" + bytes(7),
    ],
)
@pytest.mark.parametrize("header", [True, False])
def test_an_mp3_behind_a_tag_that_libsndfile_does_not_know(header: bool, tag: bytes, tone: Tone) -> None:
    path = tone("a.mp3", seconds=2.0)
    if not header:
        without_xing(path)
    length = len(load_audio(path, 24000))
    path.write_bytes(tag + path.read_bytes())
    with path.open("rb") as stream, pytest.raises(soundfile.LibsndfileError):
        soundfile.SoundFile(stream.fileno(), closefd=False)
    assert len(load_audio(path, 24000)) == length


def test_a_small_file_that_becomes_big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """250 s of 8 channels: 128 MB if they were decoded at once, 16 MB as mono."""
    samples = numpy.zeros((4_000_000, 8), dtype=numpy.int16)
    samples[:1000] = 10000
    soundfile.write(tmp_path / "a.flac", samples, 16000)
    assert (tmp_path / "a.flac").stat().st_size < 100_000
    read, sizes = soundfile.SoundFile.read, []

    def noting(self: soundfile.SoundFile, *arguments: Any, **options: Any) -> Any:
        block = read(self, *arguments, **options)
        sizes.append(block.nbytes)
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", noting)
    assert len(load_audio(tmp_path / "a.flac", 16000)) == 4_000_000
    assert sum(sizes) == 128_000_000
    assert max(sizes) <= 2**22


def test_a_segment_of_an_mp3(tone: Tone) -> None:
    path = tone("a.mp3", seconds=2.0, rate=16000)
    whole = load_audio(path, 16000)
    assert torch.equal(load_audio(Segment(path, 0.5, 1.75).path(), 16000), whole[8000:28000])
    assert torch.equal(load_audio(Segment(path, 1.5).path(), 16000, max_seconds=1.0), whole[24000:])


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.wav")
    for path in (tmp_path / "a.wav", Path("/dev/zero")):
        with pytest.raises(BadAudio, match=r"^cannot be opened: Not a regular file"):
            load_audio(path, 24000)
    with pytest.raises(OSError, match="Not a regular file"):
        sha256_file(tmp_path / "a.wav")


def test_wav_from_a_pipe_has_no_length(tone: Tone) -> None:
    path = tone("a.wav", seconds=2.0)
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = b"\xff" * 4
    path.write_bytes(content)
    assert len(load_audio(path, 24000)) == 48000


def test_header_without_samples(tone: Tone) -> None:
    with pytest.raises(BadAudio, match=r"^is empty"):
        load_audio(tone("a.wav", seconds=0), 24000)


@pytest.mark.parametrize(("level", "words"), [(0.0, "digital silence"), (9e-4, "peak -61 dBFS, limit -60 dBFS")])
def test_silence(level: float, words: str, tone: Tone) -> None:
    with pytest.raises(BadAudio, match=f"^is silent .*{words}"):
        load_audio(tone("a.wav", level=level, subtype="FLOAT"), 24000)


def test_quiet_is_not_silent(tone: Tone) -> None:
    assert len(load_audio(tone("a.wav", level=2e-3), 24000))


def test_channels_that_cancel_out_are_silent(tmp_path: Path) -> None:
    left = 0.5 * torch.sin(torch.arange(24000) / 20)
    soundfile.write(tmp_path / "a.wav", torch.stack((left, -left), dim=1).numpy(), 24000)
    with pytest.raises(BadAudio, match=r"silent"):
        load_audio(tmp_path / "a.wav", 24000)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(value: float, tmp_path: Path) -> None:
    wave = torch.full((24000,), 0.5)
    wave[100] = value
    soundfile.write(tmp_path / "a.wav", wave.numpy(), 24000, subtype="FLOAT")
    with pytest.raises(BadAudio, match=r"not finite"):
        load_audio(tmp_path / "a.wav", 24000)


def test_never_scaled(tone: Tone) -> None:
    with pytest.raises(BadAudio, match=r"peaks at 32767: a float file must be scaled"):
        load_audio(tone("a.wav", level=32767, hertz=240, subtype="FLOAT"), 24000)


def test_slightly_over_full_scale_is_kept(tone: Tone) -> None:
    assert float(load_audio(tone("a.wav", level=1.5, subtype="FLOAT"), 24000).max()) > 1.4


def test_too_long_is_seen_in_the_header(tone: Tone, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tone("a.wav", seconds=2.0)
    monkeypatch.setattr(soundfile.SoundFile, "read", None)  # decoding would fail
    with pytest.raises(BadAudio, match=r"lasts 2.00 s, longer than data.max_seconds \(1.5 s\)"):
        load_audio(path, 24000, max_seconds=1.5)


def test_limits_are_inclusive(tone: Tone) -> None:
    path = tone("a.wav", seconds=2.0)
    assert len(load_audio(path, 24000, min_seconds=2.0, max_seconds=2.0)) == 48000


def test_too_short(tone: Tone) -> None:
    path = tone("a.wav", seconds=0.03)
    with pytest.raises(BadAudio, match=r"lasts 0.030 s, shorter than data.min_seconds \(0.5 s\)"):
        load_audio(path, 24000, min_seconds=0.5, frame_rate=25.0)
    with pytest.raises(BadAudio, match=r"lasts 0.030 s, shorter than one frame of the codec \(0.04 s\)"):
        load_audio(path, 24000, frame_rate=25.0)


def test_a_rate_that_needs_gigabytes(tmp_path: Path) -> None:
    wave = 0.5 * torch.sin(torch.arange(44101) / 20)
    soundfile.write(tmp_path / "a.wav", wave.numpy(), 44101)
    with pytest.raises(BadAudio, match=r"sample rate of 44101 Hz, which has no simple ratio to 24000 Hz"):
        load_audio(tmp_path / "a.wav", 24000)


@pytest.fixture
def broken_torchaudio(tmp_path: Path) -> Path:
    """A copy of torchaudio with a native library that cannot load, in a folder for PYTHONPATH."""
    import torchaudio

    copy = tmp_path / "site" / "torchaudio"
    skip = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(Path(torchaudio.__file__).parent, copy, ignore=skip)
    (copy / "lib").mkdir(exist_ok=True)
    for name in ("_torchaudio.abi3.so", "libtorchaudio.so"):
        (copy / "lib" / name).write_bytes(b"no library")
    return copy


def import_in_a_process(site: Path) -> str:
    code = (
        "from rawloop.audio import import_torchaudio\n"
        "from rawloop.errors import UserError\n"
        "try: print(import_torchaudio().__file__)\n"
        "except UserError as error: print('UserError', error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_broken_torchaudio_and_the_command_that_mends_it(broken_torchaudio: Path) -> None:
    message = import_in_a_process(broken_torchaudio.parent)
    assert message.startswith("UserError torchaudio ")
    assert "does not fit torch" in message
    assert "\n" not in message
    command = message.partition("`rm ")[2].partition("`")[0]
    assert command == f"{broken_torchaudio}/lib/*.so"
    subprocess.run(f"rm {command}", shell=True, check=True)
    assert import_in_a_process(broken_torchaudio.parent) == str(broken_torchaudio / "__init__.py")


def test_missing_torchaudio(tmp_path: Path) -> None:
    (tmp_path / "torchaudio.py").write_text("raise ModuleNotFoundError('no', name='torchaudio')")
    assert import_in_a_process(tmp_path).endswith("is not installed: mend it with `pip install torchaudio`")


def test_a_segment_is_what_lies_between_its_times(tmp_path: Path) -> None:
    ramp = torch.linspace(-0.5, 0.5, 24000)
    for name, subtype in (("ramp.wav", "FLOAT"), ("ramp.flac", "PCM_24")):
        path = tmp_path / name
        soundfile.write(path, ramp.numpy(), 24000, subtype=subtype)
        cut = Segment(path, 0.25, 0.5).path()
        assert cut.name == f"{name}#t=0.25,0.5"
        torch.testing.assert_close(load_audio(cut, 24000), ramp[6000:12000], rtol=0, atol=1e-6)
        torch.testing.assert_close(load_audio(Segment(path, 0.75).path(), 24000), ramp[18000:], rtol=0, atol=1e-6)
        assert len(load_audio(Segment(path, 0.5, 1.03).path(), 24000)) == 12000  # times that were rounded
        for outside in (Segment(path, 0.5, 1.2), Segment(path, 1.0, 1.01), Segment(path, 2.0)):
            with pytest.raises(BadAudio, match=r"no segment of its clip.* the clip lasts 1.000 s"):
                load_audio(outside.path(), 24000)


def test_limits_hold_the_segment_and_not_its_recording(tone: Callable[..., Path]) -> None:
    cut = Segment(tone("long.wav", seconds=3.0), 1.0, 1.5).path()
    assert len(load_audio(cut, 24000, max_seconds=1.0)) == 12000
    with pytest.raises(BadAudio, match=r"lasts 0.50 s, longer than data.max_seconds \(0.4 s\)"):
        load_audio(cut, 24000, max_seconds=0.4)
    with pytest.raises(BadAudio, match=r"shorter than data.min_seconds"):
        load_audio(cut, 24000, min_seconds=1.0)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (
            b"\0\0\0\x1cftypM4A \0\0\0\0",
            r"it is MPEG-4, which is read if the program ffmpeg is installed \(`apt-get install ffmpeg`\)",
        ),
        (b"\x1a\x45\xdf\xa3" * 9, "it is WebM or Matroska, "),
        (b"\xff\xf1\x50\x80" + bytes(40), "it is AAC, "),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is the pointer of a Git LFS file: .* `git lfs pull`"),
        (b"no audio at all, but words", "Format not recognised"),
    ],
)
def test_a_file_that_is_no_known_audio_is_told_what_it_is(
    head: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no ffmpeg
    path = tmp_path / "a b.m4a"
    path.write_bytes(head)
    with pytest.raises(BadAudio, match=f"^cannot be decoded: {message}"):
        load_audio(path, 24000)


@pytest.fixture
def spoken_by(tone: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Give `spoken_by(name, *options)`: a tone of 1.5 s, two channels, written by ffmpeg in the name's format."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("ffmpeg is not installed")

    def write(name: str, *options: str) -> Path:
        source = tone("source.wav", seconds=1.5, rate=48000, channels=2)
        path = tmp_path / name
        subprocess.run(["ffmpeg", "-v", "error", "-i", source, *options, path], check=True)
        return path

    return write


@pytest.mark.parametrize(
    ("name", "options"),
    [("a b.m4a", ()), ("-v.webm", ()), ("a.aac", ()), ("a.wma", ()), ("a.mka", ("-c:a", "pcm_s16le"))],
)
def test_other_formats_are_read_with_ffmpeg(
    name: str, options: tuple[str, ...], spoken_by: Callable[..., Path]
) -> None:
    path = spoken_by(name, *options)
    wave = load_audio(path, 24000)
    assert abs(len(wave) - 36000) < 3000  # codecs pad to whole frames
    spectrum = torch.fft.rfft(wave).abs()
    assert float(spectrum.argmax()) * 24000 / len(wave) == pytest.approx(220, abs=2)
    assert float(wave.abs().max()) == pytest.approx(0.5, abs=0.08)
    if name == "a.mka":  # without loss
        assert torch.allclose(wave, load_audio(path.with_name("source.wav"), 24000), atol=1e-4)
    part = load_audio(Segment(path, 0.5, 1.0).path(), 24000)
    assert torch.equal(part[100:-100], wave[12100:23900]) or torch.allclose(
        part[500:-500], wave[12500:23500], atol=1e-3
    )
    with pytest.raises(BadAudio, match=r"longer than data.max_seconds \(1 s\)"):
        load_audio(path, 24000, max_seconds=1.0)


def test_a_fault_that_ffmpeg_would_pass_over_is_an_error(spoken_by: Callable[..., Path]) -> None:
    path = spoken_by("a.m4a", "-movflags", "faststart")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(BadAudio, match=r"cannot be decoded: ffmpeg says: "):
        load_audio(path, 24000)
