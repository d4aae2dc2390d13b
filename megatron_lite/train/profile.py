"""--profile: a Chrome trace of some steps on some ranks, in the run folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_lite.config.telemetry import TelemetryConfig


@dataclass(slots=True)
class Profiler:
    """torch.profiler from --profile-step-start until before --profile-step-end."""

    telemetry: TelemetryConfig
    rank: int
    folder: Path
    _profile: Any = field(default=None)

    def before(self, step: int) -> None:
        """Start if this step is the first profiled one."""
        t = self.telemetry
        if t.profile and self.rank in t.profile_ranks and step == t.profile_step_start:
            self._profile = torch.profiler.profile(record_shapes=True)
            self._profile.start()

    def after(self, step: int) -> None:
        """Stop after the last profiled step and write trace-rank<r>.json."""
        if self._profile is not None and step + 1 >= self.telemetry.profile_step_end:
            self._profile.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self.folder / f"trace-rank{self.rank}.json"))
            self._profile = None
