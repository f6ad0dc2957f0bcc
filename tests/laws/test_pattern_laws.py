import re

from hypothesis import given, settings
from hypothesis import strategies as st

from lora_hub.formats.patterns import Budget, Pattern

ATOMS = ["a", "b", ".", r"\.", r"\w", r"\d", "[ab]", "[^a]", "[]a]", "1", "{", "-"]
EDGES = ["^", "$", r"\b", r"\A", r"\Z"]
# Small, so that `re` itself is quick.
SIGNS = ["", "", "", "*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{,1}", "{1,}"]


def _extend(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.lists(inner, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map("|".join),
        st.builds(
            "({}{}){}".format,
            st.sampled_from(["", "?:"]),
            inner,
            st.sampled_from(SIGNS),
        ),
        st.builds("({}{})".format, st.sampled_from(["?=", "?!"]), inner),
    )


EXPRESSIONS = st.recursive(
    st.one_of(
        st.builds("{}{}".format, st.sampled_from(ATOMS), st.sampled_from(SIGNS)),
        st.sampled_from(EDGES),
    ),
    _extend,
    max_leaves=8,
)


@settings(max_examples=400)
@given(EXPRESSIONS, st.text("ab.1-{", min_size=1, max_size=7), st.booleans())
def test_patterns_answer_as_the_re_module_does(expression, name, whole):
    expected = (re.fullmatch if whole else re.match)(expression, name)

    pattern = Pattern(expression, where="config", budget=Budget(), whole=whole)

    assert pattern.is_match(name) == bool(expected)
