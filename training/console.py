"""How the entry points begin and end: options from the fields of a dataclass, errors in one line, an exit code."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from tqdm import tqdm
from tqdm.auto import tqdm as tqdm_auto

from adfeatures.catalog import unknown
from adfeatures.console import DONE, INTERRUPTED, NOTHING_DONE, console
from adfeatures.console import SOME_FAILED as SOME_FAILED
from adfeatures.errors import AdfeaturesError, UnknownNameError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
# In the place of a default: the field has none, and its option must be given.
REQUIRED: Any = dataclasses.MISSING
_KILLED = (
    "A process that reads images was ended from outside, perhaps for lack of memory. What was written before is kept; "
    "the same command resumes from there, and fewer --workers take less memory."
)
# Seconds between two lines about progress, where there is no terminal.
INTERVAL = 60


def run(entry: str, function: Callable[[], int | None]) -> int:
    """Call a function and turn its errors into a line on stderr and an exit code, as those of ``adfeatures``.

    Args:
        entry: Name of the entry point, such as "pretrain".
        function: What to run. It returns an exit code, or None for DONE.
    """
    try:
        with console(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # Of metadata, without a file's name.
            return function() or DONE
    except AdfeaturesError as error:
        message, code = f"error: {error}", NOTHING_DONE
    except KeyboardInterrupt:
        message, code = (
            "interrupted. What was written before is kept; the same command resumes from there.",
            INTERRUPTED,
        )
    except RuntimeError as error:
        # From torch, in any line of this process: its handler of signals raises it.
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        message, code = f"error: {_KILLED} ({error})", NOTHING_DONE
    print(f"training.{entry}: {message}", file=sys.stderr)
    return code


def run_config(
    entry: str,
    description: str,
    config: type[Config],
    function: Callable[[Config], int | None],
    arguments: Sequence[str] | None,
) -> int:
    """The whole of an entry point whose options are the fields of a config dataclass.

    The function is called with the config, and returns, as in ``run``; arguments are by default those of this process.
    """
    parser = argparse.ArgumentParser(prog=f"python -m training.{entry}", description=description)
    add_options(parser, config)
    options = parser.parse_args(arguments)
    return run(entry, lambda: function(from_options(options, config)))


def option(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """A field with the help text of its command line option; the default may be REQUIRED."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


def add_options(parser: argparse.ArgumentParser, config: type[DataclassInstance]) -> None:
    """An option for each field of a config dataclass: ``--batch-size 32``, several values for tuples."""
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        name, hint, required = f"--{field.name.replace('_', '-')}", hints[field.name], field.default is REQUIRED
        if hint is bool:
            parser.add_argument(name, action="store_true", help=field.metadata["help"])
            continue
        parser.add_argument(
            name,
            type=next((kind for kind in (int, float) if kind in (hint, *get_args(hint))), str),
            nargs="*" if get_origin(hint) is tuple else None,
            required=required,
            default=field.default,
            choices=field.metadata["choices"],
            help=f"{field.metadata['help']} ({'required' if required else f'default: {_shown(field.default)}'})",
        )


def check_choices(config: DataclassInstance) -> None:
    """Raise UnknownNameError for a value of a config dataclass that is not among the choices of its field."""
    for field in dataclasses.fields(config):
        choices, value = field.metadata["choices"], getattr(config, field.name)
        if choices is not None and value not in choices:
            raise UnknownNameError(unknown(field.name, value, choices))


def from_options(options: argparse.Namespace, config: type[Config]) -> Config:
    """The config that the options ask for.

    Raises:
        InputError: For values that the config cannot have.
    """
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(config)}
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _shown(default: object) -> str:
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return "-" if shown in (None, "") else str(shown)


class _Lines(tqdm):
    """A progress bar for logs: whole lines, of which the first comes after an interval and none at the end."""

    monitor_interval = 0

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        form = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} elapsed, {remaining} left{postfix}"
        super().__init__(*arguments, **settings, mininterval=INTERVAL, delay=INTERVAL, miniters=1, bar_format=form)

    def display(self, *_: object, **__: object) -> None:
        print(self, file=self.fp, flush=True)

    def close(self) -> None:
        self.disable = True


def progress(iterable: Iterable[Any] | None = None, **settings: Any) -> Any:
    """The bar of tqdm, which takes the settings, on a terminal; a line a minute elsewhere."""
    return (tqdm_auto if sys.stderr.isatty() else _Lines)(iterable, **settings)
