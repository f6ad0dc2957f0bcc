"""The identity of a base for all bases: order does not count, everything else does."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from lora_hub.base import identity

Content = st.binary(min_size=32, max_size=32)
Name = st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=12)
Shape = st.lists(st.integers(0, 2**40), max_size=4).map(tuple)
Tensors = st.dictionaries(
    Name, st.tuples(st.sampled_from(["BF16", "F16", "F32"]), Shape, Content), max_size=20
)


def root(tensors):
    return identity.root(
        {name: identity.leaf(name, *tensor) for name, tensor in tensors.items()}
    )


def rfc6962(leaves: list[bytes]) -> bytes:
    """Return the Merkle tree hash as RFC 6962 section 2.1 writes it, over hashed leaves."""
    if len(leaves) <= 1:
        return leaves[0] if leaves else hashlib.sha256().digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    left, right = rfc6962(leaves[:split]), rfc6962(leaves[split:])
    return hashlib.sha256(b"\x01" + left + right).digest()


@given(st.lists(Content, max_size=70))
def test_the_tree_is_that_of_rfc_6962(leaves):
    named = {f"{n:03}": leaf for n, leaf in enumerate(leaves)}

    assert identity.root(named) == f"sha256:{rfc6962(leaves).hex()}"


@given(Tensors, st.randoms())
def test_order_does_not_matter(tensors, random):
    shuffled = list(tensors.items())
    random.shuffle(shuffled)

    assert root(dict(shuffled)) == root(tensors)
    shapes = [(name, shape) for name, (_, shape, _) in tensors.items()]
    assert identity.struct((n, s) for n, (_, s, _) in shuffled) == identity.struct(shapes)


@given(Tensors, Tensors)
def test_other_tensors_have_another_root(one, other):
    assert (root(one) == root(other)) == (one == other)


@given(Tensors.filter(bool), st.data())
def test_names_are_bound_to_their_contents(tensors, data):
    # Two tensors that swap their bytes are another base.
    first = data.draw(st.sampled_from(sorted(tensors)))
    second = data.draw(st.sampled_from(sorted(tensors)))
    swapped = tensors | {
        first: (*tensors[first][:2], tensors[second][2]),
        second: (*tensors[second][:2], tensors[first][2]),
    }

    assert (root(swapped) == root(tensors)) == (swapped == tensors)


@given(Tensors)
def test_the_structure_does_not_know_dtypes_and_contents(tensors):
    shapes = [(name, shape) for name, (_, shape, _) in tensors.items()]

    assert identity.struct(shapes) == identity.struct(reversed(shapes))
    if shapes:
        assert identity.struct(shapes) != identity.struct(shapes[1:])
