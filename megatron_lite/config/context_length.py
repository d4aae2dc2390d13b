"""How long a text may be for a model with rotary positions, and what is said of a longer one."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.sections.model import BY_LENGTH, SCALING, ModelConfig


def trained_length(model: ModelConfig) -> int | None:
    """Tokens of the longest text that the positions are made for; None where there is no such bound.

    Learned tables end by themselves, and of a window only the distances within it are seen.
    """
    known = model.num_positions
    if model.position_embedding_type != "rope" or (model.window or known + 1) <= known:
        return None
    if model.rope_scaling_type == "dynamic":
        return None
    if model.rope_scaling_type in SCALING["rope_original_length"]:
        return max(known, int(model.rope_original_length * model.rope_scaling_factor))
    return known if model.rope_scaling_type == "none" else None  # the others do not know of what


def beyond_trained(model: ModelConfig, length: int) -> str | None:
    """The warning that a text of so many tokens goes beyond what the model was trained for."""
    reach = trained_length(model)
    if reach is None or length <= reach:
        return None
    what = f"{length} tokens are {length - reach} more than the {reach} that this model "
    if model.rope_scaling_type != "none":
        return (
            f"{what}reaches with --rope-scaling-type {model.rope_scaling_type} and --rope-scaling-factor "
            f"{model.rope_scaling_factor:g}: expect nonsense beyond them, or tune it for more; see "
            "docs/guides/long-context.md"
        )
    return (
        f"{what}was trained for, and its positions are not scaled: expect nonsense beyond them. "
        f"--rope-scaling-type yarn --rope-scaling-factor {-(-length // reach)} --rope-original-length "
        f"{reach} and some steps at the new length make them reach; see docs/guides/long-context.md"
    )


def length_lines(model: ModelConfig, length: int) -> Iterator[str]:
    """What to say before a text is continued to so many tokens: a warning, and what scaling goes by."""
    if (warning := beyond_trained(model, length)) is not None:
        yield f"WARNING: {warning}"
    if model.position_embedding_type == "rope" and model.rope_scaling_type in BY_LENGTH:
        original = model.rope_original_length
        how = "as in texts up to" if length <= original else "scaled as beyond"
        yield (
            f"--rope-scaling-type {model.rope_scaling_type}: positions are {how} {original} tokens, for a "
            f"text of {length} with its prompt"
        )


def stretch_warnings(before: ModelConfig, now: ModelConfig) -> Iterator[str]:
    """Where training continues on longer samples than the weights are of, and positions do not reach.

    before: the checkpoint's model.  Another --rotary-base is a way to stretch, too.
    """
    known, rope = trained_length(before), now.position_embedding_type == "rope"
    if known is None or not rope or now.seq_length <= known:
        return
    if now.rope_scaling_type == before.rope_scaling_type and now.rotary_base == before.rotary_base:
        yield f"--seq-length: {beyond_trained(before, now.seq_length)}"
    if now.rope_scaling_type not in SCALING["rope_original_length"]:
        return
    original, factor = now.rope_original_length, now.rope_scaling_factor
    if before.rope_scaling_type == "none" and original != known:
        yield (
            f"--rope-original-length {original} is not the {known} tokens that the checkpoint's model was "
            f"trained for: give --rope-original-length {known}"
        )
    if now.rope_scaling_type != "dynamic" and now.seq_length > original * factor:
        yield (
            f"--seq-length {now.seq_length} is more than --rope-original-length {original} x "
            f"--rope-scaling-factor {factor:g} = {original * factor:g}: give a factor of "
            f"{-(-now.seq_length // original)}"
        )
