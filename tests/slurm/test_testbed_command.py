"""Bringing a testbed up and down: from the command line, after a crash, and where it is refused."""

import os
import shlex
import subprocess
import sys

import pytest

import qlora_testbed_cluster
import qlora_testbed_needs
from qlora_dist.errors import QLoRAError, UserError
from qlora_testbed import Settings, Testbed, main


def test_what_one_process_brought_up_another_takes_down(make, submit, capfd):
    folder = make(name="with 'odd' \"name\"").place.folder
    # A process of its own, which has ended when the testbed is used.
    script = qlora_testbed_cluster.__file__.replace("_cluster", "")
    subprocess.run([sys.executable, script, "up", str(folder)], check=True)
    printed = capfd.readouterr().out
    up = Testbed(folder)
    assert f"export SLURM_CONF={up.env['SLURM_CONF']}" in printed
    assert up.alive() == ("munged", "slurmctld", "n1", "n2")

    # The second forgets whose it is, and is known by its parent.
    script = "setsid sleep 300 & setsid env --ignore-environment sleep 301 & wait"
    submit(up, f"{script} & sleep 0.5; echo started; wait").wait_for_line("started")
    left = up.processes()
    assert {"sleep 300", "sleep 301"} < {one.command for one in left}
    assert main(["status", str(folder)]) == 0
    assert "sleep 301" in capfd.readouterr().out
    with pytest.raises(UserError, match="is up already"):
        up.up()

    assert main(["down", str(folder)]) == 0
    assert up.alive() == ()
    assert all(one.process.is_gone() for one in left)
    assert not up.place.runtime.exists()
    assert (folder / "log" / "slurmctld.log").exists()
    assert main(["down", str(folder)]) == 0


def test_env_prints_what_a_shell_reads(make, capsys):
    testbed = make(name="$HOME; 'x'")
    testbed.place.folder.mkdir()
    assert main(["env", str(testbed.place.folder)]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words == ["export", f"SLURM_CONF={testbed.place.slurm_conf}"]


def test_a_daemon_that_does_not_start_says_why_and_nothing_stays(make, monkeypatch):
    def wrong(*arguments):
        return "Nonsense=1\n" + slurm_conf(*arguments)

    slurm_conf = qlora_testbed_cluster.slurm_conf
    monkeypatch.setattr(qlora_testbed_cluster, "slurm_conf", wrong)
    testbed = make()
    with pytest.raises(QLoRAError, match=r"slurmctld ended; the end of .*slurmctld\.log:") as error:
        testbed.up()
    assert "unrecognized key: Nonsense" in str(error.value)
    assert testbed.alive() == ()
    assert not testbed.place.runtime.exists()


def test_another_cluster_is_left_alone(tmp_path, make, monkeypatch):
    testbed = make()
    system = tmp_path / "slurm.conf"
    monkeypatch.setattr(qlora_testbed_needs, "SYSTEM_CONFS", (system,))
    monkeypatch.setenv("SLURM_CONF", "/somewhere/slurm")
    with pytest.raises(UserError, match="SLURM_CONF is /somewhere/slurm, of another cluster"):
        testbed.up()
    monkeypatch.setenv("SLURM_CONF", str(testbed.place.slurm_conf))
    system.touch()
    with pytest.raises(UserError, match="this machine is part of a cluster"):
        testbed.up()
    assert not testbed.place.folder.exists()


def test_missing_programs_are_named_with_their_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(qlora_testbed_needs, "PATH", str(tmp_path))
    with pytest.raises(UserError) as error:
        Testbed(tmp_path / "new", Settings(accounting=True)).up()
    assert "munged (Debian's munge), slurmctld (Debian's slurmctld)" in str(error.value)
    assert "mariadbd (Debian's mariadb-server)" in str(error.value)


def test_only_root_can(tmp_path, make, monkeypatch):
    testbed = make()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UserError, match="only root can run one, not uid 1000"):
        testbed.up()


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="files in it that are no testbed's"):
        Testbed(tmp_path)


def test_a_cluster_without_nodes_is_refused():
    with pytest.raises(ValueError, match="num_nodes is at least 1, not 0"):
        Settings(num_nodes=0)
