"""What a run's processes see of the environment that they are started from: an allow-list.

A variable passes because something that trains reads it. One whose name says secret passes by no
pattern, only by its own name in ``resources.pass_env``. Whatever is written down is redacted first.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase

ALLOWED = (
    # The user, the shell, the machine.
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TERM", "TZ", "LANG", "LANGUAGE", "LC_*"),
    *("TMPDIR", "TMP", "TEMP", "XDG_*", "LD_LIBRARY_PATH"),
    # Python, and what Triton and DeepSpeed compile with.
    *("VIRTUAL_ENV", "CONDA_*", "PYTHON*", "CC", "CXX", "CPATH", "C_INCLUDE_PATH"),
    *("CPLUS_INCLUDE_PATH", "LIBRARY_PATH"),
    # A batch script's `module` is a shell function that the login shell exports.
    *("MODULE*", "LOADEDMODULES", "_LMFILES_*", "_ModuleTable*", "LMOD_*", "__LMOD_*"),
    *("__MODULES_*", "BASH_ENV", "BASH_FUNC_module%%", "BASH_FUNC_ml%%", "BASH_FUNC__module_raw%%"),
    # Devices, networks, threads.
    *("CUDA*", "CUBLAS_*", "CUDNN_*", "NVIDIA_*", "NCCL_*", "NVSHMEM_*", "OFI_NCCL_*", "UCX_*"),
    *("FI_*", "RDMAV_*", "MLX5_*", "GLOO_*", "PMI*"),
    *("OMP_*", "GOMP_*", "MKL_*", "KMP_*", "OPENBLAS_*", "NUMEXPR_*"),
    # Libraries.
    *("TORCH_*", "TORCHELASTIC_*", "TORCHINDUCTOR_*", "PYTORCH_*", "TRITON_*", "DS_*"),
    *("HF_*", "TRANSFORMERS_*", "TOKENIZERS_*", "BNB_*", "BITSANDBYTES_*"),
    # The way out.
    *("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy"),
    *("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "ALL_PROXY", "NO_PROXY"),
    *("SSL_CERT_*", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    # The scheduler, and our own.
    *("SLURM_*", "SLURMD_*", "QLORA_*"),
)
# What a client of Slurm reads, inside a job and outside.
_OF_CLIENTS = frozenset({"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"})
REDACTED = "<redacted>"

_SECRET_NAME = re.compile(
    r"TOKEN(?!I[SZ]E)|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY"
    r"|(^|_)(JWT|PWD)(_|$)",
    re.IGNORECASE,
)
# Names of places, and a switch of huggingface_hub.
_NO_SECRET = re.compile(r".+_(PATH|FILE|DIR)|PWD|HF_HUB_DISABLE_IMPLICIT_TOKEN", re.IGNORECASE)
# As their issuers shape them: Hugging Face, GitHub, GitLab, AWS, OpenAI, Slack, JSON Web Tokens,
# PEM.
_SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{8,}|\bgh[a-z]_[A-Za-z0-9]{8,}|\bgithub_pat_\w{8,}|\bglpat-[\w-]{8,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{12,}|\bsk-[\w-]{16,}|\bxox[a-z]-[\w-]{8,}"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----|.*)",
    re.DOTALL,
)
# To the last @: a password may hold every other character. The scheme of a proxy may be missing.
_URL_USER = re.compile(r"(?<=://)\S*@|^(?!\w+://)[^\s:/@]+:\S*@(?=[^\s@]+$)")


def allowed(env: Mapping[str, str], also: Collection[str] = ()) -> dict[str, str]:
    """The part of an environment that training processes get.

    Args:
        env: The whole of it.
        also: Further names, or patterns with ``*``; a pattern lets no secret pass.
    """
    return {name: value for name, value in env.items() if _passes(name, also)}


def for_sbatch(env: Mapping[str, str], also: Collection[str] = ()) -> dict[str, str]:
    """The environment of sbatch, which becomes its job's.

    ``SBATCH_*`` would override the script's own lines unseen. ``SLURM_JWT`` is how some sites let
    users speak to Slurm; training processes do not get it.
    """
    passed = allowed(env, (*also, "SLURM_JWT"))
    return {
        name: value
        for name, value in passed.items()
        # Another job's own variables would come through to this one: its array, its restarts.
        if not name.startswith(("SBATCH_", "SLURM")) or name in _OF_CLIENTS
    }


def redacted(env: Mapping[str, str]) -> dict[str, str]:
    """An environment to be written down, in the order of its names."""
    return {name: REDACTED if says_secret(name) else redact_text(env[name]) for name in sorted(env)}


def redact_text(text: str) -> str:
    """A text without what has the shape of a key or a token, and without passwords in URLs."""
    return _URL_USER.sub(f"{REDACTED}@", _SECRET_VALUE.sub(REDACTED, text))


def says_secret(name: str) -> bool:
    """Whether a variable's value is a secret, by its name."""
    return _SECRET_NAME.search(name) is not None and _NO_SECRET.fullmatch(name) is None


def holds_secret(text: str) -> bool:
    """Whether something in a text has the shape of a key or a token."""
    return _SECRET_VALUE.search(text) is not None


def _passes(name: str, also: Collection[str]) -> bool:
    if says_secret(name):
        return name in also
    return _matches(name, ALLOWED) or _matches(name, also)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
