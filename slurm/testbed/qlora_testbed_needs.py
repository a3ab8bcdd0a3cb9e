"""What a machine needs for a testbed, and what it must not have."""

import os
import platform
import shutil
from pathlib import Path

from qlora_dist.errors import UserError
from qlora_testbed_conf import Place, Settings

# Debian keeps most daemons where a user's PATH does not lead.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Where Slurm looks when SLURM_CONF is not set.
SYSTEM_CONFS = (Path("/etc/slurm/slurm.conf"), Path("/etc/slurm-llnl/slurm.conf"))

# Program -> Debian's package.
_PROGRAMS = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
}
_ACCOUNTING_PROGRAMS = {
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
}


def refusal(place: Place, settings: Settings) -> str | None:
    """Why a testbed cannot be brought up here, and what would help; None if it can."""
    programs = _PROGRAMS | (_ACCOUNTING_PROGRAMS if settings.accounting else {})
    lacking = {name: deb for name, deb in programs.items() if not shutil.which(name, path=PATH)}
    if lacking:
        names = ", ".join(f"{name} (Debian's {deb})" for name, deb in lacking.items())
        packages = " ".join(dict.fromkeys(lacking.values()))
        return f"not installed: {names}; apt-get install --no-install-recommends {packages}"
    if os.geteuid() != 0:
        return f"slurmd starts jobs as their users: only root can run one, not uid {os.geteuid()}"
    conf = os.environ.get("SLURM_CONF")
    # Whoever has exported this testbed's may take it down and bring it up again.
    if conf and conf != str(place.slurm_conf):
        return (
            f"SLURM_CONF is {conf}, of another cluster; to have a testbed as well: unset SLURM_CONF"
        )
    for path in SYSTEM_CONFS:
        if path.exists():
            return (
                f"{path} is there: this machine is part of a cluster, and a testbed's jobs could "
                "meet the cluster's; a container without that file would do"
            )
    return None


def check_machine(place: Place, settings: Settings) -> None:
    """See whether a testbed can be brought up here.

    Raises:
        UserError: It cannot; the message is :func:`refusal`'s.
    """
    reason = refusal(place, settings)
    if reason:
        raise UserError(f"no testbed on {platform.node()}: {reason}")
