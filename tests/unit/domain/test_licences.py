"""Licences: front matter of any author, and the warning where a base's and an adapter's differ."""

from __future__ import annotations

import pytest

from builder_service.domain.origin import licence_warning
from loramux_shared.sources.licence import MAX_README, licence_in, licence_of
from tests.support import folders
from tests.support.adapters import write_adapter, write_base
from tests.support.folders import deployment_of, workshop


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


def test_a_generation_records_the_licences_of_base_and_adapters(tmp_path):
    """A generation records licences, builds warn of differences, and a README changes no bundle or revision."""
    base, adapter = write_base(tmp_path / "base"), tmp_path / "one"
    write_adapter(adapter, base_model_name_or_path="base")
    deployment, context = deployment_of(tmp_path, "one"), workshop(tmp_path)

    def built():
        done = folders.built(deployment, context)
        return done.generation, [(finding.code, finding.found) for finding in done.warnings()]

    first, none = built()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (adapter / "README.md").write_text("---\nlicense: mit\n---\n")
    second, warned = built()
    one = second.adapters["one"]
    assert (second.number, second.base.licence, one.licence) == (2, "apache-2.0", "mit")
    assert (none, warned) == ([], [("W_LICENSE", "mit")])
    before = first.adapters["one"]
    assert (one.digest, one.source) == (before.digest, before.source)
    assert b"licence" not in first.to_bytes()
    assert built() == (second, warned)  # kept
    (adapter / "README.md").write_text("---\nlicense: mit\n---\n" + "x" * MAX_README)
    assert built()[0].adapters["one"].licence == ""
