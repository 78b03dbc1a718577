"""The script that made the bundled speech still makes it (where espeak-ng is installed) and fails in one line."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from rawloop.demo import SPEECH
from rawloop.errors import RawloopError, UserError
from tests.demo.make_speech import SAMPLE_RATE, make_speech, speak, write_flac
from tests.demo.sentences import SPLITS, VOICES, Dialogue, Line


def espeak_version() -> str:
    if shutil.which("espeak-ng") is None:
        return "none"
    return subprocess.run(["espeak-ng", "--version"], check=True, capture_output=True, text=True).stdout


def test_every_line_has_a_voice_and_every_clone_follows_a_first_clip() -> None:
    for entries in SPLITS.values():
        spoken: set[str] = set()
        for entry in entries:
            lines = [entry] if isinstance(entry, Line) else [entry.first, entry.second]
            assert all(line.voice in VOICES and line.text for line in lines)
            if entry.clone:
                assert {line.voice for line in lines} <= spoken
            if not isinstance(entry, Dialogue):
                spoken.add(entry.voice)


@pytest.mark.skipif("1.51" not in espeak_version(), reason="the speech was made with espeak-ng 1.51")
def test_speech_made_again_is_the_bundled_speech(tmp_path: Path) -> None:
    make_speech(tmp_path)
    for bundled in sorted(SPEECH.glob("*/*")):
        made = tmp_path / bundled.relative_to(SPEECH)
        if bundled.suffix == ".flac":
            old, new = soundfile.read(bundled)[0], soundfile.read(made)[0]
            np.testing.assert_allclose(new, old, atol=2 / 1024)  # another CPU may resample another way in the last bit
        else:
            assert made.read_text(encoding="utf-8") == bundled.read_text(encoding="utf-8")


def test_a_folder_that_holds_speech_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    with pytest.raises(UserError, match="eval exists already"):
        make_speech(tmp_path)
    assert not (tmp_path / "train").exists()


def test_without_espeak_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RawloopError, match=r"espeak-ng cannot speak 'Hello\.' as en_ada"):
        speak(Line("en_ada", "Hello."))


def test_flac_keeps_eleven_bits_and_tells_the_duration(tmp_path: Path) -> None:
    wave = np.linspace(-1.0, 1.0, SAMPLE_RATE // 2, dtype=np.float32)
    assert write_flac(tmp_path / "ramp.flac", wave) == 0.5
    read, rate = soundfile.read(tmp_path / "ramp.flac", dtype="int16")
    assert rate == SAMPLE_RATE
    assert (read % 32 == 0).all()
    np.testing.assert_allclose(read / 2**15, wave, atol=1 / 1024)


def test_the_command_line_wants_one_folder() -> None:
    command = [sys.executable, "-m", "tests.demo.make_speech"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 1
    assert done.stderr.startswith("usage:")
