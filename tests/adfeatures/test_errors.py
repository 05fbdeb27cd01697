"""The exceptions are one family, each of which a caller may also catch as the kind of Python's own that it is."""

from __future__ import annotations

import inspect

import pytest

from adfeatures import errors

BASES = {
    "AdfeaturesError": Exception,
    "UnknownNameError": ValueError,
    "InputError": ValueError,
    "ImageError": ValueError,
    "ReferencesError": RuntimeError,
    "CheckpointError": RuntimeError,
    "DownloadError": OSError,
}


def test_one_family() -> None:
    found = dict(inspect.getmembers(errors, inspect.isclass))
    assert found.keys() == BASES.keys()
    for name, error in found.items():
        assert issubclass(error, errors.AdfeaturesError) and issubclass(error, BASES[name])


def test_an_image_is_an_input() -> None:
    assert issubclass(errors.ImageError, errors.InputError)


@pytest.mark.parametrize("name", BASES)
def test_the_message_is_what_is_printed(name: str) -> None:
    """``OSError`` would print more than one argument as a number and a text."""
    assert str(getattr(errors, name)("model.safetensors is empty. Fetch it again.")).endswith("Fetch it again.")


@pytest.mark.parametrize("name", BASES)
def test_a_name_of_any_length_is_quoted_in_part(name: str) -> None:
    message = str(getattr(errors, name)(f"model.safetensors is a checkpoint of {'x' * 1_000_000}. Fetch it again."))
    assert message.startswith("model.safetensors is") and message.endswith("Fetch it again.") and len(message) < 4100
