"""Values that the values of other flags imply, as Megatron derives them; each is said in a line.

A flag, a file or a preset that names the value itself wins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping


def imply(values: dict[str, object], origin: dict[str, str]) -> list[str]:
    """Fill in what follows; values and origin by section.field."""
    notices = []
    for key, value, because, notice in (
        *_gelu(values, origin), *_recompute(values), *_vocabulary(values, origin),
        *_length(values, origin),
    ):  # fmt: skip
        values[key], origin[key] = value, because
        notices.append(notice)
    return notices


def _gelu(
    values: Mapping[str, object], origin: Mapping[str, str]
) -> Iterator[tuple[str, object, str, str]]:
    """Megatron's tanh form is that of its kernel fused with the bias; without that it is erf."""
    if origin["model.gelu"] != "default" or values["model.swiglu"]:
        return
    for key, flag in (
        ("precision.bias_gelu_fusion", "--no-bias-gelu-fusion"),
        ("model.add_bias_linear", "--disable-bias-linear"),
    ):
        if not values[key]:
            yield "model.gelu", "erf", f"implied by {flag}", (
                f"{flag}: GELU is its erf form, as in Megatron, whose tanh form is the kernel "
                "fused with the bias; --gelu tanh keeps it"
            )  # fmt: skip
            return


def _recompute(values: Mapping[str, object]) -> Iterator[tuple[str, object, str, str]]:
    """Full recomputation without more: layer by layer."""
    if values["parallel.recompute_granularity"] != "full":
        return
    because = "implied by --recompute-granularity full"
    for key, flag, value in (
        ("parallel.recompute_method", "--recompute-method", "uniform"),
        ("parallel.recompute_num_layers", "--recompute-num-layers", 1),
    ):
        if values[key] is None:
            yield key, value, because, (
                f"--recompute-granularity full without {flag}: {value} is taken"
            )  # fmt: skip


def _vocabulary(
    values: Mapping[str, object], origin: Mapping[str, str]
) -> Iterator[tuple[str, object, str, str]]:
    """A preset's vocabulary is what its model was trained with; a tokenizer's file says another."""
    because, rows = origin["model.vocab_size"], values["model.vocab_size"]
    if not because.startswith("preset "):
        return
    gpt2 = values["data.tokenizer_type"] == "GPT2BPETokenizer"
    key, flag = (
        ("data.vocab_file", "--vocab-file") if gpt2
        else ("data.tokenizer_model", "--tokenizer-model")
    )  # fmt: skip
    if values[key] is not None:
        yield "model.vocab_size", None, f"implied by {flag}", (
            f"{because}: its vocabulary of {rows:,} gives way to the ids of the tokenizer in {flag}; "
            "--vocab-size asks for more rows"
        )  # fmt: skip


def _length(
    values: Mapping[str, object], origin: Mapping[str, str]
) -> Iterator[tuple[str, object, str, str]]:
    """A length on the command line is the run's, in whatever unit a file or preset has another."""
    lengths = ("train.train_iters", "train.train_samples", "train.train_epochs")
    said = [key for key in lengths if values[key] is not None]
    by_flag = [key for key in said if origin[key].startswith("flag ")]
    if len(by_flag) == 1:
        because = origin[by_flag[0]]
        for key in said:
            if key not in by_flag:
                flag = f"--{key.removeprefix('train.').replace('_', '-')}"
                yield key, None, f"implied by {because}", (
                    f"{origin[key]}: {flag} {values[key]} gives way to {because.removeprefix('flag ')}"
                )  # fmt: skip
