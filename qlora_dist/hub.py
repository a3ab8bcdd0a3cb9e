"""Saying in one message why something could not be loaded from a folder or from the hub."""

import re
import stat
from pathlib import Path

from qlora_dist.errors import ModelError


def read_token(token_file: str | None) -> str | None:
    """The hub token in a file that only its owner can read.

    Raises:
        ModelError: The file is missing, empty, or readable by others. The token is not shown.
    """
    if token_file is None:
        return None
    path = Path(token_file).expanduser()
    try:
        mode = path.stat().st_mode
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ModelError(f"model.token_file: cannot read {path}: {error}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ModelError(f"model.token_file: others can read {path}; run: chmod 600 {path}")
    if not token:
        raise ModelError(f"model.token_file: {path} is empty")
    return token


def explain(error: Exception, *, kind: str, key: str, source: str) -> str:
    """One message for a failed load.

    Args:
        error: What the Hugging Face libraries raised.
        kind: "model", "tokenizer" or "dataset".
        key: The spec's key that named it.
        source: Its value.
    """
    names = {type(e).__name__ for e in causes(error)}
    here = f"{key}: the {kind} {source!r}"
    if "GatedRepoError" in names:
        page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{source}"
        return (
            f"{here} is gated and this account has no access. Ask for it at {page}, put a token "
            "with read access into a file of mode 0600, and name the file in model.token_file"
        )
    if "RevisionNotFoundError" in names:
        return f"{here} has no such revision; leave it out for the newest"
    if names & {"RepositoryNotFoundError", "HFValidationError", "DatasetNotFoundError"}:
        return (
            f"{here} is neither a path on this machine nor a name on the hub (or it is private, "
            "and needs model.token_file)"
        )
    if names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError"} or any(
        "connect" in str(e).lower() or "offline" in str(e).lower() for e in causes(error)
    ):
        return (
            f"{here} is not on this machine, and the hub cannot be reached. Give a path, or run "
            "qlora prefetch CONFIG where there is a network, with HF_HOME naming the same cache"
        )
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{here} cannot be loaded: {first}"


def looks_like_path(source: str) -> bool:
    """Whether a source that does not exist was meant as a path rather than as a hub name."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1


def is_commit(revision: str | None) -> bool:
    """Whether a revision names one state of a repository for good, as no branch or tag does."""
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def causes(error: BaseException | None) -> list[BaseException]:
    """An error, what it was raised from, and so on."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
