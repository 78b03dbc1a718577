"""The demo: bundled speech and a small checkpoint built on the user's machine, so that everything runs offline.

`speech/` is data made by `make_speech.py`; `checkpoint.py` builds a model and a codec of the real classes from it.
"""

from pathlib import Path

SPEECH = Path(__file__).parent / "speech"
