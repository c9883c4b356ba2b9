"""Prometheus' text format for what there is a lot of: the library takes some 15 µs for a line, this below one.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

Lines = tuple[bytes, ...]
"""The samples of one model, family by family."""


def head(name: str, kind: str, text: str) -> bytes:
    """Return the lines above a family's samples; its text has neither a backslash nor a line break."""
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n".encode()


def label(value: str) -> str:
    """Return a label's value as it is written."""
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def sample(name: str, labels: Mapping[str, str], value: float) -> bytes:
    """Return one line; labels in the order in which they are given."""
    inside = ",".join(f'{key}="{label(content)}"' for key, content in labels.items())
    return f"{name}{{{inside}}} {value}\n".encode()


def histogram(name: str, model: str, bounds: Sequence[str], counts: Sequence[int], total: float) -> bytes:
    """Return the samples of one histogram; bounds are those of `bounds_of`, and counts do not add up."""
    inside = f'model="{label(model)}"'
    before = f'{name}_bucket{{{inside},le="'
    lines, sum_of = [], 0
    for bound, count in zip(bounds, counts, strict=True):
        sum_of += count
        lines.append(f'{before}{bound}"}} {sum_of}\n')
    lines.append(f"{name}_count{{{inside}}} {sum_of}\n{name}_sum{{{inside}}} {total}\n")
    return "".join(lines).encode()


def bounds_of(buckets: Sequence[float]) -> tuple[str, ...]:
    """Return upper bounds as they are written, with the last one that has none."""
    return (*(str(float(each)) for each in buckets), "+Inf")


def families(heads: Sequence[bytes], models: Sequence[Lines]) -> Iterator[bytes]:
    """Yield families one after the other: the format wants the samples of each together."""
    for nth, above in enumerate(heads):
        yield above
        for lines in models:
            yield lines[nth]
