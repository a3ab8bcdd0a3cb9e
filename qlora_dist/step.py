"""One attempt on the nodes of a Slurm allocation: a task a node, watched to its end."""

import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from qlora_dist import ends
from qlora_dist.beats import Beat, Watch, read_beats
from qlora_dist.code_tree import path_env
from qlora_dist.control import ask_to_kill, stop_code
from qlora_dist.ends import RankEnd, hang_end, read_rank_ends, worst
from qlora_dist.layout import CONTAINER, RunDir
from qlora_dist.process import die_with_parent
from qlora_dist.scheduler import run_command

_POLL_S, _LOOK_S = 0.1, 1.0
# Files of ranks that are read each second, on storage that all share.
_RANKS_A_S = 50
# A rank that fails takes the others down with it within seconds, but for those that wait on a GPU.
_STRAGGLERS_S = 45.0
# torchrun's own end, in good order.
_TEARDOWN_S = 15.0
# Nodes that were asked to kill their ranks have this long, before their tasks are given up.
_KILL_S = 60.0
# Below those that Linux gives to outgoing connections.
_PORTS = (20000, 32000)


class Step:
    """Runs an attempt's tasks.

    Args:
        run: The run directory.
        attempt: Number of the attempt.
        tick: Called about once a second, with the watch over the ranks.
    """

    def __init__(
        self,
        run: RunDir,
        attempt: int,
        *,
        tick: Callable[[Watch], None] = lambda _: None,
    ) -> None:
        command = json.loads(run.command_json.read_text(encoding="utf-8"))
        self._run, self._attempt = run, attempt
        self._tick = tick
        self._world_size: int = command["world_size"]
        self._num_nodes: int = command["nodes"]
        self._watch = Watch(run, attempt, world_size=self._world_size, limit_s=command["timeout_s"])
        self._hang: RankEnd | None = None
        self._failed_at: float | None = None
        self._ended_at: float | None = None
        self._killed_at: float | None = None

    def run(self) -> RankEnd:
        """Start a task on each node, and wait until the ranks, or all tasks, have ended."""
        ranks = self._run.attempt(self._attempt) / "ranks"
        stop = self._run.stop_file(self._attempt)
        process, looked = self._start(), time.monotonic()
        while process.poll() is None:
            # A job that was asked to stop may be killed soon: torchrun's end is not waited for.
            if stop.exists() and ends.all_ended(ranks, world_size=self._world_size):
                break
            if time.monotonic() - looked > max(_LOOK_S, self._world_size / _RANKS_A_S):
                looked = time.monotonic()
                self._look(process)
                self._tick(self._watch)
            time.sleep(_POLL_S)
        own = [] if self._hang is None else [self._hang]
        said = read_rank_ends(ranks, world_size=self._world_size)
        if stop.exists() and not self._began():
            # A signal that comes while interpreters start ends them without a word.
            why = "stopped before its ranks had begun"
            return RankEnd(0, stop_code(stop), why, 0, time.time())
        return worst([*said, *own, *self._unseen()])

    def _began(self) -> bool:
        """Whether any rank has come further than its imports, or has said how it ended."""
        folder = self._run.attempt(self._attempt) / "ranks"
        spoke = any(end.cause != ends.SILENT for end in ends.read_said_ends(folder))
        beats = read_beats(self._run, self._attempt).values()
        return spoke or any(beat.stage != Beat.stage for beat in beats)

    def _unseen(self) -> list[RankEnd]:
        """The end of ranks of which no node has ever said anything, if there are any."""
        folder = self._run.attempt(self._attempt) / "ranks"
        there = {int(path.stem) for path in folder.glob("*.json")}
        missing = sorted(set(range(self._world_size)) - there)
        if not missing:
            return []
        why = (
            f"{len(missing)} of {self._world_size} ranks were never started, rank {missing[0]} "
            f"first: does every node see {self._run.root}? What srun said is in control/slurm-*.out"
        )
        if not there:
            return [RankEnd(missing[0], ends.FAILED, why, 0, time.time())]
        # Where others could, it is the node's own fault.
        node = _nodes()[missing[0] // (self._world_size // self._num_nodes)]
        return [RankEnd(missing[0], ends.BAD_NODE, f"node {node}: {why}", 0, time.time(), node)]

    def _look(self, process: "subprocess.Popen[bytes]") -> None:
        """Find what hangs, or what others have left behind, and have it killed."""
        now = time.monotonic()
        if self._killed_at is not None:
            if now - self._killed_at > _KILL_S:
                process.kill()
            return
        if why := self._watch.hung():
            self._hang = hang_end(why)
            self._kill(why)
            return
        folder = self._run.attempt(self._attempt) / "ranks"
        said = ends.read_said_ends(folder)
        failed = [end for end in said if end.code not in ends.AGREED]
        if len(said) == self._world_size:
            # torchrun waits minutes for an agent of another node that is no more.
            self._ended_at = self._ended_at or now
            if now - self._ended_at > _TEARDOWN_S:
                self._kill("every rank has ended, and torchrun has not")
        elif failed:
            self._failed_at = self._failed_at or now
            if worst(failed).code == ends.BAD_NODE or now - self._failed_at > _STRAGGLERS_S:
                self._kill(f"rank {failed[0].rank} has ended, and others cannot go on without it")

    def _kill(self, why: str) -> None:
        self._killed_at = time.monotonic()
        sys.stdout.write(f"{why}\n")
        sys.stdout.flush()
        ask_to_kill(self._run, self._attempt, why)

    def _start(self) -> "subprocess.Popen[bytes]":
        logs = self._run.attempt(self._attempt) / "logs"
        host, port = _meeting_point()
        container = {"srun": [], "argv": [sys.executable]}
        with contextlib.suppress(FileNotFoundError):
            text = (self._run.root / CONTAINER).read_text(encoding="utf-8")
            container = json.loads(text)
        return self._srun(
            [
                f"--nodes={self._num_nodes}",
                f"--ntasks={self._num_nodes}",
                "--ntasks-per-node=1",
                *_cpus(),
                # The other nodes have a save to finish, whatever one task ends with.
                "--kill-on-bad-exit=0",
                "--wait=0",
                f"--output={logs / 'node_%n.log'}",
                "--open-mode=append",
                *container["srun"],
                *(*container["argv"], "-m", "qlora_dist.node"),
                *(str(self._run.root), str(self._attempt), host, str(port)),
            ]
        )

    def _srun(self, args: Sequence[str]) -> "subprocess.Popen[bytes]":
        """Start srun where a signal to the batch process's group does not reach it."""
        return subprocess.Popen(
            ["srun", *args],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,
            env=os.environ | path_env(self._run.root, os.environ.get("PYTHONPATH")),
        )


def _cpus() -> list[str]:
    """The job's cores for the task, of which srun by itself would take one."""
    cores = os.environ.get("SLURM_CPUS_PER_TASK")
    return ["--cpu-bind=none", *([f"--cpus-per-task={cores}"] if cores else [])]


def ranks_on_nodes(run: RunDir, attempt: int, tick: Callable[[], None]) -> RankEnd:
    """Run all ranks of an attempt on the nodes of this process's allocation."""
    return Step(run, attempt, tick=lambda _: tick()).run()


def _nodes() -> list[str]:
    """Slurm's names of the allocation's nodes, in the order of the tasks."""
    nodes = run_command("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"])
    return nodes.stdout.split()


def _meeting_point() -> tuple[str, int]:
    """A host name and a port on the first node, on which the first rank is to listen."""
    here = socket.gethostname()
    if "SLURMD_NODENAME" not in os.environ:
        # salloc may leave its shell on the login node.
        first = _nodes()[0]
        shown = run_command("scontrol", "show", "node", first)
        match = re.search(r"NodeHostName=(\S+)", shown.stdout)
        host = match[1] if match else first
        if host.partition(".")[0] != here.partition(".")[0]:
            # Nobody here can tell which are free there; two jobs rarely draw the same.
            return host, random.SystemRandom().randrange(*_PORTS)
    with socket.socket() as probe:
        probe.bind(("", 0))
        return here, int(probe.getsockname()[1])
