"""The identity's bytes, spelt out once more by hand."""

import hashlib

from lora_hub.base import identity


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


CONTENT = sha(b"bytes of a tensor")


def test_a_leaf_is_the_hash_of_a_zero_the_label_and_the_content():
    found = identity.leaf("model.norm.weight", "BF16", (576,), CONTENT)

    assert found == sha(b"\x00", b'["model.norm.weight","BF16",[576]]', CONTENT)


def test_a_scalar_has_an_empty_shape():
    assert identity.leaf("s", "F32", (), CONTENT) == sha(b'\x00["s","F32",[]]', CONTENT)


def test_the_root_of_one_leaf_is_the_leaf():
    assert identity.root({"a": CONTENT}) == f"sha256:{CONTENT.hex()}"


def test_the_root_of_nothing_is_the_hash_of_nothing():
    assert identity.root({}) == f"sha256:{sha().hex()}"


def test_five_leaves_split_four_and_one():
    a, b, c, d, e = (sha(bytes([n])) for n in range(5))
    left = sha(b"\x01", sha(b"\x01", a, b), sha(b"\x01", c, d))

    found = identity.root({"e": e, "a": a, "c": c, "b": b, "d": d})

    assert found == "sha256:" + sha(b"\x01", left, e).hex()


def test_the_structure_is_the_hash_of_names_and_shapes_in_order():
    expected = sha(b'[["a",[2,3]],["b",[]]]').hex()

    assert identity.struct([("b", ()), ("a", (2, 3))]) == f"sha256:{expected}"


def test_names_are_compared_as_code_points():
    # U+FFFD sorts before U+10000, though its UTF-16 units sort behind.
    low, high = sha(b"low"), sha(b"high")

    found = identity.root({"\U00010000": high, "\ufffd": low})

    assert found == "sha256:" + sha(b"\x01", low, high).hex()
