"""Cluster profiles: what a site wants said in every job, in YAML."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from qlora_dist.environment import holds_secret, says_secret
from qlora_dist.errors import SpecError, UserError
from qlora_dist.spec_file import parse_yaml
from qlora_dist.spec_values import Count, Section, Text, TimeLimit

# Profiles that come with the project lie beside this package, in a checkout.
CLUSTERS = Path(__file__).parent.parent / "clusters"


# Options of sbatch that a profile must not replace.
_OURS = frozenset(
    {"array", "comment", "dependency", "error", "export", "job-name", "nodes", "ntasks-per-node"}
    | {"open-mode", "output", "requeue", "wrap"}
)


class NoContainer(Section):
    """Programs of the nodes themselves."""

    kind: Literal["none"] = "none"
    """No container."""


class ApptainerContainer(Section):
    """Each node's processes in `apptainer exec`; the job's batch process stays outside."""

    kind: Literal["apptainer"]
    """Apptainer, or Singularity under that name."""
    image: Text
    """Path of the image, which holds Python with qlora-dist's dependencies."""
    binds: list[Text] = Field(default_factory=list)
    """Folders beside the run directory to see inside, such as models and data."""
    python: Text = "python3"
    """Interpreter inside."""


class PyxisContainer(Section):
    """Each node's processes in a container of srun's own, by the pyxis plugin."""

    kind: Literal["pyxis"]
    """pyxis with enroot."""
    image: Text
    """As `srun --container-image` takes it."""
    binds: list[Text] = Field(default_factory=list)
    """Folders beside the run directory to see inside, such as models and data."""
    python: Text = "python3"
    """Interpreter inside."""


Container = Annotated[
    NoContainer | ApptainerContainer | PyxisContainer, Field(discriminator="kind")
]


class Profile(Section):
    """One cluster, or one way to use it."""

    partition: Text | None = None
    """Partition, or several with commas."""
    account: Text | None = None
    """Account that is charged."""
    qos: Text | None = None
    """Quality of service."""
    constraint: Text | None = None
    """Features that nodes must have."""
    reservation: Text | None = None
    """Reservation to run in."""
    exclude: Text | None = None
    """Nodes to leave out."""
    gres: Text | None = None
    """Generic resources of each node, such as gpu:a100:8, where the site wants more said than how
    many GPUs."""
    cpus: Count | None = None
    """CPU cores of each node; by default resources.cpus_per_process for each process."""
    time: TimeLimit | None = None
    """Time limit where a config has none, [days-]hours:minutes:seconds."""
    mem_gb: Annotated[float, Field(gt=0)] | None = None
    """Host memory of each node, in GB. Without it some clusters give a job the whole node's, and
    run one job at a time on it."""
    signal_lead_s: Count = 120
    """How long before the time limit Slurm warns the job, in seconds; it must cover a save. Slurm
    may warn up to a minute earlier."""
    setup: list[Text] = Field(default_factory=list)
    """Shell lines that run before everything else on the first node, such as "module load cuda".
    They are code: read a profile before you use it."""
    env: dict[str, str] = Field(default_factory=dict)
    """Variables of the job. They are written into its script: no place for a secret."""
    container: Container = Field(default_factory=NoContainer)
    """What the processes of a node run in."""
    local_dir: Text | None = None
    """Folder on each node's own storage, for a copy of the quantised base (quantization.cache_dir);
    it may name variables of the job, as in /local/$SLURM_JOB_ID. A container has to bind it."""
    network_interface: Text | None = None
    """Interface that the nodes talk over, such as ib0."""
    mail_user: Text | None = None
    """Where Slurm writes to about a job."""
    mail_type: Text = "END,FAIL"
    """When it does."""
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict)
    """Further options of sbatch, by their long names, such as {nice: 100}."""

    @field_validator("sbatch")
    @classmethod
    def _not_ours(cls, sbatch: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        for name, value in sbatch.items():
            if name in _OURS:
                raise ValueError(f"{name} is the launcher's own: it finds its jobs and runs by it")
            if value is False:
                raise ValueError(f"{name}: a switch of sbatch is true, or is left out")
        return sbatch

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        for name, value in env.items():
            if says_secret(name) or holds_secret(value):
                raise ValueError(
                    f"{name} would be written into job scripts; put it into your shell's "
                    "environment and name it in resources.pass_env, or use model.token_file"
                )
        return env


def load_profile(name: str | None) -> Profile:
    """Read the profile that a spec names: a file, or a name in slurm/clusters.

    Raises:
        UserError: There is none of that name.
        SpecError: It is not a profile.
    """
    if name is None:
        return Profile()
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = CLUSTERS / f"{name}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        there = ", ".join(sorted(p.stem for p in CLUSTERS.glob("*.yaml")))
        raise UserError(
            f"resources.profile: there is no {path}; give a YAML file"
            + (f", or one of {there}" if there else "")
        ) from None
    tree: Any = parse_yaml(text, source=str(path)) or {}
    try:
        return Profile.model_validate(tree)
    except ValidationError as error:
        problems = [_problem(item) for item in error.errors(include_url=False)]
        raise SpecError(problems, source=str(path)) from None


def _problem(item: Mapping[str, Any]) -> str:
    """One line for one thing that is wrong in a profile."""
    key = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, Profile.model_fields, n=1)
        return f"{key}: no such key" + (f"; did you mean {near[0]}?" if near else "")
    return f"{key}: {item['msg'].removeprefix('Value error, ')}"
