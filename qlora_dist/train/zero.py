"""zero2 and zero3: DeepSpeed's engine, through Accelerate, with the run's own ds_config.json.

Under zero2 every process has the whole model, and a part of the gradients and moments. Under zero3
it has a part of everything: DeepSpeed cuts each tensor, as one row of elements, into equal ranges,
and gathers those of a linear layer with its adapter around its passes. NF4 matrices are to it two
plain tensors of bytes. What it holds is saved and restored as it lies, by parameter name;
DeepSpeed's own checkpoints are not used.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora_dist.spec import RunSpec
from qlora_dist.train.fill import Share, Slot
from qlora_dist.train.load import put_whole
from qlora_dist.train.nf4 import Nf4Bytes, Nf4Linear, Nf4Tensor
from qlora_dist.train.optimizer import allocate, state_tensors
from qlora_dist.train.trained import Held
from qlora_dist.train.world import World


class Zero:
    """zero2, zero3."""

    def __init__(self, world: World, spec: RunSpec, accelerator: Any) -> None:
        import deepspeed

        # It takes the group that is there.
        deepspeed.init_distributed(dist_backend=world.backend, verbose=False)
        self._world, self._accelerator = world, accelerator
        self._cuts = spec.strategy.kind == "zero3"
        self._recomputes = spec.model.gradient_checkpointing
        self.holders = world if self._cuts else world.alone()
        self.share = Share(self.holders.rank, self.holders.size)
        self._convert: Any = None

    def shard(self, base: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        """Have a layer and its adapter gathered as one."""
        if not self._cuts:
            return
        from deepspeed.utils import set_z3_leaf_module
        from peft.tuners.lora import LoraLayer

        for module in base.modules():
            if isinstance(module, LoraLayer):
                set_z3_leaf_module(module, True)
        # A layer's weights are fetched for its backward pass where its inputs have a gradient.
        base.enable_input_require_grads()
        if self._recomputes:
            # Recomputed in its other way, a layer finds its weights gone and complains.
            base.gradient_checkpointing_enable({"use_reentrant": True})

    def put(self, slot: Slot, rows: torch.Tensor) -> None:
        """Give DeepSpeed the whole of a weight, of which it keeps a part."""
        if not isinstance(slot.module, Nf4Linear) or not isinstance(rows, Nf4Tensor):
            count = slot.shape[0]
            put_whole(slot, self._whole(rows, count))
            self._cut(slot.module, slot.name)
            for module, name in slot.places:
                module._parameters[name] = slot.module._parameters[slot.name]
            return
        layer = Nf4Bytes.of(slot.module, rows.constants)
        for name, part in (("packed", rows.packed), ("absmax", rows.absmax)):
            whole = self.holders.gather_rows(part)
            layer.register_parameter(name, nn.Parameter(whole, requires_grad=False))
            self._cut(layer, name)

    def _whole(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """All rows of a tensor of which each process has as many as it is to have, or fewer."""
        missing = self.share.per_rank(count) - len(rows)
        if missing:
            rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
        return self.holders.gather_rows(rows)[:count]

    def _cut(self, module: nn.Module, name: str) -> None:
        """Have DeepSpeed cut a parameter now, before the next one is there."""
        if not self._cuts:
            return
        parameter = module._parameters[name]
        assert parameter is not None
        if self._convert is None:
            from deepspeed import zero

            holder = nn.Module()
            holder.register_parameter("first", parameter)
            zero.Init(module=holder, config_dict_or_path=self._config)
            self._convert = parameter.convert_to_zero_parameters  # type: ignore[attr-defined]
        else:
            self._convert(param_list=[parameter])

    @property
    def _config(self) -> dict[str, Any]:
        found: dict[str, Any] = self._accelerator.state.deepspeed_plugin.deepspeed_config
        return found

    def train(self, parameters: Mapping[str, nn.Parameter]) -> "Ranges":
        """They go to the engine once there is an optimizer."""
        return Ranges(parameters, self._world, self._accelerator)


@dataclass(frozen=True)
class _Range:
    """A process's part of a parameter.

    Attributes:
        start: Its first element.
        master: It, in float32.
        flat: The tensor that the optimizer steps, which ``master`` is a part of.
        offset: Where in that.
    """

    start: int
    master: torch.Tensor
    flat: torch.Tensor
    offset: int


class Ranges:
    """What is trained, as DeepSpeed's engine has it: a range of elements of each parameter.

    Args:
        parameters: Trainable parameters by name, in the order of the model.
        world: The processes.
        accelerator: Accelerate's, with the run's DeepSpeed settings.
    """

    saves_moments = True

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], world: World, accelerator: Any
    ) -> None:
        self._parameters, self._world, self._accelerator = parameters, world, accelerator
        # Those that are cut already look empty.
        self._shapes = {
            name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()
        }
        self._engine: Any = None
        self._optimizer: Any = None
        self._ranges: dict[str, _Range] = {}
        self.stepped: Mapping[str, torch.Tensor] = parameters
        self.saved: Mapping[str, torch.Tensor] = {}
        self._empty = torch.empty(0, device=world.device)
        self.held: Mapping[str, Held] = {
            name: Held(self._empty, 0, shape) for name, shape in self._shapes.items()
        }

    def begin(self, model: nn.Module, optimizer: Any) -> nn.Module:
        """Start the engine, which counts passes."""
        self._optimizer = optimizer
        self._engine, _ = self._accelerator.prepare(model, optimizer)
        find = self._ranges_of_zero3 if self._cuts else self._ranges_of_zero2
        self._ranges = find()
        own = {
            name: Held(its.master, its.start, self._shapes[name])
            for name, its in self._ranges.items()
        }
        self.held = {**self.held, **own}
        self.stepped = {name: its.master for name, its in self._ranges.items()}
        self.saved = self.stepped
        engine: nn.Module = self._engine
        return engine

    @property
    def _zero(self) -> Any:
        return self._engine.optimizer

    @property
    def _cuts(self) -> bool:
        return bool(self._engine.zero_optimization_partition_weights())

    def _ranges_of_zero2(self) -> dict[str, _Range]:
        """DeepSpeed has the parameters of a group in a row, and a part of that on each process."""
        found = {}
        for name, parameter in self._parameters.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                continue
            here, place = mapping.lp_fragment_address, mapping.hp_fragment_address
            flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
            master = flat.detach()[place.start : place.start + place.numel]
            found[name] = _Range(here.start, master, flat, place.start)
        return found

    def _ranges_of_zero3(self) -> dict[str, _Range]:
        """DeepSpeed has ranges of one size of each parameter, the last one filled up."""
        found = {}
        for name, parameter in self._parameters.items():
            group, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = self._world.rank * size
            count = min(size, math.prod(self._shapes[name]) - start)
            if count > 0:
                flat = self._zero.fp32_partitioned_groups_flat[group]
                found[name] = _Range(start, flat.detach()[offset : offset + count], flat, offset)
        return found

    def moments(self) -> dict[str, torch.Tensor]:
        """Each range's part of what the optimizer has for the tensor that it steps."""
        return {
            f"{name}.{moment}": tensor[its.offset : its.offset + its.master.numel()]
            for name, its in self._ranges.items()
            for moment, tensor in state_tensors(self._optimizer, its.flat)
        }

    def allocate(self, step: int) -> None:
        """For the tensors that the engine has the optimizer step."""
        if not self._cuts:
            flats = [
                (group, flat)
                for group, flat in enumerate(self._zero.single_partition_of_fp32_groups)
            ]
        else:
            flats = [
                (self._zero.sub_group_to_group_id[number], flat)
                for number, flat in enumerate(self._zero.fp32_partitioned_groups_flat)
            ]
        for number, (group, flat) in enumerate(flats):
            allocate(self._optimizer, (group, number), flat, step)

    def restored(self) -> None:
        """They were put into the masters, of which the engine's working copies are made again."""
        from deepspeed import zero
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self._parameters.items():
            whole = safe_get_full_fp32_param(parameter)
            with zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(whole.view(self._shapes[name]))

    def check(self) -> None:
        """No weight is on two processes."""

    def zero(self) -> None:
        """The engine does so at its steps."""

    def rehearse(self, loss: torch.Tensor) -> None:
        """The engine forgets nothing that no step has used: all of it is zero."""
        self.backward(loss * 0, last=False)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Through the engine, which takes the mean over the processes where the sum is wanted."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self._world.size, scale_wrt_gas=False)

    def step(self, lr: float, max_norm: float) -> float:
        """The engine clips as its file says, and steps where all gradients are numbers."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        applied = self._engine.was_step_applied()
        return float(self._engine.get_global_grad_norm()) if applied else math.inf
