"""A text whose tokens are shaded by a number each: on a ground of colour, or with a digit below, by what the terminal can do."""

from __future__ import annotations

from collections.abc import Sequence

from .common import make_console, print_text

# Grounds from little to much, and whether letters on them are light: a blue that darkens.
_LIGHT, _DARK = (222, 235, 247), (8, 48, 107)
_LEFT = "  "


def print_strip(tokens: Sequence[str], values: Sequence[float], most: float, *, lines: int = 2) -> None:
    """Print the first lines of a text, each token shaded by its value in 0 to ``most``.

    In colours where the terminal has 256 or more (rich takes 24 bit to 256 where it must); otherwise plainly, with the
    value, rounded, as a digit below the first letter of its token ("+" above 9).
    """
    from rich.text import Text

    console = make_console()
    coloured = shades_in_colour()
    for held in broken(tokens, values, console.width - len(_LEFT))[:lines]:
        line, digits = Text(_LEFT), _LEFT
        for token, value in held:
            if coloured:
                line.append(token, style=ground(value / most))
            else:
                line.append(token)
                digit = str(round(value)) if value < 9.5 else "+"
                digits += digit.rjust(1 + len(token) - len(token.lstrip())).ljust(len(token))
        console.print(line, soft_wrap=True)
        if not coloured:
            print(digits.rstrip())


def print_legend(most: int) -> None:
    """What the shades mean."""
    from rich.text import Text

    line = Text(_LEFT)
    if shades_in_colour():
        line.append("experts per token: ")
        for count in range(0, most + 1, max(1, most // 8)):
            line.append(f" {count} ", style=ground(count / most))
        make_console().print(line, soft_wrap=True)
    else:
        print_text("The digit below a token: its experts, mean over layers, rounded.")


def shades_in_colour() -> bool:
    """Whether the output shows at least 256 colours, and is asked to (NO_COLOR)."""
    console = make_console()
    return console.color_system in ("256", "truecolor") and not console.no_color


def ground(share: float) -> str:
    """The style of a share in 0 to 1.

    >>> ground(0.0), ground(1.0)
    ('black on rgb(222,235,247)', 'white on rgb(8,48,107)')
    """
    share = min(max(share, 0.0), 1.0)
    mixed = [round(light + share * (dark - light)) for light, dark in zip(_LIGHT, _DARK, strict=True)]
    return f"{'white' if share > 0.5 else 'black'} on rgb({','.join(map(str, mixed))})"


def broken(tokens: Sequence[str], values: Sequence[float], width: int) -> list[list[tuple[str, float]]]:
    """Lines of (token, value) of at most this many letters, broken between words; tokens of white space are left out."""
    words: list[list[tuple[str, float]]] = []
    apart = True  # white space before
    for token, value in zip(tokens, values, strict=True):
        if text := " ".join(token.split()):
            if apart or token[0].isspace():
                words.append([])
            words[-1].append((text[:width], value))
        apart = (apart and not text) or token[-1:].isspace()
    lines: list[list[tuple[str, float]]] = [[]]
    used = 0
    for word in words:
        if used + (used > 0) + sum(len(text) for text, _ in word) > width:
            lines.append([])
            used = 0
        for number, (text, value) in enumerate(word):
            shown = f" {text}" if used and not number else text
            if used + len(shown) > width:  # a word that is longer than a line
                lines.append([])
                used = 0
            lines[-1].append((shown, value))
            used += len(shown)
    return [line for line in lines if line]


__all__ = ["broken", "ground", "print_legend", "print_strip", "shades_in_colour"]
