"""`rawloop precision probe` and `rawloop precision compare`: ranges of numbers in a batch, and the modes in a race."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from os.path import expanduser
from pathlib import Path

from rawloop.cli import read_config
from rawloop.cli.options import CompareOptions, ProbeOptions
from rawloop.diagnose.shared import table
from rawloop.dist import open_world
from rawloop.errors import UserError
from rawloop.files import in_words, replace_file
from rawloop.precision_probe import Probe, Range, probe
from rawloop.precision_race import Comparison, ModeResult, compare, pace
from rawloop.records import json_value
from rawloop.watch.measure import FLUSHED, LOWEST, SUBNORMAL, Exponents

ROWS = 12  # of a table in the terminal; the file has all
BAR = 50  # characters
TABLES = {"outputs": "outputs", "output_gradients": "gradients of outputs", "gradients": "gradients of parameters"}
RANGE = ("name", "dtype", "largest", "bits left", "bits left in FP16", "zeros", "flushed", "subnormal")
ERRORS = ("gradient error", "cosine", "zeros", "flips")


def run(argv: list[str]) -> None:
    """Probe one micro-batch, or compare the modes."""
    action, rest = argv[0], argv[1:]
    config, options, _ = read_config(f"precision {action}", rest)
    file, page = _files(options)
    made: Probe | Comparison
    with open_world(config.device, config.ddp.timeout) as world:
        if world.size > 1:
            raise UserError(f"rawloop precision {action} measures in one process: call it without torchrun")
        made = probe(config, world) if action == "probe" else compare(config, world, options.reference, options.steps)
    lines = probe_lines(made) if isinstance(made, Probe) else compare_lines(made)
    print("\n".join(lines), flush=True)
    if file is not None:
        try:
            replace_file(file, json.dumps(json_value(asdict(made)), allow_nan=False, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json is '{file}', which cannot be written: {in_words(error)}") from error
    if page is not None and isinstance(made, Comparison):
        write_html(page, made, config.model.path)


def _files(options: ProbeOptions | CompareOptions) -> tuple[Path | None, Path | None]:
    """Return the files for the measurements and the page, after the checks that can be made before the work is done."""
    html = options.html if isinstance(options, CompareOptions) else None
    file, page = (Path(expanduser(name)) if name else None for name in (options.json, html))
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise UserError(f"--json is '{file}': it must name a file in a folder that exists")
    if page is not None:
        from rawloop.report.page import check_output, check_packages

        check_packages()
        check_output(page)
    return file, page


def probe_lines(probed: Probe) -> Iterator[str]:
    """Yield the lines of a probe."""
    yield f"precision: {probed.mode} ({probed.reason})"
    yield f"one micro-batch of {', '.join(probed.ids)}: loss {probed.loss:.4f}, {probed.seconds:.1f} s"
    why = "of the pass" if probed.pass_scale == probed.scale != 1.0 else "recommended for FP16"
    yield f"FP16 columns are for a loss scale of {probed.scale:g} ({why})"
    for name, head in TABLES.items():
        rows: list[Range] = getattr(probed, name)
        columns = len(RANGE) if name != "outputs" else -2
        yield f"\n{head}, least head room in FP16 first ({min(len(rows), ROWS)} of {len(rows)})"
        yield from table("llrrrrrr"[:columns], [RANGE[:columns], *(_range_row(row)[:columns] for row in rows[:ROWS])])
    yield "\nexponents of the parameters' gradients (# normal, + subnormal, . flushed in FP16 under that scale)"
    yield from histogram(probed.exponents, probed.scale)
    if probed.window is None:
        yield "\nloss scales that fit FP16: every gradient is zero"
    else:
        blind = "this pass was in FP16 and does not show what it flushed: a probe in fp32 does"
        yield f"\nloss scales that fit FP16: {probed.window}{f'; {blind}' if probed.measured_in_fp16 else ''}"
        yield f"recommended precision.loss_scale.init: {probed.window.recommended():.9g}"
    lost = ", ".join(f"{name} {share:.1%}" for name, share in probed.lost_updates.items())
    yield f"weights that an update of {probed.lr:g} (optim.lr) does not change, by their dtype: {lost}"


def _range_row(row: Range) -> list[str]:
    bits = [f"{bits:.1f}" if math.isfinite(bits) else "-" for bits in (row.headroom, row.fp16)]
    shares = [f"{row.zeros:.1%}", f"{row.flushed:.2%}", f"{row.subnormal:.2%}"]
    return [row.name, row.dtype, f"{row.largest:.3g}", *bits, *shares]


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
    yield from table("l" + "r" * 10 + "l", _mode_rows(made))
    yield ""
    yield from (f"{result.mode} is left out: {result.why_not}" for result in made.results if result.why_not)
    yield from made.reasons
    best = next((result for result in made.results if result.mode == made.recommended), None)
    if best is None:
        yield "recommended: none of these modes; see above"
    else:
        yield f"recommended: precision.mode {best.mode}, {pace(best):.3g} s a step"


def _mode_rows(made: Comparison) -> list[list[str]]:
    """Return the table of a comparison, with its head."""
    head = ["mode", "loss error", *ERRORS, "lost updates", "scale", "halved", "s / step"]
    head += [f"loss after {made.steps}", "worst module"]
    return [head, *(_mode_row(result) for result in made.results if not result.why_not)]


def _mode_row(result: ModeResult) -> list[str]:
    errors, worst = ["not finite", "-", "-", "-"], result.worst or "-"
    if own := result.errors:
        errors = [f"{own.relative:.1e}", f"{own.cosine:.6f}", f"{own.zeros:.2%}", f"{own.flips:.2%}"]
        worst += f" {result.modules[result.worst].relative:.1e}" if result.worst else ""
    scale = [f"{result.lost_updates:.1%}", f"{result.scale:g}", str(result.overflows)]
    final = f"{result.race.final:.4g}" if result.race else "-"
    return [result.mode, f"{result.loss_error:.1e}", *errors, *scale, f"{pace(result):.3g}", final, worst]


def write_html(file: Path, made: Comparison, model: str) -> None:
    """Write the comparison as a page."""
    from rawloop.report.page import Note, Section, Table, render, write_page
    from rawloop.report.plots import Line, draw_lines

    head, *rows = _mode_rows(made)
    lead = [Note(made.recommended or "none", "good" if made.recommended else "alarm", "Recommended mode")]
    notes = [Note(reason) for reason in made.reasons]
    notes += [Note(one.why_not, "warning", f"{one.mode} is left out") for one in made.results if one.why_not]
    raced = [(one.mode, one.race.losses) for one in made.results if one.race and one.race.losses]
    lines = [Line(mode, range(len(losses)), losses, color) for color, (mode, losses) in enumerate(raced)]
    modules = [
        [result.mode, name, errors.relative, errors.cosine, errors.zeros, errors.flips]
        for result in made.results
        for name, errors in sorted(result.modules.items(), key=lambda item: -item[1].relative)[:ROWS]
    ]
    worst = Table(["mode", "module", *ERRORS], modules)
    sections = [
        Section("Modes", notes, tables=[Table(head, rows)]),
        Section("Race", figures=[draw_lines("Loss", lines)] if lines else []),
        Section("Worst modules", tables=[worst]),
    ]
    write_page(file, render(f"Precision modes of {model}", sections, lead))
