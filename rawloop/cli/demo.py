"""`rawloop demo`: makes everything for a first run without a download: a small checkpoint, speech, and its codes.

The weights are random; only the codec's codebooks are fitted. So the demo shows that training works, and no voice.
"""

import shutil
from os.path import expanduser
from pathlib import Path

from rawloop.audio import import_torchaudio
from rawloop.cli import read_options
from rawloop.data import DataConfig
from rawloop.data.splits import prepare_codes
from rawloop.demo import SPEECH
from rawloop.demo.checkpoint import build_demo_checkpoint, demo_is_built
from rawloop.families import ModelConfig, load_family


def run(argv: list[str]) -> None:
    """Build missing parts in the folder, and print their paths."""
    folder = Path(expanduser(read_options("demo", argv).folder))
    import_torchaudio()
    speech = folder / "speech"
    shutil.copytree(SPEECH, speech, dirs_exist_ok=True)
    if not demo_is_built(folder):
        print("building the demo checkpoint (random weights, codebooks fitted on the bundled speech)", flush=True)
        build_demo_checkpoint(folder, speech)
    data = DataConfig(train=str(speech / "train"), eval=str(speech / "eval"), codes=str(folder / "codes"))
    family = load_family(ModelConfig(path=str(folder / "model")))
    print(prepare_codes(data, family), flush=True)
    print(f"model:  {folder / 'model'}\ncodec:  {folder / 'codec'}\nspeech: {speech}\ncodes:  {folder / 'codes'}")
