"""Sizes as people write them."""

import pytest

from lora_hub import sizes
from lora_hub.errors import InputError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (0, 0),
        (200_000_000, 200_000_000),
        ("200MB", 200_000_000),
        ("200 mb", 200_000_000),
        ("1.5GiB", 3 << 29),
        ("0.1kB", 100),
        ("1.0000000000000001 TB", 1_000_000_000_000),
        ("16KiB", 16384),
        ("12", 12),
        ("12B", 12),
    ],
)
def test_a_size_means_its_bytes(text, count):
    assert sizes.to_bytes(text, where="budget") == count


@pytest.mark.parametrize(
    "text", ["", "MB", "-1MB", -1, 1.5, True, None, "1e9", "5 M", "١MB"]
)
def test_what_is_no_size_is_refused_by_name(text):
    with pytest.raises(InputError, match="is no size") as caught:
        sizes.to_bytes(text, where="budget")
    assert caught.value.where == "budget"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (200_000_000, "200.0 MB"),
        (10**16, "10000.0 TB"),
    ],
)
def test_a_size_is_told_in_decimal_units(count, text):
    assert sizes.to_text(count) == text
