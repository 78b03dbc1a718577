"""The number of samples in an mp3 or a flac, counted by its frames; see `containers.py`.

Sources: RFC 9639 (FLAC), ISO 11172-3 and 13818-3 (MPEG audio).
"""

import os
import re
from collections.abc import Iterator
from functools import reduce
from typing import BinaryIO, NamedTuple

from rawloop.containers import BadAudio, Extent, cut_short, joined, ogg, read_at, refuse_second, skip_tags, wav

FLAC_START = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")
FLAC_BLOCKS = {1: 192, **{code: 144 * 2**code for code in range(2, 6)}, **{code: 2**code for code in range(8, 16)}}
MP3_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
MP3_KBPS = {
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def measure(stream: BinaryIO) -> Extent:
    """Return how much audio a wav, flac, ogg or mp3 file has. For other formats, libsndfile counts.

    Raises BadAudio if the file is cut short, or has something after its audio that is neither audio nor a tag.
    """
    size = os.fstat(stream.fileno()).st_size
    start = skip_tags(stream, 0, size)
    head = read_at(stream, start, 12)
    if head[:4] in (b"RIFF", b"RF64") and head[8:] == b"WAVE":
        return wav(stream, start, size)
    if head[:4] == b"OggS":
        return ogg(stream, start, size)
    if head[:4] == b"fLaC":
        return _flac(stream, start, size)
    if _mp3_frame(head):
        return _mp3(stream, start, size)
    if head[:1] == b"\xff":  # an mp3 of free format or another layer
        return Extent(slack=2**62)
    return Extent()


class Mp3Frame(NamedTuple):
    """The header of an mp3 frame; `length` in bytes, `samples` per channel."""

    length: int
    samples: int
    rate: int
    mono: bool


def _mp3_frame(head: bytes) -> Mp3Frame | None:
    """Parse the header of a layer III frame. Returns None for other bytes, and for free format."""
    if len(head) < 4 or head[0] != 255 or head[1] & 0xE6 != 0xE2:
        return None
    version, kbps, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or kbps in (0, 15) or rate == 3:
        return None
    samples, hertz = 1152 if version == 3 else 576, MP3_RATES[version][rate]
    length = samples // 8 * MP3_KBPS[version == 3][kbps] * 1000 // hertz + (head[2] >> 1 & 1)
    return Mp3Frame(length, samples, hertz, head[3] >> 6 == 3)


def _mp3(stream: BinaryIO, start: int, size: int) -> Extent:
    """Count the frames of an mp3, and compare with the number in its header, if there is one."""
    place, content = start, read_at(stream, start, 256)
    first = _mp3_frame(content)
    assert first is not None
    promised = _promised_frames(content)
    count = 0
    lost = ""
    while place < size:
        frame = _mp3_frame(read_at(stream, place, 4))
        if frame is None:
            behind = skip_tags(stream, place, size)
            if behind == place:
                raise joined(place, size, "bytes that are no mp3 frame")
            place = behind
            continue
        if frame[2:] != first[2:]:
            raise joined(place, size, "a second mp3 stream")
        if place + frame.length > size:
            lost = f"its last frame has {size - place} of {frame.length} bytes"
            break
        count += 1
        place += frame.length
    if promised is not None and not promised <= count <= promised + 2:  # some writers count the header as a frame
        seconds = first.samples / first.rate
        if count < promised:
            raise cut_short(promised * seconds, max(count - 1, 0) * seconds)
        raise BadAudio(
            f"goes on for {(count - 1 - promised) * seconds:.2f} s after the end in its header: if files "
            "were joined, split them or encode them anew as one"
        )
    if lost:
        raise BadAudio(f"is cut short after {count * first.samples / first.rate:.2f} s: {lost}")
    if b"VBRI" in content[:64]:  # the decoder does not read this header, and guesses
        return Extent((count - 1) * first.samples, first.samples, _xing(content, count - 1), start + first.length)
    if promised is not None:
        return Extent(slack=first.samples, replaces=start)
    return Extent(count * first.samples, first.samples, _xing(content, count), start)


def _promised_frames(content: bytes) -> int | None:
    """Return the number of frames after the first, if the first frame is a header with this number, else None."""
    found = re.search(rb"Xing|Info|VBRI", content[4:64])
    if not found:
        return None
    place = 4 + found.start()
    if len(content) < place + 18:  # the file is cut short here
        return None
    if found[0] == b"VBRI":
        return int.from_bytes(content[place + 14 : place + 18])
    # Encoders that cannot go back to the header leave a 0.
    return int.from_bytes(content[place + 8 : place + 12]) or None if content[place + 7] & 1 else None


def _xing(content: bytes, count: int) -> bytes:
    """Return a header frame with the number of frames, for an mp3 without one."""
    head = bytes((0xFF, content[1] | 1, content[2] & 0x0C | 0xE0, content[3]))
    frame = _mp3_frame(head)
    assert frame is not None
    side = (17 if frame.mono else 32) if frame.samples == 1152 else (9 if frame.mono else 17)
    body = head + bytes(side) + b"Info" + (1).to_bytes(4) + count.to_bytes(4)
    return body.ljust(frame.length, b"\0")


def _flac(stream: BinaryIO, start: int, size: int) -> Extent:
    """Compare the number of samples in the header of a flac with its last frame."""
    info = read_at(stream, start + 8, 34)
    rate, total = int.from_bytes(info[10:13]) >> 4 or 1, int.from_bytes(info[13:18]) & (2**36 - 1)
    place, last = start + 4, False
    while not last and place + 4 <= size:
        head = read_at(stream, place, 4)
        last = head[0] > 127
        place += 4 + int.from_bytes(head[1:])
    refuse_second(stream, place, size, FLAC_START, "a second flac file")
    found = _flac_samples(stream, place, size, int.from_bytes(info[2:4]))
    if found is None:
        raise BadAudio("is cut short, or has something after its audio: no flac frame ends at the end of the file")
    if found < total:
        raise cut_short(total / rate, found / rate)
    if found > total > 0:
        raise BadAudio(f"goes on to {found / rate:.2f} s, its header promises {total / rate:.2f} s")
    if total:
        return Extent(found)
    head = read_at(stream, 0, start + 26)
    count = int.from_bytes(head[-5:]) | found
    return Extent(found, header=head[:-5] + count.to_bytes(5), replaces=len(head))


def _flac_samples(stream: BinaryIO, frames: int, size: int, block: int) -> int | None:
    """Return the number of samples up to the end of the last frame, if only tags follow that frame."""
    place = max(frames, size - 2**22)
    content = read_at(stream, place, 2**22)
    begin, tries = len(content), 4  # other bytes may look like a header by chance
    while tries and (begin := content.rfind(b"\xff", 0, begin)) >= 0:
        samples = _samples_to_end_of(content[begin : begin + 16], block)
        if samples is None:
            continue
        tries -= 1
        if any(skip_tags(stream, place + begin + length, size) == size for length in _crc16_ends(content[begin:])):
            return samples
    return None


def _samples_to_end_of(head: bytes, block: int) -> int | None:
    """Return the number of samples up to the end of the frame with the header `head`; None for other bytes.

    `block` is the number of samples in each frame of a file with a fixed block size.
    """
    if len(head) < 6 or head[1] & 0xFE != 0xF8 or head[3] & 1:
        return None
    ones = 8 - (~head[4] & 0xFF).bit_length()  # the frame number is encoded like UTF-8
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
    samples = FLAC_BLOCKS.get(code) or 1 + int.from_bytes(head[4 + length : 4 + length + sized])
    return number * (1 if head[1] & 1 else block) + samples


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
    return reduce(lambda value, byte: CRC8[value ^ byte], content, 0)


def _crc16_ends(content: bytes) -> Iterator[int]:
    """Yield the lengths at which a flac frame in `content` may end: with its checksum, the CRC is zero."""
    value = 0
    for length, byte in enumerate(content, 1):
        value = (value << 8 & 0xFF00) ^ CRC16[value >> 8 ^ byte]
        if not value and length > 8:
            yield length
