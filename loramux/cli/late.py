"""Commands whose modules are imported when they are used, and not for the list of all commands."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from loramux.cli.entry import INTERRUPTED, needs

if TYPE_CHECKING:
    from loramux_shared.faults import SettingsInvalid

Run = Callable[..., None] | typer.Typer
"""A function as `shell.command` makes it, or a group of such."""
Load = Callable[[], Run]
"""A function that imports a command and returns it; its docstring is the line in the list of commands."""


@dataclass(frozen=True)
class Command:
    """The port of commands that packages add; the name is that of the entry point.

    The entry's module imports little: it is imported for the list of commands.
    """

    load: Load
    is_group: bool = False
    """Whether it is a group, which the list has behind all commands."""


class LateCommand(TyperCommand):
    """A command with what the list of commands says of it; its callback is a `Load`."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Return the context of the command itself."""
        return self.loaded().make_context(info_name, args, parent, **extra)

    def loaded(self) -> Any:
        """Import the command itself, and return it."""
        from loramux_shared.faults import SettingsInvalid

        name = str(self.name)
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        try:
            run = self.callback() if self.callback else None
        except SettingsInvalid as fault:
            anything = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
            app.command(name, context_settings=anything)(_refusing(fault))
        except ModuleNotFoundError as missing:
            sys.exit(needs(missing))
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        else:
            if isinstance(run, typer.Typer):
                app.add_typer(run, name=name)
            elif run:
                app.command(name)(run)
        return typer.main.get_group(app).commands[name]


def _refusing(fault: "SettingsInvalid") -> Callable[[], None]:
    from loramux.cli import shell

    @shell.command
    def command() -> None:
        raise fault

    return command
