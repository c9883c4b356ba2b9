"""The words of `loramux check --for`."""

from enum import StrEnum


class FailOn(StrEnum):
    """The verdicts that end the command with exit status 1: each includes those before it."""

    NEVER = "never"
    IGNORED = "ignored"
    """Ignored tensors and something else: the server answers, and wrongly."""
    REFUSED = "refused"
    UNKNOWN = "unknown"


class Format(StrEnum):
    """The forms of verdicts."""

    TEXT = "text"
    JSON = "json"
    SARIF = "sarif"
    JUNIT = "junit"
