"""A table as text, each column as wide as what stands in it: no number runs into its neighbour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_GAP = "  "


def aligned(
    rows: Sequence[Sequence[str]], *, left: int = 0, least: int = 6, width: int | None = None
) -> Iterator[str]:
    """Cells to the right, two spaces apart; the first `left` columns to the left.

    A row may be longer than the first: what is past its columns is said at its end.  least: width
    of a column.  width: of a line; what is wider comes in parts that repeat the first column.
    """
    columns = len(rows[0])
    widths = [max(least, *(len(row[n]) for row in rows)) for n in range(columns)]
    ends = max(len(_GAP.join(row[columns:])) for row in rows)
    for numbers in _parts(widths, ends, width):
        for row in rows:
            cells = [
                row[n].ljust(widths[n]) if n < left else row[n].rjust(widths[n]) for n in numbers
            ]
            rest = row[columns:] if numbers[-1] == columns - 1 else ()
            yield _GAP.join([*cells, *rest]).rstrip()


def _parts(widths: Sequence[int], ends: int, width: int | None) -> list[list[int]]:
    """The columns of each part; ends: how much stands behind the last."""
    parts, used = [[0]], widths[0]
    for n in range(1, len(widths)):
        wide = len(_GAP) + widths[n]
        behind = len(_GAP) + ends if ends and n == len(widths) - 1 else 0
        if width is not None and used + wide + behind > width and len(parts[-1]) > 1:
            parts.append([0])
            used = widths[0]
        parts[-1].append(n)
        used += wide
    return parts
