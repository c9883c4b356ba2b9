"""Extensions: found through entry points, and never needed."""

import pytest

from loramux_shared.extensions import load_extensions


def test_entry_points_whose_package_is_gone_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Entry points whose package exists are loaded, by name."""
    site = tmp_path_factory.mktemp("site")
    info = site / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    points = "zeta = others_package:command\nbeta = no_such_package.deep:it\nalpha = others_package:group\n"
    (info / "entry_points.txt").write_text(f"[loramux.of_a_test]\n{points}")
    (site / "others_package.py").write_text("command, group = 1, 2\n")
    monkeypatch.syspath_prepend(str(site))
    assert list(load_extensions("loramux.of_a_test").items()) == [("alpha", 2), ("zeta", 1)]
