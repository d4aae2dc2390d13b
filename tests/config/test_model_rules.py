"""What a token sees, and how positions enter: what does not go together is named with the way out."""

from __future__ import annotations

import shlex

import pytest

from megatron_lite.config.flags.parser import parse
from megatron_lite.config.rules.table import problems

GOOD = (
    "--num-layers 8 --hidden-size 96 --num-attention-heads 12 --seq-length 64 --lr 1e-3 "
    "--mock-data --vocab-size 100 --train-iters 100"
)
BAD = [
    ("--position-embedding-type rope --rotary-percent 0.4", "of 8 channels per head is 3"),
    ("--s2-group-size 8", "--s2-group-size 8 has no effect without --s2-attention; add it"),
    (
        "--s2-attention --attention-dropout 0 --s2-group-size 24",
        "--s2-group-size 24 must be even and divide --seq-length 64, since groups are moved by half of "
        "one; choose from 2, 4, 8, 16, 32, 64",
    ),
    (
        "--s2-attention --attention-dropout 0 --seq-length 60",
        "--s2-group-size 15, a quarter of --seq-length 60, must be even and divide --seq-length 60",
    ),
    (
        "--s2-attention --attention-dropout 0 --num-attention-heads 1",
        "moves the groups of half of the heads, and --num-attention-heads is 1",
    ),
    ("--s2-attention", "--attention-dropout is 0.1; give --attention-dropout 0"),
    (
        "--s2-attention --attention-dropout 0 --window-size 7,0",
        "--s2-attention and --window-size 7,0 both say what a token sees; drop one",
    ),
    ("--rotary-interleaved", "--rotary-interleaved has no say with --position-embedding-type"),
    (
        "--rotary-base 5e5",
        "--rotary-base 500000.0 has no say with --position-embedding-type learned",
    ),
    ("--use-rope-scaling", "--rope-scaling-type llama3 has no say with --position-embedding-type"),
    (
        "--position-embedding-type rope --rope-scaling-factor 4",
        "--rope-scaling-factor 4.0 has no say with --rope-scaling-type none, only with linear, ntk, "
        "dynamic, yarn, llama3, longrope, clex; choose",
    ),
    (
        "--position-embedding-type rope --rope-scaling-type linear --rope-original-length 64",
        "--rope-original-length 64 has no say with --rope-scaling-type linear, only with "
        "llama3, dynamic, yarn, longrope",
    ),
    (
        "--position-embedding-type rope --use-rope-scaling --rope-low-freq-factor 4",
        "--rope-low-freq-factor 4.0 must be below --rope-high-freq-factor 4.0",
    ),
    (
        "--position-embedding-type rope --rope-scaling-type yarn --rope-beta-fast 1",
        "--rope-beta-slow 1.0 must be below --rope-beta-fast 1.0",
    ),
    (
        "--position-embedding-type rope --rope-scaling-type yarn --rotary-base 1",
        "--rope-scaling-type yarn needs --rotary-base above 1, not 1.0",
    ),
    (
        "--position-embedding-type rope --rope-scaling-type ntk --rotary-percent 0.25",
        "needs at least 4 rotated channels per head, this model has 2",
    ),
    (
        "--position-embedding-type rope --rope-scaling-type longrope",
        "--rope-scaling-type longrope needs --rope-long-factors: 4 numbers with commas between",
    ),
    (
        "--position-embedding-type rope --rope-scaling-type longrope --rope-short-factors 1,1,1,0",
        "--rope-short-factors 1,1,1,0 is no list of numbers above 0",
    ),
    (
        "--position-embedding-type rope --rope-scaling-type longrope --rope-short-factors 1,nan,1,0",
        "--rope-short-factors 1,nan,1,0 is no list of numbers above 0",
    ),
    (
        "--position-embedding-type rope --rope-scaling-type longrope --rope-long-factors 1,2,3",
        "--rope-long-factors has 3 numbers, and 8 of 8 channels per head are rotated: give 4",
    ),
    (
        "--position-embedding-type rope --rope-scaling-type clex --rope-scaling-factor 2.5",
        "--rope-scaling-factor 2.5: with --rope-scaling-type clex it is the largest of the whole stretches",
    ),
    (
        "--position-embedding-type rope --rope-scaling-type clex --rope-original-length 2 "
        "--rope-scaling-factor 4",
        "--seq-length 64 is more than --rope-original-length 2 x --rope-scaling-factor 4 = 8, and clex "
        "spreads samples within that: give a factor of 32",
    ),
    ("--rope-scaling-factor 0.5", "--rope-scaling-factor 0.5 must be at least 1"),
]


@pytest.mark.parametrize("words, message", BAD)
def test_what_cannot_work_is_named_with_the_way_out(words: str, message: str) -> None:
    found = problems(parse(shlex.split(f"{GOOD} {words}")).config, 1)
    assert any(message in problem for problem in found), found
