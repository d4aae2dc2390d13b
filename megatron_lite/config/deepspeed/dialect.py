"""--deepspeed_config laid beside the flags: each key is mapped, told once, or refused with its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_lite.config.deepspeed.batches import BatchSizes, batch_sizes
from megatron_lite.config.deepspeed.key import DeepSpeedKey, shown, text_of, truth
from megatron_lite.config.deepspeed.keys import KEYS, SECTIONS, near_key
from megatron_lite.config.deepspeed.laying import FlagOfField, Laying, SaidKey
from megatron_lite.config.deepspeed.optimizers import lay_optimizer
from megatron_lite.config.deepspeed.passed import (
    DEEPSPEED,
    ENGINE_FIELD,
    PASSED,
    PASSED_FIELD,
    passed_key,
)
from megatron_lite.config.deepspeed.rates import lay_learning_rate
from megatron_lite.config.deepspeed.reading import FileValue, read_config
from megatron_lite.config.deepspeed.system_keys import NO_NVME

_ZERO = "zero_optimization"
_STAGE = "parallel.zero_stage"
_HOST, _HOST_SHARE = "parallel.optimizer_cpu_offload", "parallel.optimizer_offload_fraction"
_FORMATS = {"precision.fp16", "precision.bf16"}
_WANDB, _RUN = "telemetry.wandb_project", "telemetry.wandb_exp_name"


@dataclass(frozen=True, slots=True)
class LaidConfig:
    """What a ds.json brought besides the values themselves."""

    batches: BatchSizes | None
    notices: list[str]
    problems: list[str]


def lay_config(
    where: str,
    flags: Mapping[str, FlagOfField],
    *,
    values: dict[str, object],
    origin: dict[str, str],
) -> LaidConfig:
    """Lay a file over values and origins by section.field, which hold what flags and other files say.

    flags: of every section.field.
    """
    root, name = read_config(where)
    said: dict[str, SaidKey] = {}
    problems: list[str] = []
    for key in _keys(root, name, "", problems):
        said[key.name] = key
    laying = Laying(name, said, flags=flags, values=values, origin=origin)
    laying.problems += problems
    _each_by_itself(laying)
    _one_format(laying)
    _zero(laying)
    _gradient_format(laying)
    _writers(laying)
    lay_optimizer(laying)
    in_samples = lay_learning_rate(laying)
    batches = batch_sizes(laying, in_samples)
    return LaidConfig(batches, laying.notices, laying.problems)


def _keys(node: FileValue, name: str, prefix: str, problems: list[str]) -> Iterator[SaidKey]:
    """The keys of an object and of those inside it; what is unknown becomes a problem."""
    assert isinstance(node.value, dict)
    for key, inner in node.value.items():
        dotted, place = f"{prefix}{key}", f"{name}:{inner.line}"
        row = KEYS.get(dotted)
        if dotted in SECTIONS and isinstance(inner.value, dict):
            yield from _keys(inner, name, f"{dotted}.", problems)
        elif row is not None:
            yield SaidKey(dotted, inner.plain(), place)
        elif dotted == _ZERO and isinstance(inner.value, bool):  # the oldest form
            yield SaidKey(f"{_ZERO}.stage", int(inner.value), place)
        elif dotted in SECTIONS:
            if inner.value is not None and inner.value is not False:
                problems.append(
                    f"{place}: {dotted} takes an object in braces, got {shown(inner.plain())}"
                )
        else:
            problems.append(f"{place}: {dotted}: no such key{near_key(dotted)}")


def _each_by_itself(laying: Laying) -> None:
    """Keys that one row says all about."""
    reasons: dict[str, list[SaidKey]] = {}
    passed = _passed_on(laying)
    for key in laying.said.values():
        row = KEYS[key.name]
        if key.name in passed and row.kind != "mapped":
            continue
        if row.under is not None and not _is_on(laying, row.under):
            reasons.setdefault(f"has a say only with {row.under}", []).append(key)
        elif row.kind == "mapped":
            if row.to:
                _mapped(laying, row, key)
        elif row.kind == "harmless" or not row.asks(key.value):
            if row.kind == "harmless" and row.asks(key.value):
                reasons.setdefault(row.say, []).append(key)
        else:
            laying.problems.append(f"{key}: not supported; {row.say}")
    for say, keys in reasons.items():
        lines = ", ".join(f"{key.name} ({key.place.rpartition(':')[2]})" for key in keys)
        laying.notices.append(f"{laying.name}: {lines}: accepted, changes nothing: {say}")
    if _is_on(laying, "fp16.enabled") and "fp16.initial_scale_power" not in laying.said:
        laying.default(
            "precision.initial_loss_scale",
            2.0**16,
            "fp16 without initial_scale_power: 16, DeepSpeed's default",
        )


def _passed_on(laying: Laying) -> set[str]:
    """Keys that DeepSpeed gets as they are, where its own engine runs."""
    if laying.values[ENGINE_FIELD] != DEEPSPEED:
        return set()
    passed = {name: key for name, key in laying.said.items() if name in PASSED and not key.is_auto}
    own = laying.values[PASSED_FIELD]
    assert isinstance(own, list)
    given = {text.partition("=")[0] for text in own}
    laying.values[PASSED_FIELD] = own + [
        passed_key(name, key.value) for name, key in passed.items() if name not in given
    ]
    laying.origin[PASSED_FIELD] = f"file {laying.name}"
    return set(passed)


def _one_format(laying: Laying) -> None:
    """fp16 or bf16: the flag or key of the other one is named, which the rules cannot."""
    on = {
        field: key
        for key in laying.said.values()
        if key.value is True
        for field in KEYS[key.name].to
        if field in _FORMATS
    }
    for field, key in on.items():
        (other,) = _FORMATS - {field}
        if laying.given(other) and laying.values[other]:
            laying.problems.append(f"{key} contradicts {laying.flag(other)}; keep one")
    if len(on) == len(_FORMATS):
        laying.problems.append(f"{' contradicts '.join(map(str, on.values()))}; keep one")


def _is_on(laying: Laying, name: str) -> bool:
    key = laying.said.get(name)
    if key is not None and not key.is_auto:
        return key.value is True
    return key is not None and bool(laying.values[KEYS[name].to[0]])


def _mapped(laying: Laying, row: DeepSpeedKey, key: SaidKey) -> None:
    """Set the fields of a row."""
    if key.is_auto:
        laying.from_flags(key, row.to)
        return
    assert row.read is not None
    try:
        value = row.read(key.value)
    except ValueError as error:
        laying.problems.append(f"{key.place}: {key.name} {error}")
        return
    for field, one in zip(row.to, value if isinstance(value, tuple) else (value,), strict=True):
        if not _has_no_say(laying, field):
            laying.give(field, one, key, flag_wins=row.flag_wins)


def _has_no_say(laying: Laying, field: str) -> bool:
    """Partitioned activations are those kept for recomputation: without it there are none."""
    return (
        field == "parallel.distribute_saved_activations"
        and not (
            laying.values["parallel.recompute_granularity"] == "full"
            and laying.values["parallel.tensor_model_parallel_size"] != 1
        )
    )  # fmt: skip


def _zero(laying: Laying) -> None:
    """The stage, and where the optimizer's state lies."""
    stage = laying.said.get(f"{_ZERO}.stage")
    if stage is not None and stage.is_auto:
        laying.from_flags(stage, [_STAGE])
    elif stage is not None:
        row = KEYS[stage.name]
        assert row.read is not None
        try:
            number = row.read(stage.value)
        except ValueError as error:
            laying.problems.append(f"{stage.place}: {stage.name} {error}")
            number = None
        if isinstance(number, int):
            _give_stage(laying, stage, number)
    _offload(laying)


def _give_stage(laying: Laying, key: SaidKey, stage: int) -> None:
    """The file's stage, beside which --use-distributed-optimizer only asks for 1 or more."""
    bare = laying.before[_STAGE].removeprefix("flag ")
    if bare.replace("_", "-") not in laying.flags[_STAGE].at_least:
        laying.give(_STAGE, stage, key)
    elif stage < 1:
        laying.problems.append(f"{key} contradicts {bare}; keep one")
    else:
        laying.values[_STAGE], laying.origin[_STAGE] = stage, f"file {key.place} {key.name}"


def _offload(laying: Laying) -> None:
    """Where masters and optimizer state lie; two keys say it, and of one a share."""
    section = f"{_ZERO}.offload_optimizer"
    device, old = laying.said.get(f"{section}.device"), laying.said.get(f"{_ZERO}.cpu_offload")
    asked: dict[SaidKey, bool] = {}
    if device is not None and device.value not in ("cpu", "none", None):
        laying.problems.append(
            f'{device}: not supported; {NO_NVME}: write "cpu", or drop offload_optimizer'
        )
    elif device is not None:
        asked[device] = device.value == "cpu"
    if old is not None and isinstance(old.value, bool):
        asked[old] = old.value
    elif old is not None:
        laying.problems.append(
            f"{old.place}: {old.name} takes true or false, got {shown(old.value)}"
        )
    if len(set(asked.values())) > 1:
        laying.problems.append(f"{device} contradicts {old}; keep one")
        return
    for key, on in asked.items():
        laying.give(_HOST, on, key)
    ratio = laying.said.get(f"{section}.ratio")
    if ratio is None:
        return
    try:
        row = KEYS[ratio.name]
        assert row.read is not None
        share = row.read(ratio.value)
    except ValueError as error:
        laying.problems.append(f"{ratio.place}: {ratio.name} {error}")
        return
    if laying.values[_HOST]:
        laying.give(_HOST_SHARE, share, ratio)
    elif share != 1.0:
        laying.notices.append(f'{ratio}: has a say only with device "cpu"')


def _gradient_format(laying: Laying) -> None:
    """data_types.grad_accum_dtype: fp32, or the parameters' own format."""
    key = laying.said.get("data_types.grad_accum_dtype")
    if key is None or key.value is None:
        return
    values = laying.values
    own = "fp16" if values["precision.fp16"] else "bf16" if values["precision.bf16"] else "fp32"
    if key.value not in ("fp32", own):
        laying.problems.append(f'{key}: takes "fp32"{"" if own == "fp32" else f" or {own}"} here')
        return
    laying.give("parallel.accumulate_allreduce_grads_in_fp32", key.value == "fp32", key)


def _writers(laying: Laying) -> None:
    """TensorBoard and Weights & Biases, where they are enabled."""
    for section, fields in (
        ("tensorboard", {"output_path": "", "job_name": ""}),
        ("wandb", {"project": _WANDB, "team": "telemetry.wandb_entity", "group": _RUN}),
    ):
        on = laying.said.get(f"{section}.enabled")
        if on is None:
            continue
        try:
            asked = truth(on.value)
            said = {
                name: text_of(laying.said[f"{section}.{name}"].value)
                for name in fields
                if asked and f"{section}.{name}" in laying.said
            }
        except ValueError as error:
            laying.problems.append(f"{on.place}: {section} {error}")
            continue
        if asked and section == "tensorboard":
            folder = said.get("output_path", "").rstrip("/")
            path = f"{folder}/{said.get('job_name', 'DeepSpeedJobName')}".lstrip(
                "/" if not folder else ""
            )
            laying.give("telemetry.tensorboard_dir", path, on, flag_wins=True)
        elif asked:
            said.setdefault("project", "deepspeed")
            said.setdefault("group", said["project"])
            for name, value in said.items():
                laying.give(fields[name], value, on, flag_wins=True)
