"""The regular expressions of a config, matched in bounded time with the answers of `re`.

A config is written by strangers, and Python's `re` tries one way after another: a pattern
of thirty characters can keep it busy for years. Here each part of a pattern takes the set
of places where it may end and gives the set of places where it may begin, so that no way
is tried twice. Sets are integers, bit i for the place before character i.

Limits: what asks for more than a set (back references, atomic groups), lookbehind and
inline flags are refused by name, and so is what takes more than `STEPS`.
"""

import re
from collections.abc import Callable, Sequence
from typing import NoReturn

from lora_hub.errors import FormatError

# A second or two. A pattern of sixty characters takes about 200 for a module's name.
STEPS = 4_000_000
# What compiling a pattern costs in steps of 0.3 µs, and each of its characters: measured.
COMPILING, _READING = 500, 12
MAX_CHARACTERS = 20_000
MAX_DEPTH = 50

# Names as they are written by hand: nothing in them repeats, so `re` has one way to try.
_PLAIN = re.compile(r"\^?(?:\w|\\?[.-])*")

_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_REPEAT = re.compile(r"(?:([*+?])|\{(?:([0-9]+)|([0-9]*),([0-9]*))\})\??(\+?)")
_GROUP = re.compile(r"\((?:\?(?::|(=)|(!)|P<\w+>)|(?!\?))")
_COUNTS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class Budget:
    """How many steps are left for all patterns of one config."""

    __slots__ = ("left",)

    def __init__(self, steps: int = STEPS) -> None:
        self.left = steps

    def spend(self, steps: int, text: str, where: str) -> None:
        self.left -= steps
        if self.left < 0:
            raise FormatError(
                f"matching {_brief(text)} takes more than {STEPS} steps",
                where=where,
                hint="write a simpler pattern, or list the modules by their names",
            )


class Pattern:
    """A compiled pattern; `is_match` answers as `re.match` or `re.fullmatch` does.

    Args:
        expression: what is matched.
        where: the file and JSON pointer.
        budget: shared by the patterns of a config.
        text: how the config spells it, for messages; the expression itself without.
        whole: the name has to match to its end.

    Raises:
        FormatError: it is no regular expression, or one that is not read.
    """

    __slots__ = ("_budget", "_plain", "_root", "_text", "_where", "_whole")

    def __init__(
        self,
        expression: str,
        *,
        where: str,
        budget: Budget,
        text: str | None = None,
        whole: bool = False,
    ) -> None:
        self._budget = budget
        self._text = expression if text is None else text
        self._where = where
        self._whole = whole
        self._spend(COMPILING + _READING * min(len(expression), MAX_CHARACTERS))
        self._plain, self._root = _compile(expression, self._text, where)

    def is_match(self, name: str) -> bool:
        """Return whether the pattern matches from the name's beginning on.

        Raises:
            FormatError: the budget is spent.
        """
        if self._plain is not None:
            self._spend(1)
            match = self._plain.fullmatch if self._whole else self._plain.match
            return match(name) is not None
        subject = _Subject(name, self._spend)
        ends = subject.end if self._whole else subject.everywhere
        return bool(self._root(subject, ends) & 1)

    def _spend(self, steps: int) -> None:
        self._budget.spend(steps, self._text, self._where)


class _Subject:
    """A name to match.

    Attributes:
        places: character → the set of places before it.
        everywhere: the set of all places.
    """

    __slots__ = ("end", "everywhere", "places", "spend")

    def __init__(self, name: str, spend: Callable[[int], None]) -> None:
        spend(len(name) + 1)
        self.spend = spend
        self.places: dict[str, int] = {}
        for index, character in enumerate(name):
            self.places[character] = self.places.get(character, 0) | 1 << index
        self.end = 1 << len(name)
        self.everywhere = 2 * self.end - 1

    def of_class(self, expression: re.Pattern[str]) -> int:
        """Return the places before a character that the class holds."""
        self.spend(len(self.places))
        found = 0
        for character, places in self.places.items():
            if expression.match(character):
                found |= places
        return found


# Where the part may end → where it may begin.
_Part = Callable[[_Subject, int], int]


def _compile(
    expression: str, text: str, where: str
) -> tuple[re.Pattern[str] | None, _Part]:
    """Return what `re` may match by itself, else None; and the pattern's parts."""
    if len(expression) > MAX_CHARACTERS:
        raise FormatError(
            f"{_brief(text)} has {len(text)} characters, at most {MAX_CHARACTERS} are read",
            where=where,
        )
    try:
        compiled = re.compile(expression)
    except (re.error, OverflowError) as error:
        raise FormatError(
            f"{_brief(text)} is no regular expression: {error}", where=where
        ) from error
    except RecursionError as error:
        raise FormatError(f"{_brief(text)} nests too deep", where=where) from error
    if _PLAIN.fullmatch(text):
        return compiled, _sequence(())
    return None, _Parser(expression, text, where).alternatives(0)


class _Parser:
    """Reads an expression that `re` has found well-formed."""

    def __init__(self, expression: str, text: str, where: str) -> None:
        self._expression = expression
        self._text = text
        self._where = where
        self._at = 0

    def alternatives(self, depth: int) -> _Part:
        if depth > MAX_DEPTH:
            self._refuse("more than 50 groups inside one another")
        found = [self._items(depth)]
        while self._take("|"):
            found.append(self._items(depth))
        return found[0] if len(found) == 1 else _either(found)

    def _items(self, depth: int) -> _Part:
        items: list[_Part] = []
        while self._at < len(self._expression) and self._next() not in "|)":
            items.append(self._repeated(self._item(depth)))
        return _sequence(items)

    def _item(self, depth: int) -> _Part:
        if self._next() == "(":
            return self._group(depth)
        if self._next() == "[":
            match = _CLASS.match(self._expression, self._at)
            assert match is not None
            self._at = match.end()
            return _class(match[0])
        size = 2 if self._next() == "\\" else 1
        atom = self._expression[self._at : self._at + size]
        self._at += size
        if atom in _EDGES:
            return _edge(_EDGES[atom])
        if atom == "." or (size == 2 and atom[1] in "dDsSwW"):
            return _class(atom)
        if size == 2 and atom[1].isalnum():
            self._refuse(atom)
        return _literal(atom[-1])

    def _group(self, depth: int) -> _Part:
        match = _GROUP.match(self._expression, self._at)
        if match is None:
            self._refuse(self._expression[self._at : self._at + 4])
        self._at = match.end()
        inner = self.alternatives(depth + 1)
        self._take(")")
        if match[1]:
            return lambda subject, ends: ends & inner(subject, subject.everywhere)
        if match[2]:
            return lambda subject, ends: ends & ~inner(subject, subject.everywhere)
        return inner

    def _repeated(self, part: _Part) -> _Part:
        match = _REPEAT.match(self._expression, self._at)
        if match is None:
            return part
        self._at = match.end()
        sign, exactly, low, high, possessive = match.groups()
        if possessive:
            self._refuse(match[0])
        if sign:
            return _repeat(part, *_COUNTS[sign])
        if exactly:
            return _repeat(part, int(exactly), int(exactly))
        return _repeat(part, int(low or 0), int(high) if high else None)

    def _next(self) -> str:
        return self._expression[self._at]

    def _take(self, character: str) -> bool:
        if self._expression.startswith(character, self._at):
            self._at += 1
            return True
        return False

    def _refuse(self, what: str) -> NoReturn:
        raise FormatError(
            f"the pattern {_brief(self._text)} holds {what!r}, which is not read",
            where=self._where,
            hint="write the pattern without it, or list the modules by their names",
        )


def _literal(character: str) -> _Part:
    def part(subject: _Subject, ends: int) -> int:
        subject.spend(1)
        return ends >> 1 & subject.places.get(character, 0)

    return part


def _class(text: str) -> _Part:
    expression = re.compile(text)
    return lambda subject, ends: ends >> 1 & subject.of_class(expression)


def _edge(places: Callable[[_Subject], int]) -> _Part:
    def part(subject: _Subject, ends: int) -> int:
        subject.spend(1)
        return ends & places(subject)

    return part


def _boundaries(subject: _Subject) -> int:
    words = subject.of_class(_WORD)
    return words ^ words << 1


_WORD = re.compile(r"\w")
_EDGES: dict[str, Callable[[_Subject], int]] = {
    "^": lambda subject: 1,
    r"\A": lambda subject: 1,
    "$": lambda subject: subject.end | subject.places.get("\n", 0) & subject.end >> 1,
    r"\Z": lambda subject: subject.end,
    r"\b": _boundaries,
    r"\B": lambda subject: subject.everywhere & ~_boundaries(subject),
}


def _sequence(parts: Sequence[_Part]) -> _Part:
    def part(subject: _Subject, ends: int) -> int:
        for each in reversed(parts):
            if not ends:
                break
            ends = each(subject, ends)
        return ends

    return parts[0] if len(parts) == 1 else part


def _either(parts: Sequence[_Part]) -> _Part:
    def part(subject: _Subject, ends: int) -> int:
        found = 0
        for each in parts:
            found |= each(subject, ends)
        return found

    return part


def _repeat(inner: _Part, low: int, high: int | None) -> _Part:
    def part(subject: _Subject, ends: int) -> int:
        # The repetitions that may be: only places not met before lead to new ones, and
        # who came there in fewer repetitions has more of them left.
        fresh, rounds = ends, 0
        while fresh and (high is None or rounds < high - low):
            subject.spend(1)
            fresh = inner(subject, fresh) & ~ends
            ends |= fresh
            rounds += 1
        # Those that must be; the same set again stays the same for ever.
        for _ in range(low):
            subject.spend(1)
            before = ends
            ends = inner(subject, ends)
            if ends in (0, before):
                break
        return ends

    return part


def _brief(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
