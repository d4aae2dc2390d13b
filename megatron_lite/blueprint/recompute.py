"""Which layers, and which parts of a layer, are recomputed in backward: read once from the flags.

full uniform N   groups of N layers; only each group's input is kept
full block N     the first N layers of a stage, one by one; the others keep everything
selective        parts of a block: core_attn, mlp, layernorm (arXiv:2205.05198)
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.config.sections.parallel import ParallelConfig


@dataclass(frozen=True, slots=True)
class RecomputePlan:
    """What a stage recomputes; the default keeps everything."""

    modules: frozenset[str] = frozenset()
    group: int = 0
    """Layers per recomputed group; 0 recomputes no whole layers."""

    layers: int | None = None
    """Only the first so many layers of the stage; None means all."""

    split: bool = False
    """Keep only this tp rank's slice of a group's input (--distribute-saved-activations)."""

    @classmethod
    def from_config(cls, parallel: ParallelConfig) -> RecomputePlan:
        """The plan of the recompute flags, which config/rules has checked together."""
        if parallel.recompute_granularity is None:
            return cls()
        if parallel.recompute_granularity == "selective":
            return cls(modules=frozenset(parallel.recompute_modules))
        count = parallel.recompute_num_layers or 1
        split = parallel.distribute_saved_activations
        if parallel.recompute_method == "block":
            return cls(group=1, layers=count, split=split)
        return cls(group=count, split=split)

    def groups(self, num_layers: int) -> list[tuple[range, bool]]:
        """(positions of layers on the stage, whether they are recomputed) in order."""
        if not self.group:
            return [(range(num_layers), False)]
        until = num_layers if self.layers is None else min(self.layers, num_layers)
        cut = [
            (range(start, min(start + self.group, until)), True)
            for start in range(0, until, self.group)
        ]
        return [*cut, (range(until, num_layers), False)] if until < num_layers else cut

    def recomputed(self, num_layers: int) -> range:
        """Positions on the stage of the layers whose whole forward runs again."""
        until = num_layers if self.layers is None else min(self.layers, num_layers)
        return range(until if self.group else 0)
