"""Which tokens are read, in which order, and with which tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

TokenizerType = Literal[
    "GPT2BPETokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "TikTokenizer",
    "NullTokenizer",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Datasets, splits and tokenizer."""

    data_path: list[str] = field(default_factory=list)
    """A prefix, or weights and prefixes in turn (0.35 wiki 0.65 owt), or prefixes alone."""

    split: str | None = None
    """Shares of train, validation and test, e.g. 949,50,1; 969, 30, 1 by default."""

    data_args_path: str | None = None
    """A file holding what --data-path would."""

    train_data_path: list[str] = field(default_factory=list)
    """Blend for training only; instead of --data-path and --split."""

    valid_data_path: list[str] = field(default_factory=list)
    """Blend for validation only."""

    test_data_path: list[str] = field(default_factory=list)
    """Blend for testing only."""

    per_split_data_args_path: str | None = None
    """A JSON file {"train": [...], "valid": [...], "test": [...]} of blends."""

    mock_data: bool = False
    """Synthetic documents instead of files."""

    data_cache_path: str | None = None
    """Folder of the index cache; inside the run folder by default."""

    mid_level_dataset_surplus: float = 0.005
    """Share of samples built beyond what a blend needs, as Megatron does."""

    exact_blend_counts: bool = False
    """Build exactly the samples the blend takes instead of the surplus."""

    tokenizer_type: TokenizerType = "GPT2BPETokenizer"
    """Kind of tokenizer; its files: --vocab-file and --merge-file, or --tokenizer-model."""

    vocab_file: str | None = None
    """Vocabulary of the GPT-2 tokenizer (gpt2-vocab.json)."""

    merge_file: str | None = None
    """Merges of the GPT-2 tokenizer (gpt2-merges.txt)."""

    tokenizer_model: str | None = None
    """Model file or folder of the other tokenizers."""

    tiktoken_pattern: str | None = None
    """How TikTokenizer cuts text into words: v1, v2, gpt2, cl100k or o200k; by the file's name."""

    tiktoken_num_special_tokens: int = 1000
    """Ids TikTokenizer keeps for special tokens before the ranks of a .json file."""

    tiktoken_special_tokens: list[str] = field(default_factory=list)
    """Names of the first of them; <unk> <s> </s> <mask> <pad> <cls> <sep> by default."""

    chatglm_special_tokens: bool = False
    """ChatGLM2's [MASK] [gMASK] [sMASK] sop eop behind the pieces of GPTSentencePieceTokenizer."""

    allow_tokenizer_mismatch: bool = False
    """Read token files whose .meta.json names another tokenizer than this run's."""

    num_workers: int = 2
    """Threads that read samples ahead; 0 reads in the training thread."""

    dataloader_type: Literal["single", "cyclic"] = "single"
    """single reads the dataset's own order; cyclic permutes it anew each epoch, as dp and micro batch ask."""

    data_sharding: bool = True
    """With cyclic: each data-parallel rank permutes a part of its own instead of taking turns."""

    reset_position_ids: bool = False
    """Positions start at 0 again after an end-of-document token."""

    reset_attention_mask: bool = False
    """No attention across an end-of-document token."""

    eod_mask_loss: bool = False
    """No loss where the input is an end-of-document token."""

    sft_packing: bool = True
    """With --objective sft: whole samples share a row, none sees another; else each has one of its own."""

    verify_data: bool = False
    """Read token files and cached indices whole before training: ids, and hashes where recorded."""

    mmap_bin_files: bool = True
    """Map the .bin files into memory instead of reading them."""

    @property
    def has_vocabulary(self) -> bool:
        """Whether the tokenizer's ids can be counted: its file is named, or it has none."""
        named = (
            self.vocab_file if self.tokenizer_type == "GPT2BPETokenizer" else self.tokenizer_model
        )
        return named is not None or self.tokenizer_type == "NullTokenizer"
