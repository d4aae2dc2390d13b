"""RULES: the name of an update rule -> its mathematics, made from the optimizer's settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.optim.adafactor import Adafactor
from megatron_lite.optim.adam import AdamW
from megatron_lite.optim.adam8bit import AdamW8bit
from megatron_lite.optim.apex import ApexAdamW
from megatron_lite.optim.galore import GaLore
from megatron_lite.optim.lion import Lion
from megatron_lite.optim.muon import Muon
from megatron_lite.optim.sgd import SGD
from megatron_lite.optim.sophia import SophiaG


class UpdateRule(Protocol):
    """How parameters change; no communication here.

    Which states it keeps of each, and of what shape, stands in blueprint/optimizers.py.  One that
    cannot run everywhere has check(device), too: ConfigError, before the first step, where it cannot.
    """

    def update(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        *,
        steps: int,
        lr: float,
        weight_decay: float,
        taken: Tensor | None = None,
    ) -> None:
        """Change parameters and states in place; steps: updates done before this one.

        taken: bool scalar on the device; where it is false everything keeps its bits.  A rule
        without this argument makes the host wait for each step.
        A rule with an argument `shares` (see TpShares) is told what other tp ranks have; its row of
        OPTIMIZERS says sums_over_tp.
        """
        ...


RULES: dict[str, Callable[[OptimConfig], UpdateRule]] = {
    "adam": lambda o: AdamW(beta1=o.adam_beta1, beta2=o.adam_beta2, eps=o.adam_eps),
    "sgd": lambda o: SGD(momentum=o.sgd_momentum),
    "adam8bit": lambda o: AdamW8bit(o.adam_beta1, o.adam_beta2, o.adam_eps, o.adam8bit_block_size),
    "adafactor": Adafactor.from_config,
    "apex-adam": lambda o: ApexAdamW(beta1=o.adam_beta1, beta2=o.adam_beta2, eps=o.adam_eps),
    "sophiag": lambda o: SophiaG(beta1=o.sophia_beta1, rho=o.sophia_rho),
    "lion": lambda o: Lion(beta1=o.lion_beta1, beta2=o.lion_beta2),
    "muon": Muon.from_config,
    "galore": GaLore.from_config,
}
