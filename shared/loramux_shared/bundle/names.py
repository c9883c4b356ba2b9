"""The names of a deployment's models: what a name may be, and which names fit together."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from loramux_shared.faults import Finding
from loramux_shared.wording import listed


def _no_path(name: str) -> str:
    if name in {".", ".."}:
        raise ValueError("a name other than . and ..")
    return name


Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_:][a-zA-Z0-9_\-\.:]*$", max_length=128)]
"""A name that can be an OpenAI ``model``, a part of an object's key, and an argument of a command."""
StoredName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_\-\.:]+$", max_length=128), AfterValidator(_no_path)]
"""A name in a store: older releases took names that begin with a dot or a dash."""
NAME_RULE: Final = "Begin with a letter, a digit, _ or :, and go on with these, - and dots."
_NAME: Final[TypeAdapter[str]] = TypeAdapter(Name)
OWN_NAME: Final = "a name that differs in more than case from the base's and from every alias and other adapter"


@dataclass(frozen=True)
class ModelNames:
    """The names that a deployment serves, in its file or in one of its generations."""

    base: str
    adapters: Collection[str]
    aliases: Mapping[str, Mapping[str, int]]
    """Weights of the models that an alias stands for, by alias."""
    serve_base: bool = True
    merge_always: bool = False

    def owner(self, name: str) -> str | None:
        """Return which model has a name, in any case; None where the name is free."""
        return next((model for model, each in self._all() if each.casefold() == name.casefold()), None)

    def findings(self, *, in_file: bool = False) -> Iterator[Finding]:
        """Yield what does not fit together.

        In a file an alias names models of the deployment alone. In a generation it may name models that are
        gone while another one answers.
        """
        place = "build.lora_adapters" if in_file else "adapters"
        yield from self._clashes(place)
        yield from self._bad_aliases(in_file=in_file)
        if not self.serve_base and not self.adapters:
            yield _bad(place, "at least one adapter where runtime.serve_base is false", "none")
        if self.merge_always and (len(self.adapters) != 1 or self.serve_base):
            found = f"adapters: {listed(self.adapters)}; runtime.serve_base: {str(self.serve_base).lower()}"
            yield _bad(place, "one adapter and runtime.serve_base: false where runtime.merge is always", found)

    def _clashes(self, place: str) -> Iterator[Finding]:
        """Yield a finding for each name that two models have, in any case."""
        taken: dict[str, str] = {}
        for model, name in self._all():
            owner = taken.setdefault(name.casefold(), model)
            if owner != model:
                where = f"{place}.{name}" if model.startswith("adapter") else f"runtime.aliases.{name}"
                yield _bad(where, OWN_NAME, owner, f"Rename {model} or {owner}.")

    def _bad_aliases(self, *, in_file: bool) -> Iterator[Finding]:
        """Yield a finding for each alias for which no model can answer, or which names others in a file."""
        for alias, weights in self.aliases.items():
            gone = [name for name in weights if name != self.base and name not in self.adapters]
            if in_file and gone:
                yield _bad(f"runtime.aliases.{alias}", "models of this deployment", listed(gone))
            elif not any(weight for name, weight in weights.items() if self._serves(name)):
                found = ", ".join(f"{name}: {weight}" for name, weight in weights.items()) or "none"
                fix = "Keep or add one of its models, or build the deployment without the alias."
                yield _bad(f"runtime.aliases.{alias}", "a served model with a weight above 0", found, fix)

    def _all(self) -> Iterator[tuple[str, str]]:
        yield f"the base {self.base}", self.base
        yield from ((f"alias {name}", name) for name in self.aliases)
        yield from ((f"adapter {name}", name) for name in self.adapters)

    def _serves(self, name: str) -> bool:
        return name in self.adapters or (self.serve_base and name == self.base)


def bad_name(name: str, where: str) -> Finding | None:
    """Return why no adapter can have a name; None where one can."""
    try:
        _NAME.validate_python(name)
    except ValidationError:
        return _bad(where, "a name of 1 to 128 characters", repr(name[:80]), NAME_RULE)
    return None


def _bad(where: str, expected: str, found: str, fix: str = "") -> Finding:
    return Finding(code="E_BAD_FIELD", where=where, expected=expected, found=found, fix=fix)


BASE: Final = "base"
"""A name of every served base, where nothing else is called so."""


def names_of(model: str) -> list[str]:
    """Return the distinct names of ``NAME*SCALE+NAME``, in their order; of one name itself."""
    return sorted({part.partition("*")[0].strip() for part in model.split("+")})
