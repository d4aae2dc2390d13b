"""Settings of an optimizer that does not read them are refused."""

from __future__ import annotations

import pytest

from megatron_lite.config.rules.table import problems
from megatron_lite.config.sections.optim import OptimConfig
from tests.support.tiny import tiny_config

READ_BY = {
    "adam_beta2": "adam", "sgd_momentum": "sgd", "lion_beta1": "lion", "sophia_rho": "sophiag",
    "adafactor_beta1": "adafactor", "adam8bit_block_size": "adam8bit", "muon_momentum": "muon",
    "galore_rank": "galore",
}  # fmt: skip
VALUES = {"adam8bit_block_size": 16, "galore_rank": 4}


def refused(**optim) -> list[str]:
    changes = {f"optim__{name}": value for name, value in optim.items()}
    return [found for found in problems(tiny_config(**changes), 1) if "is about --optim" in found]


@pytest.mark.parametrize(("setting", "optimizer"), READ_BY.items())
def test_a_setting_is_given_with_its_optimizer(setting, optimizer) -> None:
    changed = {setting: VALUES.get(setting, 0.25)}
    other = "adafactor" if optimizer != "adafactor" else "adam"
    (said,) = refused(**changed, optimizer=other)
    assert said.startswith(f"--{setting.replace('_', '-')} is about --optimizer {optimizer}")
    assert said.endswith(f"--optimizer is {other}; drop it, or give --optimizer {optimizer}")
    assert not refused(**changed, optimizer=optimizer)
    assert not refused(**changed, optimizer=other, param_groups=[f"*:rule={optimizer}"])


def test_every_setting_that_begins_with_an_optimizers_name_is_looked_at() -> None:
    begins = {name.partition("_")[0] for name in READ_BY}
    named = {
        row.removesuffix("g")
        for row in OptimConfig.__dataclass_fields__["optimizer"].metadata["rows"]
    }
    assert named - {"apex-adam"} == begins
    assert not refused()  # a default is no setting


@pytest.mark.parametrize("optimizer", ["muon", "galore", "adam8bit", "apex-adam"])
def test_what_updates_some_tensors_by_adamw_reads_adams(optimizer) -> None:
    assert not refused(adam_beta2=0.95, optimizer=optimizer)


def test_a_row_of_an_extension_may_read_any() -> None:
    assert not refused(adam_beta2=0.95, muon_momentum=0.5, optimizer="mine")
