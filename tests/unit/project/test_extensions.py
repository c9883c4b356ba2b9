"""Extensions: found through entry points, and never needed."""

import pytest

from loramux_shared.extensions import load_extensions
from loramux_shared.faults import SettingsInvalid


def test_entry_points_whose_package_is_gone_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Entry points that can be imported are loaded, by name; one that raises is left out by name."""
    site = tmp_path_factory.mktemp("site")
    info = site / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    points = "zeta = others_package:command\nbeta = no_such_package.deep:it\nalpha = others_package:group\n"
    (info / "entry_points.txt").write_text(f"[loramux.of_a_test]\n{points}mu = raising\n")
    (site / "others_package.py").write_text("command, group = 1, 2\n")
    (site / "raising.py").write_text("raise OSError('no such driver')\n")
    monkeypatch.syspath_prepend(str(site))
    left: dict[str, SettingsInvalid] = {}
    found = load_extensions("loramux.of_a_test", left.__setitem__)
    assert list(found.items()) == [("alpha", 2), ("zeta", 1)]
    assert left["mu"].message.startswith("the extension 'mu' cannot be imported: OSError: no such driver. ")
