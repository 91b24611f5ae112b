"""A reader of YAML has back what was written."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cluster.yaml_text import yaml_of

TREES = st.recursive(
    st.integers(-(2**40), 2**40) | st.booleans() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("abyesnof-./1 :#", max_size=4), inner, max_size=4)
    ),
    max_leaves=20,
)


@pytest.mark.parametrize(
    "text",
    ["", "a", "a\nb\n", "a\n\nb\n", " a\nb\n", "a\nb", "\na\n", "a\n\n", "a:\n  - b\n", "a\t\nb\n", "# a\nb\n",
     "a \nb\n", "---\nb\n", "é\n日\n", "yes", "1", "null", "a\rb\nc\n", "a\u2028b\nc\n", "\x85a\nb\n", "a\n"],
)  # fmt: skip
def test_every_text_comes_back(text):
    tree = {"a": text, "b": [text, {"c": text, "d": [[text]]}]}
    assert yaml.safe_load(yaml_of([tree])) == tree


@settings(deadline=None, max_examples=60)
@given(st.lists(st.dictionaries(st.text("ab", min_size=1), TREES, min_size=1, max_size=3), max_size=3))
def test_every_tree_comes_back(trees):
    assert list(yaml.safe_load_all(yaml_of(trees))) == trees


def test_lines_of_a_text_stand_as_they_are():
    made = [{"data": {"file": "a = 1\n\n[b]\n"}, "ports": [{"port": 1}]}]
    assert yaml_of(made) == ("---\ndata:\n  file: |\n    a = 1\n\n    [b]\nports:\n  - port: 1\n")
