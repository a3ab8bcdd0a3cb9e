"""One testbed: what brings its daemons up in order, and down again."""

import contextlib
import json
import os
import platform
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import qlora_testbed_argv as argv
from qlora_dist.errors import QLoRAError, UserError
from qlora_dist.files import remove_tree, write_json, write_text
from qlora_testbed_conf import (
    CLUSTER,
    LIVE,
    Place,
    Settings,
    gpu_files,
    gres_conf,
    slurm_conf,
    slurmdbd_conf,
)
from qlora_testbed_daemons import Daemons
from qlora_testbed_needs import PATH, check_machine
from qlora_testbed_procs import JobProcess, free_ports, job_processes, send

_FOLDERS = ("db", "log", "spool", "state")


class Testbed:
    """One cluster: munged, slurmctld, a slurmd a node; with accounting, MariaDB and slurmdbd.

    Args:
        folder: Made by :meth:`up`. Holds logs, state and jobs' scripts.
        settings: What kind of cluster. By default what it was when last up, or :class:`Settings`'s.

    Raises:
        UserError: ``folder`` has files in it that are no testbed's.
    """

    # Not for pytest to collect.
    __test__ = False

    def __init__(self, folder: Path, settings: Settings | None = None) -> None:
        self.place = Place(folder.absolute())
        record = self._read_record()
        self.settings = settings or Settings(**record.get("settings", {}))
        self._ports: dict[str, int] = record.get("ports", {})
        self._daemons = Daemons(self.place.folder / "daemons.json", self.place.folder / "log")

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()

    @property
    def env(self) -> dict[str, str]:
        """What a child's environment needs for it to be a client of this cluster."""
        return {"SLURM_CONF": str(self.place.slurm_conf)}

    def alive(self) -> tuple[str, ...]:
        """Names of the daemons that run."""
        return self._daemons.alive()

    def up(self) -> None:
        """Bring it up, from nothing: jobs and logs of an earlier time are gone.

        Raises:
            UserError: It is up already, or this machine cannot have one.
            QLoRAError: A daemon did not start; nothing of it is left running.
        """
        check_machine(self.place, self.settings)
        if self.alive():
            raise UserError(
                f"{self.place.folder} is up already ({', '.join(self.alive())}); "
                "take it down first, or use another folder"
            )
        self._clear()
        try:
            self._start()
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """End its jobs and daemons, whoever started them; logs and state stay in the folder."""
        self._daemons.end(["slurmctld", *self.settings.nodes])
        self._kill_jobs(self.settings.nodes)
        # Each needs those that started before it in order to end in good order.
        for name in reversed(self.alive()):
            self._daemons.end([name])
        remove_tree(self.place.runtime)

    def reconfigure(self, settings: Settings) -> None:
        """Go on with other settings, restarting the daemons if Slurm must start anew for them.

        The queue stays, and so do jobs that run, unless their node is no more.

        Raises:
            UserError: This machine cannot have such a one.
            QLoRAError: A daemon did not start again.
        """
        check_machine(self.place, settings)
        old, new = asdict(self.settings), asdict(settings)
        if {name for name in old if old[name] != new[name]} <= LIVE:
            self.settings = settings
            self._write_confs()
            self.run("scontrol", "reconfigure")
            return
        # slurmd too: with a new slurmctld alone, nodes stayed "unk" for a minute.
        self._daemons.end(["slurmctld", *self.settings.nodes])
        self._kill_jobs(self.settings.nodes[settings.num_nodes :])
        if not settings.accounting:
            self._daemons.end(["slurmdbd"])
            self._daemons.end(["mariadbd"])
        self.settings = settings
        self._start()

    def kill_node(self, name: str) -> None:
        """Let a node fail: SIGKILL to its slurmd, then to all that jobs have there."""
        self._daemons.end([name], number=signal.SIGKILL)
        self._kill_jobs((name,))

    def start_node(self, name: str) -> None:
        """Start a node's slurmd and wait until the node takes jobs.

        Raises:
            QLoRAError: It did not start.
        """
        self._start_daemon(name, argv.slurmd(self.place, name))
        self._daemons.wait_for(name, partial(self._takes_jobs, name))

    @contextlib.contextmanager
    def controller_away(self) -> Iterator[None]:
        """Have no slurmctld meanwhile. Jobs go on.

        Raises:
            QLoRAError: It did not start again.
        """
        # slurmd too: with a new slurmctld alone, nodes stayed "unk" for a minute.
        self._daemons.end(["slurmctld", *self.settings.nodes])
        try:
            yield
        finally:
            self._start()

    def processes(self) -> list[JobProcess]:
        """Live processes of jobs, orphans included."""
        return job_processes(self.place, self.settings.nodes)

    def wait_idle(self, timeout_s: float = 60.0) -> None:
        """Wait until the queue is empty and every node idle.

        Raises:
            QLoRAError: They are not, after that long; the message has the queue and the nodes.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            queue = self.run("squeue", "--noheader")
            states = {name: self._state(name) for name in self.settings.nodes}
            if not queue and set(states.values()) == {"idle"}:
                return
            if time.monotonic() > deadline:
                raise QLoRAError(f"not idle after {timeout_s:g} s: {states}\n{queue}")
            time.sleep(0.1)

    def run(self, *command: str) -> str:
        """Run a client, such as ``squeue``, and return what it prints.

        Raises:
            QLoRAError: It failed; the message has what it said.
        """
        done = subprocess.run(
            command, env=os.environ | self.env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise QLoRAError(
                f"{shlex.join(command)}: exit {done.returncode}: {done.stderr.strip()}"
            )
        return done.stdout

    def _read_record(self) -> dict[str, Any]:
        path = self.place.folder / "testbed.json"
        if path.exists():
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return record
        if self.place.folder.exists() and any(self.place.folder.iterdir()):
            raise UserError(
                f"{self.place.folder} has files in it that are no testbed's; "
                "a folder that is new or empty would do"
            )
        return {}

    def _clear(self) -> None:
        # Open to all: jobs' users pass through to their scripts.
        self.place.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._ports = {}
        self._write_record()
        for name in _FOLDERS:
            remove_tree(self.place.folder / name)
            (self.place.folder / name).mkdir(mode=0o755)
        remove_tree(self.place.runtime)
        self.place.runtime.mkdir(mode=0o755)
        self.place.files.symlink_to(self.place.folder)
        self.place.munge_key.touch(mode=0o600)
        self.place.munge_key.write_bytes(os.urandom(128))

    def _write_record(self) -> None:
        value = {"settings": asdict(self.settings), "ports": self._ports}
        write_json(self.place.folder / "testbed.json", value)

    def _write_confs(self) -> None:
        lacking = [
            name
            for name in ("slurmctld", "slurmdbd", *self.settings.nodes)
            if name not in self._ports
        ]
        self._ports |= dict(zip(lacking, free_ports(len(lacking)), strict=True))
        self._write_record()
        for file in gpu_files(self.place, self.settings):
            if not file.is_symlink():
                file.symlink_to("/dev/null")
        host = platform.node().partition(".")[0]
        conf = slurm_conf(self.place, self.settings, self._ports, host)
        for name, text in (
            ("gres.conf", gres_conf(self.place, self.settings)),
            ("slurmdbd.conf", slurmdbd_conf(self.place, self._ports["slurmdbd"])),
            ("slurm.conf", conf),
        ):
            write_text(self.place.runtime / name, text)
        # The clients of every user read it.
        self.place.slurm_conf.chmod(0o644)

    def _start(self) -> None:
        """Start every daemon that does not run, and wait until all nodes take jobs."""
        self._write_confs()
        self._start_daemon("munged", argv.munged(self.place))
        self._daemons.wait_for("munged", partial(_listens, self.place.munge_socket))
        if self.settings.accounting:
            self._start_database()
        # Before the nodes, which end of the same mistakes in slurm.conf and say less about them.
        self._start_controller()
        for name in self.settings.nodes:
            self._start_daemon(name, argv.slurmd(self.place, name))
        for name in self.settings.nodes:
            self._daemons.wait_for(name, partial(self._takes_jobs, name))

    def _start_controller(self) -> None:
        self._start_daemon("slurmctld", argv.slurmctld(self.place))
        self._daemons.wait_for("slurmctld", partial(self._works, "scontrol", "ping"))

    def _start_database(self) -> None:
        if not any(self.place.database.iterdir()):
            self.run(*argv.mariadb_install_db(self.place))
        self._start_daemon("mariadbd", argv.mariadbd(self.place))
        self._daemons.wait_for("mariadbd", partial(_listens, self.place.database_socket))
        self._start_daemon("slurmdbd", argv.slurmdbd())
        self._daemons.wait_for("slurmdbd", partial(self._works, "sacctmgr", "list", "cluster"))
        # Of a cluster that it does not know it writes no jobs down.
        if not self.run("sacctmgr", "--noheader", "list", "cluster"):
            self.run("sacctmgr", "--immediate", "add", "cluster", CLUSTER)

    def _start_daemon(self, name: str, command: list[str]) -> None:
        # libmariadb's variable; slurmdbd.conf has no word for where a socket is.
        socket_of = {"MYSQL_UNIX_PORT": str(self.place.database_socket)}
        self._daemons.start(name, command, {"PATH": PATH} | self.env | socket_of)

    def _kill_jobs(self, nodes: tuple[str, ...]) -> None:
        # Again, until there is none: one that was just starting another may have been ahead.
        deadline = time.monotonic() + 30
        while processes := job_processes(self.place, nodes):
            if time.monotonic() > deadline:
                raise QLoRAError(f"not ended by SIGKILL in 30 s: {processes}")
            for found in processes:
                send(found.process, signal.SIGKILL)
            time.sleep(0.02)

    def _state(self, node: str) -> str:
        # Not sinfo, which went on saying "mixed" of idle nodes after slurmctld had been away. A "*"
        # says that the node has not answered lately, a "+" comes before what else there is to say.
        text = self.run("scontrol", "show", "node", node)
        return text.partition("State=")[2].split()[0].lower()

    def _takes_jobs(self, node: str) -> bool:
        return self._state(node).partition("+")[0] in ("idle", "mixed", "allocated")

    def _works(self, *command: str) -> bool:
        try:
            self.run(*command)
        except QLoRAError:
            return False
        return True


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0
