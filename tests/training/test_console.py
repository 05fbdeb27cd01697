"""Options from the fields of a dataclass, and how commands end."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from adfeatures.errors import InputError, UnknownNameError
from training import console
from training.console import REQUIRED, check_choices, option, progress, run, run_config


@dataclass(frozen=True)
class Order:
    """A config with a field of each kind."""

    dish: str = option(REQUIRED, "what to cook", ("soup", "rice"))
    guests: tuple[int, ...] = option(REQUIRED, "ages of the guests")
    cook: str | None = option(None, "who cooks")
    minutes: float = option(12.5, "time")
    pots: int | None = option(None, "pots at most")
    spices: tuple[str, ...] = option(("salt", "thyme"), "spices")
    table: tuple[float, ...] = option((), "sides of the table in meters")
    hot: bool = option(False, "keep it hot")

    def __post_init__(self) -> None:
        check_choices(self)
        if self.minutes < 0:
            raise InputError("Time does not run backwards.")


def order(*arguments: str) -> tuple[int, list[Order]]:
    """The exit code and the config that the function was called with, if it was."""
    taken: list[Order] = []
    return run_config("cook", "Cook a meal.", Order, taken.append, arguments), taken


def test_options_that_are_not_given_have_the_defaults_of_the_fields() -> None:
    assert order("--dish", "soup", "--guests", "7", "41") == (0, [Order("soup", (7, 41))])


def test_values_arrive_with_the_types_of_their_fields() -> None:
    wanted = Order("rice", (), "Ada", 3.0, 2, ("pepper",), (1.0, 2.5), True)
    text = "--dish rice --guests --cook Ada --minutes 3 --pots 2 --spices pepper --table 1 2.5 --hot"
    assert order(*text.split()) == (0, [wanted])
    found = order(*text.split())[1][0]
    assert repr(found) == repr(wanted), "2 is no 2.0 here"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--guests 3", "the following arguments are required: --dish"),
        ("--dish soup", "the following arguments are required: --guests"),
        ("--dish stew --guests 3", "invalid choice: 'stew'"),
        ("--dish soup --guests three", "invalid int value: 'three'"),
    ],
)
def test_what_the_options_cannot_be_is_said_by_the_parser(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        order(*arguments.split())
    # The code of the adfeatures command where nothing could be done.
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_required_fields_are_required_in_python_too() -> None:
    with pytest.raises(TypeError, match="guests"):
        Order("soup")
    with pytest.raises(UnknownNameError, match="dish 'soap'. Did you mean 'soup'"):
        Order("soap", (3,))


def test_the_help_says_what_is_required_and_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        order("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: python -m training.cook") and "Cook a meal." in text
    for line in (
        "what to cook (required)",
        "ages of the guests (required)",
        "who cooks (default: -)",
        "time (default: 12.5)",
        "spices (default: salt thyme)",
        "sides of the table in meters (default: -)",
        "keep it hot",
    ):
        assert line in text


def test_errors_become_a_line_and_a_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert order("--dish", "soup", "--guests", "3", "--minutes", "-1") == (2, [])
    assert capsys.readouterr().err == "training.cook: error: Time does not run backwards.\n"

    def interrupted() -> None:
        raise KeyboardInterrupt

    assert run("cook", interrupted) == 130
    assert "training.cook: interrupted" in capsys.readouterr().err


def test_codes_of_functions_are_passed_on() -> None:
    assert run("cook", lambda: None) == 0
    assert run("cook", lambda: 1) == 1
    # Any other error is a fault of the program, and shows where it happened.
    with pytest.raises(ZeroDivisionError):
        run("cook", lambda: 1 // 0)


def test_without_a_terminal_progress_is_a_line_an_interval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "INTERVAL", 0)
    assert list(progress(iter("ab"), total=2, desc="products", unit="parts", leave=False)) == ["a", "b"]
    with progress(total=5, initial=3, desc="pretraining", unit="steps") as bar:
        bar.update()
        bar.set_postfix({"waiting": "0.1"}, refresh=False)
        bar.update()
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err
    lines = err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        *(f"products: {n} of 2 parts" for n in (0, 1, 2)),
        *(f"pretraining: {n} of 5 steps" for n in (3, 4, 5)),
    ]
    assert lines[-1].endswith("left, waiting=0.1")


def test_nothing_is_printed_before_a_minute_and_by_other_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    list(progress(range(1000), desc="quick"))
    monkeypatch.setattr(console, "INTERVAL", 0)
    list(progress(range(10), desc="another rank", disable=True))
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(progress("ab", desc="letters")) == ["a", "b"]
    assert "100%|" in capsys.readouterr().err


def test_a_worker_that_was_killed_is_an_error_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    def killed() -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    assert run("cook", killed) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "perhaps for lack of memory" in error and "(pid 7)" in error
    with pytest.raises(RuntimeError, match="another"):
        run("cook", lambda: (_ for _ in ()).throw(RuntimeError("another")))
