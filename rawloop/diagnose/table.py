"""A table as plain text, for consoles and logs."""

from collections.abc import Sequence


def table(align: str, rows: Sequence[Sequence[object]]) -> list[str]:
    """Return lines of aligned columns, the first row being the head.

    Args:
        align: a letter per column, `l` for words and `r` for numbers.
        rows: as many cells each.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        columns = zip(row, widths, align, strict=True)
        lines.append("  ".join(c.ljust(w) if side == "l" else c.rjust(w) for c, w, side in columns).rstrip())
    return lines
