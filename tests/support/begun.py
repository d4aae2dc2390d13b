"""A Llama of Hugging Face's whose tokenizer puts a token before every text, and that says letters."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.extras import needs
from tests.support.huggingface import tokenizer_files
from tests.support.llama import llama

BEGIN = 262


def speaks(table: torch.nn.Module) -> None:
    """Says letters, merges and the end of a document: other tokens never have the largest logit."""
    silent = [n for n in range(256) if chr(n) not in "the inrsdoaq"]
    with torch.no_grad():
        table.weight[silent] = 0.0


def write_llama(path: Path) -> None:
    """With a tokenizer that puts a token before every text."""
    model = llama(
        num_attention_heads=4, intermediate_size=52, max_position_embeddings=64, bos_token_id=BEGIN
    )
    speaks(model.lm_head)
    model.save_pretrained(path)
    vocab, merges = tokenizer_files(path / "files", "vocab.json", "merges.txt")
    tokenizers, transformers = needs("tokenizers"), needs("transformers")
    whole = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab), str(merges)))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = tokenizers.decoders.ByteLevel()
    whole.add_special_tokens(["<|endoftext|>", "<s>"])
    whole.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BEGIN)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole, bos_token="<s>", eos_token="<|endoftext|>"
    ).save_pretrained(path)
