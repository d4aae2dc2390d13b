"""OPTIMIZERS: --optimizer -> by which rule each tensor is updated, and what that rule keeps of it.

Known before any tensor exists.  The engine makes these states and hands them to the rules of
optim/, checkpoints name them, the planner counts them: an optimizer is its mathematics in optim/
and a row here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Literal

from megatron_lite.blueprint.figure.parts import HEAD, Format, Tensor
from megatron_lite.blueprint.turns import ALWAYS, NEVER, BlockDraw, OfBlock, Turns
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.param_groups import own_settings
from megatron_lite.config.registry import Registry
from megatron_lite.config.sections.optim import OptimConfig

StateFormat = Literal["fp32", "fp16", "bf16", "uint8"]
"""What a rule keeps its states in; uint8: codes of its own."""

STATE_BYTES: Mapping[StateFormat, int] = MappingProxyType(
    {"fp32": 4, "fp16": 2, "bf16": 2, "uint8": 1}
)
"""Of one of them."""


@dataclass(frozen=True, slots=True)
class Own:
    """A dim of a state that is none of the parameter's, of so many numbers."""

    size: int


@dataclass(frozen=True, slots=True)
class State:
    """A tensor that a rule keeps of a parameter; zero before the first update.

    dims: those of the parameter's dims that it has, None for all: (0,) is a number per row, () one
    number, (0, Own(8)) eight per row.  storage: the number format that it is kept in; its rule must
    cope with it.  block: it has
    one number for so many neighbours along its last dim, of which ranks have all or none.
    """

    name: str
    dims: tuple[int | Own, ...] | None = None
    storage: StateFormat = "fp32"
    block: int = 1

    def has(self, dim: int | None) -> bool:
        """Whether it is cut where its parameter is cut along this dim; None: nowhere."""
        return dim is None or self.dims is None or dim in self.dims

    def of(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Its sizes, by those of the parameter."""
        return self._chosen(sizes, lambda dim: dim.size)

    def at(self, place: Sequence[int]) -> tuple[int, ...]:
        """Its place in the whole state, by that of the parameter's part."""
        return self._chosen(place, lambda dim: 0)

    def _chosen(self, numbers: Sequence[int], own: Callable[[Own], int]) -> tuple[int, ...]:
        dims = range(len(numbers)) if self.dims is None else self.dims
        found = tuple(own(dim) if isinstance(dim, Own) else numbers[dim] for dim in dims)
        return found if self.block == 1 else (*found[:-1], -(-found[-1] // self.block))


LIKE_PARAMETER = State("")
"""Of the parameter's own shape."""


@dataclass(frozen=True, slots=True)
class Treatment:
    """How one canonical tensor is updated.

    rule: a row of optim/rules.py.  needs_whole_matrix: an element's update depends on others of
    other rows and columns; what dp shares or tp cuts is then one rank's to update.  turns: which updates
    of the run change it; it is frozen in the others.  flops: of an update's products, by the tensor's
    shape; None: elementwise.
    lr, weight_decay: factors on the run's; None: its kind decides whether it decays.
    sums_over_tp: of what tp ranks cut the rule sums so many numbers over them (optim/shares.py); None:
    it cannot.
    """

    rule: str
    states: tuple[State, ...] = ()
    needs_whole_matrix: bool = False
    turns: Turns = ALWAYS
    flops: Callable[[Sequence[int]], float] | None = None
    lr: float = 1.0
    weight_decay: float | None = None
    sums_over_tp: int | None = None

    @property
    def frozen(self) -> bool:
        """Whether no update ever changes the tensor."""
        return self.turns == NEVER

    def decay(self, tensor: Tensor) -> float:
        """The factor on the run's weight decay."""
        return float(tensor.decays) if self.weight_decay is None else self.weight_decay

    def needs(self, dim: int) -> bool:
        """Whether the rule must see the tensor whole along this dim: it cannot be cut there."""
        summed = any(state.dims is not None and dim not in state.dims for state in self.states)
        return self.needs_whole_matrix or summed

    def cost(self, shape: Sequence[int]) -> float:
        """What owners of whole tensors are balanced by: FLOPs, or elements where all is elementwise."""
        return float(math.prod(shape)) if self.flops is None else self.flops(shape)


FROZEN = Treatment("frozen", turns=NEVER)
FIRST_MOMENT = State("exp_avg")
ADAM = Treatment("adam", (FIRST_MOMENT, State("exp_avg_sq")))
PLAIN_SGD = Treatment("sgd")
MOMENTUM = Treatment("sgd", (State("momentum"),))

CURVATURE = State("hessian")
"""Made of a pass of its own (train/curvature.py), not by the update."""


@cache  # asked for every tensor of every layout that a search looks at
def _adam(*moments: Format) -> Treatment:
    """Adam's, its moments in these formats."""
    kept = zip(ADAM.states, moments, strict=True)
    return replace(ADAM, states=tuple(replace(state, storage=name) for state, name in kept))


def _first_moment(optim: OptimConfig) -> tuple[State, ...]:
    """In the format that is asked for."""
    return (replace(FIRST_MOMENT, storage=optim.moments[0]),)


def _adafactor(optim: OptimConfig, tensor: Tensor) -> Treatment:
    """Means of a matrix' rows and columns, all of a vector; a clipped update is one of all elements."""
    matrix = len(tensor.shape) == 2
    states = (
        (State("exp_avg_sq_row", (0,)), State("exp_avg_sq_col", (1,)))
        if matrix
        else (State("exp_avg_sq"),)
    )
    if optim.adafactor_beta1 is not None:
        states = (*states, State("exp_avg"))
    sums = 1 + optim.adafactor_scale_parameter  # of squares: the update's, the tensor's own
    if matrix and tensor.tp_dim is not None:
        # one side's means, and the mean of those of the other where its rows are cut
        sums += tensor.shape[1] + 1 if tensor.tp_dim == 0 else tensor.shape[0]
    return Treatment("adafactor", states, needs_whole_matrix=True, sums_over_tp=sums)


SMALLEST_IN_8_BITS = 4096
"""Elements of the smallest matrix whose moments are worth it (arXiv:2110.02861 keeps others in 32 bits)."""


def _adam8bit(optim: OptimConfig, tensor: Tensor) -> Treatment:
    """Vectors and small matrices as adam; of a vocabulary the padding, thus the size, is the layout's."""
    small = math.prod(tensor.shape) < SMALLEST_IN_8_BITS and not tensor.vocabulary
    if len(tensor.shape) != 2 or small:
        return ADAM
    states = (
        state
        for name in ("exp_avg", "exp_avg_sq")
        for state in (
            State(f"{name}_8bit", storage="uint8"),
            State(f"{name}_scale", block=optim.adam8bit_block_size),
        )
    )
    return Treatment("adam8bit", tuple(states))


@cache
def _muon(steps: int) -> Treatment:
    """Muon's, of a matrix, with so many Newton-Schulz iterations."""

    def flops(shape: Sequence[int]) -> float:
        m, n = sorted(shape)
        return steps * (4.0 * m * m * n + 2.0 * m**3)  # X X', its square, their sum times X

    return Treatment("muon", (State("momentum"),), needs_whole_matrix=True, flops=flops)


@cache
def _galore(rank: int, kind: str, gap: int, shape: tuple[int, int]) -> Treatment:
    """GaLore's, of a matrix of this shape: a basis of its columns' space, left of it, or of its rows'."""
    tall = shape[0] >= shape[1]
    left = kind == "left" or kind == ("reverse_std" if tall else "std")
    own = Own(min(rank, *shape))
    basis = State("left_basis", (0, own)) if left else State("right_basis", (1, own))
    low = (own, 1) if left else (0, own)
    states = basis, State("low_exp_avg", low), State("low_exp_avg_sq", low)

    def flops(shape: Sequence[int]) -> float:
        m, n = sorted(shape)
        # singular values and vectors (Golub and Van Loan, table 8.6.1), there and back
        return (6.0 * n * m * m + 20.0 * m**3) / gap + 4.0 * m * n * own.size

    return Treatment("galore", states, needs_whole_matrix=True, flops=flops)


def is_hidden_matrix(tensor: Tensor) -> bool:
    """Whether it maps features to features: no table, head, norm, bias or what stages share."""
    hidden = tensor.kind == "weight" and len(tensor.shape) == 2 and not tensor.stages
    return hidden and not tensor.vocabulary and not tensor.name.startswith(HEAD)


OPTIMIZERS: Registry[Callable[[OptimConfig, Tensor], Treatment]] = Registry(
    "optim.optimizer",
    {
        "adam": lambda optim, tensor: _adam(*optim.moments),
        "sgd": lambda optim, tensor: MOMENTUM if optim.sgd_momentum else PLAIN_SGD,
        "lion": lambda optim, tensor: Treatment("lion", _first_moment(optim)),
        "sophiag": lambda optim, tensor: Treatment("sophiag", (*_first_moment(optim), CURVATURE)),
        "adafactor": _adafactor,
        "adam8bit": _adam8bit,
        "muon": lambda optim, tensor: (
            _muon(optim.muon_num_ns_steps) if is_hidden_matrix(tensor) else ADAM
        ),
        "galore": lambda optim, tensor: (
            _galore(
                optim.galore_rank,
                optim.galore_proj_type,
                optim.galore_update_proj_gap,
                (tensor.shape[0], tensor.shape[1]),
            )
            if is_hidden_matrix(tensor)
            else ADAM
        ),
        "apex-adam": lambda optim, tensor: replace(ADAM, rule="apex-adam"),
    },
)
"""A row may look at the tensor's kind and shape: several rules in one run."""


def treatment(optim: OptimConfig, tensor: Tensor, draw: BlockDraw | None = None) -> Treatment:
    """How the run's optimizer, or the one that --param-groups names, updates a tensor.

    draw: which blocks are trained when, where not all of them always are.
    """
    own = own_settings(optim, tensor.name, tensor.kind)
    if tensor.frozen or own.lr == 0.0:
        return FROZEN
    name = own.rule or optim.optimizer
    how = OPTIMIZERS[name](optim, tensor)
    if not isinstance(how, Treatment) or len({state.name for state in how.states}) < len(
        how.states
    ):
        raise ConfigError(
            f"--optimizer {name}: its row of OPTIMIZERS gives {how!r} for {tensor.name}; it must "
            "be a Treatment whose states have names of their own"
        )
    block = None if draw is None else _block_of(tensor)
    if draw is not None and block is not None and how.turns == ALWAYS:
        how = replace(how, turns=OfBlock(draw, block))
    if own.lr == 1.0 and own.weight_decay is None:
        return how
    decay = how.weight_decay if own.weight_decay is None else own.weight_decay
    return replace(how, lr=how.lr * own.lr, weight_decay=decay)


def gathered(how: Treatment, tensor: Tensor) -> bool:
    """Whether one tp rank updates the whole tensor for all; the ragged parts of a vocabulary stay apart."""
    alone = how.needs_whole_matrix and not how.sums_over_tp
    return alone and tensor.tp_dim is not None and not tensor.vocabulary


def state_bytes(optim: OptimConfig, tensor: Tensor, tp: int) -> float:
    """What all states of a tensor take on one of so many tp ranks; of what one of them owns, the mean."""
    how = treatment(optim, tensor)
    owned = tp > 1 and gathered(how, tensor)
    sizes = tensor.shape if owned else tensor.local(tp)
    total = sum(math.prod(s.of(sizes)) * STATE_BYTES[s.storage] for s in how.states)
    return total / tp if owned else total


def _block_of(tensor: Tensor) -> int | None:
    """The number of the block that a canonical tensor lies in; None at the ends of the model."""
    found = re.match(r"blocks\.(\d+)\.", tensor.name)
    return int(found[1]) if found else None


def check_states(optim: OptimConfig, tensors: Iterable[Tensor], tp: int) -> None:
    """ConfigError where a rule would need rows or columns that other tp ranks have, and no rank has all.

    Ranks of dp may share the state all the same: each then keeps it of whole tensors.
    """
    for tensor in tensors if tp > 1 else ():
        cut = tensor.tp_dim
        how = treatment(optim, tensor)
        reached = how.sums_over_tp is not None or gathered(how, tensor)
        if cut is not None and how.needs(cut) and not reached:
            raise ConfigError(
                f"--optimizer {optim.optimizer} updates {tensor.name} by the rule {how.rule}, which "
                f"needs all of its {tensor.shape[cut]} {'columns' if cut else 'rows'}, and "
                f"--tensor-model-parallel-size {tp} cuts them; use --tensor-model-parallel-size 1, "
                "with --pipeline-model-parallel-size or --use-distributed-optimizer"
            )
        for block in {state.block for state in how.states} if cut == len(tensor.shape) - 1 else ():
            if tensor.shape[-1] // tp % block:
                raise ConfigError(
                    f"--optimizer {optim.optimizer} keeps {tensor.name} in blocks of {block} columns, and "
                    f"--tensor-model-parallel-size {tp} cuts its {tensor.shape[-1]} columns between "
                    f"them; use a block of {math.gcd(tensor.shape[-1] // tp, block)} "
                    "(--adam8bit-block-size), or fewer tp ranks"
                )


def curvature_interval(optim: OptimConfig, tensors: Iterable[Tensor]) -> int:
    """Every how many iterations a pass of its own observes curvature; 0 where no rule divides by it."""
    asked = any(CURVATURE in treatment(optim, tensor).states for tensor in tensors)
    return optim.sophia_hessian_interval if asked else 0


def check_curvature(optim: OptimConfig, tensors: Iterable[Tensor], *, vocabulary: bool) -> None:
    """ConfigError where it would be observed of a head that no label can be drawn from."""
    if not vocabulary and curvature_interval(optim, tensors):
        raise ConfigError(
            "--optimizer sophiag draws labels from the outputs, and this --objective has a head "
            "without a vocabulary; use --optimizer adam"
        )
