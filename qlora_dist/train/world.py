"""World: the processes of a run, or a part of them, and the little that they tell one another.

Gradients travel on the default group (NCCL or gloo); flags and
small JSON values on a gloo group of their own, so that they never wait for a GPU. Nothing is
pickled.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from qlora_dist.errors import PlanError, QLoRAError, UserError
from qlora_dist.plan import Topology
from qlora_dist.train.place import Place
from qlora_dist.train.preempt import Preempted
from qlora_dist.train.pulse import Pulse

# From finding that nothing moves to the end of the ranks, in which no collective may give up.
_TIME_TO_LOOK_S = 120
_BEAT_S = 2.0
# Blocks of a GPU that gather the next layer beside this one's products. A gather waits for the
# slowest rank with its blocks taken: NCCL's choice, 24 on an H100, slows the products down that it
# should hide behind. The environment's NCCL_MAX_CTAS goes before this.
_GATHER_BLOCKS = 4
# Rank 0 is given up on after this long without a beat: its machine is gone, or the network.
_SILENCE_S = 120.0


@dataclass(frozen=True)
class World:
    """One process among those of a run.

    Attributes:
        rank: Of this process among them.
        size: How many they are.
        device: Where this process computes.
        pulse: Told whenever this process waits for another.
        node: Number of this process's machine.
        local_rank: Rank on it.
        num_nodes: Machines.
        part: Which part of the run's processes these are; 0 of all.
    """

    rank: int
    size: int
    device: torch.device
    pulse: Pulse = field(default_factory=Pulse)
    node: int = 0
    local_rank: int = 0
    num_nodes: int = 1
    part: int = 0
    _timeout: timedelta = timedelta(minutes=30)
    _parts: Sequence[Sequence[int]] = ()
    _group: Any = None
    _control: Any = None
    _store: Any = None

    @classmethod
    def start(
        cls, place: Place, topology: Topology, *, timeout_s: int, pulse: Pulse | None = None
    ) -> "World":
        """Join the other processes.

        Args:
            place: Which process this is.
            topology: How many there are to be.
            timeout_s: How long a process may stay at one place, in seconds. Collectives give up
                only later, so that who finds a hang can first see where each process is.
            pulse: This process's.

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
        pulse = pulse or Pulse()
        device = _device(topology, place.local_rank)
        if place.size == 1:
            return cls(0, 1, device, pulse)
        timeout = timedelta(seconds=timeout_s + _TIME_TO_LOOK_S)
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        dist.init_process_group(
            _backend(device),
            store=PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        control = dist.new_group(backend="gloo", timeout=timeout)
        return cls(
            rank,
            size,
            device,
            pulse,
            node=rank // topology.processes_per_node,
            local_rank=place.local_rank,
            num_nodes=topology.nodes,
            _timeout=timeout,
            _parts=[range(size)],
            _control=control,
            _store=PrefixStore("qlora", store),
        )

    @property
    def backend(self) -> str:
        """Of the default group."""
        return _backend(self.device)

    def alone(self) -> "World":
        """This process, a part of its own."""
        return World(0, 1, self.device, self.pulse, part=self.rank)

    def within_node(self) -> "World":
        """The processes of this machine. All ranks call this together."""
        inside = self.size // self.num_nodes
        return self._divide([range(n * inside, (n + 1) * inside) for n in range(self.num_nodes)])

    def across_nodes(self) -> "World":
        """The processes of this one's local rank on all machines. All ranks call this together."""
        inside = self.size // self.num_nodes
        return self._divide([range(local, self.size, inside) for local in range(inside)])

    def _divide(self, parts: Sequence[Sequence[int]]) -> "World":
        """The part of the ranks that this one is in, over groups of its own.

        It has no store: nothing long is done on one of its ranks.
        """
        (mine,) = (number for number, ranks in enumerate(parts) if self.rank in ranks)
        if len(parts[mine]) == 1:
            return replace(self.alone(), part=mine)
        return replace(
            self,
            rank=parts[mine].index(self.rank),
            size=len(parts[mine]),
            part=mine,
            _parts=parts,
            _group=self._new_groups(parts),
            _control=self._new_groups(parts, backend="gloo"),
            _store=None,
        )

    def _new_groups(self, parts: Sequence[Sequence[int]], **options: Any) -> Any:
        """A group for each part, which every rank must make; returns this rank's."""
        groups = [dist.new_group(list(p), timeout=self._timeout, **options) for p in parts]
        (mine,) = (group for group in groups if group is not dist.GroupMember.NON_GROUP_MEMBER)
        return mine

    def second(self) -> "World":
        """The same processes over a control group of their own, for a thread beside this one's.

        All ranks call this together.
        """
        if self.size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=self._timeout)
        return replace(self, pulse=Pulse(), _control=group)

    def mesh(self) -> DeviceMesh:
        """These processes, over a group of their own for what is gathered beside computing.

        All ranks of the run call this together.
        """
        options: dict[str, Any] = {}
        if self.device.type == "cuda":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = self._timeout
            nccl.config.max_ctas = _GATHER_BLOCKS
            options["pg_options"] = nccl
        group = self._new_groups(self._parts, **options)
        return DeviceMesh.from_group(group, self.device.type)

    def stop(self) -> None:
        """Leave the other processes."""
        if self.size > 1:
            dist.destroy_process_group()

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        if self.size == 1:
            # Nobody to wait for; it has got on all the same.
            with self.pulse.waiting():
                return flag
        value = torch.tensor([int(flag)])
        with self.pulse.waiting():
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
        return [part.tolist() for part in self._all_gather(mine)]

    def sum_ints(self, values: list[int]) -> list[int]:
        """The sums over all ranks of integers, modulo 2 ** 64 as signed numbers."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.int64)
        with self.pulse.waiting():
            dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self._control)
        return total.tolist()

    def gather_json(self, value: Any) -> list[Any]:
        """A JSON value of every rank, in the order of the ranks."""
        if self.size == 1:
            return [value]
        data = json.dumps(value).encode()
        lengths = [int(length) for (length,) in self.gather([float(len(data))])]
        mine = torch.zeros(max(lengths), dtype=torch.uint8)
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return [
            json.loads(bytes(part[:length].numpy()).decode())
            for part, length in zip(self._all_gather(mine), lengths, strict=True)
        ]

    def _all_gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        with self.pulse.waiting():
            dist.all_gather(everyone, mine, group=self._control)
        return everyone

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
        with self.pulse.waiting():
            dist.broadcast(length, group_src=source, group=self._control)
            buffer = torch.zeros(int(length.item()), dtype=torch.uint8)
            if self.rank == source:
                buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            dist.broadcast(buffer, group_src=source, group=self._control)
        return json.loads(bytes(buffer.numpy()).decode())

    def on_rank_0(
        self, name: str, work: Callable[[Callable[[], None]], Any], stop: Callable[[], bool]
    ) -> Any:
        """Do something long on rank 0, while the others wait for as long as it takes.

        They wait on a key of the rendezvous store, not in a collective that would time out; rank 0
        sends a heartbeat.

        Args:
            name: Of the work; not used twice.
            work: Called on rank 0 with a check that it is to call often: it raises Preempted once
                any rank is asked to stop.
            stop: Whether this process has been asked to stop.

        Returns:
            What ``work`` returned, a JSON value; on every rank.

        Raises:
            Preempted: A stop was asked for.
            QLoRAError: ``work`` failed, or rank 0 gave no sign of life.
        """
        return self._led(name, work, stop, leader="rank 0", leads=self.rank == 0)

    def on_each_node(
        self, name: str, work: Callable[[Callable[[], None]], Any], stop: Callable[[], bool]
    ) -> Any:
        """The same on one process of each machine, for the others there.

        All wait for all machines. These may come to different ends: who raises here must have the
        others agree.
        """
        found = self._led(
            f"{name}, node {self.node}",
            work,
            stop,
            leader=f"the first process of node {self.node}",
            leads=self.local_rank == 0,
        )
        with self.pulse.waiting():
            for node in range(self.num_nodes):
                if node != self.node:
                    self._hear(f"the first process of node {node}", f"{name}, node {node}", stop)
        return found

    def _led(
        self,
        name: str,
        work: Callable[[Callable[[], None]], Any],
        stop: Callable[[], bool],
        *,
        leader: str,
        leads: bool,
    ) -> Any:
        def check() -> None:
            self.pulse.at(name)
            if stop() or (self.size > 1 and self._store.check([f"{name}/stop"])):
                raise Preempted

        if self.size == 1:
            return work(check)
        if not leads:
            with self.pulse.waiting():
                return self._wait_for(leader, name, stop)
        told: dict[str, Any] = {"error": f"{leader} failed", "user": False}
        with _Heartbeat(self._store, f"{name}/beat"):
            try:
                value = work(check)
                told = {"value": value}
                return value
            except Preempted:
                told = {"stopped": True}
                raise
            except QLoRAError as error:
                told = {"error": str(error), "user": isinstance(error, UserError)}
                raise
            finally:
                self._store.set(f"{name}/done", json.dumps(told))

    def _wait_for(self, leader: str, name: str, stop: Callable[[], bool]) -> Any:
        told = self._hear(leader, name, stop)
        if "stopped" in told:
            raise Preempted
        if "error" in told:
            raise (UserError if told["user"] else QLoRAError)(told["error"])
        return told["value"]

    def _hear(self, leader: str, name: str, stop: Callable[[], bool]) -> dict[str, Any]:
        """What the leader says at the end of its work."""
        beat, heard, asked = b"", time.monotonic(), False
        while not self._store.check([f"{name}/done"]):
            if stop() and not asked:
                self._store.set(f"{name}/stop", "1")
                asked = True
            if self._store.check([f"{name}/beat"]):
                new = self._store.get(f"{name}/beat")
                if new != beat:
                    beat, heard = new, time.monotonic()
            if time.monotonic() - heard > _SILENCE_S:
                raise QLoRAError(f"{name}: no sign of life from {leader} for {_SILENCE_S:.0f} s")
            time.sleep(0.1)
        told: dict[str, Any] = json.loads(self._store.get(f"{name}/done"))
        return told

    def check_sum(self) -> None:
        """Sum a small tensor over all ranks on their devices, and see whether it is right.

        Raises:
            QLoRAError: It is not.
        """
        value = torch.full((1024,), float(self.rank + 1), device=self.device)
        self.sum_in_place(value)
        wanted = self.size * (self.size + 1) / 2
        if not bool((value == wanted).all()):
            raise QLoRAError(
                f"a sum over all processes should be {wanted:g} and is {value[0].item():g} on rank "
                f"{self.rank}: the network or a GPU does not work"
            )

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of all ranks on the device, ``(n, k)`` of each, as ``(size * n, k)``."""
        if self.size == 1:
            return rows
        whole = rows.new_empty((self.size * rows.shape[0], *rows.shape[1:]))
        dist.all_gather_into_tensor(whole, rows, group=self._group)
        return whole

    def share_parts(self, parts: Sequence[torch.Tensor]) -> None:
        """Give every rank the part of each: the rank's own is sent, the others are overwritten."""
        if self.size > 1:
            sent = [
                dist.broadcast(part, group_src=rank, group=self._group, async_op=True)
                for rank, part in enumerate(parts)
                if part.numel()
            ]
            for work in sent:
                work.wait()

    def sum_in_place(self, buffer: torch.Tensor) -> None:
        """Sum a tensor on the device over all ranks."""
        if self.size > 1:
            dist.all_reduce(buffer, op=dist.ReduceOp.SUM, group=self._group)


class _Heartbeat:
    """Counts up under a key of a store, from a thread, for the length of a ``with`` block."""

    def __init__(self, store: Any, key: str) -> None:
        self._store, self._key = store, key
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _beat(self) -> None:
        count = 0
        while not self._end.wait(_BEAT_S if count else 0.0):
            count += 1
            self._store.set(self._key, str(count))


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


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
