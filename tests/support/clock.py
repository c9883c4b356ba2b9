"""The module ``time`` of a module under test: it passes when something sleeps, and when the test says so."""


class OwnTime:
    """A clock of its own: ``monkeypatch.setattr(module, "time", OwnTime())`` replaces the real one."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
