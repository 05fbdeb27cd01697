"""The exceptions of adfeatures. Each message says what was wrong, with which file or name, and what to do next."""

MAX_LETTERS = 4000


class AdfeaturesError(Exception):
    """Base of every error that this package raises on purpose.

    A message quotes names and values from files, which may be of any length: its middle is left out above 4,000
    characters.
    """

    def __str__(self) -> str:
        message = super().__str__()
        half = MAX_LETTERS // 2
        return message if len(message) <= MAX_LETTERS else f"{message[:half]} ... {message[-half:]}"


class UnknownNameError(AdfeaturesError, ValueError):
    """A model, tag, preset or product that does not exist."""


class InputError(AdfeaturesError, ValueError):
    """An argument or tensor that cannot be used: wrong shape or size, NaN, out of range."""


class ImageError(InputError):
    """A file or array that cannot be read as an image."""


class ReferencesError(AdfeaturesError, RuntimeError):
    """Reference images are missing, too few, or belong to another model."""


class CheckpointError(AdfeaturesError, RuntimeError):
    """A weights or bank file that is damaged, unsafe to read, or made for something else."""


class DownloadError(AdfeaturesError, OSError):
    """Weights that could not be found or fetched: no network, refused by the Hub, wrong hash, unwritable cache."""
