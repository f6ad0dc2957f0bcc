"""Digests are shared among threads: none is lost, mixed up or asked for after a failure."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_hub.base.view import digests
from lora_hub.errors import InconclusiveError
from lora_hub.manifest.document import BaseConfig


class Base:
    """A base whose digests tell what was asked for; it fails at one name."""

    where = "here"
    config = BaseConfig()

    def __init__(self, sizes, fails_at=None):
        self.tensors = {name: ("F32", (size,)) for name, size in sizes.items()}
        self.fails_at = fails_at
        self.asked = []

    def digest(self, name, as_dtype=None):
        self.asked.append(name)
        if name == self.fails_at:
            raise InconclusiveError("not in memory", where=name)
        return f"{name} {as_dtype}"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c", "in parts"]),
            st.sampled_from([None, "BF16"]),
        ),
        max_size=30,
    )
)
def test_digests_are_in_the_order_of_what_was_wanted(wanted):
    base = Base({"a": 3, "b": 0, "c": 1000})

    assert digests(base, wanted) == [f"{name} {dtype}" for name, dtype in wanted]


def test_the_largest_tensor_is_begun_first():
    base = Base({"a": 1, "b": 1000, "c": 10})

    digests(base, [("a", None), ("b", None), ("c", None)])

    assert base.asked[0] == "b"


def test_a_failure_is_raised_and_the_rest_is_left():
    names = [str(number) for number in range(1000)]
    base = Base(dict.fromkeys(names, 1) | {"first": 2}, fails_at="first")
    started = threading.active_count()

    with pytest.raises(InconclusiveError, match="not in memory"):
        digests(base, [(name, None) for name in ("first", *names)])

    assert threading.active_count() == started
