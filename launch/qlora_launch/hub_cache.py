"""What a run needs of the hub, and what of it is in the cache."""

import glob
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_dist.data.reader import has_rows, local_file
from qlora_dist.errors import DataError, ModelError, UserError
from qlora_dist.hub import is_commit, looks_like_path
from qlora_dist.spec import DatasetSection, RunSpec

INDEX = "model.safetensors.index.json"
_ONE_FILE = "model.safetensors"
# What transformers reads beside the weights: configuration, tokenizer, chat template.
_COMPANIONS = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Repo:
    """A repository on the hub that a spec names.

    Attributes:
        kind: "model" or "dataset", as the hub has it.
        source: Its name.
        revision: Commit, branch or tag; None for the newest.
        dataset: What of it is read, for a dataset.
    """

    kind: str
    source: str
    revision: str | None
    dataset: DatasetSection | None = None

    @property
    def key(self) -> str:
        """The spec's key that names it."""
        return "model.source" if self.dataset is None else "data.source"

    @property
    def folder(self) -> Path:
        """Its folder in the hub's cache."""
        from huggingface_hub import constants

        name = "--".join([f"{self.kind}s", *self.source.split("/")])
        return Path(constants.HF_HUB_CACHE).expanduser() / name

    @property
    def commit(self) -> str | None:
        """The commit that it is pinned to, or that the cache has for its branch or tag."""
        if is_commit(self.revision):
            return self.revision
        try:
            text = (self.folder / "refs" / (self.revision or "main")).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return None
        return text if is_commit(text) else None


def hub_repos(spec: RunSpec) -> tuple[Repo, ...]:
    """The model and the datasets that are no paths on this machine."""
    repos = []
    source = spec.model.source
    if not (looks_like_path(source) or Path(source).expanduser().is_dir()):
        repos.append(Repo("model", source, spec.model.revision))
    for dataset in spec.data.datasets:
        try:
            if local_file(dataset) is None:
                repos.append(Repo("dataset", dataset.source, dataset.revision, dataset))
        except DataError:
            continue
    return tuple(dict.fromkeys(repos))


def missing(spec: RunSpec) -> tuple[str, ...]:
    """What a run needs of the hub and cannot have without a network, a line each."""
    return tuple(
        f"{repo.key}: {repo.source} at {repo.commit or repo.revision or 'its newest commit'}"
        for repo in hub_repos(spec)
        if not _is_here(repo, spec)
    )


def check_prefetched(spec: RunSpec, named: str) -> None:
    """Refuse a run whose processes have no network and need one.

    Args:
        spec: Of the run.
        named: What ``qlora prefetch`` is to be given.

    Raises:
        UserError: Something is not in the cache.
    """
    if lines := missing(spec):
        raise UserError(
            "jobs run without a network, and this is not in the cache:\n"
            + "".join(f"  {line}\n" for line in lines)
            + f"Fetch it with: qlora prefetch {named}"
        )


def model_files(sizes: Mapping[str, int], snapshot: Path, *, source: str, code: bool) -> list[str]:
    """Names of a model's files that a run reads.

    Args:
        sizes: Every file of the repository -> bytes.
        snapshot: Folder that has the index of the weights, if there is one.
        source: The model, for messages.
        code: Python files too.

    Raises:
        ModelError: There are no safetensors weights, or not all that the index names.
        OSError: The index is not there.
    """
    if _ONE_FILE in sizes:
        weights = [_ONE_FILE]
    elif INDEX in sizes:
        try:
            index = json.loads((snapshot / INDEX).read_text(encoding="utf-8"))
            weights = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"model.source: {INDEX} of {source!r} is damaged: {error}") from error
    else:
        pickles = [name for name in sizes if name.endswith(_PICKLES)]
        raise ModelError(
            f"model.source: {source!r} has no safetensors weights"
            + (f", only pickles, which can run any code: {', '.join(pickles)}" if pickles else "")
            + ". Name a model that has model.safetensors, or convert it and give the folder"
        )
    if lost := [name for name in weights if name not in sizes]:
        raise ModelError(f"model.source: {source!r} lacks {', '.join(lost)}, which its index names")
    return [name for name in sizes if name in weights or _is_companion(name, code=code)]


def listing(repo: Repo, commit: str) -> dict[str, int]:
    """Every file of a repository at a commit -> bytes, from the cache; empty if not there."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HFValidationError

    try:
        tree = get_cached_repo_tree(repo.source, repo_type=repo.kind, revision=commit)
    except (CachedRepoTreeNotFoundError, HFValidationError):
        return {}
    return {file.path: file.size for file in tree}


def exactly(names: list[str]) -> list[str]:
    """Patterns that match these file names and no others."""
    return [glob.escape(name) for name in names]


def _is_companion(name: str, *, code: bool) -> bool:
    if code and name.endswith(".py"):
        return True
    folder, _, file = name.rpartition("/")
    return folder in ("", "additional_chat_templates") and file.endswith(_COMPANIONS)


def _is_here(repo: Repo, spec: RunSpec) -> bool:
    commit = repo.commit
    if commit is None:
        return False
    if repo.dataset is not None:
        return has_rows(repo.dataset)
    snapshot = repo.folder / "snapshots" / commit
    sizes = listing(repo, commit)
    try:
        names = model_files(sizes, snapshot, source=repo.source, code=spec.model.trust_remote_code)
    except (ModelError, OSError):
        return False
    return all((snapshot / name).is_file() for name in names)
