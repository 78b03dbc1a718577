"""Decoding, mixing, resampling; every reason why a clip cannot be used; and a torchaudio that does not load."""

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch

from rawloop.audio import BadAudio, clip_seconds, load_audio
from rawloop.segments import Segment

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
    with pytest.raises(BadAudio, match=r"^cannot be decoded"):
        load_audio(path, 24000)


@pytest.mark.parametrize("name", ["a.wav", "a.mp3"])
def test_what_was_cut_short_is_not_taken_for_whole(name: str, tone: Tone) -> None:
    path = tone(name, seconds=2.0)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadAudio, match=r"^is cut short: its header promises 2.00 s, it holds (1.00|0.9\d) s$"):
        load_audio(path, 24000)


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


def test_a_length_from_the_header_alone(tone: Tone, tmp_path: Path) -> None:
    for name in ("a.wav", "a.flac", "a.ogg"):
        assert clip_seconds(tone(name, 0.4), min_seconds=0.4, max_seconds=0.4) == pytest.approx(0.4)
    with pytest.raises(BadAudio, match=r"longer than data.max_seconds \(0.3 s\)"):
        clip_seconds(tone("a.wav", 0.4), max_seconds=0.3)
    with pytest.raises(BadAudio, match=r"lasts 0.400 s, shorter than data.min_seconds \(0.5 s\)"):
        clip_seconds(tone("a.wav", 0.4), min_seconds=0.5)
    cut = tmp_path / "cut.wav"
    cut.write_bytes(tone("a.wav", 0.4).read_bytes()[:10000])
    with pytest.raises(BadAudio, match=r"is cut short: its header promises 0.40 s, it holds 0.21 s"):
        clip_seconds(cut)
    with pytest.raises(BadAudio, match="cannot be opened: No such file"):
        clip_seconds(tmp_path / "gone.wav")
    (tmp_path / "text.wav").write_text("no audio")
    with pytest.raises(BadAudio, match="cannot be decoded"):
        clip_seconds(tmp_path / "text.wav")


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
        assert clip_seconds(cut) == 0.25
        assert len(load_audio(Segment(path, 0.5, 1.03).path(), 24000)) == 12000  # times that were rounded
        for outside in (Segment(path, 0.5, 1.2), Segment(path, 1.0, 1.01), Segment(path, 2.0)):
            with pytest.raises(BadAudio, match=r"no segment of its clip.* the clip lasts 1.000 s"):
                load_audio(outside.path(), 24000)
            with pytest.raises(BadAudio, match="no segment of its clip"):
                clip_seconds(outside.path())


def test_limits_hold_the_segment_and_not_its_recording(tone: Callable[..., Path]) -> None:
    cut = Segment(tone("long.wav", seconds=3.0), 1.0, 1.5).path()
    assert len(load_audio(cut, 24000, max_seconds=1.0)) == 12000
    assert clip_seconds(cut, max_seconds=1.0) == 0.5
    with pytest.raises(BadAudio, match=r"lasts 0.50 s, longer than data.max_seconds \(0.4 s\)"):
        load_audio(cut, 24000, max_seconds=0.4)
    with pytest.raises(BadAudio, match=r"shorter than data.min_seconds"):
        clip_seconds(cut, min_seconds=1.0)
