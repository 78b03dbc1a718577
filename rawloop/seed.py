"""Every random stream of a process in one place: seeding it, saving it into a checkpoint, putting it back.

Three libraries draw random numbers in a training process (torch, python, numpy), torch with one stream per device.
A run continues bit for bit only if all of them are restored, on every rank.
"""

import hashlib
import json
import pickle
import random
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import string_at as _memory
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")
Seed = Callable[[int], None]


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and on their order, the same on every machine.

    Neighbouring inputs give unrelated seeds, which `seed + rank` does not: (seed 0, rank 1) would equal (1, 0).
    """
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big") >> 1


def seed_all(seed: int, rank: int) -> None:
    """Seed torch (CPU and all devices), python and numpy with the stream of this rank."""
    _seed_everything(derive_seed("rank", seed, rank))


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = _numpy()
    if numpy is not None:
        numpy.random.seed(seed & 0xFFFFFFFF)


def _numpy() -> Any:
    """Return numpy, or None where it is not installed.

    It is imported even if nobody has done so yet: seeded later, it would start from the operating system's entropy.
    """
    try:
        import numpy
    except ImportError:
        return None
    return numpy


def capture_rng() -> dict[str, Any]:
    """Return the state of every random stream of this process as nested dicts of tensors and JSON values.

    CUDA is left alone until something has initialised it: asking it for its state would do so, and DataLoader
    workers could no longer be forked.
    """
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state(torch.cuda.current_device())  # other devices are other ranks'
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    numpy = _numpy()
    if numpy is not None:
        state["numpy"] = _capture_numpy(numpy)
    return state


def _capture_numpy(numpy: Any) -> dict[str, Any]:
    name, words, position, has_gauss, gauss = numpy.random.get_state()
    keys = torch.tensor(words.astype("int64"))
    return {"name": name, "words": keys, "position": position, "has_gauss": has_gauss, "gauss": gauss}


def restore_rng(state: dict[str, Any]) -> None:
    """Put back what `capture_rng` returned. A stream that exists on one side only is named in a warning.

    Raises:
        KeyError: the torch or python stream is missing.
    """
    torch.set_rng_state(state["torch"])
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    _restore_devices(state)
    numpy = _numpy()
    if numpy is not None and "numpy" in state:
        saved = state["numpy"]
        words = saved["words"].numpy().astype("uint32")
        numpy.random.set_state((saved["name"], words, saved["position"], saved["has_gauss"], saved["gauss"]))
    elif "numpy" in state:
        warnings.warn("the saved numpy random state is not restored: numpy is not installed here", stacklevel=2)


def _restore_devices(state: dict[str, Any]) -> None:
    lost = []
    if "cuda" in state and torch.cuda.is_available():
        device, saved = torch.cuda.current_device(), state["cuda"]
        if not isinstance(saved, list):
            torch.cuda.set_rng_state(saved, device)
        elif len(saved) == torch.cuda.device_count():  # an older checkpoint has the streams of all GPUs of a machine
            torch.cuda.set_rng_state(saved[device], device)
        else:
            lost.append(f"GPU ({len(saved)} GPUs per machine then, {torch.cuda.device_count()} now)")
    elif "cuda" in state:
        lost.append("GPU (there is none here)")
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
    elif "mps" in state:
        lost.append("MPS device (there is none here)")
    for device_name in lost:
        warnings.warn(f"the saved random state of the {device_name} is not restored", stacklevel=3)


class RngState:
    """All random streams of this process, as a part of a checkpoint.

    `per_rank` tells the checkpoint manager to store one for every rank.
    """

    per_rank = True

    def __init__(self, seed: int, rank: int) -> None:
        self.seed = seed
        self.rank = rank

    def state_dict(self) -> dict[str, Any]:
        """Return the streams as they stand now."""
        return capture_rng()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the streams back. Call it last: building models and data loaders draws from them."""
        restore_rng(state)

    def start_afresh(self, step: int) -> None:
        """Derive the streams from (seed, step, rank), for a rank that the checkpoint has no state of."""
        _seed_everything(derive_seed("resumed", self.seed, step, self.rank))


class SampleStreams:
    """Lends torch's CPU stream, python's and numpy's global ones to code that makes samples, and puts them back.

    Nothing is seeded until that code draws a number: most families draw none, and seeding costs more than making a
    small batch does. The first draw is noticed and undone, and the same batch is made again with seeds, as are all
    later ones. Devices are left alone. Generators that a library seeds from the operating system
    (`numpy.random.default_rng()` without a seed) are not reached.
    """

    def __init__(self) -> None:
        self.drawn = False  # whether anything has been drawn so far
        self._numpy = _numpy()
        self._python_address = _python_address()
        self._numpy_words: bytes | None = None  # what _mt19937_words gave for the state in _numpy_state

    def lend(self, make: Callable[[Seed | None], Made]) -> Made:
        """Return `make(seed)`. If `seed` is not None, `make` calls it with a number of up to 64 bits before it draws.

        Calling `make` twice must give the same, apart from what it draws.
        """
        self._capture()
        if not self.drawn:
            try:
                made = make(None)
            except Exception:
                if not self._moved():
                    raise
            else:
                if not self._moved():
                    return made
            self._put_back()
            self.drawn = True
        try:
            return make(self._seed)
        finally:
            self._put_back()

    def _seed(self, number: int) -> None:
        torch.default_generator.manual_seed(number)
        random.seed(number)
        if self._numpy is not None:
            self._numpy.random.seed([number & 0xFFFFFFFF, number >> 32])

    def _capture(self) -> None:
        self._torch_state, self._python_state = torch.default_generator.get_state(), self._python()
        if self._numpy is None:
            return
        words = _mt19937_words(self._numpy)
        if words is None or words != self._numpy_words:  # reading the whole state takes 30 us
            self._numpy_state = self._numpy.random.get_state(legacy=False)
            # randn() keeps its second number for the next call, which then moves no word.
            self._numpy_words = None if self._numpy_state["has_gauss"] else words

    def _moved(self) -> bool:
        now = torch.default_generator.get_state()
        if _memory(now.data_ptr(), len(now)) != _memory(self._torch_state.data_ptr(), len(now)):  # torch.equal: 4 us
            return True
        if self._python() != self._python_state:
            return True
        if self._numpy is None:
            return False
        if self._numpy_words is not None:
            return _mt19937_words(self._numpy) != self._numpy_words
        return pickle.dumps(self._numpy.random.get_state(legacy=False)) != pickle.dumps(self._numpy_state)

    def _python(self) -> tuple[int, bytes, float | None]:
        """Return the index, the words and the second gaussian number of python's global generator."""
        if self._python_address is None:
            _, (*words, index), gauss = random.getstate()
            return index, struct.pack("=624I", *words), gauss
        memory = _memory(self._python_address, 4 * 625)
        return int.from_bytes(memory[:4], sys.byteorder), memory[4:], _python_generator().gauss_next

    def _put_back(self) -> None:
        torch.default_generator.set_state(self._torch_state)
        index, words, gauss = self._python_state
        random.setstate((3, (*struct.unpack("=624I", words), index), gauss))
        if self._numpy is not None:
            self._numpy.random.set_state(self._numpy_state)


def _python_generator() -> Any:
    return random.getstate.__self__  # type: ignore[attr-defined]


def _python_address() -> int | None:
    """Return where CPython keeps the index and the words of its global generator: `random.getstate` takes 10 us.

    None where memory does not have them, as in another interpreter.
    """
    generator = _python_generator()
    address = id(generator) + object.__basicsize__
    if type(generator).__basicsize__ < object.__basicsize__ + 4 * 625:
        return None
    words = random.getstate()[1]
    return address if _memory(address, 4 * 625) == struct.pack("=625I", words[-1], *words[:-1]) else None


def _mt19937_words(numpy: Any) -> bytes | None:
    """Return the words of numpy's global generator and its place among them, read from memory; None of another kind."""
    generator = numpy.random.get_bit_generator()
    if not isinstance(generator, numpy.random.MT19937):
        return None
    return _memory(generator.ctypes.state_address, 4 * 625)  # uint32 key[624]; int pos


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave every random stream as it was found, whatever is drawn inside (evaluation must not move training)."""
    state = capture_rng()
    try:
        yield
    finally:
        restore_rng(state)
