"""The grammar of names, versions and references.

    [registry:]namespace/name[@selector]    a version, a range, latest or sha256:…
    REF=0.7                                 a reference with a weight

Versions are the spellings that SemVer 2 and PEP 440 both accept and order alike:
`1.2.0`, `1.2.0-rc.1`. Ranges are PEP 440 (`~=1.0`, `>=1,<2`). A text that starts with
`.`, `/` or `~`, or that is an existing folder, is a path and no name: `is_path` decides.
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
PART_RULE = "2 to 63 lower-case letters, digits and single hyphens"
_PART = re.compile(r"[a-z0-9](?:[a-z0-9]|-(?!-)){0,61}[a-z0-9]")
_VERSION = re.compile(
    r"(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})"
    r"(-(?:alpha|beta|rc)\.(?:0|[1-9][0-9]{0,8}))?"
)

_MAX_RANGE = 200
_LONG_NUMBER = re.compile(r"\d{10}")

# Names of devices on Windows; a folder of this name cannot be made there.
DEVICES = frozenset(
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
    if text.startswith((".", "/", "~")):
        return True
    try:
        return Path(text).is_dir()
    except OSError:  # longer than a path may be, or not ours to look at
        return False


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

    Raises:
        ReferenceSyntaxError: what stands there is no finite number.
    """
    head, equals, tail = text.rpartition("=")
    if not equals or not head or head[-1] in "=<>~!" or is_version(tail):
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
    namespace, _, name = text.partition("/")
    if not (_PART.fullmatch(namespace) and _PART.fullmatch(name)):
        raise _bad(text, f"a name is namespace/name, each {PART_RULE}")
    for part in (namespace, name):
        if part in DEVICES:
            raise _bad(text, f"{part!r} cannot be a folder name on Windows")
    return namespace, name


def check_namespace(text: str) -> None:
    """Raise `ReferenceSyntaxError` unless the text can be a namespace."""
    if not is_part(text):
        raise ReferenceSyntaxError(
            f"{_brief(text)} cannot be a namespace",
            hint=f"a namespace is {PART_RULE}, and no name of a device on Windows",
        )


def is_part(text: str) -> bool:
    """Return whether the text can be a namespace, or a name alone."""
    return _PART.fullmatch(text) is not None and text not in DEVICES


def is_name(text: str) -> bool:
    """Return whether the text is `namespace/name`."""
    return text.count("/") == 1 and all(map(is_part, text.split("/")))


def is_version(text: str) -> bool:
    return _VERSION.fullmatch(text) is not None


def parse_version(text: str) -> "Version":
    """Return the version, which sorts as SemVer and PEP 440 both sort it.

    Raises:
        ReferenceSyntaxError: it is no version.
    """
    from packaging.version import Version

    if _VERSION.fullmatch(text) is None:
        raise ReferenceSyntaxError(
            f"{_brief(text)} is no version",
            hint="a version is 1.2.0, or 1.2.0-rc.1 before a release (alpha, beta, rc)",
        )
    return Version(text)


def parse_range(text: str) -> "SpecifierSet":
    """Return the PEP 440 range.

    Raises:
        ReferenceSyntaxError: it is no range.
    """
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        # No version has numbers of more digits, and Python converts only so many.
        if len(text) > _MAX_RANGE or _LONG_NUMBER.search(text):
            raise InvalidSpecifier
        return SpecifierSet(text)
    except InvalidSpecifier as error:
        raise ReferenceSyntaxError(
            f"{_brief(text)} is neither a version, a range, 'latest' nor a sha256: digest",
            hint="for example @1.2.0, @~=1.0 or @>=1,<2",
        ) from error


def _check_selector(selector: str, text: str) -> None:
    if selector == "latest" or is_version(selector):
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


def _brief(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:197]}...")


def _bad(text: str, problem: str) -> ReferenceSyntaxError:
    return ReferenceSyntaxError(
        problem,
        where=_brief(text),
        hint="a reference is [registry:]namespace/name[@version], e.g. style/milton@~=1.0",
    )
