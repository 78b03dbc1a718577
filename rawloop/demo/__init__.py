"""The demo: bundled speech, and a small checkpoint that is built on the user's machine. Everything runs offline.

`checkpoint.py` builds a model and a codec of the real classes, fitted to `speech/`. `tests/demo/make_speech.py` made
the speech.
"""

from pathlib import Path

SPEECH = Path(__file__).parent / "speech"
