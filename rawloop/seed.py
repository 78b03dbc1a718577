"""Seeding, saving and restoring every random stream of a process.

A training process draws random numbers with torch (one stream per device), python and numpy. A run continues bit for
bit only if all streams are restored on every rank.
"""

import hashlib
import json
import pickle
import random
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import string_at as _memory
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")
Seed = Callable[[int], None]


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all parts and their order, and is the same on every machine.

    Similar parts give unrelated seeds. With `seed + rank`, (seed 0, rank 1) would equal (seed 1, rank 0).
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
    """Return numpy, or None if it is not installed.

    This imports it: a later import would take its seed from the operating system.
    """
    try:
        import numpy
    except ImportError:
        return None
    return numpy


def capture_rng() -> dict[str, Any]:
    """Return the state of every random stream of this process as nested dicts of tensors and JSON values.

    CUDA's state is read only if CUDA is initialised: reading would initialise it, and DataLoader workers could not be
    forked any more.
    """
    return RngCapture().take()


class RngCapture:
    """Captures all random streams as `capture_rng` does, again and again, in a sixth of its time."""

    def __init__(self) -> None:
        self._numpy = _numpy()
        self._python_generator = _python_generator()
        self._python_address = _python_address()
        self._numpy_words: bytes | None = None  # those of the state in _numpy_state
        self._numpy_state: dict[str, Any] = {}
        self._python_memory: bytes | None = None  # that of the words in _python_words
        self._python_words = torch.empty(0)

    def take(self) -> dict[str, Any]:
        """Return the states as `capture_rng` does."""
        state: dict[str, Any] = {"torch": torch.default_generator.get_state(), "python": self._python()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            state["cuda"] = torch.cuda.get_rng_state(torch.cuda.current_device())  # other ranks use the other devices
        if torch.backends.mps.is_available():
            state["mps"] = torch.mps.get_rng_state()
        if self._numpy is not None:
            words = _mt19937_words(self._numpy)
            if words is None or words != self._numpy_words:  # reading the whole state takes 30 us
                self._numpy_state = self._read_numpy()
                # randn() stores a second number for its next call, which then changes no word
                self._numpy_words = None if self._numpy_state["has_gauss"] else words
            state["numpy"] = self._numpy_state
        return state

    def _python(self) -> dict[str, Any]:
        if self._python_address is None:
            version, words, gauss = random.getstate()
            return {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss}
        memory = _memory(self._python_address, 4 * 625)
        if memory != self._python_memory:  # most steps draw nothing from it
            words = torch.frombuffer(bytearray(memory), dtype=torch.uint32).to(torch.int64)
            self._python_memory, self._python_words = memory, words.roll(-1)  # the index is in front in memory
        return {"version": 3, "words": self._python_words, "gauss": self._python_generator.gauss_next}

    def _read_numpy(self) -> dict[str, Any]:
        name, words, position, has_gauss, gauss = self._numpy.random.get_state()
        keys = torch.tensor(words.astype("int64"))
        return {"name": name, "words": keys, "position": position, "has_gauss": has_gauss, "gauss": gauss}


def restore_rng(state: dict[str, Any]) -> None:
    """Restore the result of `capture_rng`. A warning names streams that this machine lacks.

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
    """All random streams of this process as a part of a checkpoint, which has one for each rank (`per_rank`)."""

    per_rank = True

    def __init__(self, seed: int, rank: int) -> None:
        self.seed = seed
        self.rank = rank

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the streams."""
        return capture_rng()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the streams. Call it last: building models and data loaders draws from them."""
        restore_rng(state)

    def start_afresh(self, step: int) -> None:
        """Seed the streams from (seed, step, rank), for a rank that the checkpoint has no state for."""
        _seed_everything(derive_seed("resumed", self.seed, step, self.rank))


class SampleStreams:
    """Restores the global random streams (torch's CPU stream, python, numpy) after code that makes samples.

    Nothing is seeded until that code draws a number, because most families draw none, and seeding takes longer than
    making a small batch. The first draw is detected and undone; that batch and all later ones are then made with seeds.
    Streams of devices, and generators that the operating system seeds (`numpy.random.default_rng()`), are not included.
    """

    def __init__(self) -> None:
        self.drawn = False  # whether a number was drawn
        self._numpy = _numpy()
        self._python_generator = _python_generator()
        self._python_address = _python_address()
        self._numpy_words: bytes | None = None  # _mt19937_words of the state in _numpy_state

    def lend(self, make: Callable[[Seed | None], Made]) -> Made:
        """Return `make(seed)`. If `seed` is not None, `make` must call it with a number of 64 bits before it draws.

        Apart from random numbers, two calls of `make` must return the same.
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
            self._restore()
            self.drawn = True
        try:
            return make(self._seed)
        finally:
            self._restore()

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
            # randn() stores a second number for its next call, which then changes no word.
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

    def _python(self) -> tuple[bytes, float | None]:
        """Return the index and the words of python's global generator, as CPython stores them, and its second gauss."""
        gauss = self._python_generator.gauss_next
        if self._python_address is not None:
            return _memory(self._python_address, 4 * 625), gauss
        *words, index = random.getstate()[1]
        return struct.pack("=625I", index, *words), gauss

    def _restore(self) -> None:
        torch.default_generator.set_state(self._torch_state)
        memory, gauss = self._python_state
        index, *words = struct.unpack("=625I", memory)
        random.setstate((3, (*words, index), gauss))
        if self._numpy is not None:
            self._numpy.random.set_state(self._numpy_state)


def _python_generator() -> Any:
    return random.getstate.__self__  # type: ignore[attr-defined]


def _python_address() -> int | None:
    """Return the address of the index and the words of CPython's global generator: `random.getstate` takes 10 us.

    Return None if they are not there, as in another interpreter.
    """
    generator = _python_generator()
    address = id(generator) + object.__basicsize__
    if type(generator).__basicsize__ < object.__basicsize__ + 4 * 625:
        return None
    words = random.getstate()[1]
    return address if _memory(address, 4 * 625) == struct.pack("=625I", words[-1], *words[:-1]) else None


def _mt19937_words(numpy: Any) -> bytes | None:
    """Return the words and the index of numpy's global generator, read from memory; None if it is not an MT19937."""
    generator = numpy.random.get_bit_generator()
    if not isinstance(generator, numpy.random.MT19937):
        return None
    return _memory(generator.ctypes.state_address, 4 * 625)  # uint32 key[624]; int pos


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore every random stream on exit, so that evaluation does not change training."""
    state = capture_rng()
    try:
        yield
    finally:
        restore_rng(state)
