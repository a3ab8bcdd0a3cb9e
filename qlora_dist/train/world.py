"""World: the processes of a run, and the little that they tell one another.

Gradients travel on the default group (NCCL or gloo); flags and
small JSON values on a gloo group of their own, so that they never wait for a GPU. Nothing is
pickled.
"""

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from qlora_dist.errors import PlanError
from qlora_dist.plan import Topology
from qlora_dist.train.place import Place


@dataclass(frozen=True)
class World:
    """One process among those of a run.

    Attributes:
        rank: Global rank.
        size: Processes over all nodes.
        device: Where this process computes.
    """

    rank: int
    size: int
    device: torch.device
    _control: Any = None

    @classmethod
    def start(cls, place: Place, topology: Topology, *, timeout_s: int) -> "World":
        """Join the other processes.

        Raises:
            PlanError: The launcher started another number of processes than the plan has, or there
                are fewer GPUs here than it wants.
        """
        if place.size != topology.world_size:
            raise PlanError(
                f"resources: the plan has {topology.world_size} processes and {place.size} were "
                "started; start it with qlora, or with accelerate launch and the run's own "
                "accelerate.yaml"
            )
        device = _device(topology, place.local_rank)
        if place.size == 1:
            return cls(0, 1, device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(
            backend, timeout=timeout, device_id=device if device.type == "cuda" else None
        )
        control = dist.new_group(backend="gloo", timeout=timeout)
        return cls(place.rank, place.size, device, control)

    def stop(self) -> None:
        """Leave the other processes."""
        if self.size > 1:
            dist.destroy_process_group()

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        if self.size == 1:
            return flag
        value = torch.tensor([int(flag)])
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._control)
        return bool(value.item())

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)

    def gather(self, values: list[float]) -> list[list[float]]:
        """The values of every rank, in the order of the ranks; float64, so that sums are exact."""
        if self.size == 1:
            return [values]
        mine = torch.tensor(values, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine, group=self._control)
        return [part.tolist() for part in everyone]

    def from_rank_0(self, value: Any) -> Any:
        """What rank 0 passes; the others' argument is ignored. Any JSON value."""
        return self._broadcast(value, source=0)

    def first_text(self, text: str) -> str:
        """The text of the first rank that has one; empty if none has."""
        having = [rank for rank, (has,) in enumerate(self.gather([float(bool(text))])) if has]
        return str(self._broadcast(text, source=having[0])) if having else ""

    def _broadcast(self, value: Any, *, source: int) -> Any:
        if self.size == 1:
            return value
        data = json.dumps(value).encode() if self.rank == source else b""
        length = torch.tensor([len(data)])
        dist.broadcast(length, src=source, group=self._control)
        buffer = torch.zeros(int(length.item()), dtype=torch.uint8)
        if self.rank == source:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(buffer, src=source, group=self._control)
        return json.loads(bytes(buffer.numpy()).decode())

    def sum_in_place(self, buffer: torch.Tensor) -> None:
        """Sum a tensor on the device over all ranks."""
        if self.size > 1:
            dist.all_reduce(buffer, op=dist.ReduceOp.SUM)


def _device(topology: Topology, local_rank: int) -> torch.device:
    if topology.device == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count < topology.processes_per_node:
        raise PlanError(
            f"resources.gpus_per_node: {topology.processes_per_node}, and there are {count} here; "
            + (f"use {count}" if count else "use 0 to run on the CPU")
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
