"""--profile: some steps on some ranks, as Chrome traces in the run folder, or for Nsight Systems."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_lite.config.sections.telemetry import TelemetryConfig


@dataclass(slots=True)
class Profiler:
    """From before --profile-step-start until before --profile-step-end.

    torch.profiler by default: trace-rank<r>.json in `folder`, for chrome://tracing or Perfetto.
    With --no-use-pytorch-profiler on a GPU only the range is marked, for
    `nsys profile --capture-range=cudaProfilerApi`; without a GPU that marks nothing.
    """

    telemetry: TelemetryConfig
    rank: int
    folder: Path
    device: torch.device = torch.device("cpu")
    _profile: Any = field(default=None)
    _marking: bool = False

    def before(self, step: int) -> None:
        """Start if this step is the first profiled one."""
        t = self.telemetry
        if not t.profile or self.rank not in t.profile_ranks or step != t.profile_step_start:
            return
        if t.use_pytorch_profiler:
            self._profile = torch.profiler.profile(record_shapes=True)
            self._profile.start()
        elif self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            self._marking = True

    def after(self, step: int) -> None:
        """Stop after the last profiled step."""
        if step + 1 >= self.telemetry.profile_step_end:
            self.close()

    def close(self) -> None:
        """Write what was profiled; also where the run ends before --profile-step-end."""
        if self._profile is not None:
            profile, self._profile = self._profile, None
            profile.stop()
            path = self.folder / f"trace-rank{self.rank}.json"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                profile.export_chrome_trace(str(path))
            except (OSError, RuntimeError) as error:  # RuntimeError: torch's own writer of files
                print(
                    f"WARNING: the trace {path} is lost, training continues: {error}",
                    file=sys.stderr,
                )
        if self._marking:
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            self._marking = False
