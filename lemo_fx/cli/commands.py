"""How functions become commands: options from dataclasses, run files in YAML, errors in one line.

Nothing here imports torch, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from lemo_fx.errors import InputError, LemoError

HELP = {"help_option_names": ["--help", "-h"]}


class Stopped(Exception):
    """The user has interrupted a command; says how to go on."""


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Print a user's error as one line and exit with code 2; an interrupt with 130."""
    try:
        yield
    except LemoError as error:
        _print_error(f"error: {' '.join(str(error).split())}")
        raise typer.Exit(2) from error
    except (Stopped, KeyboardInterrupt) as stop:
        _print_error(str(stop) or "stopped")
        raise typer.Exit(130) from stop


def _print_error(line: str) -> None:
    Console(stderr=True, soft_wrap=True).print(line, style="red", markup=False, highlight=False)


USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""What click, or the copy of it that newer versions of typer hold, raises for wrong options."""


class OneLineGroup(TyperGroup):
    """Commands that answer a wrong option, too, in one line."""

    def main(self, *args: Any, **more: Any) -> Any:
        """Run a command and leave with its exit code."""
        try:
            sys.exit(super().main(*args, **{**more, "standalone_mode": False}) or 0)
        except USAGE_ERROR as error:
            words = " ".join(error.format_message().split())  # type: ignore[attr-defined]
            context = getattr(error, "ctx", None)
            where = f"{context.command_path} --help" if context else "--help"
            _print_error(f"error: {words.rstrip('.')}; see {where}")
            sys.exit(2)
        except typer.Abort:
            sys.exit(130)


def command(app: typer.Typer) -> Callable[[Callable], Callable]:
    """Make a function a command: errors are one line, and a parameter that is a dataclass is an option per field."""

    def add(function: Callable) -> Callable:
        parameters, groups = [], {}
        hints = typing.get_type_hints(function, include_extras=True)
        for parameter in inspect.signature(function).parameters.values():
            kind = hints[parameter.name]
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                groups[parameter.name] = kind
                parameters += _parameters(kind)
            else:
                parameters.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))

        def run(**given: Any) -> None:
            with errors_in_one_line():
                made: dict[str, Any] = {}
                for name, kind in groups.items():
                    made[name] = kind(**{f.name: given.pop(f.name) for f in dataclasses.fields(kind)})
                function(**given, **made)

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(context_settings=HELP)(run)
        return run

    return add


def _parameters(group: Any) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(group)
    ]


def from_file(context: typer.Context, path: Path | None) -> Path | None:
    """Take a run file's values as defaults of a command: what is given beside it wins.

    Raises:
        typer.Exit: the file cannot be read, or names an option that there is not.
    """
    if path is None or context.resilient_parsing:
        return path
    with errors_in_one_line():
        context.default_map = _defaults(path, context.command.params)
    return path


def _defaults(path: Path, parameters: Sequence[Any]) -> dict[str, Any]:
    import yaml

    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise InputError(f"{path} must hold options and values, one `option: value` a line")
    names = {name: p.name for p in parameters for name in (p.name, *(_plain(option) for option in p.opts))}
    found = {}
    for name, value in given.items():
        key = _plain(str(name))
        if key not in names or key in ("config", "help"):
            plan = {"attention", "mlp", "dense_layers"} & set(given)
            hint = "a LemoConfig goes behind --plan" if plan else "see --help for the options"
            raise InputError(f"{path}: there is no option {name!r}; {hint}")
        if isinstance(value, list):
            value = ",".join(map(str, value))
        if isinstance(value, dict):
            raise InputError(f"{path}: {name} must be one value")
        if value is not None:
            found[names[key]] = value
    return found


def _plain(option: str) -> str:
    return option.lstrip("-").replace("-", "_")


def as_file(*groups: Any) -> str:
    """The run file that gives these options again."""
    import yaml

    values = {}
    for group in groups:
        hints = typing.get_type_hints(type(group), include_extras=True)
        for field in dataclasses.fields(group):
            # typer keeps an option's own name where others keep a default.
            named = [note.default for note in getattr(hints[field.name], "__metadata__", ()) if note.default is not ...]
            value = getattr(group, field.name)
            values[_plain(named[0]) if named else field.name] = str(value) if isinstance(value, Path) else value
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
