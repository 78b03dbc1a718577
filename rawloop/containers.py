"""Finds where the audio of a file ends by reading its container, since the length in a header can be wrong.

libsndfile stops at the number of samples in the header and ignores the rest: a second file joined to the first, or
most of an mp3 without a Xing header, whose length it guesses from the first frame. It reports no error for a wav, an
ogg or an mp3 that was cut short. Nothing is decoded here. `frames.py` does the same for mp3 and flac.

Sources: RFC 3533 (Ogg), id3.org, the RIFF specification.
"""

import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from rawloop.errors import RawloopError

CHUNK = 2**20  # bytes read at a time when a file is searched
STREAMED = 2**30  # bytes: programs that write a wav to a pipe do not know its length, and put a huge one into it
WAV_START = re.compile(rb"RIFF.{4}WAVEfmt ", re.DOTALL)


class BadAudio(RawloopError):
    """A clip that cannot be used. The message is the reason, without the name of the file."""


class Extent(NamedTuple):
    """How much audio a file has.

    `samples` per channel, or 0 if libsndfile counts them right; a decoder may leave out `slack` of them. If the first
    `replaces` bytes are tags, or have no number of samples, `header` replaces them. A file with an `open_end` does not
    say where it ends: a program streamed it, or it was cut short.
    """

    samples: int = 0
    slack: int = 0
    header: bytes = b""
    replaces: int = 0
    open_end: bool = False


def read_at(stream: BinaryIO, place: int, count: int) -> bytes:
    """Return `count` bytes from `place`, or fewer at the end of the file."""
    stream.seek(place)
    return stream.read(count)


def cut_short(promised: float, found: float) -> BadAudio:
    """Return the error for a file without its end; both arguments in seconds."""
    return BadAudio(f"is cut short: its header promises {promised:.2f} s, it has {found:.2f} s")


def joined(place: int, size: int, what: str) -> BadAudio:
    """Return the error for a file with something else after its audio, at `place`."""
    return BadAudio(
        f"has {what} after its audio, from byte {place} of {size} on, which a decoder leaves out: if files were "
        "joined, split them or encode them anew as one"
    )


def skip_tags(stream: BinaryIO, place: int, size: int) -> int:
    """Return the first place that is neither in a tag nor in the zeros at the end of the file."""
    while place < size:
        length = _tag(stream, place, size)
        if not length:
            break
        place = min(place + length, size)
    return place


def _tag(stream: BinaryIO, place: int, size: int) -> int:
    """Return the length of the tag at `place`, or of zeros up to the end, or 0."""
    head = read_at(stream, place, 32)
    if head[:3] == b"ID3" and len(head) >= 10 and max(head[6:10]) < 128:
        length = sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
        return 10 + length + 10 * bool(head[5] & 16)
    if head[:3] == b"TAG" and size - place in (128, 128 + 227):
        return size - place
    if head[:8] == b"APETAGEX" and len(head) == 32:
        return 32 + int.from_bytes(head[12:16], "little") * bool(head[23] & 32)
    for last in (size, size - 128):  # an APE tag may have no header; an ID3v1 tag may follow it
        foot = read_at(stream, max(last - 32, 0), 32)
        if foot[:8] == b"APETAGEX" and place == last - int.from_bytes(foot[12:16], "little"):
            return last - place
    if head[:11] == b"LYRICSBEGIN":
        end = re.search(rb"LYRICS200|LYRICSEND", read_at(stream, place, 2**17))
        return end.end() if end else 0
    zeros = bool(head) and not any(head) and all(not any(chunk) for chunk in _chunks(stream, place))
    return size - place if zeros else 0


def _chunks(stream: BinaryIO, place: int) -> Iterator[bytes]:
    stream.seek(place)
    while chunk := stream.read(CHUNK):
        yield chunk


def refuse_second(stream: BinaryIO, place: int, size: int, start: re.Pattern[bytes], what: str) -> None:
    """Refuse a file in which another file starts, at or after `place`."""
    before = b""
    for chunk in _chunks(stream, place):
        if found := start.search(before + chunk):
            raise joined(place + found.start() - len(before), size, what)
        place += len(chunk)
        before = (before + chunk)[-32:]


def wav(stream: BinaryIO, start: int, size: int) -> Extent:
    """Check the chunks of a wav. libsndfile counts its samples, unless the header has no length."""
    place, speed, large, seen = start + 12, 0, 0, False
    while place + 8 <= size:
        name, length = read_at(stream, place, 4), int.from_bytes(stream.read(4), "little")
        body = stream.read(16)
        if name in (b"RIFF", b"RF64"):
            raise joined(place, size, "a second wav file")
        if not _is_name(name):
            if seen and skip_tags(stream, place, size) < size:
                raise joined(place, size, "bytes that are no chunk")
            return Extent()
        if name == b"fmt ":
            speed = int.from_bytes(body[8:12], "little")
        elif name == b"ds64":
            large = int.from_bytes(body[8:16], "little")
        elif name == b"data":
            seen = True
            length = large if length == 2**32 - 1 and large else length
            found = size - place - 8
            no_length = not length and not _is_name(body[:4]) and skip_tags(stream, place + 8, size) < size
            if no_length or (length > found and length > STREAMED and not large):
                return _streamed_wav(stream, start, place + 8, size, no_length)
            if length > found and speed:
                raise cut_short(length / speed, found / speed)
        place += 8 + length
        if length % 2:  # some writers forget the padding byte, others do not write a zero
            place += not _is_name(read_at(stream, place, 4))
    return Extent()


def _streamed_wav(stream: BinaryIO, start: int, data: int, size: int, no_length: bool) -> Extent:
    """Return the extent of a wav without a true length: its writer did not go back to the header."""
    refuse_second(stream, data, size, WAV_START, "a second wav file")
    if not no_length:
        return Extent(open_end=True)
    header = read_at(stream, start, data - 4 - start) + min(size - data, 2**32 - 1).to_bytes(4, "little")
    return Extent(header=header, replaces=data, open_end=True)


def _is_name(name: bytes) -> bool:
    return name.isascii() and name.decode().isprintable()


def ogg(stream: BinaryIO, start: int, size: int) -> Extent:
    """Check the pages of an ogg. libsndfile counts its samples. A broadcast may have no end mark."""
    place, first, ended = start, True, False
    while place < size:
        head = read_at(stream, place, 27)
        if head[:4] != b"OggS"[: len(head)]:
            place = skip_tags(stream, place, size)
            if place == size and ended:
                break
            raise joined(place, size, "something") if ended else BadAudio(f"is damaged: no ogg page at byte {place}")
        table = stream.read(head[26]) if len(head) == 27 else b""
        end = place + 27 + len(table) + sum(table)
        if len(head) < 27 or len(table) < head[26] or end > size:
            raise BadAudio("is cut short: its last ogg page is not whole")
        if head[5] & 2 and not first:
            raise joined(place, size, "a second ogg stream")
        place, first, ended = end, bool(head[5] & 2), bool(head[5] & 4)
    return Extent(open_end=not ended)
