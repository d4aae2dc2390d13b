"""--param-groups: which tensors have a learning rate, a weight decay or an update rule of their own.

embedding.*:lr=0.1     kind=norm:weight_decay=1     blocks.0.*:rule=sgd,lr=10     head.*:lr=0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from types import MappingProxyType

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.sections.optim import OptimConfig

KINDS: Mapping[str, str] = MappingProxyType(
    {"matrix": "weight", "embedding": "embedding", "norm": "norm", "bias": "bias"}
)
"""What kind=... may say -> the kind of a canonical tensor."""

_KIND, _KEYS = "kind=", ("lr", "weight_decay", "rule")
_LARGEST = 1e6


@dataclass(frozen=True, slots=True)
class OwnSettings:
    """What groups say of a tensor.

    lr, weight_decay: factors on the run's, at each step; 0 for lr freezes the tensor.  None where nothing
    is said: its kind decides whether it decays, and --optimizer by which rule it is updated.
    """

    lr: float = 1.0
    weight_decay: float | None = None
    rule: str | None = None


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """One PATTERN:key=value,...; text: as it was given, said: its keys with their values."""

    text: str
    pattern: str
    said: tuple[tuple[str, float | str], ...]

    def has(self, name: str, kind: str) -> bool:
        """Whether a canonical tensor of this name and kind belongs to it."""
        if self.pattern.startswith(_KIND):
            return KINDS[self.pattern.removeprefix(_KIND)] == kind
        return fnmatchcase(name, self.pattern)

    @property
    def rule(self) -> str | None:
        """The rule that it asks for."""
        return next((str(value) for key, value in self.said if key == "rule"), None)


def read_group(text: str) -> ParamGroup:
    """ConfigError, without the flag's name, where the text is none."""
    pattern, colon, words = text.rpartition(":")
    if not pattern or not words:
        raise ConfigError(
            f"{text!r} is no PATTERN:key=value, such as 'embedding.*:lr=0.1' or 'kind=norm:weight_decay=1'"
        )
    if pattern.startswith(_KIND) and pattern.removeprefix(_KIND) not in KINDS:
        raise ConfigError(f"{text!r}: kind is one of {', '.join(KINDS)}")
    said: dict[str, float | str] = {}
    for word in words.split(","):
        key, _, value = word.partition("=")
        if key not in _KEYS:
            raise ConfigError(f"{text!r}: {key!r} is none of {', '.join(_KEYS)}")
        if key in said:
            raise ConfigError(f"{text!r}: {key} is said twice")
        said[key] = value if key == "rule" else _factor(text, key, value)
    return ParamGroup(text, pattern, tuple(said.items()))


def _factor(text: str, key: str, value: str) -> float:
    flag = "--" + key.replace("_", "-")
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0.0 <= number <= _LARGEST:
        raise ConfigError(
            f"{text!r}: {key}={value} must be a factor on {flag} from 0 to {_LARGEST:g}"
        )
    return number


@lru_cache(maxsize=16)
def param_groups(texts: tuple[str, ...]) -> tuple[ParamGroup, ...]:
    """Those of --param-groups, in order."""
    return tuple(map(read_group, texts))


def own_settings(optim: OptimConfig, name: str, kind: str) -> OwnSettings:
    """What --param-groups says of a canonical tensor; of two that say the same key the later one counts."""
    return _own(tuple(optim.param_groups), name, kind) if optim.param_groups else _NOTHING


_NOTHING = OwnSettings()


@lru_cache(maxsize=1 << 14)  # asked for every tensor of every layout that a search looks at
def _own(texts: tuple[str, ...], name: str, kind: str) -> OwnSettings:
    found = OwnSettings()
    for group in param_groups(texts):
        if group.has(name, kind):
            found = replace(found, **dict(group.said))  # type: ignore[arg-type]
    return found


def optimizers_asked_for(optim: OptimConfig) -> tuple[str, ...]:
    """--optimizer, and the rules of --param-groups: each once; of what can be read."""
    try:
        groups = param_groups(tuple(optim.param_groups))
    except ConfigError:  # a rule of its own tells it
        groups = ()
    return tuple(dict.fromkeys([optim.optimizer, *(group.rule for group in groups if group.rule)]))
