"""JSON files of a checkpoint, read key by key, each value checked for its type."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from losart.errors import CheckpointError, ConfigError

# Every size and token id has to fit into the 32-bit indices of the kernels.
LARGEST_INTEGER = 2**31 - 1


@dataclass(frozen=True)
class JsonObject:
    """A JSON object with its file and its path in it, so that errors can name both.

    A key whose value is null counts as absent, as Hugging Face's configurations mean it.

    Attributes
    ----------
    file : Path
        The file that holds the object.
    values : dict
        The parsed object.
    prefix : str
        Dotted path of the object inside the file, with a trailing dot; "" at the top.
    """

    file: Path
    values: dict[str, Any]
    prefix: str = ""

    def get(self, key: str) -> Any:
        """The value as parsed, None where absent."""
        return self.values.get(key)

    def integer(self, key: str) -> int:
        """A positive integer; required."""
        value = self.optional_integer(key)
        if value is None:
            raise self.missing(key)
        return value

    def optional_integer(self, key: str, minimum: int = 1) -> int | None:
        """An integer of `minimum` or more, None where absent."""
        value = self.get(key)
        return None if value is None else self.checked_integer(key, value, minimum)

    def checked_integer(self, key: str, value: object, minimum: int) -> int:
        """`value`, which stands at `key`, if it is an integer from `minimum` to `LARGEST_INTEGER`."""
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= LARGEST_INTEGER:
            raise self.error(key, value, f"an integer from {minimum} to {LARGEST_INTEGER}")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number as a float, `default` where absent."""
        value = self.optional_number(key)
        return default if value is None else value

    def optional_number(self, key: str) -> float | None:
        """A finite number as a float, None where absent."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, value, "a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.error(key, value, "a finite number")
        return number

    def boolean(self, key: str, default: bool) -> bool:
        """true or false, `default` where absent."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def optional_text(self, key: str) -> str | None:
        """A string, None where absent."""
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, value, "a string")
        return value

    def optional_object(self, key: str) -> JsonObject | None:
        """A nested object, None where absent."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, value, "an object")
        return JsonObject(self.file, value, f"{self.prefix}{key}.")

    def missing(self, key: str) -> ConfigError:
        """The error for a required key that is absent."""
        return ConfigError(f"{self.file}: missing key {self.prefix + key!r}")

    def error(self, key: str, value: object, expected: str) -> ConfigError:
        """The error for a value that is not what was expected."""
        return ConfigError(f"{self.file}: {self.prefix}{key} must be {expected}, not {reprlib.repr(value)}")


@contextmanager
def errors_naming(file: Path) -> Iterator[None]:
    """Prefix the file's name to a ConfigError raised by code that does not know the file."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def read_json_object(file: Path) -> JsonObject:
    """Read a file that holds one JSON object.

    Raises
    ------
    CheckpointError
        If the file is missing, unreadable, not JSON, or holds anything but an object.
    """
    try:
        values = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return JsonObject(file, values)


def read_optional_json_object(file: Path) -> JsonObject:
    """As `read_json_object`, but an empty object where the file does not exist."""
    return read_json_object(file) if file.exists() else JsonObject(file, {})


def read_text(file: Path) -> str:
    """Read a UTF-8 text file.

    Raises
    ------
    CheckpointError
        If the file is missing, unreadable or not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: not UTF-8 text: {error}") from error
