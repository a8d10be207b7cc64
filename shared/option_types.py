"""Types of options: text in, checked value out.

convert(text) returns the value, or raises ValueError with a sentence that follows "Invalid value for '--flag': ".
"""
from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable, Sequence

TRUE_WORDS = ("yes", "true", "t", "y", "1", "on")
FALSE_WORDS = ("no", "false", "f", "n", "0", "off")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ' (did you mean "x"?)' for the known name closest to `name`, or '' when none is close."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f' (did you mean "{found[0]}"?)' if found else ""


class Int:
    """A whole number from `low` to `high`, both included, and never beyond an int64."""

    metavar = "INT"

    def __init__(self, low: int | None = None, high: int | None = None) -> None:
        self.low, self.high = low, high
        self.range = _describe(low, high)

    def convert(self, text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a valid integer.") from None
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            raise ValueError(f"{value} is not in the range {self.range}.")
        if not -2 ** 63 <= value < 2 ** 63:
            raise ValueError(f"{value} does not fit into 64 bits.")
        return value


class Float:
    """A finite number from `low` to `high`.

    open: True excludes the bounds, "low" or "high" one of them. non_finite: also take inf, and nan without a bound.
    """

    metavar = "FLOAT"

    def __init__(self, low: float | None = None, high: float | None = None, open: bool | str = False,
                 non_finite: bool = False) -> None:
        self.low, self.high, self.non_finite = low, high, non_finite
        self.open = {False: "", True: "low high"}.get(open, open)
        self.range = _describe(low, high, self.open)

    def convert(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a valid float.") from None
        if not math.isfinite(value) and not self.non_finite:
            raise ValueError(f"{text} is not a finite number.")
        above = self.low is None or value > self.low or (value == self.low and "low" not in self.open)
        below = self.high is None or value < self.high or (value == self.high and "high" not in self.open)
        if not (above and below):
            raise ValueError(f"{value} is not in the range {self.range}.")
        return value


def _describe(low: float | None, high: float | None, open: str = "") -> str:
    """Return a range as in x>=1 or 0<=x<1; '' without bounds."""
    least, most = (f"{bound:g}" if isinstance(bound, float) else bound for bound in (low, high))
    left, right = "<" if "low" in open else "<=", "<" if "high" in open else "<="
    if low is None:
        return "" if high is None else f"x{right}{most}"
    return f"x{left.replace('<', '>')}{least}" if high is None else f"{least}{left}x{right}{most}"


class Bool:
    """Yes or no in words or digits: `--cond=1`, `--cond no`."""

    metavar, range = "BOOL", ""

    def convert(self, text: str) -> bool:
        word = text.strip().lower()
        if word not in TRUE_WORDS + FALSE_WORDS:
            raise ValueError(f"{text!r} is not a valid boolean, such as yes or no.")
        return word in TRUE_WORDS


class Flag(Bool):
    """A switch: `--strict`; also `--strict True` and, in YAML, `strict: true`."""

    metavar = ""


class Text:
    """Any text: a name, a path."""

    metavar, range = "TEXT", ""

    def convert(self, text: str) -> str:
        if "\0" in text:
            raise ValueError(f"{text!r} holds a null character.")
        return text


class Choice:
    """One of `words`; or of the `further` ones, which messages leave out."""

    range = ""

    def __init__(self, *words: str, further: Sequence[str] = ()) -> None:
        self.words, self.further = words, tuple(further)
        self.metavar = "|".join(words) if len(words) <= 8 else "NAME"

    def convert(self, text: str) -> str:
        if text in self.words or text in self.further:
            return text
        close = nearest(text, self.words)
        if len(self.words) > 20:
            raise ValueError(f"unknown name {text!r}{close}; expected one like {', '.join(self.words[::10])}.")
        raise ValueError(f"{text!r} is not one of {', '.join(map(repr, self.words))}{close}.")


class NameOrPath:
    """The name of one of our data sets, or the path of a file or folder that exists."""

    metavar, range = "NAME|PATH", ""

    def __init__(self, *names: str) -> None:
        self.names = names

    def convert(self, text: str) -> str:
        if text in self.names or text.strip() and os.path.exists(text):
            return text
        raise ValueError(f"{text!r} is neither one of {', '.join(self.names)} nor a folder or file"
                         f"{nearest(text, self.names)}.")


def parse_int_list(text: str, most: int = 10_000_000) -> list[int]:
    """Read comma-separated integers and inclusive ranges: "1,2,5-10"; ValueError for anything else, or above `most`.

    A range from a larger to a smaller number is empty.
    """
    numbers: list[int] = []
    for item in text.split(","):
        ends = re.fullmatch(r"(\d+)-(\d+)", item)
        try:
            first, last = (int(ends[1]), int(ends[2])) if ends else (int(item), int(item))
        except ValueError:
            raise ValueError(f"{text!r} is not a list like 1,2,5-10.") from None
        if len(numbers) + last - first >= most:
            raise ValueError(f"{text!r} holds more than {most:,} numbers.")
        numbers.extend(range(first, last + 1))
    return numbers


class IntList:
    """Comma-separated integers from `low` to `high` and inclusive ranges of them, at most `most`: 1,2,5-10 -> list."""

    metavar = "LIST"

    def __init__(self, low: int | None = None, high: int | None = None, most: int = 10_000_000) -> None:
        self.member, self.most = Int(low, high), most
        self.range = self.member.range

    def convert(self, text: str) -> list[int]:
        numbers = parse_int_list(text.strip().strip("[]()"), self.most)
        if not numbers:
            raise ValueError(f"{text!r} is empty; a range goes from the smaller to the larger number.")
        for extreme in (min(numbers), max(numbers)):
            self.member.convert(str(extreme))
        return numbers


class IntTuple(IntList):
    """As IntList, also in brackets, with a comma at the end, or empty: (1000, 2000), [5], () -> tuple."""

    def convert(self, text: str) -> tuple[int, ...]:  # type: ignore[override]
        inside = text.strip().strip("[]()").strip().removesuffix(",")
        return tuple(super().convert(inside)) if inside else ()
