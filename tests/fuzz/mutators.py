"""What the fuzzer does to inputs: bytes, JSON values, folders of files. All of it follows from the generator's seed."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345678\n"
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 10**9, 10**18, 10**400, 0.5, -1e-9, 1e308, float("nan"), float("inf")),
    *(
        "",
        " ",
        "x",
        "a" * 3000,
        "\x00",
        "\ud800",
        "\u202e",
        "../..",
        "/dev/zero",
        "<|im_end|>",
        "auto",
        "float16",
        "12",
    ),
    *([], [[]], [None], [1, "2"], {}, {"a": {}}, {"": 1}),
]
JINJA = [
    "{{ 1 / 0 }}",
    "{% if %}",
    "{{ nothing.at.all }}",
    "{{ raise_exception('no') }}",
    "{% for x in range(9) %}",
    "}}",
]


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Some bytes changed, lost or added."""
    spot = rng.randrange(len(data)) if data else 0
    length = rng.choice([1, 4, 64, 4096])
    match rng.randrange(8):
        case 0:
            return data[:spot]
        case 1:
            return b""
        case 2:
            return data[:spot] + data[spot + length :]
        case 3:
            return data[:spot] + rng.randbytes(length) + data[spot:]
        case 4:
            return data[:spot] + bytes(length) + data[spot + length :]
        case 5:
            return data + data[spot : spot + length]
        case _:  # most often a bit; near the beginning in half of the cases, where headers are
            spot = spot if rng.random() < 0.5 else min(spot, rng.randrange(64))
            return (
                data[:spot] + bytes(byte ^ 1 << rng.randrange(8) for byte in data[spot : spot + 1]) + data[spot + 1 :]
            )


def mutated_json(rng: random.Random, value: Any) -> Any:
    """A deep copy with one or two places changed."""
    root = [json.loads(json.dumps(value))]
    for _ in range(rng.choice([1, 1, 1, 2])):
        places = list(_places(root))
        holder, key = rng.choice(places)
        match rng.randrange(6):
            case 0 if isinstance(holder, dict):
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice(["x", "", f"{key} ", str(key).upper(), "audio_file", "offset"])] = holder.pop(key)
            case 2 if isinstance(holder, list) and len(holder) > 1:
                holder.insert(rng.randrange(len(holder)), holder[key])
            case 3:
                holder[key] = [holder[key]] if rng.random() < 0.5 else {"x": holder[key]}
            case 4:
                holder[key] = _near(rng, holder[key])
            case _:
                holder[key] = rng.choice(VALUES)
    return root[0]


def _near(rng: random.Random, value: Any) -> Any:
    """Another value of the same type: what a typo, or another version, would be."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice([-value, value + 1, value - 1, value * 2, value * 10**9, value / 3, str(value)])
    if isinstance(value, str):
        return rng.choice([value + "x", value[:-1], value.upper(), value[::-1], value * 50, f"{value}\n{value}"])
    return rng.choice(VALUES)


def _places(value: Any) -> Any:
    """Every (holder, key) of a nested value, as flat as possible: long lists count as their first items."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:8])
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def json_text(rng: random.Random, value: Any) -> bytes:
    """JSON, sometimes of the kinds that a strict reader refuses."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    match rng.randrange(12):
        case 0:
            text = text.replace("{", '{"x": 1, "x": 2, ', 1)
        case 1:
            text = "[" * 3000 + text + "]" * 3000
        case 2:
            text = text.replace(": 1", f": {'9' * 5000}", 1)
        case 3:
            text = "\ufeff" + text
    return text.encode("utf-8", "surrogatepass" if rng.random() < 0.5 else "replace")


def mutate_file(rng: random.Random, file: Path, others: list[Path]) -> str:
    """Damage a file in one way, and return in which."""
    is_json, is_template = file.suffix in (".json", ".jsonl"), file.suffix == ".jinja"
    way = rng.choice(["bytes", "bytes", "json" if is_json else "bytes", "json" if is_json else "bytes", "whole"])
    if is_template and rng.random() < 0.7:
        text = file.read_text(encoding="utf-8")
        spot = rng.randrange(len(text) + 1)
        file.write_text(text[:spot] + rng.choice(JINJA) + text[spot:], encoding="utf-8")
        return f"{file.name}: jinja at {spot}"
    if way == "json":
        try:
            value = json.loads(file.read_bytes())
        except ValueError:
            way = "bytes"
        else:
            file.write_bytes(json_text(rng, mutated_json(rng, value)))
            return f"{file.name}: json"
    if way == "bytes":
        file.write_bytes(mutated_bytes(rng, file.read_bytes()))
        return f"{file.name}: bytes"
    other = rng.choice(others)
    whole = rng.choice(["gone", "gone", "pointer", "folder", "swapped", "loop", "words"])
    if whole == "swapped":
        first, second = file.read_bytes(), other.read_bytes()
        file.write_bytes(second)
        other.write_bytes(first)
        return f"{file.name}: swapped with {other.name}"
    file.unlink()
    if whole == "folder":
        file.mkdir()
    elif whole == "loop":
        os.symlink(file.name, file)
    elif whole != "gone":
        file.write_bytes(POINTER if whole == "pointer" else b"<html>404</html>")
    return f"{file.name}: {whole}"


def mutate_folder(rng: random.Random, source: Path, target: Path) -> str:
    """Copy a folder and damage it, and return how."""
    shutil.copytree(source, target, symlinks=True)
    done = []
    for _ in range(rng.choice([1, 1, 1, 2])):
        files = sorted(path for path in target.rglob("*") if path.is_file())
        done.append(mutate_file(rng, rng.choice(files), files) if files else "empty")
    return ", ".join(done)
