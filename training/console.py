"""How the entry points begin and end: options from the fields of a dataclass, errors in one line, exit codes of the ``adfeatures`` command."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_type_hints

from adfeatures.catalog import unknown
from adfeatures.errors import AdfeaturesError, UnknownNameError

T = TypeVar("T")
DONE, SOME_FAILED, NOTHING_DONE, INTERRUPTED = 0, 1, 2, 130


def run(entry: str, function: Callable[[], int | None]) -> int:
    """Call a function and turn its errors into a line on stderr and an exit code.

    Args:
        entry: Name of the entry point, such as "pretrain".
        function: What to run. It returns an exit code, or None for DONE.
    """
    try:
        return function() or DONE
    except AdfeaturesError as error:
        print(f"training.{entry}: error: {error}", file=sys.stderr)
        return NOTHING_DONE
    except KeyboardInterrupt:
        print(
            f"training.{entry}: interrupted. What was written before is kept; the same command resumes from there.",
            file=sys.stderr,
        )
        return INTERRUPTED


def option(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """A field with the help text of its command line option."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


def add_options(parser: argparse.ArgumentParser, config: type) -> None:
    """An option for each field of a config dataclass: ``--batch-size 32``, several values for tuples."""
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        name, kind = f"--{field.name.replace('_', '-')}", str(hints[field.name])
        if hints[field.name] is bool:
            parser.add_argument(name, action="store_true", help=field.metadata["help"])
            continue
        several = kind.startswith("tuple")
        type_ = (
            next((t for t in (int, float) if t.__name__ in kind), str)
            if hints[field.name] not in (int, float)
            else hints[field.name]
        )
        parser.add_argument(
            name,
            type=type_,
            nargs="*" if several else None,
            default=field.default,
            choices=field.metadata["choices"],
            help=f"{field.metadata['help']} (default: {_shown(field.default)})",
        )


def check_choices(config: Any) -> None:
    """Raise UnknownNameError for a value of a config dataclass that is not among the choices of its field."""
    for field in dataclasses.fields(config):
        choices, value = field.metadata["choices"], getattr(config, field.name)
        if choices is not None and value not in choices:
            raise UnknownNameError(unknown(field.name, value, choices))


def from_options(options: argparse.Namespace, config: type[T]) -> T:
    """The config that the options ask for.

    Raises:
        InputError: For values that the config cannot have.
    """
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _shown(default: object) -> str:
    return (
        " ".join(map(str, default)) or "-" if isinstance(default, tuple) else "-" if default is None else str(default)
    )
