"""Names of bases in adapters, and licences: copies are the base, and differences of licences are a warning."""

import pytest

from builder_service.domain.origin import base_warning, licence_warning
from loramux_shared.sources.licence import licence_in, licence_of
from tests.support.cases import cases


@pytest.mark.parametrize("copy", cases(__file__, "test_a_copy_in_another_format_is_the_base"))
def test_a_copy_in_another_format_is_the_base(copy: str) -> None:
    """A copy of any author is the base, whichever of the two the adapter names."""
    assert base_warning(copy, "Qwen/Qwen3-8B") is None
    assert base_warning("Qwen/Qwen3-8B", copy) is None


@pytest.mark.parametrize("other", cases(__file__, "test_anything_else_is_worth_a_warning"))
def test_anything_else_is_worth_a_warning(other: str) -> None:
    """Another size, another training, no name; words of a format alone are a name."""
    warning = base_warning(other, "Qwen/Qwen3-8B")
    assert warning is not None
    assert (warning.code, warning.expected, warning.found) == ("W_BASE", "Qwen/Qwen3-8B", other or "no name")


ALIASES = "x: &a [y]\n" + "".join(f"b{i}: &b{i} {{<<: [*a, *a]}}\n" for i in range(500))


@pytest.mark.parametrize(
    ("matter", "expected"),
    [
        *cases(__file__, "test_the_front_matter_is_read_and_nothing_else"),
        (f"license: {'m' * 500}", ""),
        ("a: " + "[" * 2000, ""),
        (ALIASES, ""),
    ],
)
def test_the_front_matter_is_read_and_nothing_else(matter, expected):
    """A licence is the text under `license` at the top of a card; other content gives none."""
    assert licence_of(f"---\n{matter}\n---\n# license: gpl\n".encode()) == expected
    assert licence_of(f"\ufeff---\r\n{matter}\r\n---".encode()) == expected
    assert licence_of(f"# A card\n---\n{matter}\n---\n".encode()) == ""


def test_a_file_is_named_where_no_front_matter_says_more(tmp_path):
    """A README without front matter, one that is no text, and none at all leave the word to LICENSE."""
    for readme in (b"# card", b"---\n\xff\n---\n", None):
        if readme is None:
            (tmp_path / "README.md").unlink()
        else:
            (tmp_path / "README.md").write_bytes(readme)
        assert licence_in(tmp_path, {"LICENSE", "a"}) == "see LICENSE"
    assert licence_in(tmp_path, {"a"}) == ""


@pytest.mark.parametrize(
    ("adapter", "base", "warned"), cases(__file__, "test_licences_that_differ_or_are_not_known_are_a_warning")
)
def test_licences_that_differ_or_are_not_known_are_a_warning(adapter, base, warned):
    """Two licences are compared without case; texts that name no licence are a warning."""
    assert (licence_warning(adapter, base) is not None) == warned
