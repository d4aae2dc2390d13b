"""Where DeepSpeed keeps this rank's elements of a parameter: master, gradient, states; by ZeRO stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Partition(Protocol):
    """This rank's elements [start, stop) of each parameter, flat views of DeepSpeed's own tensors.

    deep: the engine.  A method that has nothing of a parameter gives an empty tensor.
    """

    deep: Any

    def range_of(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Its elements here: whose gradient, master and states this rank keeps."""
        ...

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """Those that the model computes with, or will when they are gathered."""
        ...

    def master(self, parameter: nn.Parameter) -> Tensor:
        """fp32; in fp32 runs, too, except where the weight itself is updated (stage 0)."""
        ...

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """Of the mean loss, once it is reduced."""
        ...

    def state(self, parameter: nn.Parameter, key: str) -> Tensor:
        """By the torch optimizer's name of it."""
        ...

    def updated(self) -> list[Tensor]:
        """What the optimizer updates: its parameters."""
        ...

    def clear(self) -> None:
        """Forget all gradients: the next step begins from none."""
        ...

    def take_apart(self) -> None:
        """Before weights are written: nothing else holds values of them."""
        ...

    def make_whole(self) -> None:
        """After that: what is whole outside the layers is so again."""
        ...


class _Whole:
    """Weights that every rank has."""

    def __init__(self, deep: Any) -> None:
        self.deep = deep

    def range_of(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Its elements here."""
        raise NotImplementedError

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """Part of the parameter."""
        start, stop = self.range_of(parameter)
        return parameter.detach().view(-1)[start:stop]

    def take_apart(self) -> None:
        """They are not."""

    def make_whole(self) -> None:
        """They are."""


class WholeTensors(_Whole):
    """Stage 0: every rank has all of it, in the parameters themselves."""

    def range_of(self, parameter: nn.Parameter) -> tuple[int, int]:
        """All."""
        return 0, parameter.numel()

    def master(self, parameter: nn.Parameter) -> Tensor:
        """The weight."""
        return parameter.detach().view(-1)

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """autograd's own."""
        if parameter.grad is None:  # nothing has used it
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad.view(-1)

    def state(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Of the parameter."""
        found: Tensor = self.deep.optimizer.state[parameter][key]
        return found.view(-1)

    def updated(self) -> list[Tensor]:
        """The parameters."""
        return _parameters_of(self.deep.optimizer)

    def clear(self) -> None:
        """As DeepSpeed does after an update."""
        self.deep.zero_grad()


class FlatPartition(_Whole):
    """Stages 1 and 2: all parameters of a group one after the other, cut evenly; a rank has parts of some."""

    def range_of(self, parameter: nn.Parameter) -> tuple[int, int]:
        """As DeepSpeed's fragments say."""
        found = _fragment(parameter)
        if found is None:
            return 0, 0
        address = found.lp_fragment_address
        return address.start, address.start + address.numel

    def master(self, parameter: nn.Parameter) -> Tensor:
        """Part of the partition that is updated."""
        found: Tensor = _fragment(parameter).hp_fragment.detach()
        return found

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """What is reduced and not yet updated with; before that what this rank has added, if it is there."""
        if getattr(self.deep.optimizer, "cpu_offload", False):
            self.deep.optimizer._wait_for_offload_copies()
        start, stop = self.range_of(parameter)
        index = parameter._index_in_param_group  # type: ignore[attr-defined]
        try:
            found: Tensor = _fragment(parameter).get_lp_grad_fragment(index).view(-1)
        except ValueError:  # between two backwards, or after an update
            own = getattr(parameter, "grad_accum", None)
            own = parameter.grad if own is None else own
            return (
                torch.zeros_like(parameter).view(-1)[start:stop]
                if own is None
                else own.view(-1)[start:stop]
            )
        # bf16 with fp32 gradients at stage 1: those of all ranks' elements are there
        return found if found.numel() == stop - start else found[start:stop]

    def state(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Part of the flat state."""
        found: Tensor = _fragment(parameter).get_optim_state_fragment(key)
        return found

    def updated(self) -> list[Tensor]:
        """The flat partitions."""
        return _parameters_of(self.deep.optimizer.optimizer)

    def link_states(self) -> None:
        """Have the fragments know states that were made before the first update."""
        self.deep.optimizer._lazy_init_hp_params_optimizer_state()

    def clear(self) -> None:
        """As DeepSpeed does where a step overflows."""
        held = self.deep.optimizer
        if hasattr(held, "clear_hp_grads"):  # its bf16 optimizer
            held.clear_hp_grads()
            held.clear_lp_grads()
            return
        held.zero_grad(set_to_none=True)
        held.micro_step_id = -1
        if held.cpu_offload:
            held.reset_cpu_buffers()
            held._offload_accumulated_param_ids = set()
        for group in held.averaged_gradients:
            held.averaged_gradients[group] = held.all_grad_tensors[group] = None


class CutParameters:
    """Stage 3: each parameter is cut evenly, its end padded; this rank has one part of all."""

    def __init__(self, deep: Any) -> None:
        self.deep = deep

    def range_of(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Without the padding."""
        size, own = parameter.ds_numel, parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        start = own * self.deep.optimizer._get_param_partition_rank(parameter)
        return min(start, size), min(start + own, size)

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """This rank's part of it."""
        return self._own(parameter, parameter.ds_tensor)  # type: ignore[attr-defined]

    def take_apart(self) -> None:
        """All of them: small ones are whole between steps, too."""
        self.deep.optimizer._partition_all_parameters()

    def make_whole(self) -> None:
        """The small ones."""
        small = self.deep.optimizer.persistent_parameters
        if small:
            small[0].all_gather(small)

    def _own(self, parameter: nn.Parameter, found: Tensor) -> Tensor:
        start, stop = self.range_of(parameter)
        return found.detach().view(-1)[: stop - start]

    def master(self, parameter: nn.Parameter) -> Tensor:
        """Part of its group's flat fp32 values."""
        return self.state(parameter, None)

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """What is reduced and not yet updated with."""
        found, _ = self.deep.optimizer._get_fp32_grad_state_partition(
            parameter, release_swap_buffers=False
        )
        return self._own(parameter, found)

    def state(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        """Part of its group's flat state."""
        found, _ = self.deep.optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=key
        )
        return self._own(parameter, found)

    def updated(self) -> list[Tensor]:
        """The groups' flat values."""
        return list(self.deep.optimizer.fp32_partitioned_groups_flat)

    def clear(self) -> None:
        """As DeepSpeed does where a step overflows."""
        self.deep.optimizer._pre_step()
        self.deep.optimizer._overflow_clean_up(None)


def _fragment(parameter: nn.Parameter) -> Any:
    """DeepSpeed's note of where this rank's part of a parameter lies; None where it has none."""
    return parameter._hp_mapping  # type: ignore[attr-defined]


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def partition_of(stage: int, deep: Any) -> Partition:
    """Of an engine that has begun."""
    kinds: Sequence[type[Any]] = (WholeTensors, FlatPartition, FlatPartition, CutParameters)
    made: Partition = kinds[stage](deep)
    return made
