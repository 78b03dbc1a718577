"""`rawloop precision probe` and `rawloop precision compare`: ranges of numbers in a batch, and the modes in a race."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, is_dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any

from rawloop.cli import read_config
from rawloop.diagnose.shared import table
from rawloop.dist import open_world
from rawloop.errors import UserError, nearest
from rawloop.files import in_words, replace_file
from rawloop.precision_probe import Probe, Range, probe
from rawloop.precision_race import Comparison, ModeResult, compare, pace
from rawloop.records import json_value
from rawloop.watch.measure import FLUSHED, LOWEST, SUBNORMAL, Exponents

ACTIONS = ("probe", "compare")
ROWS = 12  # of a table in the terminal; the file has all
BAR = 50  # characters
HEADS = {"outputs": "outputs", "output_gradients": "gradients of outputs", "gradients": "gradients of parameters"}


def run(argv: list[str]) -> None:
    """Probe one micro-batch, or compare the modes."""
    action = argv[0] if argv else ""
    if action in ("-h", "--help"):
        print(f"usage: rawloop precision ({' | '.join(ACTIONS)}) --config FILE [options]")
        return
    if action not in ACTIONS:
        hint = nearest(action, ACTIONS) if action else ""
        raise UserError(
            f"rawloop precision needs one of {', '.join(ACTIONS)} first, as in `rawloop precision probe "
            f"--config FILE`; it got '{action}'{hint}"
        )
    config, options = read_config(f"precision {action}", argv[1:])
    file = output(options["json"])
    with open_world(config.device, config.ddp.timeout) as world:
        if world.size > 1:
            raise UserError(f"rawloop precision {action} measures in one process: call it without torchrun")
        if action == "probe":
            probed = probe(config, world)
            print("\n".join(probe_lines(probed)), flush=True)
            write_json(file, {**as_json(probed), "measured_in_fp16": probed.is_blind})
            return
        page = page_file(options["html"])
        reference, steps = chosen_reference(options["reference"]), chosen_steps(options["steps"])
        compared = compare(config, world, reference, steps)
    print("\n".join(compare_lines(compared)), flush=True)
    write_json(file, as_json(compared))
    if page is not None:
        write_html(page, compared, config.model.path)


def chosen_reference(value: str | None) -> str:
    """Return the dtype of the reference."""
    if value not in (None, "fp32", "fp64"):
        raise UserError(f"--reference is '{value}': it must be fp32 or fp64")
    return value or "fp32"


def chosen_steps(value: str | None) -> int:
    """Return the steps of the race."""
    if value is None:
        return 20
    if not value.isdecimal():
        raise UserError(f"--steps is '{value}': it must be a whole number, 0 for no race")
    return int(value)


def output(value: str | None) -> Path | None:
    """Return the file of an option. Refuse one that cannot be written before the work is done."""
    if value is None:
        return None
    file = Path(expanduser(value))
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(f"--json is '{value}': it must name a file in a folder that exists")
    return file


def page_file(value: str | None) -> Path | None:
    """Return the page's file, after the checks that it can be made."""
    if value is None:
        return None
    from rawloop.report.page import check_output, check_packages

    check_packages()
    check_output(file := Path(expanduser(value)))
    return file


def as_json(made: Any) -> dict[str, Any]:
    """Return a result as JSON values."""
    assert is_dataclass(made)
    assert not isinstance(made, type)
    values: dict[str, Any] = json_value(asdict(made))
    return values


def write_json(file: Path | None, values: dict[str, Any]) -> None:
    """Write values into a file, if there is one."""
    if file is None:
        return
    try:
        replace_file(file, json.dumps(values, allow_nan=False, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json is '{file}', which cannot be written: {in_words(error)}") from error


def probe_lines(probed: Probe) -> Iterator[str]:
    """Yield the lines of a probe."""
    yield f"precision: {probed.mode} ({probed.reason})"
    yield f"one micro-batch of {', '.join(probed.ids)}: loss {probed.loss:.4f}, {probed.seconds:.1f} s"
    why = "of the pass" if probed.pass_scale == probed.scale != 1.0 else "recommended for FP16"
    yield f"FP16 columns are for a loss scale of {probed.scale:g} ({why})"
    for name, head in HEADS.items():
        rows: list[Range] = getattr(probed, name)
        yield ""
        yield f"{head}, least head room in FP16 first ({min(len(rows), ROWS)} of {len(rows)})"
        yield from range_table(rows[:ROWS], gradients=name != "outputs")
    yield ""
    yield "exponents of the parameters' gradients (# normal, + subnormal, . flushed in FP16 under that scale)"
    yield from histogram(probed.exponents, probed.scale)
    yield ""
    if probed.window is None:
        yield "loss scales that fit FP16: every gradient is zero"
    else:
        seen = (
            "; this pass was in FP16 and does not show what it flushed: a probe in fp32 does" if probed.is_blind else ""
        )
        yield f"loss scales that fit FP16: {probed.window}{seen}"
        yield f"recommended precision.loss_scale.init: {probed.window.recommended():.9g}"
    lost = ", ".join(f"{name} {share:.1%}" for name, share in probed.lost_updates.items())
    yield f"weights that an update of {probed.lr:g} (optim.lr) does not change, by their dtype: {lost}"


def range_table(rows: Sequence[Range], gradients: bool) -> list[str]:
    """Return ranges as an aligned table."""
    head = ["name", "dtype", "largest", "bits left", "bits left in FP16", "zeros"]
    lines: list[list[object]] = [[*head, *(["flushed", "subnormal"] if gradients else [])]]
    for row in rows:
        shares = [f"{row.flushed:.2%}", f"{row.subnormal:.2%}"] if gradients else []
        lines.append(
            [
                row.name,
                row.dtype,
                f"{row.largest:.3g}",
                _bits(row.headroom),
                _bits(row.fp16),
                f"{row.zeros:.1%}",
                *shares,
            ]
        )
    return table("llrrrrrr"[: len(lines[0])], lines)


def _bits(bits: float) -> str:
    return f"{bits:.1f}" if math.isfinite(bits) else "-"


def histogram(exponents: Exponents, scale: float) -> Iterator[str]:
    """Yield a bar for each power of two between the smallest and the largest magnitude."""
    filled = [place for place, count in enumerate(exponents.counts) if count]
    if not filled:
        return
    most, shift = max(exponents.counts), round(math.log2(scale))
    for place in range(filled[-1], filled[0] - 1, -1):
        count, exponent = exponents.counts[place], place + LOWEST
        mark = "." if exponent + shift <= FLUSHED else "+" if exponent + shift <= SUBNORMAL else "#"
        bar = mark * (math.ceil(BAR * count / most) if count else 0)
        yield f"  2^{exponent - 1:<5d} {count / exponents.nonzero:7.2%}  {bar}".rstrip()


def compare_lines(made: Comparison) -> Iterator[str]:
    """Yield the lines of a comparison."""
    yield f"against {made.reference}, on the samples {', '.join(made.ids)}"
    yield from table("l" + "r" * 10 + "l", comparison_rows(made))
    yield ""
    for result in made.results:
        if result.why_not:
            yield f"{result.mode} is left out: {result.why_not}"
    yield from made.reasons
    best = next((result for result in made.results if result.mode == made.recommended), None)
    if best is None:
        yield "recommended: none of these modes; see above"
    else:
        yield f"recommended: precision.mode {best.mode}, {pace(best):.3g} s a step"


def comparison_rows(made: Comparison) -> list[list[object]]:
    """Return the table of a comparison, with its head."""
    head = ["mode", "loss error", "gradient error", "cosine", "zeros", "flips", "lost updates", "scale", "halved"]
    rows: list[list[object]] = [[*head, "s / step", f"loss after {made.steps}", "worst module"]]
    return rows + [_row(result) for result in made.results if not result.why_not]


def _row(result: ModeResult) -> list[object]:
    errors, race = result.errors, result.race
    shown = ["not finite", "-", "-", "-"]
    if errors:
        shown = [f"{errors.relative:.1e}", f"{errors.cosine:.6f}", f"{errors.zeros:.2%}", f"{errors.flips:.2%}"]
    worst = result.worst or "-"
    if errors and result.worst:
        worst = f"{result.worst} {result.modules[result.worst].relative:.1e}"
    return [
        result.mode,
        f"{result.loss_error:.1e}",
        *shown,
        f"{result.lost_updates:.1%}",
        f"{result.scale:g}",
        result.overflows,
        f"{pace(result):.3g}",
        f"{race.final:.4g}" if race else "-",
        worst,
    ]


def write_html(file: Path, made: Comparison, model: str) -> None:
    """Write the comparison as a page."""
    from rawloop.report.page import Note, Section, Table, render, write_page
    from rawloop.report.plots import Line, draw_lines

    head, *rows = comparison_rows(made)
    lead = [Note(made.recommended or "none", "good" if made.recommended else "alarm", "Recommended mode")]
    notes = [Note(reason) for reason in made.reasons]
    notes += [
        Note(result.why_not, "warning", f"{result.mode} is left out") for result in made.results if result.why_not
    ]
    curves = [(result.mode, result.race.losses) for result in made.results if result.race and result.race.losses]
    lines = [Line(name, range(len(losses)), losses, color) for color, (name, losses) in enumerate(curves)]
    modules = [
        [result.mode, name, errors.relative, errors.cosine, errors.zeros, errors.flips]
        for result in made.results
        for name, errors in sorted(result.modules.items(), key=lambda item: -item[1].relative)[:ROWS]
    ]
    sections = [
        Section("Modes", notes, tables=[Table([str(cell) for cell in head], rows)]),
        Section("Race", figures=[draw_lines("Loss", lines)] if lines else []),
        Section(
            "Worst modules",
            tables=[Table(["mode", "module", "gradient error", "cosine", "zeros", "flips"], modules)],
        ),
    ]
    write_page(file, render(f"Precision modes of {model}", sections, lead))
