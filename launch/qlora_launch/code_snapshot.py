"""Taking the code that a run's processes will execute: the qlora_dist package, as it is here now.

A job may wait for days; what is done to a checkout or an installation meanwhile changes nothing.
"""

import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Any

from qlora_dist import __version__
from qlora_dist.attempt import idle
from qlora_dist.code_tree import PACKAGE, package_dir, recorded, tree_sha256
from qlora_dist.environment import holds_secret, redact_text
from qlora_dist.errors import QLoRAError
from qlora_dist.files import fsync_dir, remove_tree, replace_dir, write_json, write_text
from qlora_dist.layout import RunDir
from qlora_launch.git import Checkout

# Those whose versions can change what a run computes.
PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed", "datasets"),
    *("tokenizers", "safetensors", "numpy", "pyarrow", "huggingface_hub", "pydantic"),
    *("submitit", "triton", "tensorboard"),
)
# Source files are of kilobytes; a weight or a core dump that lies among them is none.
MAX_BYTES = 4 << 20
SECRET_NAMES = (
    *(".env", ".env.*", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.kdbx", "*.ppk", "*.gpg"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.token", "token", "token.txt"),
    *("*_token", "*_token.txt", ".netrc", "_netrc", ".npmrc", ".pypirc", ".git-credentials"),
    *("credentials", "credentials.*", "secrets", "secrets.*", "*.secret", ".ssh", ".aws"),
)


@dataclass(frozen=True)
class Code:
    """The package as it is now.

    Attributes:
        package: Its folder.
        files: Path in RUN/code -> content.
        left_out: Path -> why it is not among them.
        commit: Of the checkout; None where it is none.
        dirty: Whether the checkout has changes of the package; None where it is none.
        diff: Those to tracked files.
    """

    package: Path
    files: dict[str, bytes]
    left_out: dict[str, str]
    commit: str | None = None
    dirty: bool | None = None
    diff: str = ""

    def to_json(self) -> dict[str, Any]:
        """What code.json says."""
        hashes = {name: sha256(content).hexdigest() for name, content in self.files.items()}
        return {
            "sha256": tree_sha256(hashes),
            "commit": self.commit,
            "dirty": self.dirty,
            "from": str(self.package),
            "version": __version__,
            "python": platform.python_version(),
            "packages": _versions(),
            "left_out": self.left_out,
            "files": hashes,
        }


def current_code(package: Path | None = None) -> Code:
    """Read the package: from a git checkout what is tracked or not ignored, else all of it.

    Args:
        package: Its folder; by default the one that this process has imported.
    """
    package = package or package_dir()
    checkout = Checkout.of(package)
    names = checkout.files if checkout else _all_files(package)
    files, left_out = {}, {}
    for name in names:
        path = f"{PACKAGE}/{name}"
        if (reason := _unwanted(package, name)) is not None:
            # A name may be bytes that are no text.
            left_out[path.encode(errors="backslashreplace").decode()] = reason
        elif (package / name).is_file():
            files[path] = (package / name).read_bytes()
            if holds_secret(files[path].decode(errors="replace")):
                left_out[path] = "holds what looks like a key"
                del files[path]
    if checkout is None:
        return Code(package, files, left_out)
    changed = [name for name in checkout.changed if f"{PACKAGE}/{name}" not in left_out]
    added = [name for name in checkout.untracked if f"{PACKAGE}/{name}" in files]
    diff = redact_text(checkout.diff([name for name in changed if not _is_secret(name)]))
    return Code(package, files, left_out, checkout.commit, bool(changed or added), diff)


def write_code(code: Code, folder: Path) -> None:
    """Put the code into a run directory; code.json last, since without it there is no snapshot.

    Raises:
        OSError: It cannot be written.
    """
    run = RunDir(folder)
    run.code_json.unlink(missing_ok=True)
    fsync_dir(folder)
    partial = run.code.with_name("code.partial")
    remove_tree(partial)
    (partial / PACKAGE).mkdir(mode=0o700, parents=True)
    partial.chmod(0o700)
    for name, content in code.files.items():
        path = partial / name
        for parent in reversed(path.relative_to(partial).parents):
            (partial / parent).mkdir(mode=0o700, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
    replace_dir(partial, run.code)
    if code.diff:
        write_text(run.code_diff, code.diff)
    else:
        run.code_diff.unlink(missing_ok=True)
    write_json(run.code_json, code.to_json())


def take_code(run: RunDir, *, say: Callable[[str], None]) -> None:
    """Give a run the code that is here now, if it has another, while no launcher has it.

    Raises:
        RunDirError: The code is another, and a launcher has the run.
        QLoRAError: It cannot be read or written.
    """
    try:
        code, before = current_code(), recorded(run)
        now = code.to_json()
        if before != now or not run.code.is_dir():
            with idle(run):
                _replace(run, code, before, now, say)
    except OSError as error:
        raise QLoRAError(f"{run.code} cannot be taken from {package_dir()}: {error}") from error
    for name, reason in code.left_out.items():
        # A name that is no plain text may be more than a line.
        say(f"code: left out {name if name.isprintable() else ascii(name)}: {reason}")


def _replace(
    run: RunDir,
    code: Code,
    before: dict[str, Any] | None,
    now: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    if before is not None and before["files"] == now["files"] and run.code.is_dir():
        # Committed since, or with other packages beside it.
        write_json(run.code_json, now)
        return
    write_code(code, run.root)
    say(f"code: was {_name(before)}, is {_name(now)}")


def _name(tree: dict[str, Any] | None) -> str:
    if tree is None:
        return "unknown"
    origin = str(tree.get("commit") or f"qlora-dist {tree.get('version')}")
    origin = origin[:12] if tree.get("commit") else origin
    changes = " with changes" if tree.get("dirty") else ""
    return f"{origin}{changes} (sha256 {str(tree.get('sha256'))[:12]})"


def _all_files(package: Path) -> list[str]:
    paths = [path for path in sorted(package.rglob("*")) if path.is_symlink() or path.is_file()]
    names = [path.relative_to(package) for path in paths]
    return [str(name) for name in names if "__pycache__" not in name.parts]


def _unwanted(package: Path, name: str) -> str | None:
    """Why a file has no place in a snapshot; None where it has."""
    path = package / name
    if _is_secret(name):
        return "its name says that it is secret"
    if not name.isprintable():
        return "its name is no plain text"
    target = path.resolve()
    if path.is_symlink() and (_is_secret(target.name) or not target.is_file()):
        return "a link that leads to no plain file"
    if not target.is_relative_to(package.resolve()):
        return "a link that leads out of the package"
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        return f"larger than {MAX_BYTES >> 20} MiB"
    return None


def _is_secret(name: str) -> bool:
    parts = name.lower().split("/")
    return any(fnmatchcase(part, pattern) for part in parts for pattern in SECRET_NAMES)


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
