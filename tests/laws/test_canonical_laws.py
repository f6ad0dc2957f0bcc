"""The short way to canonical bytes writes what the RFC's own writes, or gives way to it."""

import rfc8785
from hypothesis import example, given
from hypothesis import strategies as st

from lora_hub import canonical

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.text(alphabet='0123456789eE.-+,:"\\[]NaI \ud7ff\ue000\U0001f600')
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
@example({"a": 16.0, "b": 1e-7, "c": 1e21, "d": -0.0})
@example({"\ue000": 1, "\U0001f600": 2})
@example([2**53 - 1, -(10**15), 10**14])
@example({"sha256:12e5": "sha256:12e5", "x\x00\x1f\x7f\u2028": '\b\f\n\r\t"\\/'})
@example(1.5)
def test_canonical_bytes_are_those_of_the_rfc(value):
    assert canonical.encode(value) == rfc8785.dumps(value)
