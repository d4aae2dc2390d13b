"""One GPU equals the CPU: losses of a tiny model, dropout masks, weights, every kernel."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from megatron_lite.kernels import documents, nf4
from megatron_lite.kernels.attention import AttentionCall
from megatron_lite.kernels.compiled import Compiler
from megatron_lite.kernels.on_request import ON_REQUEST
from megatron_lite.kernels.random import feature_bits, keep_mask, key, normal, token_numbers
from megatron_lite.kernels.table import TABLE, Need, choose
from megatron_lite.optim.groups import Rates
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.train.ahead import hear, update_unheard
from megatron_lite.train.assemble import assemble
from megatron_lite.train.feed import pinned_on
from megatron_lite.train.measuring.device import be_deterministic
from megatron_lite.train.measuring.waits import DeviceWaits
from megatron_lite.train.step import begin_step, train_step
from tests.support.axes import BF16
from tests.support.kernels import INPUTS, MASKED, packed_rows, run_with_gradients
from tests.support.tiny import draw, make_batches, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def losses(device, **changes):
    config = tiny_config(model__hidden_dropout=0.1, **changes)
    blueprint = draw(config, 1)
    run = assemble(config, blueprint, ParallelContext.serial(device))
    seen = []
    for step in range(5):
        run.progress.step = step
        batches = make_batches(config, blueprint, 0, step, ragged=True)
        seen.append(train_step(run, batches, lr=1e-2, weight_decay=0.1).loss.item())
    return seen


@pytest.mark.parametrize("compiled", ["auto", "off"])
def test_losses_equal_the_cpus(compiled):
    found = losses("cuda", precision__torch_compile=compiled)
    assert found == pytest.approx(losses("cpu"), rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adafactor", "adam8bit", "muon", "galore"])
def test_states_of_other_shapes_and_formats_follow_the_cpu(optimizer):
    changes = {"optim__optimizer": optimizer, "optim__muon_fp32_matmul_prec": "highest",
               "optim__galore_rank": 8}  # fmt: skip
    # of 8 bits one may be rounded the other way
    assert losses("cuda", **changes) == pytest.approx(losses("cpu", **changes), rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_fp32(precision):
    changes = {f"precision__{precision}": True, "precision__initial_loss_scale": 1024.0}
    assert losses("cuda", **changes) == pytest.approx(losses("cpu"), rel=2e-2)


PIECES = [(op, row) for op, rows in TABLE.items() for row in rows if row.fusible]


@pytest.mark.parametrize(("op", "row"), PIECES, ids=[op for op, _ in PIECES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_piece_equals_its_reference(op, row, dtype):
    """Its dropout mask bit for bit (CPU twin: tests/kernels/test_compiled.py)."""
    device = torch.device("cuda")
    if row.usable(Need(device, dtype)) is not None:
        pytest.skip("not usable here")
    compiler = Compiler(warn=pytest.fail)
    assert compiler.try_on(device) is None
    made = replace(row, run=compiler.piece(op, row.run))
    expected = run_with_gradients(row, op, device, dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for ours, theirs in zip(run_with_gradients(made, op, device, dtype), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        if op == "dropout":
            assert torch.equal(ours == 0.0, theirs == 0.0)


def test_weights_and_masks_are_those_of_the_cpu():
    def draw_on(device):
        x = normal(torch.empty(64, 48, device=device), key(1), std=1.0, offset=(3, 5), columns=99)
        tokens = token_numbers(torch.arange(4, device=device), torch.arange(9, device=device))
        features = feature_bits(torch.arange(32, device=device))
        mask = keep_mask(torch.tensor(key(2), device=device), tokens, features, 0.2)
        return x.cpu(), mask.cpu()

    (x, mask), (y, other) = draw_on("cuda"), draw_on("cpu")
    torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    assert torch.equal(mask, other)


WGRAD, UNPACK = "linear_weight_gradient", "unpack_nf4"
COMPARED = [
    (op, inputs)
    for op, rows in TABLE.items()
    if any(not row.fusible for row in rows[:-1]) and op not in (WGRAD, UNPACK)
    for inputs in INPUTS[op]
]


@pytest.mark.parametrize(("op", "inputs"), COMPARED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_equals_its_reference(op, inputs, dtype):
    device = torch.device("cuda")
    expected = run_with_gradients(TABLE[op][-1], inputs, device, dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    tried = 0
    for row in TABLE[op][:-1]:
        need = Need(
            device, dtype, backend="flash", capability=torch.cuda.get_device_capability(),
            **MASKED.get(inputs, {}),
        )  # fmt: skip
        if row.usable(need) is None and (inputs in MASKED or not row.for_masks):
            tried += 1
            found = run_with_gradients(row, inputs, device, dtype)
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert tried, f"no faster twin of {op} runs here"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bitsandbytes_unpacks_the_reference_to_the_bit(dtype):
    """Its CPU twins: tests/kernels/test_nf4.py, and behind a stand-in test_table.py."""
    device = torch.device("cuda")
    row, reference = TABLE[UNPACK][0], TABLE[UNPACK][-1]
    reason = row.usable(Need(device, dtype))
    if reason is not None:
        pytest.skip(f"{row.name}: {reason}")
    weight = torch.randn(96, 512, device=device)
    codes, absmax = nf4.pack(weight, 64)
    here = nf4.pack(weight.cpu(), 64)
    assert torch.equal(codes.cpu(), here[0]) and torch.equal(absmax.cpu(), here[1])
    given = codes, absmax, nf4.quantile_pairs(device), dtype
    assert torch.equal(row.run(*given), reference.run(*given))


def test_adapters_beside_4_bits_follow_the_cpu():
    packed = {
        "model__hidden_size": 128, "model__ffn_hidden_size": 128, "lora__lora_rank": 4,
        "lora__lora_base": "nf4",
    }  # fmt: skip
    assert losses("cuda", **packed) == pytest.approx(losses("cpu", **packed), rel=1e-4)


@pytest.mark.parametrize(("op", "row"), [(op, r) for op, rows in ON_REQUEST.items() for r in rows])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_of_others_equals_the_reference(op, row, dtype):
    """Its CPU twin runs it behind a stand-in of its package: tests/kernels/test_on_request.py."""
    device = torch.device("cuda")
    reason = row.usable(Need(device, dtype))
    if reason is not None:
        pytest.skip(f"{row.name}: {reason}")
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    found, expected = (run_with_gradients(r, op, device, dtype) for r in (row, TABLE[op][-1]))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_gradient_is_one_product_into_the_fp32_sum_of_its_cpu_twin(dtype):
    choice = choose(WGRAD, Need(torch.device("cuda"), dtype))
    assert choice.implementation.name == "one-product"
    dy, x, total = torch.randn(96, 2, 64), torch.randn(96, 2, 48), torch.full((64, 48), 1000.0)
    low = [factor.to(dtype) for factor in (dy, x)]
    on_gpu = total.cuda()
    with torch.no_grad():
        returned = choice.run(*(factor.cuda() for factor in low), on_gpu)
        twin = choice.run(*low, total)
    assert returned.data_ptr() == on_gpu.data_ptr()
    torch.testing.assert_close(on_gpu.cpu(), twin, rtol=1e-6, atol=1e-3)


def test_flex_is_compiled_once_for_changing_documents():
    torch._dynamo.reset()
    counters.clear()
    for borders in ([0, 300, 600], [0, 7, 131, 300, 301, 600], [0, 299, 300, 600]):
        q, k, v = (
            torch.randn(2, n, 300, 64, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2)
        )
        packed = packed_rows(borders)
        call = AttentionCall(segments=replace(packed, cu_seqlens=packed.cu_seqlens.cuda()))
        documents.flex(q.requires_grad_(), k, v, call).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1 and not documents.flex.failed


def test_attention_dropout_of_a_vendor_kernel_is_reproducible():
    changes = {"model__attention_dropout": 0.1, BF16: True}
    assert losses("cuda", **changes) == losses("cuda", **changes)


@pytest.fixture
def deterministic(monkeypatch):
    """--deterministic-mode in this process, and gone afterwards."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    be_deterministic()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_deterministic_runs_are_equal_to_the_last_bit(deterministic, precision):
    changes = {BF16: precision == "bf16", "model__attention_dropout": 0.1}
    first = losses("cuda", **changes)
    assert [loss.hex() for loss in losses("cuda", **changes)] == [loss.hex() for loss in first]


def test_tf32_rounds_products_and_its_absence_does_not():
    a, b = (torch.randn(512, 512, device="cuda") for _ in range(2))
    exact, errors = a.double() @ b.double(), {}
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for tf32 in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            errors[tf32] = ((a @ b).double() - exact).norm().item() / exact.norm().item()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert errors[False] < 1e-6 < 1e-5 < errors[True]


def test_waits_on_a_device_are_measured_on_its_stream():
    waits, a = DeviceWaits(), torch.randn(4096, 4096, device="cuda")
    with waits:
        for _ in range(20):
            a @ a
    assert waits.take() > 1e-4 and waits.take() == 0.0


WITH_APEX = pytest.mark.skipif(
    importlib.util.find_spec("amp_C") is None,
    reason="needs apex built with its CUDA extensions: docs/guides/install-gpu.md",
)


@WITH_APEX
def test_apexs_adam_learns_as_ours_where_it_is_built():
    found, expected = (losses("cuda", optim__optimizer=name) for name in ("apex-adam", "adam"))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "optimizer", ["adam", "sgd", "muon", pytest.param("apex-adam", marks=WITH_APEX)]
)
def test_ten_steps_wait_for_nothing(optimizer):
    """Losses are those of steps that wait, and a step in between that is bad leaves weights alone."""
    changes = {BF16: True, "model__hidden_dropout": 0.1, "model__attention_dropout": 0.1,
               "optim__optimizer": optimizer}  # fmt: skip
    config = tiny_config(**changes)
    blueprint = draw(config, 1)
    run = assemble(config, blueprint, ParallelContext.serial("cuda"))
    assert run.runs_ahead and not run.waits_because
    pin, rates = pinned_on(run.ctx.device), Rates(1e-2, 0.1)
    fed = [[pin(batch) for batch in make_batches(config, blueprint, 0, n)] for n in range(12)]
    seen, unheard = [], None

    def step(number):
        nonlocal unheard
        run.progress.step = number
        begun = begin_step(run, fed[number])
        if unheard is not None:
            seen.append(hear(run, unheard).heard.seen.loss)
        unheard = update_unheard(run, begun, rates)

    step(0)
    step(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(2, 12):
            step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    again = assemble(config, blueprint, ParallelContext.serial("cuda"))
    expected = []
    for number in range(11):
        again.progress.step = number
        result = train_step(again, fed[number], lr=1e-2, weight_decay=0.1)
        expected.append(result.heard.seen.loss)
    assert seen == pytest.approx(expected, rel=1e-4)


def test_a_bad_step_is_left_out_by_the_device():
    config = tiny_config()
    blueprint = draw(config, 1)
    run = assemble(config, blueprint, ParallelContext.serial("cuda"))
    batches = make_batches(config, blueprint, 0, 0)
    train_step(run, batches, lr=1e-2, weight_decay=0.1)
    run.engine.accumulators()[3][1].view(-1)[0] = float("nan")
    held = [*run.engine.weights(owned=False), *run.engine.state(owned=False)]
    before = [piece.data.clone() for piece in held]
    unheard = update_unheard(run, begin_step(run, batches), Rates(1e-2, 0.1))
    assert hear(run, unheard) is None
    assert all(torch.equal(a, piece.data) for a, piece in zip(before, held, strict=True))


def test_a_loader_s_batches_are_pinned_whole():
    config = tiny_config()
    (batch, *_) = make_batches(config, draw(config, 1), 0, 0)
    pinned = pinned_on(torch.device("cuda", 0))(batch)
    for name in ("tokens", "sample_numbers", "loss_mask"):
        assert torch.from_numpy(getattr(pinned, name)).is_pinned()
        assert (getattr(pinned, name) == getattr(batch, name)).all()
