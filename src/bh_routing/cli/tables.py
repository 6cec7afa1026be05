"""The one printer of text tables: plain where piped, and no number is ever split.

Where the output is too narrow, first the blanks between columns go, then the columns that the caller can spare, and
what is still too wide is printed row by row, one name and value a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

from .common import make_console, print_text


def print_heading(text: str) -> None:
    """Print a heading, bold on a terminal, broken at the width of the output."""
    console = make_console()
    broken = fill(text, width=console.width, break_long_words=False, break_on_hyphens=False)
    console.print(broken, style="bold", markup=False)


def print_table(
    title: str | None,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text: int = 1,
    spare: Sequence[str] = (),
    total: bool = False,
) -> None:
    """Print a table after an empty line.

    Parameters
    ----------
    title : str or None
    columns : sequence of str
        Their names.
    rows : sequence of sequence of str
        One cell for each column.
    text : int
        The first so many columns are text, on the left; the others are numbers, on the right.
    spare : sequence of str
        Columns that may be left out, the first of them first; a line below the table names those that were.
    total : bool
        The last row stands below a line: it sums up the others.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table

    console = make_console()
    left_out: list[str] = []
    print()
    if title is not None:
        print_heading(title)
    while True:
        shown = [i for i, name in enumerate(columns) if name not in left_out]
        widths = [max(cell_len(row[i]) for row in (columns, *rows)) for i in shown]
        blanks = next((b for b in (2, 1) if sum(widths) + b * (len(shown) - 1) <= console.width), None)
        if blanks is not None:
            break
        if len(left_out) == len(spare):
            _print_records(columns, rows)
            return
        left_out = list(spare[: len(left_out) + 1])
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, blanks - 1, 0, 0), header_style=""
    )
    for i in shown:
        table.add_column(columns[i], justify="left" if i < text else "right", no_wrap=True)
    for number, row in enumerate(rows):
        table.add_row(*(row[i] for i in shown), end_section=total and number == len(rows) - 2)
    with console.capture() as capture:
        console.print(table, markup=False)
    print("\n".join(line.rstrip() for line in capture.get().rstrip().split("\n")))
    if left_out:
        print_text(f"Not shown at this width: {', '.join(left_out)}.")


def _print_records(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Each row as lines of a name and its value, under the row's first cell."""
    width = max(map(len, columns[1:]), default=0)
    for row in rows:
        print(row[0])
        for name, value in zip(columns[1:], row[1:], strict=True):
            print(f"  {name:<{width}}  {value}".rstrip())


__all__ = ["print_heading", "print_table"]
