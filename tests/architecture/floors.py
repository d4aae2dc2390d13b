"""The floors of the package: which folder may import which, and what none of its files may."""

from __future__ import annotations

# folder -> folders it may import (its own is always allowed); a folder missing here is an error
MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "storage": {"config"},
    "blueprint": {"config"},
    "planner": {"config", "blueprint"},
    "telemetry": {"config", "blueprint", "storage"},
    "data": {"config", "storage"},
    "kernels": set(),
    "rendezvous": {"config"},
    "parallel": {"config", "blueprint"},
    "layers": {"config", "blueprint", "parallel", "kernels"},
    "models": {"config", "blueprint", "parallel", "kernels", "layers"},
    "pipeline": {"blueprint", "parallel"},
    "optim": {"config", "blueprint", "kernels"},
    "engines": {"config", "blueprint", "parallel", "optim", "kernels"},
    "checkpoint": {"config", "blueprint", "parallel", "models", "storage"},
    "inference": {
        "config", "blueprint", "parallel", "kernels", "models", "layers", "pipeline", "checkpoint",
        "data", "telemetry", "storage",
    },
    "train": {
        "config", "blueprint", "rendezvous", "parallel", "kernels", "layers", "models", "pipeline",
        "optim", "engines", "checkpoint", "inference", "data", "telemetry", "storage",
    },
    "rehearsal": {"config", "blueprint", "parallel", "data", "train"},
    "cli": {
        "config", "blueprint", "planner", "parallel", "kernels", "layers", "models", "pipeline",
        "optim", "engines", "checkpoint", "inference", "data", "telemetry", "storage", "train", "rehearsal",
        "rendezvous",
    },
}  # fmt: skip

NEVER: dict[str, set[str]] = {
    "config": {"torch", "numpy"},
    "storage": {"torch", "numpy"},
    "blueprint": {"torch", "numpy"},
    "planner": {"torch", "numpy"},
    "telemetry": {"torch"},
    "data": {"torch.distributed"},
    "kernels": {"torch.distributed"},
}
"""Libraries a folder must not import (torch: nor anything below it)."""
