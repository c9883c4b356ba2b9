"""Licences: front matter of any author, and the warning where a base's and an adapter's differ."""

from __future__ import annotations

import pytest

from builder_service.domain.origin import licence_warning
from loramux_shared.sources.licence import licence_in, licence_of


@pytest.mark.parametrize(
    ("matter", "expected"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("tags:\n- license\nlicense: 'mit' # ours\nmodel-index:\n- name: x\n  license: gpl", "mit"),
        ("license: other\nlicense_name: llama3.1\nlicense_link: LICENSE", "llama3.1"),
        ("license: [mit, apache-2.0]", "mit, apache-2.0"),
        ("license:\n- mit\n- bsd\ntags: [a]", "mit, bsd"),
        ("license: other", "other"),
        ("license: unknown", ""),
        ("license:", ""),
        ("license: {a: mit}", ""),
        ("text: |\n  license: mit", ""),
        ("- license: mit", ""),
        ("license: 'x\x07y'", ""),
        (f"license: {'m' * 500}", ""),
        ("license: *nobody", ""),
        ("a: &a x\nlicense: *a", ""),
        ("{license: mit", ""),
        ("a: " + "[" * 2_000, ""),
        ("x: &a [y]\n" + "".join(f"b{i}: &b{i} {{<<: [*a, *a]}}\n" for i in range(500)), ""),
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
    ("adapter", "base", "warned"),
    [
        ("", "", False),
        ("mit", "MIT", False),
        ("mit", "apache-2.0", True),
        ("", "mit", True),
        ("mit", "", True),
        ("other", "other", True),
        ("see LICENSE", "see LICENSE", True),
    ],
)
def test_licences_that_differ_or_are_not_known_are_a_warning(adapter, base, warned):
    """Equal licences and unknown licences give no warning."""
    assert (licence_warning(adapter, base) is not None) == warned
