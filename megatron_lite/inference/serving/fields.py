"""Fields of a JSON body, taken one by one: each has its kind and bounds, and none is left over."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


class RequestRefused(Exception):
    """A request that is answered with an error; as OpenAI's interface writes it."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message, "type": kind, "param": self.param, "code": self.code,
            }
        }  # fmt: skip


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is; RequestRefused for anything else."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RequestRefused(400, f"the body is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise RequestRefused(400, f"the body must be a JSON object, not {type(found).__name__}")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


@dataclass(slots=True)
class Fields:
    """What a request says; what `null` says is not said."""

    given: dict[str, Any]
    _taken: set[str] = field(default_factory=set)

    def take(self, name: str, default: Any = None) -> Any:
        """As it is."""
        self._taken.add(name)
        value = self.given.get(name)
        return default if value is None else value

    def number(self, name: str, default: float, *, low: float, high: float) -> float:
        """Between low and high."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RequestRefused(400, f"{name} must be a number, not {_short(value)}", param=name)
        if not (math.isfinite(value) and low <= value <= high):
            raise RequestRefused(400, f"{name} {_short(value)} must be {low} to {high}", param=name)
        return float(value)

    def whole(self, name: str, default: int | None, *, low: int, high: int) -> int | None:
        """A whole number between low and high."""
        value = self.take(name, default)
        if value is None:
            return None
        if type(value) is not int:
            raise RequestRefused(
                400, f"{name} must be a whole number, not {_short(value)}", param=name
            )
        if not low <= value <= high:
            raise RequestRefused(400, f"{name} {_short(value)} must be {low} to {high}", param=name)
        return value

    def flag(self, name: str) -> bool:
        """false where nothing is said."""
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise RequestRefused(
                400, f"{name} must be true or false, not {_short(value)}", param=name
            )
        return value

    def texts(self, name: str, *, most: int) -> list[str]:
        """A text, or a list of at most so many; none of them empty."""
        value = self.take(name, [])
        values = [value] if isinstance(value, str) else value
        if not (isinstance(values, list) and all(isinstance(v, str) and v for v in values)):
            raise RequestRefused(400, f"{name} must be a text, or a list of texts", param=name)
        if len(values) > most:
            raise RequestRefused(400, f"{name} has {len(values)} texts: at most {most}", param=name)
        return [valid_text(value, name) for value in values]

    def only(self, name: str, allowed: Sequence[Any]) -> None:
        """Refuses what is not served; what says the same as nothing is."""
        value = self.take(name)
        if value is not None and value not in allowed:
            raise RequestRefused(
                400, f"{name} {_short(value)} is not served: leave it out", param=name
            )

    def ignore(self, *names: str) -> None:
        """What changes no answer."""
        self._taken.update(names)

    def end(self) -> None:
        """RequestRefused where a field is left over: a setting is not silently ignored."""
        left = sorted(self.given.keys() - self._taken)
        if left:
            raise RequestRefused(
                400,
                f"{_short(left[0])} is no field that is known here",
                param=_short(left[0])[1:-1],
            )


def valid_text(value: Any, name: str) -> str:
    """A text that UTF-8 can say; JSON can write halves of characters."""
    if not isinstance(value, str):
        raise RequestRefused(400, f"{name} must be a text, not {_short(value)}", param=name)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestRefused(
            400, f"{name} holds half a character ({error.reason})", param=name
        ) from None
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
