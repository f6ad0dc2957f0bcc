"""What a signature must cover before we call the package signed.

A valid OpenSSF bundle may cover nothing that matters: its signer may have ignored the
weights, or followed symbolic links. These are our conditions on top; who may sign what is
the matter of the trust store.
"""

from collections.abc import Collection

from lora_hub.errors import TrustError
from lora_hub.signing.statement import SIGNATURE_NAME, Statement

# Always in a package, and always signed.
REQUIRED = ("lorahub.json", "adapter_config.json")
WEIGHTS_SUFFIX = ".safetensors"

# What a signer may leave out: the signature itself, later attestations, and what
# model_signing leaves out by default. Nothing under these names is ever read as a package's
# content.
IGNORABLE = frozenset(
    {
        SIGNATURE_NAME,
        "attestations",
        ".git",
        ".gitignore",
        ".gitattributes",
        ".github",
    }
)

_HINT = "sign the whole package anew with `lorahub sign`"


def check(statement: Statement, present: Collection[str], *, where: str) -> None:
    """Raise `TrustError` unless the statement covers what a package of these files needs.

    Args:
        statement: what was signed.
        present: the names of all files of the package but the signature.
        where: the signature's path, for the message.
    """
    _check_ignored(statement, where)
    _check_required(statement, present, where)
    _check_names(statement.files, where)


def _check_ignored(statement: Statement, where: str) -> None:
    if statement.allow_symlinks:
        raise TrustError(
            "the signature was made following symbolic links, which cover no content",
            where=where,
            hint=_HINT,
        )
    hidden = sorted(set(statement.ignored) - IGNORABLE)
    if hidden:
        raise TrustError(
            f"the signature leaves out {', '.join(map(repr, hidden))}; only "
            f"{', '.join(sorted(IGNORABLE))} may be left out",
            where=where,
            hint=_HINT,
        )


def _check_required(statement: Statement, present: Collection[str], where: str) -> None:
    weights = [name for name in present if name.endswith(WEIGHTS_SUFFIX)]
    bare = sorted({*REQUIRED, *weights} - statement.files.keys())
    if bare:
        raise TrustError(
            f"the signature covers too little: {', '.join(map(repr, bare))} is not in it",
            where=where,
            hint=_HINT,
        )


def _check_names(names: Collection[str], where: str) -> None:
    nested = sorted(name for name in names if "/" in name or "\\" in name)
    if nested:
        raise TrustError(
            f"the signature lists {nested[0]!r}; a package has no folders",
            where=where,
            hint=_HINT,
        )
    if len({name.casefold() for name in names}) != len(names):
        raise TrustError(
            "the signature lists two names that differ in case alone",
            where=where,
            hint=_HINT,
        )
