"""A table as text, each column as wide as what stands in it: no number runs into its neighbour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def aligned(rows: Sequence[Sequence[str]], *, left: int = 0, least: int = 6) -> Iterator[str]:
    """Cells to the right, two spaces apart; the first `left` columns to the left, and the last cell as it is.

    A row may be longer than the first: what is past its columns is said at its end.  least: width.
    """
    columns = len(rows[0])
    widths = [max(least, *(len(row[n]) for row in rows)) for n in range(columns)]
    for row in rows:
        cells = [
            cell.ljust(width) if n < left else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        yield "  ".join([*cells, *row[columns:]]).rstrip()
