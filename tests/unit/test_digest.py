"""Digests of bytes."""

import hashlib

import pytest

from lora_hub import digest
from lora_hub.errors import InputError, IntegrityError

DATA = b"x" * (3 * digest.CHUNK_BYTES + 5)
EXPECTED = "sha256:" + hashlib.sha256(DATA).hexdigest()


def test_all_ways_to_hash_agree():
    assert digest.of_bytes(DATA) == EXPECTED
    assert digest.of_chunks([DATA[:7], memoryview(DATA)[7:]]) == EXPECTED


def test_a_changed_byte_is_an_integrity_error():
    with pytest.raises(IntegrityError, match="expected sha256:"):
        digest.check(DATA[:-1] + b"y", EXPECTED, where="f")


@pytest.mark.parametrize(
    "text", ["", "sha256:", "md5:00", "sha256:" + "G" * 64, EXPECTED + "0"]
)
def test_what_is_no_digest_is_refused(text):
    with pytest.raises(InputError, match="is no digest"):
        digest.hex_of(text)
