"""Keep the names of all metrics."""

from tests.golden.metrics.script import NAMES, names

if __name__ == "__main__":
    NAMES.write_text(names())
