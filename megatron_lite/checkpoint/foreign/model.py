"""A model of another program: its sizes as ours, and where each of its tensors is to be had."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from megatron_lite.blueprint.figure.parts import TOKENS
from megatron_lite.checkpoint.foreign.records import UnreadTensor
from megatron_lite.checkpoint.foreign.torch_file import TorchFile
from megatron_lite.checkpoint.huggingface.conversion import Conversion, conversions
from megatron_lite.checkpoint.huggingface.names import Names
from megatron_lite.checkpoint.tensor_file import SAFETENSORS_NAMES, TensorForm
from megatron_lite.config.errors import CheckpointError
from megatron_lite.config.rules.table import model_problems
from megatron_lite.config.sections.model import ModelConfig

_SHOWN = 20


class ForeignTensor(NamedTuple):
    """Number format and shape of a tensor, and how it is read."""

    form: TensorForm
    read: Callable[[], Tensor]

    @classmethod
    def stored(cls, file: TorchFile, tensor: UnreadTensor) -> ForeignTensor:
        """One of a file of torch.save."""
        return cls(TensorForm(tensor.dtype, tensor.shape), lambda: file.read(tensor))

    def rows(self, count: int) -> ForeignTensor:
        """The first rows of it."""
        form = TensorForm(self.form.dtype, (count, *self.form.shape[1:]))
        return ForeignTensor(form, lambda: self.read()[:count])


def _with_rows(
    tensors: Mapping[str, ForeignTensor], rows: int, model: ModelConfig, names: Names, path: Path
) -> dict[str, ForeignTensor]:
    """The same with so many rows of the tables of tokens; CheckpointError where they have fewer."""
    found = dict(tensors)
    for name in (names.source(f"{TOKENS}.weight", model).name, names.head):
        if name in found:
            held = found[name].form.shape
            if not held or not 0 < rows <= held[0]:
                raise CheckpointError(
                    f"{path}: --vocab-size {rows}, but {name} is {list(held)}: it has no such rows"
                )
            found[name] = found[name].rows(rows)
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class ForeignModel:
    """A checkpoint that was looked through but for its numbers, and fits its model whole.

    title: whose it is; notices: what differs and does not matter.
    """

    path: Path
    title: str
    model: ModelConfig
    conversions: Sequence[Conversion]
    tensors: Mapping[str, ForeignTensor]
    notices: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(self.form(conversion).bytes for conversion in self.conversions)

    def form(self, conversion: Conversion) -> TensorForm:
        """How a tensor is stored."""
        return self.tensors[conversion.theirs].form

    def parts(self, conversion: Conversion) -> Iterator[tuple[str, Tensor]]:
        """Canonical tensors by name, from one tensor that is read for them."""
        return conversion.parts(self.tensors[conversion.theirs].read())


def fit_model(
    path: Path,
    title: str,
    model: ModelConfig,
    names: Names,
    tensors: Mapping[str, ForeignTensor],
    *,
    iteration: object,
    vocab_size: int | None = None,
    notices: Sequence[str] = (),
) -> ForeignModel:
    """The model with its tensors: each is there in its shape, and no other.

    iteration: what the file says of it, None for nothing; vocab_size: keep so many rows of the tables.
    Raises CheckpointError that lists what is missing, too many or of another shape.
    """
    if vocab_size is not None:
        model = dataclasses.replace(model, vocab_size=vocab_size)
        tensors = _with_rows(tensors, vocab_size, model, names, path)
    if model.num_layers > 100 * (
        len(tensors) + 1
    ):  # before a table is made of what the file claims
        raise CheckpointError(
            f"{path} says {model.num_layers} layers, but holds only {len(tensors)} tensors"
        )
    if problems := model_problems(model):
        raise CheckpointError(f"{path}: no such model is built here: {'; '.join(problems)}")
    wanted = conversions(names, model)
    wrong = []
    for conversion in wanted:
        found = tensors.get(conversion.theirs)
        if found is None:
            wrong.append(f"{conversion.theirs}: missing")
        elif found.form.shape != conversion.shape:
            wrong.append(
                f"{conversion.theirs}: {list(found.form.shape)} in the file, {list(conversion.shape)} "
                "by the sizes that it says"
            )
        elif not found.form.dtype.is_floating_point or found.form.dtype not in SAFETENSORS_NAMES:
            wrong.append(f"{conversion.theirs}: numbers of the format {found.form.dtype}")
    known = {conversion.theirs for conversion in wanted}
    wrong += [
        f"{name[:120]}: no tensor of such a model"
        for name in tensors
        if name not in known and not name.endswith(names.constants)
    ]
    if wrong:
        more = f"\n  ... and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise CheckpointError(
            f"{path} is no {title} model of its own sizes ({len(wrong)} tensors): take it from where it "
            "came once more\n  " + "\n  ".join(wrong[:_SHOWN]) + more
        )
    reached = "unknown" if iteration is None else str(iteration)[:20]
    notice = (
        f"iteration {reached} of {title} becomes iteration 0: weights only, the optimizer's state is left "
        "out"
    )
    return ForeignModel(path, title, model, wanted, tensors, (notice, *notices))
