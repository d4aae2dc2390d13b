"""Runs to be planned, from flags, and what a search asks of them."""

from __future__ import annotations

import dataclasses

from megatron_lite.blueprint.draw_up import Blueprint, draw_up
from megatron_lite.config.flags.parser import parse
from megatron_lite.config.rules import table as rules
from megatron_lite.config.sections.parallel import ParallelConfig
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.planner.hardware import Cluster, find_device
from megatron_lite.planner.memory import PlanInputs
from megatron_lite.planner.space import LayoutVariant

SMALL = "--num-layers 24 --hidden-size 2048 --num-attention-heads 16"
BASE = (
    "--seq-length 2048 --vocab-size 50257 --bf16 --global-batch-size 512 --micro-batch-size 2 --train-iters 10 "
    "--lr 1e-4 --dry-run"
)


def read(flags: str, model: str = SMALL) -> RunConfig:
    return parse(f"{BASE} {model} {flags}".split()).config


def asked_of(config: RunConfig) -> PlanInputs:
    return PlanInputs(config.parallel, config.precision, config.train.micro_batch_size)


def cluster_of(world: int, hardware: str = "a100-80g") -> Cluster:
    return Cluster(device=find_device(hardware), world_size=world, devices_per_node=8)


def variant_of(config: RunConfig, world: int) -> LayoutVariant:
    def variant(parallel: ParallelConfig, micro_batch_size: int) -> Blueprint:
        train = dataclasses.replace(config.train, micro_batch_size=micro_batch_size)
        changed = dataclasses.replace(config, parallel=parallel, train=train)
        rules.check_config(changed, world)
        return draw_up(changed, world)

    return variant
