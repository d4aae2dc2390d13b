"""Two configurations of DeepSpeed as their users have them, and a shorter way to write others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.flags.parser import ParsedFlags, parse

ADADELTA = """{
  "train_micro_batch_size_per_gpu": 4,
  "gradient_accumulation_steps": 32,
  "gradient_clipping": 1.0,
  "fp16": {
    "enabled": true, "loss_scale": 0, "loss_scale_window": 100, "initial_scale_power": 16,
    "hysteresis": 2, "min_loss_scale": 1
  },
  "optimizer": {
    "type": "Adadelta",
    "params": {"lr": 5e-5, "betas": [0.9, 0.95]}
  },
  "scheduler": {
    "type": "WarmupLR",
    "params": {"warmup_min_lr": 1e-5, "warmup_max_lr": 5e-5, "warmup_num_steps": 10}
  },
  "zero_optimization": {
    "stage": 2,
    "offload_optimizer": {"device": "cpu", "pin_memory": true},
    "overlap_comm": true,
    "contiguous_gradients": true
  }
}
"""
"""A 1.3B Llama of the Hugging Face Trainer; its optimizer cannot be built by DeepSpeed either."""

MISSPELT = """{
  "train_micro_batch_size_per_gpu": 32,
  "grad_accum_steps": 1,
  "bf16": {"enabled": false},
  "fp16": {"enabled": true},
  "scheduler": {
    "type": "WarmupLR",
    "params": {
      "warmup_min_lr": 0,
      "warmup_max_lr": 1.0,
      "warmup_num_steps": 1000
    }
  },
  "zero_optimization": {"stage": 2}
}
"""
"""A small Llama whose loss exploded: the schedule owns the learning rate, and climbs to 1.0."""


class DsFolder:
    """Writes a ds.json into a folder and reads flags beside it."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "ds.json"

    def write(self, config: str | dict[str, Any]) -> list[str]:
        """The flags that name the file with this text."""
        self.file.write_text(config if isinstance(config, str) else json.dumps(config, indent=1))
        return ["--deepspeed", "--deepspeed_config", str(self.file)]

    def parse(self, config: str | dict[str, Any], flags: str = "") -> ParsedFlags:
        """The flags beside such a file."""
        return parse([*flags.split(), *self.write(config)])

    def refusal(self, config: str | dict[str, Any], flags: str = "", ranks: int = 0) -> str:
        """What is said of a file that is refused, without its folder; on ranks where a number is given."""
        try:
            parsed = self.parse(config, flags)
            if ranks:
                parsed.on(ranks)
        except ConfigError as error:
            return str(error).replace(f"{self.file.parent}/", "")
        raise AssertionError("it was taken")
