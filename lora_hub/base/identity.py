"""The identity of a base: `root`, what it holds, and `struct`, how it is built.

Both depend on the tensors alone: not on how they are cut into files, in which order they
lie, or what the files are called. In bytes, with H = SHA-256 and || for one behind the
other:

    content  = H(the tensor's bytes, row-major, little endian)              32 bytes
    label    = the RFC 8785 JSON of [name, dtype, [dimension, …]], e.g.
               ["model.norm.weight","BF16",[576]]
    leaf     = H(0x00 || label || content)
    node     = H(0x01 || left || right)
    root     = "sha256:" and the hex of the tree over the leaves in the order of their
               names, compared as Unicode code points
    struct   = "sha256:" and the hex of H(the RFC 8785 JSON of
               [[name, [dimension, …]], …] in the same order)

The tree is that of RFC 6962 section 2.1: n > 1 leaves are split at the largest power of
two below n; one leaf is its own tree; none at all is H of no bytes. The label ends where
its bracket closes and content has 32 bytes, so no two tensors share the bytes of a leaf.
A copy in another dtype has another root and the same struct.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from lora_hub import canonical, digest


def leaf(name: str, dtype: str, shape: Sequence[int], content: bytes) -> bytes:
    """Return the leaf of one tensor; `content` is the SHA-256 of its bytes, 32 bytes."""
    label = canonical.encode([name, dtype, list(shape)])
    return hashlib.sha256(b"\x00" + label + content).digest()


def root(leaves: Mapping[str, bytes]) -> str:
    """Return the root over tensor name → leaf."""
    level = [leaves[name] for name in sorted(leaves)]
    if not level:
        return digest.of_bytes(b"")
    # Pairs from the left, an odd one carried up: the same tree as splitting at the
    # largest power of two, without the recursion.
    while len(level) > 1:
        pairs = zip(level[0::2], level[1::2], strict=False)
        odd = level[-1:] if len(level) % 2 else []
        level = [hashlib.sha256(b"\x01" + a + b).digest() for a, b in pairs] + odd
    return f"sha256:{level[0].hex()}"


def struct(shapes: Iterable[tuple[str, Sequence[int]]]) -> str:
    """Return the digest of the structure over (name, shape) pairs in any order."""
    return digest.of_bytes(
        canonical.encode([[name, list(shape)] for name, shape in sorted(shapes)])
    )
