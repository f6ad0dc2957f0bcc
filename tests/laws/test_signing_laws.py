"""Laws of signing: same bytes for the same input, and no byte changes unnoticed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_hub import digest
from lora_hub.errors import IntegrityError, TrustError
from lora_hub.signing import keys
from lora_hub.signing.sign import sign
from lora_hub.signing.verify import verify

KEY = keys.private_key(keys.generate())
PUBLIC = [keys.public_pem(KEY)]
CONTENTS = {
    "lorahub.json": b'{"name":"style/tiny"}',
    "adapter_config.json": b'{"peft_type":"LORA","r":2}',
    "adapter_model.safetensors": bytes(range(64)),
    "README.md": b"# tiny",
}


def digests(contents):
    return {name: digest.of_bytes(data) for name, data in contents.items()}


BUNDLE = sign(digests(CONTENTS), subject="style/tiny", key=KEY)

names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,20}", fullmatch=True)
file_sets = st.dictionaries(names, st.binary(max_size=16), max_size=8).filter(
    lambda files: (
        len({name.casefold() for name in {*files, *CONTENTS}}) == len({*files, *CONTENTS})
    )
)


@given(file_sets, st.text(max_size=30))
def test_signing_twice_gives_the_same_bytes_which_verify(extra, subject):
    files = digests(extra | CONTENTS)

    bundle = sign(files, subject=subject, key=KEY)

    assert bundle == sign(files, subject=subject, key=KEY)
    assert verify(bundle, files, PUBLIC).hint == keys.hint(KEY)


@given(st.sampled_from(sorted(CONTENTS)), st.data())
def test_no_flipped_byte_of_a_file_verifies(name, data):
    content = CONTENTS[name]
    position = data.draw(st.integers(0, len(content) - 1))
    changed = content[position] ^ data.draw(st.integers(1, 255))
    flipped = content[:position] + bytes([changed]) + content[position + 1 :]

    with pytest.raises(IntegrityError) as caught:
        verify(BUNDLE, digests(CONTENTS | {name: flipped}), PUBLIC)

    assert caught.value.where == name


@given(st.integers(0, len(BUNDLE) - 1), st.integers(1, 255))
def test_no_flipped_byte_of_the_bundle_verifies(position, mask):
    flipped = bytearray(BUNDLE)
    flipped[position] ^= mask

    with pytest.raises((TrustError, IntegrityError)):
        verify(bytes(flipped), digests(CONTENTS), PUBLIC)


def test_no_flipped_bit_at_any_position_of_the_bundle_verifies():
    files = digests(CONTENTS)
    for position in range(len(BUNDLE)):
        for bit in range(8):
            flipped = bytearray(BUNDLE)
            flipped[position] ^= 1 << bit

            with pytest.raises((TrustError, IntegrityError)):
                verify(bytes(flipped), files, PUBLIC)
