"""The demo: bundled speech and a small checkpoint built on the user's machine, so that everything runs offline.

`checkpoint.py` builds a model and a codec of the real classes, fitted to `speech/`, which `tests/demo/make_speech.py`
made.
"""

from pathlib import Path

SPEECH = Path(__file__).parent / "speech"
