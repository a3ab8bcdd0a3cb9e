"""How each daemon of a testbed is started. All stay in the foreground, and print their log."""

from qlora_testbed_conf import Place


def munged(place: Place) -> list[str]:
    """With a key of its own, made when the testbed comes up."""
    return [
        *("munged", "--foreground"),
        f"--key-file={place.munge_key}",
        f"--socket={place.munge_socket}",
        f"--seed-file={place.runtime}/munge.seed",
        f"--pid-file={place.runtime}/munged.pid",
    ]


def mariadb_install_db(place: Place) -> list[str]:
    """Make an empty database in which root is whoever is root on this machine."""
    return [
        # This machine's own database may have options of its own, in files that this leaves out.
        *("mariadb-install-db", "--no-defaults", "--user=root"),
        f"--datadir={place.database}",
        *("--auth-root-authentication-method=socket", "--skip-test-db"),
    ]


def mariadbd(place: Place) -> list[str]:
    """On a Unix socket and no port. Small, and careless of power cuts."""
    return [
        *("mariadbd", "--no-defaults", "--user=root"),
        f"--datadir={place.database}",
        f"--socket={place.database_socket}",
        f"--pid-file={place.runtime}/mariadbd.pid",
        *("--skip-networking", "--skip-log-bin"),
        *("--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0"),
    ]


def slurmdbd() -> list[str]:
    """It finds slurmdbd.conf beside SLURM_CONF."""
    return ["slurmdbd", "-D"]


def slurmctld(place: Place) -> list[str]:
    """With the state that it finds, if any."""
    return ["slurmctld", "-D", "-f", str(place.slurm_conf)]


def slurmd(place: Place, node: str) -> list[str]:
    """One node of several on this machine."""
    return ["slurmd", "-D", "-f", str(place.slurm_conf), "-N", node]
