"""Tests of the core. What the tests of an extension share lies beside them, and is `tests.<module>` too."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
