"""The grammar of names, versions and references.

    [registry:]namespace/name[@selector]    a version, a range, latest or sha256:…
    REF=0.7                                 a reference with a weight

Versions are the spellings that SemVer 2 and PEP 440 both accept and order alike:
`1.2.0`, `1.2.0-rc.1`. Ranges are PEP 440 (`~=1.0`, `>=1,<2`). A text that starts with
`.` or `/`, or that is an existing folder, is a path and no name: `is_path` decides.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_hub import digest
from lora_hub.errors import InputError, ReferenceSyntaxError

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

# Lower case, digits and hyphens only: no two names look alike or differ in case alone,
# and each is a file name everywhere.
_PART = r"[a-z0-9](?:[a-z0-9]|-(?!-)){0,61}[a-z0-9]"
_NAME = re.compile(rf"({_PART})/({_PART})")
_VERSION = re.compile(
    r"(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})"
    r"(-(?:alpha|beta|rc)\.(?:0|[1-9]\d{0,8}))?"
)

# Names of devices on Windows; a folder of this name cannot be made there.
_RESERVED = frozenset(
    {"con", "prn", "aux", "nul"}
    | {f"{device}{number}" for device in ("com", "lpt") for number in range(1, 10)}
)


@dataclass(frozen=True, slots=True)
class Reference:
    """A name and which of its versions is meant.

    `registry` is None where the text names none. `selector` is a version, a PEP 440
    range, "latest" or a package digest.
    """

    namespace: str
    name: str
    selector: str = "latest"
    registry: str | None = None

    @property
    def full_name(self) -> str:
        return f"{self.namespace}/{self.name}"

    def __str__(self) -> str:
        prefix = f"{self.registry}:" if self.registry else ""
        suffix = "" if self.selector == "latest" else f"@{self.selector}"
        return f"{prefix}{self.full_name}{suffix}"


def is_path(text: str) -> bool:
    """Return whether the text means a folder rather than a name in a registry."""
    return text.startswith((".", "/", "~")) or Path(text).is_dir()


def parse(text: str) -> Reference:
    """Return the reference that the text spells.

    Raises:
        ReferenceSyntaxError: it does not follow the grammar above.
    """
    head, at, selector = text.partition("@")
    registry, colon, name = head.rpartition(":")
    if colon and not registry:
        raise _bad(text, "the registry before ':' is empty")
    namespace, name = parse_name(name)
    if at:
        _check_selector(selector, text)
    return Reference(namespace, name, selector if at else "latest", registry or None)


def parse_weighted(text: str) -> tuple[str, float]:
    """Return the reference or path, and the weight behind its last `=` (1.0 without).

    The `=` of a range (`ns/name@==1.2.0`) is not taken for a weight.
    """
    head, equals, tail = text.rpartition("=")
    if not equals or not head or head[-1] in "=<>~!" or _is_version(tail):
        return text, 1.0
    try:
        weight = float(tail)
    except ValueError:
        if "/" in tail or "@" in tail:  # a path that holds '='
            return text, 1.0
        raise ReferenceSyntaxError(
            f"{tail!r} is no weight",
            where=text,
            hint="write NAME=0.7, a finite number behind the equals sign",
        ) from None
    if not abs(weight) < float("inf"):
        raise ReferenceSyntaxError("a weight must be finite", where=text)
    return head, weight


def parse_name(text: str) -> tuple[str, str]:
    """Return namespace and name of `namespace/name`.

    Raises:
        ReferenceSyntaxError: not two parts of 2–63 lower-case letters, digits and
            single hyphens, or a part is a device name on Windows.
    """
    match = _NAME.fullmatch(text)
    if match is None:
        raise _bad(
            text,
            "a name is namespace/name, each 2 to 63 lower-case letters, digits and "
            "single hyphens",
        )
    for part in match.groups():
        if part in _RESERVED:
            raise _bad(text, f"{part!r} cannot be a folder name on Windows")
    return match[1], match[2]


def parse_version(text: str) -> "Version":
    """Return the version, which sorts as SemVer and PEP 440 both sort it."""
    from packaging.version import Version

    if _VERSION.fullmatch(text) is None:
        raise ReferenceSyntaxError(
            f"{text!r} is no version",
            hint="a version is 1.2.0, or 1.2.0-rc.1 before a release (alpha, beta, rc)",
        )
    return Version(text)


def parse_range(text: str) -> "SpecifierSet":
    """Return the PEP 440 range."""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        return SpecifierSet(text)
    except InvalidSpecifier as error:
        raise ReferenceSyntaxError(
            f"{text!r} is neither a version, a range, 'latest' nor a sha256: digest",
            hint="for example @1.2.0, @~=1.0 or @>=1,<2",
        ) from error


def _check_selector(selector: str, text: str) -> None:
    if selector == "latest" or _is_version(selector):
        return
    if selector.startswith("sha256:"):
        try:
            digest.hex_of(selector)
        except InputError as error:
            raise ReferenceSyntaxError(
                error.problem, where=text, hint=error.hint
            ) from error
        return
    if not selector:
        raise _bad(text, "nothing stands behind '@'")
    parse_range(selector)


def _is_version(text: str) -> bool:
    return _VERSION.fullmatch(text) is not None


def _bad(text: str, problem: str) -> ReferenceSyntaxError:
    return ReferenceSyntaxError(
        problem,
        where=repr(text),
        hint="a reference is [registry:]namespace/name[@version], e.g. style/milton@~=1.0",
    )
