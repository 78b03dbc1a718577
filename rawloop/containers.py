"""Where the audio of a file ends, read off its container: what a header promises can be an estimate, or wrong.

libsndfile stops where it believes a file ends, without a word about what it leaves: a second file joined to the first,
or the rest of an mp3 without a Xing header, whose length it guesses from its first frame. It does not notice either
that a wav, an ogg or an mp3 was cut short. Nothing is decoded here.

Sources: RFC 9639 (FLAC), RFC 3533 (Ogg), ISO 11172-3 and 13818-3 (MPEG audio), id3.org.
"""

import os
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from rawloop.errors import RawloopError

CHUNK = 2**20  # bytes read at a time where a file is searched
STREAMED = 2**30  # bytes: writers to a pipe leave a huge length behind in a wav
FLAC_START = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")
WAV_START = re.compile(rb"RIFF.{4}WAVEfmt ", re.DOTALL)
FLAC_BLOCKS = {1: 192, **{code: 144 * 2**code for code in range(2, 6)}, **{code: 2**code for code in range(8, 16)}}
MP3_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
MP3_KBPS = {
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


class BadAudio(RawloopError):
    """A clip that cannot be used. The message is the reason alone, without the file's name."""


class Held(NamedTuple):
    """What a file holds.

    `samples` per channel, 0 where libsndfile counts right; a decoder may leave out `slack` of them. Where a file does
    not say how many there are, `header` does: put it in the place of the first `replaces` bytes.
    """

    samples: int = 0
    slack: int = 0
    header: bytes = b""
    replaces: int = 0


def held(stream: BinaryIO) -> Held:
    """Return what a wav, flac, ogg or mp3 file holds; of other formats libsndfile is believed.

    Raises:
        BadAudio: it is cut short, or something stands behind its audio that is neither audio nor a tag.
    """
    size = os.fstat(stream.fileno()).st_size
    start = _behind_tags(stream, 0, size)
    head = _at(stream, start, 12)
    if head[:4] in (b"RIFF", b"RF64") and head[8:] == b"WAVE":
        _check_wav(stream, start, size)
    elif head[:4] == b"OggS":
        _check_ogg(stream, start, size)
    elif head[:4] == b"fLaC":
        return _Flac(stream, start, size).held()
    elif _mp3_frame(head):
        return _mp3(stream, start, size)
    elif head[:1] == b"\xff":  # an mp3 with a bitrate of its own, or of another layer
        return Held(slack=2**62)
    return Held()


def _at(stream: BinaryIO, place: int, count: int) -> bytes:
    stream.seek(place)
    return stream.read(count)


def cut_short(promised: float, found: float) -> BadAudio:
    """What is wrong with a file that has lost its end; both in seconds."""
    return BadAudio(f"is cut short: its header promises {promised:.2f} s, it holds {found:.2f} s")


def _joined(place: int, size: int, what: str) -> BadAudio:
    return BadAudio(
        f"has {what} behind its audio, from byte {place} of {size} on, which a decoder leaves out: if files were "
        "joined, split them or encode them anew as one"
    )


def _behind_tags(stream: BinaryIO, place: int, size: int) -> int:
    """Return where the next thing begins that is no tag and not the zeros at a file's end."""
    while place < size:
        length = _tag(stream, place, size)
        if not length:
            break
        place = min(place + length, size)
    return place


def _tag(stream: BinaryIO, place: int, size: int) -> int:
    """Return the length of the tag that begins at `place`, of zeros up to the end, or 0."""
    head = _at(stream, place, 32)
    if head[:3] == b"ID3" and len(head) >= 10 and max(head[6:10]) < 128:
        length = sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
        return 10 + length + 10 * bool(head[5] & 16)
    if head[:3] == b"TAG" and size - place in (128, 128 + 227):
        return size - place
    if head[:8] == b"APETAGEX" and len(head) == 32:
        return 32 + int.from_bytes(head[12:16], "little") * bool(head[23] & 32)
    for last in (size, size - 128):  # an APE tag may lack its header; an ID3v1 tag may follow
        foot = _at(stream, max(last - 32, 0), 32)
        if foot[:8] == b"APETAGEX" and place == last - int.from_bytes(foot[12:16], "little"):
            return last - place
    if head[:11] == b"LYRICSBEGIN":
        end = re.search(rb"LYRICS200|LYRICSEND", _at(stream, place, 2**17))
        return end.end() if end else 0
    zeros = all(not any(chunk) for chunk in _chunks(stream, place)) if head and not any(head) else False
    return size - place if zeros else 0


def _chunks(stream: BinaryIO, place: int) -> Iterator[bytes]:
    stream.seek(place)
    while chunk := stream.read(CHUNK):
        yield chunk


def _refuse_second(stream: BinaryIO, place: int, size: int, start: re.Pattern[bytes], what: str) -> None:
    """Refuse a file in which another one begins, at or behind `place`."""
    before = b""
    for chunk in _chunks(stream, place):
        found = start.search(before + chunk)
        if found:
            raise _joined(place + found.start() - len(before), size, what)
        place += len(chunk)
        before = (before + chunk)[-32:]


def _check_wav(stream: BinaryIO, start: int, size: int) -> None:
    """Look at the chunks of a wav: its samples are libsndfile's to count."""
    place, speed, large, seen = start + 12, 0, 0, False
    while place + 8 <= size:
        name, length = _at(stream, place, 4), int.from_bytes(stream.read(4), "little")
        body = stream.read(16)
        if name in (b"RIFF", b"RF64"):
            raise _joined(place, size, "a second wav file")
        if not _is_name(name):
            if seen and _behind_tags(stream, place, size) < size:
                raise _joined(place, size, "bytes that are no chunk")
            return
        if name == b"fmt ":
            speed = int.from_bytes(body[8:12], "little")
        elif name == b"ds64":
            large = int.from_bytes(body[8:16], "little")
        elif name == b"data":
            seen = True
            length = large if length == 2**32 - 1 and large else length
            found = size - place - 8
            if not length and found and not _is_name(body[:4]) and _behind_tags(stream, place + 8, size) < size:
                raise BadAudio(
                    f"has a header that says that it is empty, and {found} bytes behind it, as a recording that was "
                    "not closed: write it anew, as with `ffmpeg -i`"
                )
            if length > found and length > STREAMED and not large:
                _refuse_second(stream, place + 8, size, WAV_START, "a second wav file")
                return
            if length > found and speed:
                raise cut_short(length / speed, found / speed)
        place += 8 + length
        if length % 2:  # some writers forget the byte that makes it even, others put no zero there
            place += not _is_name(_at(stream, place, 4))


def _is_name(name: bytes) -> bool:
    return name.isascii() and name.decode().isprintable()


def _check_ogg(stream: BinaryIO, start: int, size: int) -> None:
    """Look at the pages of an ogg: its samples are libsndfile's to count."""
    place, first, ended = start, True, False
    while place < size:
        head = _at(stream, place, 27)
        if head[:4] != b"OggS"[: len(head)]:
            place = _behind_tags(stream, place, size)
            if place == size and ended:
                return
            raise _joined(place, size, "something") if ended else BadAudio(f"is damaged: no ogg page at byte {place}")
        table = stream.read(head[26]) if len(head) == 27 else b""
        end = place + 27 + len(table) + sum(table)
        if len(head) < 27 or len(table) < head[26] or end > size:
            raise BadAudio("is cut short: its last ogg page is not whole")
        if head[5] & 2 and not first:
            raise _joined(place, size, "a second ogg stream")
        place, first, ended = end, bool(head[5] & 2), bool(head[5] & 4)
    if not ended:
        raise BadAudio(
            "is cut short: its last ogg page does not end the stream (if nothing is missing, as in a broadcast, "
            "`ffmpeg -i ... -c copy` writes one that does)"
        )


class Mp3Frame(NamedTuple):
    """What the header of an mp3 frame says; `length` in bytes, `samples` per channel."""

    length: int
    samples: int
    rate: int
    mono: bool


def _mp3_frame(head: bytes) -> Mp3Frame | None:
    """Read the header of a layer III frame; None if it is none, or of a bitrate of its own ("free format")."""
    if len(head) < 4 or head[0] != 255 or head[1] & 0xE6 != 0xE2:
        return None
    version, kbps, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or kbps in (0, 15) or rate == 3:
        return None
    samples, hertz = 1152 if version == 3 else 576, MP3_RATES[version][rate]
    length = samples // 8 * MP3_KBPS[version == 3][kbps] * 1000 // hertz + (head[2] >> 1 & 1)
    return Mp3Frame(length, samples, hertz, head[3] >> 6 == 3)


def _mp3(stream: BinaryIO, start: int, size: int) -> Held:
    """Count the frames of an mp3, whose header may tell their number or not."""
    place, content = start, _at(stream, start, 256)
    first = _mp3_frame(content)
    assert first is not None
    promised = _promised_frames(content)
    count = 0
    lost = ""
    while place < size:
        frame = _mp3_frame(_at(stream, place, 4))
        if frame is None:
            behind = _behind_tags(stream, place, size)
            if behind == place:
                raise _joined(place, size, "bytes that are no mp3 frame")
            place = behind
            continue
        if frame[2:] != first[2:]:
            raise _joined(place, size, "a second mp3 stream")
        if place + frame.length > size:
            lost = f"its last frame has {size - place} of {frame.length} bytes"
            break
        count += 1
        place += frame.length
    if promised is not None and not promised <= count <= promised + 2:  # its header is a frame that some count, too
        seconds = first.samples / first.rate
        if count < promised:
            raise cut_short(promised * seconds, (count - 1) * seconds)
        raise BadAudio(
            f"goes on for {(count - 1 - promised) * seconds:.2f} s behind the end that its header gives: if files "
            "were joined, split them or encode them anew as one"
        )
    if lost:
        raise BadAudio(f"is cut short after {count * first.samples / first.rate:.2f} s: {lost}")
    if b"VBRI" in content[:64]:  # the decoder takes no count from there, and guesses
        return Held((count - 1) * first.samples, first.samples, _xing(content, count - 1), start + first.length)
    if promised is not None:
        return Held(slack=first.samples)
    return Held(count * first.samples, first.samples, _xing(content, count), start)


def _promised_frames(content: bytes) -> int | None:
    """Return the number of frames behind the first one that it tells of, if it does."""
    found = re.search(rb"Xing|Info|VBRI", content[4:64])
    if not found:
        return None
    place = 4 + found.start()
    if found[0] == b"VBRI":
        return int.from_bytes(content[place + 14 : place + 18])
    # Encoders that cannot go back to the beginning leave a 0.
    return int.from_bytes(content[place + 8 : place + 12]) or None if content[place + 7] & 1 else None


def _xing(content: bytes, count: int) -> bytes:
    """Return a header frame, as encoders write it, that gives the number of frames of an mp3 that has none."""
    head = bytes((0xFF, content[1] | 1, content[2] & 0x0C | 0xE0, content[3]))
    frame = _mp3_frame(head)
    assert frame is not None
    side = (17 if frame.mono else 32) if frame.samples == 1152 else (9 if frame.mono else 17)
    body = head + bytes(side) + b"Info" + (1).to_bytes(4) + count.to_bytes(4)
    return body.ljust(frame.length, b"\0")


class _Flac:
    """A flac file: its header's number of samples is held against its last frame."""

    def __init__(self, stream: BinaryIO, start: int, size: int) -> None:
        self.stream, self.start, self.size = stream, start, size
        info = _at(stream, start + 8, 34)
        self.block = int.from_bytes(info[2:4])
        self.rate = int.from_bytes(info[10:13]) >> 4 or 1
        self.total = int.from_bytes(info[13:18]) & (2**36 - 1)
        place, last = start + 4, False
        while not last and place + 4 <= size:
            head = _at(stream, place, 4)
            last = head[0] > 127
            place += 4 + int.from_bytes(head[1:])
        self.frames = place

    def held(self) -> Held:
        """Return how many samples there are up to the last one.

        Raises:
            BadAudio: it is cut short or goes on behind its header's end, or something is joined to it.
        """
        _refuse_second(self.stream, self.frames, self.size, FLAC_START, "a second flac file")
        found = self._last_frame()
        if found is None:
            raise BadAudio("is cut short, or something stands behind its audio: no flac frame ends where the file does")
        if found < self.total:
            raise cut_short(self.total / self.rate, found / self.rate)
        if found > self.total > 0:
            raise BadAudio(f"goes on to {found / self.rate:.2f} s, its header promises {self.total / self.rate:.2f} s")
        if self.total:
            return Held(found)
        head = _at(self.stream, 0, self.start + 26)
        total = int.from_bytes(head[-5:]) | found
        return Held(found, header=head[:-5] + total.to_bytes(5), replaces=len(head))

    def _last_frame(self) -> int | None:
        """Return the number of the sample behind the last frame, if the file or its tags begin where that ends."""
        place = max(self.frames, self.size - 2**22)
        content = _at(self.stream, place, 2**22)
        end, tries = len(content), 4  # chance makes bytes inside a frame look like a header, too
        while tries and (end := content.rfind(b"\xff", 0, end)) >= 0:
            behind = self._header(content[end : end + 16])
            if behind is None:
                continue
            tries -= 1
            ends = _crc16_ends(content[end:])
            if any(_behind_tags(self.stream, place + end + length, self.size) == self.size for length in ends):
                return behind
        return None

    def _header(self, head: bytes) -> int | None:
        """Return the number of the first sample behind a frame, if `head` begins one."""
        if len(head) < 6 or head[1] & 0xFE != 0xF8 or head[3] & 1:
            return None
        ones = 8 - (~head[4] & 0xFF).bit_length()  # of the number, which is coded as in UTF-8
        length = max(ones, 1)
        if ones in (1, 8):
            return None
        number = head[4] & (0x7F >> ones)
        for byte in head[5 : 4 + length]:
            number = number << 6 | byte & 0x3F
        code, rate = head[2] >> 4, head[2] & 15
        sized = {6: 1, 7: 2}.get(code, 0)
        end = 4 + length + sized + {12: 1, 13: 2, 14: 2}.get(rate, 0)
        if len(head) <= end or _crc8(head[:end]) != head[end] or code == 0:
            return None
        block = FLAC_BLOCKS.get(code) or 1 + int.from_bytes(head[4 + length : 4 + length + sized])
        return number * (1 if head[1] & 1 else self.block) + block


def _crc_table(bits: int, polynomial: int) -> list[int]:
    table = []
    for byte in range(256):
        value = byte << (bits - 8)
        for _ in range(8):
            value = (value << 1) ^ (polynomial if value >> (bits - 1) else 0)
            value &= (1 << bits) - 1
        table.append(value)
    return table


CRC8, CRC16 = _crc_table(8, 0x07), _crc_table(16, 0x8005)


def _crc8(content: bytes) -> int:
    value = 0
    for byte in content:
        value = CRC8[value ^ byte]
    return value


def _crc16_ends(content: bytes) -> Iterator[int]:
    """Yield the lengths at which `content` may end as a flac frame does: its checksum makes that of the whole zero."""
    value = 0
    for length, byte in enumerate(content, 1):
        value = (value << 8 & 0xFF00) ^ CRC16[value >> 8 ^ byte]
        if not value and length > 8:
            yield length
