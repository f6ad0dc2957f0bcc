"""Key files: make a pair, read one."""

import os
from dataclasses import dataclass
from pathlib import Path

from lora_hub import atomic
from lora_hub.errors import InputError, StoreError

PathLike = str | os.PathLike[str]

MAX_KEY_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class KeyPair:
    """Two files and what people call the key."""

    private: Path
    public: Path
    fingerprint: str


def keygen(out: PathLike) -> KeyPair:
    """Make a P-256 key pair: `out` (private, mode 0600) and `out`.pub.

    Raises:
        StoreError: one of the files exists; keys are never overwritten.
    """
    from lora_hub.signing import keys

    private = Path(out)
    public = Path(f"{private}.pub")
    pem = keys.generate()
    key = keys.private_key(pem)
    for path, data, mode in (
        (public, keys.public_pem(key), 0o644),
        (private, pem, 0o600),
    ):
        if os.path.exists(private) or not atomic.write_new(path, [data], mode=mode):
            raise StoreError(
                "exists already, and a key is never overwritten",
                where=str(private if os.path.exists(private) else path),
                hint="name another file with --out",
            )
    return KeyPair(private, public, keys.fingerprint(key))


def read_key(path: PathLike) -> bytes:
    """Return the PEM text in a file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with Path(path).open("rb") as stream:
            return stream.read(MAX_KEY_BYTES)
    except OSError as error:
        raise InputError(
            f"the key cannot be read: {error.strerror}",
            where=os.fspath(path),
            hint="make a pair with `lorahub keygen`",
        ) from error
