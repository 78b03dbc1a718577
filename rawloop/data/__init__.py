"""Data: reads data sets into samples, caches the codes of their audio, and makes batches.

`samples.read_samples` returns samples, `prepare.prepare` fills the cache, `codes.CodeCache` reads it. Only the config
is imported here, so that `--help` needs no torch.
"""

from rawloop.data.config import DataConfig, codes_folder

__all__ = ["DataConfig", "codes_folder"]
