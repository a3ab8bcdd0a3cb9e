"""What of a shell's environment reaches a training process, and what of that is written down."""

import json

import pytest

from qlora_dist.environment import REDACTED, allowed, for_sbatch, redacted
from qlora_dist.errors import SpecError
from qlora_dist.layout import RunDir
from qlora_dist.plan import make_plan
from qlora_dist.process_env import note_env, process_env
from qlora_dist.resume import check_change
from qlora_dist.spec_file import spec_from_tree
from qlora_launch.render import render
from qlora_launch.rundir import write_run_dir
from qlora_slurm.site_profile import load_profile
from tests.unit.test_spec import GOOD

# Taken apart, so that nobody's scanner takes them for real ones.
HUB, GITHUB, AWS = (
    "hf" + "_AbCdEfGhIjKlMnOp",
    "ghp" + "_0123456789abcdef",
    "AKIA" + "ABCDEFGHIJKLMNOP",
)
JWT = "eyJ" + "hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl"
PEM = "-----BEGIN OPENSSH " + "PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----"


@pytest.mark.parametrize(
    "name",
    [
        *("PATH", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "CONDA_PREFIX", "PYTHONPATH", "CC"),
        *("CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "NCCL_DEBUG", "FI_PROVIDER"),
        *("OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "TRITON_CACHE_DIR", "BNB_CUDA_VERSION"),
        *("HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN_PATH", "HF_HUB_DISABLE_IMPLICIT_TOKEN"),
        *(
            "TOKENIZERS_PARALLELISM",
            "https_proxy",
            "SSL_CERT_FILE",
            "SLURM_CONF",
            "SLURMD_NODENAME",
        ),
        *("QLORA_FAULT", "LMOD_CMD", "MODULEPATH", "BASH_FUNC_module%%", "_ModuleTable001_"),
    ],
)
def test_what_training_reads_passes(name):
    assert allowed({name: "x"}) == {name: "x"}


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"),
        *("hf_token", "HF_TOKENS", "QLORA_PASSWORD", "CONDA_TOKEN", "NVIDIA_API_KEY", "SLURM_JWT"),
        *("QLORA_CREDENTIALS", "TORCH_APIKEY", "HF_PRIVATE_KEY", "OPENAI_API_KEY", "PGPASSWORD"),
        *("SSH_AUTH_SOCK", "LD_PRELOAD", "EDITOR", "RANK", "WORLD_SIZE", "ACCELERATE_USE_CPU"),
        *("SBATCH_ACCOUNT", "SBATCH_GET_USER_ENV", "PWD", "", "MY_PATH"),
    ],
)
def test_nothing_else_does(name):
    assert allowed({name: "x"}) == {}


def test_a_secret_passes_by_its_own_name_and_by_no_pattern():
    env = {"HF_TOKEN": HUB, "LAB_QUEUE": "a", "LAB_TOKEN": "b", "OTHER": "c"}
    assert allowed(env, ["HF_*", "LAB_*"]) == {"LAB_QUEUE": "a"}
    assert allowed(env, ["HF_TOKEN"]) == {"HF_TOKEN": HUB}
    assert allowed(env, ["*"]) == {"LAB_QUEUE": "a", "OTHER": "c"}


def test_sbatch_gets_no_variable_that_overrides_the_script():
    env = {"SBATCH_ACCOUNT": "other", "SLURM_CONF": "/etc/s", "SLURM_JWT": JWT, "HF_TOKEN": HUB}
    assert for_sbatch(env, ["*"]) == {"SLURM_CONF": "/etc/s", "SLURM_JWT": JWT}


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("HF_TOKEN", "short", REDACTED),
        ("QLORA_NOTE", HUB, REDACTED),
        ("QLORA_NOTE", f"a {GITHUB}, b", f"a {REDACTED}, b"),
        ("QLORA_NOTE", f"{AWS}:x", f"{REDACTED}:x"),
        ("QLORA_NOTE", JWT, REDACTED),
        ("QLORA_NOTE", f"first\n{PEM}\nlast", f"first\n{REDACTED}\nlast"),
        ("QLORA_NOTE", PEM.partition("\n-----END")[0], REDACTED),
        ("http_proxy", "http://me:pw@proxy:3128", f"http://{REDACTED}@proxy:3128"),
        # A password may hold what parts a URL.
        ("http_proxy", "http://me:p@w/d:#@proxy:3128", f"http://{REDACTED}@proxy:3128"),
        ("http_proxy", "me:pw@proxy:3128", f"{REDACTED}@proxy:3128"),
        ("http_proxy", "http://proxy:3128", "http://proxy:3128"),
        ("PATH", "/a:/opt/gcc@12/bin:/b", "/a:/opt/gcc@12/bin:/b"),
        ("HF_TOKEN_PATH", "/home/me/token", "/home/me/token"),
        ("TOKENIZERS_PARALLELISM", "true", "true"),
    ],
)
def test_what_is_written_down_holds_no_secret(name, value, shown):
    assert redacted({name: value}) == {name: shown}


def run_with(tmp_path, *overrides):
    spec = spec_from_tree(GOOD, [f"run_dir={json.dumps(str(tmp_path / 'r'))}", *overrides])
    return write_run_dir(render(make_plan(spec)), spec)


def test_a_process_finds_the_runs_code_first_and_then_what_the_user_had(tmp_path):
    run = run_with(tmp_path)
    env = {"PYTHONPATH": f"/mine::{run.code}:/yours", "HOME": "/h", "EDITOR": "vi"}
    got = process_env(run, 3, env)
    assert got["PYTHONPATH"] == f"{run.code}:/mine:/yours"
    assert got["PYTHONSAFEPATH"] == "1"
    assert got["QLORA_ATTEMPT"] == "3"
    assert got["HOME"] == "/h"
    assert "EDITOR" not in got


def test_the_spec_and_the_jobs_script_name_more(tmp_path):
    run = run_with(tmp_path, "resources.pass_env=[HF_TOKEN, LAB_*]")
    env = {"HF_TOKEN": HUB, "LAB_X": "1", "SITE": "2", "QLORA_PASS_ENV": "SITE NONE"}
    got = process_env(run, 0, env)
    assert {name: got[name] for name in ("HF_TOKEN", "LAB_X", "SITE")} == {
        "HF_TOKEN": HUB,
        "LAB_X": "1",
        "SITE": "2",
    }
    (run.attempt(0)).mkdir(parents=True)
    note_env(run, 0, env | {"EDITOR": "vi"}, got, left_out=["WANDB_API_KEY"])
    path = RunDir(run.root).environment_json(0)
    assert path.stat().st_mode & 0o777 == 0o600
    assert HUB not in path.read_text()
    noted = json.loads(path.read_text())
    assert noted["left_out"] == ["EDITOR", "WANDB_API_KEY"]
    assert noted["variables"]["HF_TOKEN"] == REDACTED
    assert noted["variables"]["LAB_X"] == "1"


@pytest.mark.parametrize("name", ["", "A=B", "a b", "$(x)", "A-B"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(SpecError, match=r"resources\.pass_env"):
        spec_from_tree(GOOD, [f"resources.pass_env=[{json.dumps(name)}]"])


def test_the_names_may_change_at_a_resume():
    one, two = (spec_from_tree(GOOD, [f"resources.pass_env={names}"]) for names in ("[A]", "[]"))
    assert check_change(one, two) == []


@pytest.mark.parametrize("line", ["HF_TOKEN: x", f"NOTE: {HUB}"])
def test_a_profile_that_would_put_a_secret_into_job_scripts_is_refused(tmp_path, line):
    file = tmp_path / "p.yaml"
    file.write_text(f"env: {{{line}}}\n")
    with pytest.raises(SpecError, match=r"use model\.token_file") as error:
        load_profile(str(file))
    assert HUB not in str(error.value)
