"""Processes of a testbed: its daemons' and its jobs'. Linux only."""

import contextlib
import os
import random
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_dist.process import Process, start_ticks
from qlora_testbed_conf import Place


def process_of(pid: int) -> Process | None:
    """A process of this machine; None if it has ended."""
    ticks = start_ticks(pid)
    return None if ticks is None else replace(Process.this(), pid=pid, start_ticks=ticks)


def send(process: Process, number: signal.Signals) -> None:
    """Send a signal to that process, never to another that got its pid; nothing if it has ended."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        # The descriptor now stands for one process, so the answer holds when the signal is sent.
        if process.is_gone() is False:
            signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        pass
    finally:
        os.close(fd)


@dataclass(frozen=True)
class JobProcess:
    """A process that is on a node because of a job: a task's, a batch script's or a slurmstepd."""

    process: Process
    node: str
    command: str


def job_processes(place: Place, nodes: tuple[str, ...]) -> list[JobProcess]:
    """All live ones on these nodes, also those that outlived their job or left their session.

    Known by SLURM_CONF and SLURMD_NODENAME, which slurmd sets even with ``--export=NONE``, by
    being a descendant of one that has them, and, for slurmstepd, by its socket.
    """
    owners = dict(_step_daemons(place, nodes))
    children: dict[int, list[int]] = {}
    for pid in _pids():
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            continue
        children.setdefault(int(stat.rpartition(b")")[2].split()[1]), []).append(pid)
        if f"SLURM_CONF={place.slurm_conf}".encode() in environ:
            for node in nodes:
                if f"SLURMD_NODENAME={node}".encode() in environ:
                    owners[pid] = node
    todo = list(owners)
    while todo:
        parent = todo.pop()
        new = [child for child in children.get(parent, []) if child not in owners]
        owners.update(dict.fromkeys(new, owners[parent]))
        todo += new
    found = []
    for pid, node in sorted(owners.items()):
        process = process_of(pid)
        if process is not None:
            found.append(JobProcess(process, node, _command(pid)))
    return found


def _step_daemons(place: Place, nodes: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Pid and node of each slurmstepd.

    It writes its title over its environment; what tells it apart is the socket
    ``SPOOL/NODE_JOB.STEP`` that it listens on.
    """
    inodes: dict[str, str] = {}
    for line in Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace").splitlines():
        fields = line.split(maxsplit=7)
        for node in nodes:
            if len(fields) == 8 and fields[7].startswith(f"{place.spool(node)}/{node}_"):
                inodes[f"socket:[{fields[6]}]"] = node
    if not inodes:
        return
    for pid in _pids():
        try:
            # Tasks inherit none of it, but a fork that has yet to exec does: it is a job's as well.
            files = [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        yield from {(pid, inodes[file]) for file in files if file in inodes}


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _command(pid: int) -> str:
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return line.replace(b"\0", b" ").decode(errors="replace").strip()


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing listens on, all different.

    From below what Linux gives to outgoing connections (32768 and up, ip(7)): a daemon that is down
    for a moment finds its port free again.
    """
    held: list[socket.socket] = []
    for port in random.sample(range(20000, 32000), 12000):
        if len(held) == count:
            break
        # Taken.
        with contextlib.suppress(OSError):
            held.append(socket.create_server(("127.0.0.1", port)))
    ports = [listener.getsockname()[1] for listener in held]
    for listener in held:
        listener.close()
    return ports
