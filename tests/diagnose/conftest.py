"""What the tests of the checks share: the demo's family, examples of its data, and fresh copies of its model."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from rawloop.data import DataConfig
from rawloop.data.codes import CodeCache
from rawloop.data.samples import read_samples
from rawloop.families import ModelConfig, load_family
from rawloop.families.higgs_audio_v2 import HiggsAudioV2
from rawloop.losses import LossModule


@pytest.fixture
def family(demo_checkpoint: Path) -> HiggsAudioV2:
    """A family of its own for every test, to be spoilt at will."""
    loaded = load_family(ModelConfig(path=str(demo_checkpoint / "model")))
    assert isinstance(loaded, HiggsAudioV2)
    return loaded


@pytest.fixture(scope="session")
def trained_samples(demo_data: Path) -> list[Any]:
    return read_samples(demo_data / "train", DataConfig())


@pytest.fixture(scope="session")
def cache(demo_data: Path, demo_checkpoint: Path) -> CodeCache:
    return CodeCache(demo_data / "codes")


@pytest.fixture
def examples(family: HiggsAudioV2, trained_samples: list[Any], cache: CodeCache) -> list[Any]:
    """Eight examples of all languages."""
    return [family.example(sample, cache) for sample in trained_samples]


@pytest.fixture(scope="session")
def loaded_model(demo_checkpoint: Path) -> Any:
    return load_family(ModelConfig(path=str(demo_checkpoint / "model"))).load_model()


@pytest.fixture
def module(family: HiggsAudioV2, loaded_model: Any) -> LossModule:
    """The demo's model with its loss, all weights trained, to be spoilt at will."""
    return LossModule(deepcopy(loaded_model), family.losses)


@pytest.fixture
def mask_the_stop_token(family: HiggsAudioV2) -> Callable[[Any], Any]:
    """Give a function that labels an example as the processor of transformers does: without the stop token."""

    def mask(example: Any) -> Any:
        masked = deepcopy(example)
        masked.audio_labels[masked.audio_labels == family.settings.audio_stream_eos_id] = -100
        return masked

    return mask
