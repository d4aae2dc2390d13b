"""Command lines become configs; what is wrong with them is said in one go."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.flags.legacy import LEGACY, MEGATRON_DEFAULTS, OURS_ONLY
from megatron_lite.config.flags.parser import ParsedFlags, parse, spellings
from megatron_lite.config.flags.presets import PRESETS
from megatron_lite.config.flags.settings import FlagSetting, documentation, sections, settings
from megatron_lite.config.rules.table import problems
from megatron_lite.config.sections.run import RunConfig

SIZES = ["--num-layers=4", "--hidden-size=64", "--num-attention-heads=4", "--seq-length=32"]


def value(parsed: ParsedFlags, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(parsed.config, section), name)


def error(argv: Sequence[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_no_flags_give_the_defaults() -> None:
    parsed = parse([])
    assert parsed.config == RunConfig()
    assert set(parsed.origin.values()) == {"default"}
    assert set(parsed.origin) == set(settings())
    assert parsed.notices == ()


def test_every_field_of_every_section_is_a_documented_setting() -> None:
    fields = [f"{s}.{f.name}" for s, cls in sections().items() for f in dataclasses.fields(cls)]
    assert list(settings()) == fields
    for key in fields:
        doc = documentation(key)
        assert len(doc.text) > 10
        source = Path(doc.file).read_text(encoding="utf-8").splitlines()
        assert source[doc.line - 1].strip().startswith(f"{key.split('.')[1]}:")


def test_no_flag_is_both_a_setting_and_a_row_of_the_table() -> None:
    assert not set(spellings()) & set(LEGACY)


def test_the_tables_name_existing_fields() -> None:
    assert set(MEGATRON_DEFAULTS) | OURS_ONLY <= set(settings())
    for row in LEGACY.values():
        by_value = {key for sets in row.by_value.values() for key in sets}
        named = {*row.sets, *row.unless_given, *by_value, row.value_to, row.tokens_to} - {None}
        assert named <= set(settings()), row.flag
        assert bool(named) == (row.kind == "mapped"), row.flag
        assert "_" not in row.flag and row.say


def sample(setting: FlagSetting) -> tuple[list[str], object]:
    """Some words for a setting's flag and the value they mean."""
    if setting.choices:
        text, item = str(setting.choices[-1]), setting.choices[-1]
    else:
        text, item = {int: ("7", 7), float: ("0.25", 0.25), str: ("a b", "a b")}[setting.kind]
    return ([text, text], [item, item]) if setting.many else ([text], item)


@pytest.mark.parametrize("flag", spellings())
@pytest.mark.parametrize("underscores", [False, True])
def test_every_spelling_sets_its_field(flag: str, underscores: bool) -> None:
    spelling = spellings()[flag]
    written = f"--{flag[2:].replace('-', '_')}" if underscores else flag
    words, expected = ([], spelling.value)
    if spelling.value is None:
        words, expected = sample(spelling.setting)
    parsed = parse([written, *words])
    assert value(parsed, spelling.setting.key) == expected
    assert parsed.origin[spelling.setting.key] == f"flag {written}"
    changed = [key for key, origin in parsed.origin.items() if origin.startswith("flag")]
    assert changed == [spelling.setting.key]


@pytest.mark.parametrize(
    "words, key, expected",
    [
        ("--lr=-1.5e-4", "learning_rate.lr", -1.5e-4),
        ("--lr -.5", "learning_rate.lr", -0.5),
        ("--seed -3", "train.seed", -3),
        ("--split 949,50,1", "data.split", "949,50,1"),
        ("--normalization rmsnorm", "model.normalization", "RMSNorm"),
        ("--timing-log-level 2", "telemetry.timing_log_level", 2),
        ("--data-path 0.35 wiki 0.65 owt", "data.data_path", ["0.35", "wiki", "0.65", "owt"]),
        ("--data-path=0.35 wiki 0.65 owt", "data.data_path", ["0.35", "wiki", "0.65", "owt"]),
        ("--rampup-batch-size 16 16 5859375", "train.rampup_batch_size", [16, 16, 5859375]),
        ("--no-query-key-layer-scaling", "model.apply_query_key_layer_scaling", False),
        ("--override-opt_param-scheduler", "learning_rate.override_opt_param_scheduler", True),
        ("--layernorm-epsilon 1e-6", "model.norm_epsilon", 1e-6),
        ("--disable-bias-linear", "model.add_bias_linear", False),
    ],
)
def test_values(words: str, key: str, expected: object) -> None:
    assert value(parse(words.split()), key) == expected


def test_a_value_may_look_like_a_flag_after_an_equals_sign() -> None:
    assert parse(["--save=--odd"]).config.checkpoint.save == "--odd"


@pytest.mark.parametrize(
    "words, message",
    [
        ("--gloal-batch-size 3", "--gloal-batch-size: unknown flag; did you mean --global-batch-"),
        ("--ddp-impl local", "--ddp-impl: unknown flag; did you mean --DDP-impl?"),
        ("-x", "-x: unknown flag"),
        ("--lr", "--lr takes a value (float), got none"),
        ("--lr --seed 3", "--lr takes a value (float), got none"),
        ("--lr nan", "--lr takes a finite number, got 'nan'"),
        ("--lr -inf", "--lr takes a finite number, got '-inf'"),
        ("--lr fast", "--lr takes a number, got 'fast'"),
        ("--train-iters 1e6", "takes a whole number, got the float '1e6'; write 1000000"),
        ("--train-iters 1.5", "takes a whole number, got the float '1.5'"),
        ("--fp16 true", "--fp16 takes no value, got 'true'; --no-fp16 is its opposite"),
        ("--fp16=", "--fp16 takes no value, got ''"),
        ("--save=", "--save got an empty value (an unset shell variable?)"),
        ("--split 949, 50, 1", "--split takes one value, got 3: '949,' '50,' '1'"),
        ("--lr-decay-style cosin", "takes one of constant, linear, cosine, inverse-square-root"),
        ("--use-flash-attn --attention-backend local", "--use-flash-attn (flash) and --attention"),
        ("--no-pipeline-parallel --pipeline-model-parallel-size 2", "contradict each other"),
        ("surplus", "'surplus' belongs to no flag"),
        ("--preset gpt2-123m", "--preset gpt2-123m: no such preset; did you mean gpt2-124m?"),
        ("--config /nowhere/run.yaml", "--config /nowhere/run.yaml: cannot be read (No such file"),
        ("--explain --nun-layers", "no such flag; did you mean --num-layers?"),
        ("--train-tokens 100", "--train-tokens 100 needs --seq-length"),
    ],
)
def test_what_is_wrong_is_named(words: str, message: str) -> None:
    assert message in error(words.split())


@pytest.mark.parametrize(
    ("words", "stage"),
    [
        ("--use-distributed-optimizer", 1),
        ("--use_distributed_optimizer --zero-stage 1", 1),
        ("--zero-stage 2 --use-distributed-optimizer", 2),
        ("--use-distributed-optimizer --zero-stage 3", 3),
        ("--no-use-distributed-optimizer --zero-stage 0", 0),
    ],
)
def test_a_distributed_optimizer_is_a_stage_of_at_least_one(words: str, stage: int) -> None:
    parsed = parse(words.split())
    assert parsed.config.parallel.zero_stage == stage and not parsed.notices


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--zero-stage 0 --use-distributed-optimizer", "--zero-stage (0) and --use-distributed-optimizer "
         "(at least 1) contradict each other; keep one"),
        ("--no-use-distributed-optimizer --use-distributed-optimizer", "contradict each other"),
        ("--no-use-distributed-optimizer --zero-stage 2", "contradict each other"),
        ("--use-distributed-optimizer yes", "takes no value, got 'yes'; --zero-stage takes one"),
        ("--zero-stage 4", "--zero-stage takes one of 0, 1, 2, 3; got 4"),
    ],
)  # fmt: skip
def test_stages_that_contradict_each_other_are_refused(words: str, message: str) -> None:
    assert message in error(words.split())


def test_older_files_say_the_stage_as_a_switch(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("parallel:\n  use_distributed_optimizer: true\n")
    assert parse(["--config", str(file)]).config.parallel.zero_stage == 1
    file.write_text("parallel:\n  zero_stage: 0\n")
    raised = parse(["--config", str(file), "--use-distributed-optimizer"])
    assert raised.config.parallel.zero_stage == 1
    assert raised.origin["parallel.zero_stage"] == "flag --use-distributed-optimizer"
    file.write_text("parallel:\n  use_distributed_optimizer: 7\n")
    assert "takes one of 0, 1, 2, 3; got 7" in error(["--config", str(file)])


@pytest.mark.parametrize(
    "words",
    ["--use-flash-attn --attention-backend auto", "--attention-backend auto --use-flash-attn"],
)
def test_auto_contradicts_nothing(words: str) -> None:
    assert parse(words.split()).config.precision.attention_backend == "flash"


@pytest.mark.parametrize(
    ("words", "key", "expected", "said"),
    [
        ("--lr 1 --lr 2", "learning_rate.lr", 2.0, "--lr (1.0) and --lr (2.0)"),
        ("--lr 2 --lr 1 --lr 2", "learning_rate.lr", 2.0, "--lr (1.0) and --lr (2.0)"),
        ("--norm-epsilon .1 --layernorm-epsilon .2", "model.norm_epsilon", 0.2,
         "--norm-epsilon (0.1) and --layernorm-epsilon (0.2)"),
        ("--bf16 --no-bf16", "precision.bf16", False, "--bf16 (True) and --no-bf16 (False)"),
        ("--data-path a --data-path 1 b 2 c", "data.data_path", ["1", "b", "2", "c"],
         "--data-path (a) and --data-path (1 b 2 c)"),
        ("--num-key-value-heads 2 --num-key-value-heads 4", "model.num_query_groups", 4,
         "--num-key-value-heads (2) and --num-key-value-heads (4)"),
        ("--preset gpt2-124m --preset gpt2-355m", "model.num_layers", 24,
         "--preset gpt2-124m and --preset gpt2-355m"),
        ("--seq-length 8 --train-tokens 80 --train-tokens 160", "train.train_samples", 20, ""),
    ],
    ids=["lr", "back again", "two names", "off", "several words", "alias", "preset", "derived"],
)  # fmt: skip
def test_the_last_of_a_repeated_flag_counts_and_is_said(
    words: str, key: str, expected: object, said: str
) -> None:
    """As argparse, and so Megatron, does it: scripts append flags to override earlier ones."""
    parsed = parse(words.split())
    assert value(parsed, key) == expected
    assert not said or f"{said}: the last one counts" in parsed.notices


@pytest.mark.parametrize(
    ("words", "key", "expected"),
    [
        ("--train-samples 2_000_000", "train.train_samples", 2_000_000),
        ("--train-iters 1_0", "train.train_iters", 10),
        ("--lr 1_0.5e-1_0", "learning_rate.lr", 10.5e-10),
        ("--train-tokens 1_024 --seq-length 1_024", "train.train_samples", 1),
        ("--save-interval 0", "checkpoint.save_interval", 0),
    ],
)
def test_numbers_are_read_as_megatrons_parser_reads_them(
    words: str, key: str, expected: object
) -> None:
    assert value(parse(words.split()), key) == expected


@pytest.mark.parametrize("text", ["2__0", "_2", "2_", "2_000.5", "0x10", "2,000"])
def test_what_is_no_whole_number_stays_none(text: str) -> None:
    assert "takes a whole number" in error(["--train-samples", text])


@pytest.mark.parametrize(
    ("words", "text", "compiled"),
    [
        ("", "", "auto"),
        ("--torch-compile", "torch_compile: true", "on"),
        ("--torch-compile on", "torch_compile: on", "on"),
        ("--torch-compile=auto", "torch_compile: auto", "auto"),
        ("--torch-compile off", "torch_compile: off", "off"),
        ("--no-torch-compile", "torch_compile: false", "off"),
        ("--torch_compile --bf16", 'torch_compile: "on"', "on"),
    ],
)
def test_what_is_compiled_is_asked_in_words_or_as_a_switch(
    words: str, text: str, compiled: str, tmp_path: Path
) -> None:
    """Older config files have a bool there, and YAML reads a bare on or off as one."""
    file = tmp_path / "run.yaml"
    file.write_text(f"precision: {{{text}}}\n", encoding="utf-8")
    for argv in (words.split(), ["--config", str(file)]):
        precision = parse(argv).config.precision
        assert precision.torch_compile == compiled
        assert precision.compiles(on_gpu=True) == (compiled != "off")
        assert precision.compiles(on_gpu=False) == (compiled == "on")


def test_a_wrong_word_for_what_is_compiled_is_refused_with_the_right_ones(tmp_path: Path) -> None:
    assert "--torch-compile takes one of auto, on, off; got 'inductor'" in error(
        ["--torch-compile", "inductor"]
    )
    file = tmp_path / "run.yaml"
    for word, told in (
        ("inductor", "takes one of auto, on, off; got 'inductor'"),
        ("1", "takes one of auto, on, off, or true or false; got 1"),
    ):
        file.write_text(f"precision: {{torch_compile: {word}}}\n", encoding="utf-8")
        said = error(["--config", str(file)])
        assert told in said and str(file) in said


def test_equal_duplicates_are_fine() -> None:
    parsed = parse(["--lr=1e-4", "--lr=0.0001", "--layernorm-epsilon=1e-6", "--norm-epsilon=1e-6"])
    assert parsed.config.learning_rate.lr == 1e-4


def test_all_problems_are_reported_together() -> None:
    text = error(["--nun-layers", "3", "--lr=x", "--batch-size", "4", "--zzzzzz"])
    assert text.splitlines() == [
        "4 problems on the command line:",
        "  1. --nun-layers: unknown flag; did you mean --num-layers?",
        "  2. --lr takes a number, got 'x'",
        "  3. --batch-size 4: not supported; renamed: use --micro-batch-size",
        "  4. --zzzzzz: unknown flag; --help lists all",
    ]


def test_precedence_is_preset_then_file_then_flag(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {num_layers: 3, hidden_size: 96}\noptim: {clip_grad: 0.5}\n")
    parsed = parse(f"--num-layers 2 --preset gpt2-124m --config {file}".split())
    expected = {
        "model.num_layers": (2, "flag --num-layers"),
        "model.hidden_size": (96, f"file {file}"),
        "optim.clip_grad": (0.5, f"file {file}"),
        "model.seq_length": (1024, "preset gpt2-124m"),
        "train.seed": (1234, "default"),
    }
    for key, (number, origin) in expected.items():
        assert (value(parsed, key), parsed.origin[key]) == (number, origin)


def test_a_file_may_name_the_preset_and_a_flag_another(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("preset: gpt2-124m\n")
    assert parse(["--yaml-cfg", str(file)]).config.model.num_layers == 12
    other = parse(["--config", str(file), "--preset", "gpt2-355m"])
    assert other.config.model.num_layers == 24


def test_configs_share_no_lists() -> None:
    first, second = parse([]).config, parse([]).config
    assert first.telemetry.profile_ranks is not second.telemetry.profile_ranks


def test_explain_tells_type_defaults_and_place(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(["--explain", "--calculate_per_token_loss"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("--calculate-per-token-loss  (train.calculate_per_token_loss)\n")
    assert "type:     bool\n    default:  on\n    Megatron: off\n" in out
    doc = documentation("train.calculate_per_token_loss")
    assert out.endswith(f"{doc.file}:{doc.line}\n")


@pytest.mark.parametrize("flag", [*spellings(), *LEGACY])
def test_every_flag_can_be_explained(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--explain", flag])
    assert capsys.readouterr().out.startswith(f"{flag}  (")


def test_help_names_every_flag_but_the_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    assert left.value.code == 0
    words = capsys.readouterr().out.split()
    for setting in settings().values():
        assert setting.flag in words or setting.off[0] in words
    for row in LEGACY.values():
        assert (row.flag in words) == (row.kind != "refused")


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--list-presets"])
    listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert listed["gpt3-175b"].split()[1:] == [
        "96", "12288", "96", "2048", "50257", "arXiv:2005.14165,", "table", "2.1"
    ]  # fmt: skip
    assert {"preset", *PRESETS} == set(listed)


def test_importing_the_config_imports_neither_torch_nor_numpy() -> None:
    program = (
        "import sys; import megatron_lite.config.rules.table; "
        "from megatron_lite.config.flags.parser import parse; parse([]); "
        "print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "[]\n"


NUMBERS = [s for s in settings().values() if s.kind in (int, float)]
AWKWARD = ["0", "-1", "1" + "0" * 30, "1e400", "nan", "-inf", "", "1_0", "0x10", "9" * 5000]


@pytest.mark.parametrize("text", AWKWARD, ids=lambda text: text[:12] or "empty")
@pytest.mark.parametrize("setting", NUMBERS, ids=lambda setting: setting.name)
def test_an_awkward_number_is_taken_or_refused_by_name(setting: FlagSetting, text: str) -> None:
    try:
        parsed = parse([*SIZES, f"{setting.flag}={text}"])
    except ConfigError as refused:
        assert setting.flag in str(refused)
        return
    assert text in ("0", "-1", "1" + "0" * 30, "1_0")
    number = value(parsed, setting.key)
    assert number in (float(text), [float(text)])
    if float(text) in (-1.0, 1e30):  # no count, rate or size is negative or 10^30
        named = [p for p in problems(parsed.config, 1) if setting.flag in p]
        assert named or (number == 1e30 and setting.kind is float)
