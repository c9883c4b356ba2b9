"""Metrics as Prometheus reads them, for tests."""

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Scrape:
    """A scrape of metrics."""

    text: str

    def __post_init__(self) -> None:
        assert list(text_string_to_metric_families(self.text))

    def series(self, name: str) -> list[tuple[dict[str, str], float]]:
        return [
            (sample.labels, sample.value)
            for family in text_string_to_metric_families(self.text)
            for sample in family.samples
            if sample.name == name
        ]

    def value(self, name: str, **labels: str) -> float:
        """The value of the only series with these labels; 0 where there is none."""
        found = [value for own, value in self.series(name) if labels.items() <= own.items()]
        assert len(found) < 2
        return found[0] if found else 0.0

    def names(self) -> list[str]:
        lines = {
            f"{sample.name} {family.type} {{{','.join(sorted(sample.labels))}}}"
            for family in text_string_to_metric_families(self.text)
            for sample in family.samples
        }
        return sorted(lines)
