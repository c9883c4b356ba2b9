"""The check of words finds them in prose and in names, and docstrings that are no sentences."""

from __future__ import annotations

import pytest

from scripts import words


@pytest.mark.parametrize(
    "text",
    [
        "The request of whoever asks.",
        "serves_no_more = 1",
        "class QueryGrowth: ...",
        "# It is there no\n    # more.",
        "the adapter works no more",
    ],
)
def test_a_word_is_found_in_prose_and_in_names(text: str) -> None:
    """A refused word is found across lines, and within identifiers in either spelling."""
    assert [match for match in words.words_in("some.py", text) if not match.exempt]


def test_a_comparison_is_no_refused_word() -> None:
    """The phrase "no more than" is plain English."""
    assert not list(words.words_in("some.py", "takes no more than 2, and no more rows than 3"))


def test_an_exception_is_not_refused() -> None:
    """A file that is named beside a word may have it."""
    assert all(match.exempt for match in words.words_in("docs/decisions/0001-note.md", "whoever comes"))


@pytest.mark.parametrize(
    ("doc", "refused"), [("Of a row.", True), ("A row of it", True), ("Return a row.", False)]
)
def test_a_docstring_is_a_sentence(doc: str, refused: bool) -> None:
    """A docstring that begins with a refused word, or has no full stop, is refused with its line."""
    found = list(words.fragments_in("some.py", f'def f():\n    """{doc}"""\n'))
    assert [match.line for match in found] == [1] * refused


@pytest.mark.parametrize("code", ["said = 1", "def f(said): ...", "def _said(): ...", "class Said: ..."])
def test_a_name_says_what_a_thing_is(code: str) -> None:
    """A refused name is found where it is bound; a longer one, an attribute and a keyword are not."""
    assert [match.line for match in words.names_in("some.py", code)] == [1]
    assert not list(words.names_in("some.py", "what_was_said = it.said = f(said=1)"))
