"""Data: three file formats read into samples, and audio turned into cached codes once, before training.

`samples.read_samples` gives samples, `prepare.prepare` fills the cache, `codes.CodeCache` hands the codes out. Only the
config is imported here, so that `--help` needs no torch.
"""

from rawloop.data.config import DataConfig, codes_folder

__all__ = ["DataConfig", "codes_folder"]
