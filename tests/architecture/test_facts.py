"""What a config says is read in one place: nobody else derives the same fact from it once more."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.architecture.source import SOURCES, dotted
from tests.support.places import ROOT

OF_A_FIGURE = frozenset(
    [
        "ffn_hidden_size",
        "kv_channels",
        "num_query_groups",
        "swiglu",
        "add_bias_linear",
        "add_qkv_bias",
        "window_size",
        "rotary_interleaved",
        "qk_layernorm",
        "parallel_residual",
        "normalization",
    ]
)
"""Fields of ModelConfig from which blueprint/figure/ makes the parts of a model."""

MAY_READ: Mapping[str, str] = {
    "megatron_lite/config/": "defaults, rules and what a checkpoint's model must share",
    "megatron_lite/blueprint/figure/": "the parts are made of them",
    "megatron_lite/checkpoint/huggingface/": "another library's file says them its own way",
}
"""Begin of a path -> why it reads what a figure is made of."""

ONE_READER: Mapping[str, tuple[str, ...]] = {
    "ddp_bucket_size": ("megatron_lite/blueprint/buckets.py",),
    "recompute_num_layers": (
        "megatron_lite/blueprint/recompute.py",
        "megatron_lite/planner/advice.py",  # says the flag again
    ),
    "distribute_saved_activations": (
        "megatron_lite/blueprint/recompute.py",
        "megatron_lite/planner/advice.py",  # says it
    ),
    "make_vocab_size_divisible_by": (
        "megatron_lite/blueprint/draw_up.py",
        "megatron_lite/blueprint/plan.py",  # says it
        "megatron_lite/inference/model.py",  # a checkpoint's model, without a run
    ),
}
"""A field of a config -> the files outside config/ that read it; others ask those."""

MAY_REFUSE: Mapping[str, str] = {
    "megatron_lite/blueprint/figure/transformer.py": "a head that has no row, which no rule can see",
    "megatron_lite/blueprint/grid.py": "places that are not on a grid, which no flag can say",
    "megatron_lite/blueprint/optimizers.py": "what an optimizer needs whole is known of parts only",
    "megatron_lite/blueprint/param_groups.py": "a group that has no tensor, which is known of names only",
}
"""A file of blueprint/ that raises ConfigError -> what; for all else it asks the rules of config/."""

COUNTS_MICRO_BATCHES: Mapping[tuple[str, str], str] = {
    ("megatron_lite/config/sections/train.py", "samples_at_once"): "the unit of every batch size",
    ("megatron_lite/blueprint/batches.py", "microbatches"): "how many a step has",
    ("megatron_lite/data/sampler.py", "sample_numbers"): "which samples one of them is",
    ("megatron_lite/data/sampler.py", "__call__"): "Megatron's cyclic order goes by rounds",
    ("megatron_lite/data/sampler.py", "_of_epoch"): "the same",
    ("megatron_lite/data/loader.py", "_read_ahead"): "where the next step begins",
    ("megatron_lite/config/rules/layout.py", "whole_groups"): "says a number that is not whole",
}
"""(file, function) that may multiply a micro batch by data-parallel ranks, or divide by it -> why."""

OF_OTHER_SAMPLES: Mapping[str, str] = {
    "megatron_lite/train/reading.py": "which samples a rank reads, and in which order",
    "megatron_lite/train/step.py": "the tokens, and the samples, of all ranks",
    "megatron_lite/inference/evaluating/scorer.py": "which rows a rank scores",
    "megatron_lite/inference/evaluating/problems.py": "which problems a rank solves",
    "megatron_lite/train/measuring/timeline.py": "a rank's place, in words",
    "megatron_lite/rehearsal/rehearse.py": "a rank's place, in words",
}
"""A file that asks a ParallelContext for its axis dp -> what for; the same weights are `replicas`."""


def modules(tree: ast.AST) -> set[str]:
    """Names that stand for modules or what was imported from them."""
    return {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }


def reads(tree: ast.AST, fields: frozenset[str]) -> Iterator[tuple[int, str]]:
    """(line, field) of each `x.field` and `getattr(x, "field")`; functions of modules are none."""
    imported = modules(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in fields:
            if dotted(node.value) not in imported:
                yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and dotted(node.func) == "getattr":
            for value in node.args[1:2]:
                if isinstance(value, ast.Constant) and value.value in fields:
                    yield node.lineno, str(value.value)


def products(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, function) of each product of a micro batch and data-parallel ranks, and division by it."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if not isinstance(node, ast.BinOp):
                continue
            divisor = node.right if isinstance(node.op, ast.Div | ast.FloorDiv) else None
            if isinstance(divisor, ast.Call) and "samples_at_once" in dotted(divisor.func):
                yield node.lineno, function.name
            elif isinstance(node.op, ast.Mult):
                words = {word for factor in factors(node) for word in factor.split(".")}
                if any("micro" in word for word in words) and words & {"dp", "dp_size"}:
                    yield node.lineno, function.name


def factors(node: ast.expr) -> list[str]:
    """Dotted names in a chain of products."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return [*factors(node.left), *factors(node.right)]
    return [dotted(node)]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def holding(*words: str) -> Iterator[tuple[str, ast.AST]]:
    """(name, tree) of the files in whose text one of the words occurs."""
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if any(word in text for word in words):
            yield name(path), ast.parse(text)


def test_only_the_figure_reads_what_it_is_made_of() -> None:
    found = [
        f"{file}:{line}: {field}"
        for file, tree in holding(*OF_A_FIGURE)
        if not file.startswith(tuple(MAY_READ))
        for line, field in reads(tree, OF_A_FIGURE)
    ]
    assert found == []


@pytest.mark.parametrize("field", ONE_READER)
def test_a_flag_that_means_more_than_it_says_has_one_reader(field: str) -> None:
    found = {
        file
        for file, tree in holding(field)
        if not file.startswith("megatron_lite/config/")
        for _ in reads(tree, frozenset({field}))
    }
    assert found == set(ONE_READER[field])


def test_the_planner_asks_whether_the_sequence_is_split_not_whether_that_was_asked_for() -> None:
    asked = frozenset({"sequence_parallel"})
    found = {
        file
        for file, tree in holding(*asked)
        if file.startswith(("megatron_lite/planner/", "megatron_lite/blueprint/"))
        for _ in reads(tree, asked)
    }
    assert found == {"megatron_lite/planner/shortage.py"}  # which adds the flag


def test_micro_batches_of_a_step_are_counted_in_one_place() -> None:
    found = {(file, function) for file, tree in holding("micro") for _, function in products(tree)}
    assert found == set(COUNTS_MICRO_BATCHES)


def test_rules_about_sizes_stand_in_config() -> None:
    found = {
        file
        for file, tree in holding("ConfigError", "all_together")
        for node in ast.walk(tree)
        if file.startswith("megatron_lite/blueprint/") and isinstance(node, ast.Raise)
    }
    assert found == set(MAY_REFUSE)


def test_only_who_reads_samples_asks_for_the_axis_of_samples() -> None:
    found = {
        file
        for file, tree in holding(".dp")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "dp"
        if dotted(node.value).split(".")[-1] in ("ctx", "at")
        if file.startswith("megatron_lite/")
    }
    assert found == set(OF_OTHER_SAMPLES)


@pytest.mark.parametrize(
    "source", ["model.swiglu", "run.model.swiglu", "getattr(model, 'swiglu')", "f().swiglu"]
)
def test_a_read_field_is_found(source: str) -> None:
    assert [field for _, field in reads(ast.parse(source), OF_A_FIGURE)] == ["swiglu"]


def test_a_function_of_a_module_is_no_field() -> None:
    source = "from megatron_lite.kernels import reference\nreference.swiglu(x)"
    assert list(reads(ast.parse(source), OF_A_FIGURE)) == []


@pytest.mark.parametrize(
    "source",
    [
        "size // (micro * ctx.dp.size)",
        "b.micro_batch_size * b.dp",
        "seq * train.micro_batch_size * dp",
        "size // train.samples_at_once(dp)",
    ],
)
def test_a_count_of_micro_batches_is_found(source: str) -> None:
    tree = ast.parse(f"def count():\n    return {source}")
    assert {function for _, function in products(tree)} == {"count"}
