"""GPT-2 equals Hugging Face's with the same weights: logits, loss and every gradient."""

import pytest
import torch

from megatron_lite.checkpoint.huggingface.gpt2 import GPT2
from megatron_lite.checkpoint.huggingface.llama import LLAMA
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.layers.contexts import ForwardContext, StageContext
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.parameters import local_parameters
from megatron_lite.parallel.context import ParallelContext
from tests.support.extras import needs
from tests.support.huggingface import require_equal
from tests.support.models import fill, logits_and_loss

transformers = needs("transformers")

CONFIG = ModelConfig(
    num_layers=2, hidden_size=48, num_attention_heads=3, seq_length=20, vocab_size=101,
    hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip


def theirs():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=101, n_positions=20, n_embd=48, n_layer=2, n_head=3,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    for parameter in model.parameters():  # biases are zero by default: give them something to show
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def their_tensor(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    source = GPT2.names.source(name, CONFIG)
    tensor = tensors[source.name]
    if source.transposed:
        tensor = tensor.t()
    return tensor if source.part is None else tensor.chunk(3)[source.part]


def ours(tensors):
    context = StageContext(CONFIG, ParallelContext.serial(), padded_vocab_size=128, vocab_size=101)
    model = Decoder(context, range(2), has_embedding=True, has_head=True)
    fill(model)
    with torch.no_grad():
        for local in local_parameters(model):
            for piece in local.pieces:
                piece.of(local.parameter).copy_(their_tensor(piece.name, tensors))
    return model


@pytest.fixture
def pair():
    reference = theirs()
    return reference, ours(dict(reference.named_parameters()))


def their_results(reference, tokens):
    """Logits, loss and gradients by name."""
    logits = reference(tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return logits.detach(), loss.detach(), {n: p.grad for n, p in reference.named_parameters()}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "exact"])
def test_logits_loss_and_every_gradient_equal_hugging_face(pair, dtype, seed):
    """Ours in fp32 against theirs in fp32, and against theirs computed in float64."""
    reference, model = pair
    tokens = torch.randint(0, 101, (3, 21), generator=torch.Generator().manual_seed(seed))
    their_logits, their_loss, gradients = their_results(reference.to(dtype), tokens)
    logits, loss = logits_and_loss(model, tokens)
    loss.backward()
    require_equal(logits[..., :101].transpose(0, 1), their_logits, "logits")
    require_equal(loss, their_loss, "loss")
    checked = set()
    for local in local_parameters(model):
        for piece in local.pieces:
            source = GPT2.names.source(piece.name, CONFIG)
            whole = gradients[source.name]
            # a key bias moves no softmax: its gradient is zero, so it is held against q, k and v's
            zero = piece.name.endswith("attention.k.bias")
            require_equal(
                piece.of(local.parameter.grad), their_tensor(piece.name, gradients), piece.name,
                whole.abs().max() if zero else None,
            )  # fmt: skip
            checked.add(source)
    # all of theirs, and the three parts of each fused one
    fused = sum(".c_attn." in name for name in gradients)
    assert len(checked) == len(gradients) + 2 * fused


def test_padding_columns_get_no_gradient(pair):
    _, model = pair
    tokens = torch.randint(0, 101, (2, 21), generator=torch.Generator().manual_seed(2))
    logits_and_loss(model, tokens)[1].backward()
    assert not model.embedding.tokens.weight.grad[101:].any()


@pytest.mark.parametrize(
    "changes",
    [
        {"swiglu": True, "normalization": "RMSNorm", "position_embedding_type": "rope",
         "add_bias_linear": False, "untie_embeddings_and_output_weights": True},
        {"group_query_attention": True, "num_query_groups": 1, "position_embedding_type": "none"},
    ],
)  # fmt: skip
def test_cached_decoding_equals_the_whole_forward(changes):
    import dataclasses

    from megatron_lite.inference.generate import generate

    config = dataclasses.replace(CONFIG, **changes)
    context = StageContext(config, ParallelContext.serial(), padded_vocab_size=128, vocab_size=101)
    model = Decoder(context, range(2), has_embedding=True, has_head=True)
    fill(model)
    prompt = [5, 17, 3]
    answer = generate(
        model, prompt, max_new_tokens=8, pick=lambda logits, _: logits.argmax(-1), eod=None
    )
    tokens = list(prompt)
    for _ in range(8):
        at = ForwardContext(
            samples=torch.zeros(1, dtype=torch.int64), index=torch.arange(len(tokens))
        )
        with torch.no_grad():
            logits = model(torch.tensor(tokens)[:, None], at)
        tokens.append(int(logits[-1, 0, :101].argmax()))
    assert answer.ids == tokens[3:]


def test_llama_parts_equal_hugging_face_llama():
    """RMSNorm, rotary positions, grouped queries and SwiGLU against an independent model."""
    import dataclasses

    config = dataclasses.replace(
        CONFIG, swiglu=True, normalization="RMSNorm", position_embedding_type="rope",
        add_bias_linear=False, untie_embeddings_and_output_weights=True, ffn_hidden_size=64,
        num_attention_heads=4, group_query_attention=True, num_query_groups=2,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=101, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
            max_position_embeddings=20, tie_word_embeddings=False,
        )
    )  # fmt: skip
    context = StageContext(config, ParallelContext.serial(), padded_vocab_size=128, vocab_size=101)
    model = Decoder(context, range(2), has_embedding=True, has_head=True)
    fill(model)
    tensors = dict(reference.named_parameters())
    with torch.no_grad():
        for local in local_parameters(model):
            for piece in local.pieces:
                source = LLAMA.names.source(piece.name, config)
                piece.of(local.parameter).copy_(tensors[source.name])
    tokens = torch.randint(0, 101, (2, 21), generator=torch.Generator().manual_seed(3))
    logits, _ = logits_and_loss(model, tokens)
    expected = reference(tokens[:, :-1]).logits
    torch.testing.assert_close(logits[..., :101].transpose(0, 1), expected, rtol=1e-4, atol=1e-5)
