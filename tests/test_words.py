"""Counts with their nouns, and names in a row."""

import pytest

from equiframe.words import counted, listed


@pytest.mark.parametrize(
    ("num", "words", "text"),
    [
        (0, ("image",), "0 images"),
        (1, ("image",), "1 image"),
        (1200, ("image",), "1,200 images"),
        (1, ("class has", "classes have"), "1 class has"),
        (2, ("class has", "classes have"), "2 classes have"),
    ],
)
def test_a_count_and_its_noun(num, words, text):
    assert counted(num, *words) == text


@pytest.mark.parametrize(
    ("names", "text"), [([], ""), (["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")]
)
def test_names_in_a_row(names, text):
    assert listed(names) == text
