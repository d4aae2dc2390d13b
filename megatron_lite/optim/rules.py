"""OPTIMIZERS: --optimizer -> the update rule made from its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.optim.adam import AdamW
from megatron_lite.optim.sgd import SGD


class UpdateRule(Protocol):
    """What an engine needs of an optimizer; no communication here."""

    needs_whole_matrix: bool

    @property
    def state_names(self) -> tuple[str, ...]:
        """Keys of new_state's dict, as checkpoints name them."""
        ...

    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """State of a parameter before its first update; every tensor has the parameter's shape."""
        ...

    def update(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        *,
        steps: int,
        lr: float,
        weight_decay: float,
    ) -> None:
        """Change parameters and states in place; steps: updates done before this one."""
        ...


OPTIMIZERS: dict[str, Callable[[OptimConfig], UpdateRule]] = {
    "adam": lambda o: AdamW(beta1=o.adam_beta1, beta2=o.adam_beta2, eps=o.adam_eps),
    "sgd": lambda o: SGD(momentum=o.sgd_momentum),
}
