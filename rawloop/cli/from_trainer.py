"""`rawloop from-trainer FILE`: writes a config from the settings of HF Trainer and of what is built on it."""

from collections.abc import Iterator
from os.path import expanduser
from pathlib import Path
from typing import Any

from rawloop.cli import read_options
from rawloop.config import parse
from rawloop.errors import UserError, happening
from rawloop.files import in_words, replace_file
from rawloop.translation.sources import read_sources
from rawloop.translation.syntax import Source
from rawloop.translation.telling import as_yaml, our_defaults, told
from rawloop.translation.translate import Translation, translate


def run(argv: list[str]) -> None:
    """Translate the settings, write the config, and print what became of each of them."""
    values = read_options("from-trainer", argv)
    output = Path(expanduser(values.output))
    if output.exists() and not values.force:
        raise UserError(f"--output is '{output}', which exists: choose another name, or replace it with --force")
    sources = [source for file in values.file for source in read_sources(Path(expanduser(file)))]
    defaults = our_defaults()
    done = []
    for source in sources:
        with happening(source.place, name_own=True):
            translated = translate(source.table, source.given, defaults, source.unread, source.implied)
        done.append((source, translated))
    settings = together(done)
    settings = {key: settings[key] for key in defaults if key in settings}
    write(output, settings, sources)
    for line in report(done, settings, output):
        print(line, flush=True)


def together(done: list[tuple[Source, Translation]]) -> dict[str, Any]:
    """Return the settings of all sources. Raise UserError if two of them contradict each other."""
    settings: dict[str, Any] = {}
    places: dict[str, str] = {}
    for source, translation in done:
        for key, value in translation.settings.items():
            if settings.setdefault(key, value) != value:
                raise UserError(f"'{key}' is {settings[key]!r} by {places[key]}, and {value!r} by {source.place}")
            places[key] = source.place
    return settings


def write(output: Path, settings: dict[str, Any], sources: list[Source]) -> None:
    """Write the config. Raise UserError if `rawloop train` would refuse it, or if it cannot be written."""
    places = ", ".join(source.place for source in sources)
    text = f"# written by `rawloop from-trainer` from {places}\n{as_yaml(settings)}"
    draft = output.with_name(f".tmp-{output.name}.draft")
    try:
        draft.write_text(text, encoding="utf-8")
        parse(["--config", str(draft)], "rawloop train")
        replace_file(output, text)
    except UserError as error:
        raise type(error)(str(error).replace(str(draft), places)) from error
    except OSError as error:
        raise UserError(f"--output is '{output}', which cannot be written: {in_words(error)}") from error
    finally:
        draft.unlink(missing_ok=True)


def report(done: list[tuple[Source, Translation]], settings: dict[str, Any], output: Path) -> Iterator[str]:
    """Yield what became of each setting, what is still to be set, and the next command."""
    for source, translation in done:
        yield f"from {source.place}:"
        yield from told(translation, "taken", "changed", "idle", "without", "unread", "unknown", "assumed", "default")
    absent = [key for key in ("model.path", "data.train") if key not in settings]
    if settings.get("evaluation.enabled", True) and not {"data.eval", "data.eval_share"} & settings.keys():
        absent.append("data.eval (or data.eval_share, or evaluation.enabled false)")
    methods = {key for source, _ in done for rule in source.table.rules.values() for key in rule.keys}
    if "adapter.mode" not in settings and not {"adapter.mode", "adapter.rank"} & methods:
        absent.append("adapter.mode (lora, the default, or full: the file does not say which)")
    if absent:
        yield f"still to be set: {', '.join(absent)}"
    yield f"wrote {output}: rawloop train --config {output}"
