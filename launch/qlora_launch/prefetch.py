"""Fetching what a run needs of the hub into the Hugging Face cache, ahead of the run."""

import errno
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from qlora_dist.data.reader import has_rows, read_rows, rows_cache
from qlora_dist.errors import DataError, ModelError, QLoRAError
from qlora_dist.hub import causes, explain, read_token
from qlora_dist.spec import DatasetSection, RunSpec
from qlora_launch.hub_cache import INDEX, Repo, exactly, hub_repos, listing, model_files
from qlora_launch.pins import keep_commits
from qlora_launch.progress import NO_BAR, DownloadProgress, size_text

# What decides which files are needed; all of it is small.
_FIRST = {
    "model": ["config.json", INDEX],
    "dataset": ["README.md", ".huggingface.yaml", "dataset_infos.json"],
}
# huggingface_hub itself takes up a broken download five times, where it broke; this is for what
# ends it all the same.
_WAITS_S = (1.0, 4.0)

T = TypeVar("T")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Fetched:
    """A repository whose files are all in the cache.

    Attributes:
        repo: Which.
        commit: At which commit.
        num_bytes: Size of the files that a run needs.
        folder: Where they are.
    """

    repo: Repo
    commit: str
    num_bytes: int
    folder: Path


@dataclass(frozen=True)
class _Wanted:
    """Files of a repository that a run needs: name -> bytes."""

    repo: Repo
    commit: str
    folder: Path
    files: dict[str, int]

    @property
    def absent(self) -> dict[str, int]:
        """Those that are not in the cache yet."""
        here = self.folder
        return {name: size for name, size in self.files.items() if not (here / name).is_file()}


def prefetch(spec: RunSpec, *, say: Say) -> tuple[Fetched, ...]:
    """Fetch the model and the datasets of a spec that are on the hub.

    What is in the cache already is not fetched again; the rows of datasets are prepared as the
    run's processes will look for them.

    Args:
        spec: Any; where it names no revision and its run is there, the run's commits are fetched,
            else the newest.
        say: Takes lines for a person.

    Raises:
        ModelError: A model is missing, gated, or has no safetensors weights.
        DataError: A dataset is missing, gated or malformed.
        QLoRAError: The disk has too little room, or the network broke again and again; what is
            complete is kept.
    """
    spec = keep_commits(spec)
    fetch = _Fetch(spec, say)
    repos = hub_repos(spec)
    for key, source in _local_sources(spec, repos):
        say(f"{key}: {source} is on this machine; nothing to fetch")
    wanted = [fetch.steadily(repo, partial(fetch.look, repo)) for repo in repos]
    _check_room(wanted, say)
    for item in wanted:
        fetch.steadily(item.repo, partial(fetch.download, item))
    return tuple(Fetched(w.repo, w.commit, sum(w.files.values()), w.folder) for w in wanted)


def _check_room(wanted: list[_Wanted], say: Say) -> None:
    """Say how much will be fetched, and refuse if the cache's disk has less room.

    Raises:
        QLoRAError: It has less.
    """
    # By path: two splits of a dataset may be read from the same files.
    files = {w.folder / name: size for w in wanted for name, size in w.absent.items()}
    absent = files.values()
    if not absent:
        return
    disk = next(path for path in wanted[0].folder.parents if path.exists())
    free = shutil.disk_usage(disk).free
    if sum(absent) > free:
        raise QLoRAError(
            f"{size_text(sum(absent))} are to be fetched, and the disk of {disk} has "
            f"{size_text(free)} left. Make room, or let HF_HOME name a folder on a larger disk"
        )
    say(f"to fetch: {len(absent)} files, {size_text(sum(absent))} of {size_text(free)} free")


def table(fetched: tuple[Fetched, ...]) -> str:
    """What was fetched, a line each."""
    rows = [("what", "commit", "size", "where")]
    rows += [(f.repo.source, f.commit, size_text(f.num_bytes), str(f.folder)) for f in fetched]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    )


class _Fetch:
    """Fetches repositories of one spec."""

    def __init__(self, spec: RunSpec, say: Say) -> None:
        self._spec, self._say = spec, say
        self._token = read_token(spec.model.token_file)

    def steadily(self, repo: Repo, step: Callable[[], T]) -> T:
        """Carry out a step, again where the network broke it.

        Raises:
            QLoRAError: It failed for good.
        """
        import httpx
        from huggingface_hub.errors import XetDownloadError

        failures = (OSError, ValueError, RuntimeError, httpx.HTTPError, XetDownloadError)
        for wait_s in _WAITS_S:
            try:
                return step()
            except (QLoRAError, *failures) as error:
                if not _may_pass(error):
                    raise _final(error, repo) from error
                self._say(f"{repo.source}: {_first_line(error)}; again in {wait_s:g} s")
            time.sleep(wait_s)
        try:
            return step()
        except (QLoRAError, *failures) as error:
            if not _may_pass(error):
                raise _final(error, repo) from error
            raise QLoRAError(
                f"{_final(error, repo)}\nWhat is complete is kept; the same command goes on"
            ) from error

    def look(self, repo: Repo) -> _Wanted:
        """Which files of a repository are needed, at which commit."""
        folder = self._snapshot(repo, repo.revision, _FIRST[repo.kind])
        sizes = listing(repo, folder.name)
        if not sizes:
            raise ConnectionError(f"no list of the files of {repo.source}")
        if repo.dataset is None:
            names = model_files(
                sizes, folder, source=repo.source, code=self._spec.model.trust_remote_code
            )
        elif has_rows(_at(repo.dataset, folder.name)):
            names = [name for name in sizes if (folder / name).is_file()]
        else:
            names = self._data_files(_at(repo.dataset, folder.name))
        files = {name: sizes[name] for name in names if name in sizes}
        return _Wanted(repo, folder.name, folder, files)

    def download(self, wanted: _Wanted) -> None:
        """Fetch what is absent; of a dataset, prepare the rows."""
        repo, absent = wanted.repo, wanted.absent
        if absent:
            size = sum(absent.values())
            self._say(f"{repo.source}: fetching {len(absent)} files, {size_text(size)}")
            with DownloadProgress(size, self._say, bar=sys.stderr.isatty()) as progress:
                names = exactly(list(absent))
                self._snapshot(repo, wanted.commit, names, progress.bar_class())
                progress.update(size)
        if repo.dataset is not None and not has_rows(_at(repo.dataset, wanted.commit)):
            rows = read_rows(_at(repo.dataset, wanted.commit), self._spec.model.token_file)
            self._say(f"{repo.source}: {len(rows):,} rows are ready")

    def _snapshot(
        self, repo: Repo, revision: str | None, patterns: list[str], bar_class: Any = NO_BAR
    ) -> Path:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                repo.source,
                repo_type=repo.kind,
                revision=revision,
                allow_patterns=patterns,
                token=self._token,
                tqdm_class=bar_class,
            )
        )

    def _data_files(self, dataset: DatasetSection) -> list[str]:
        """Names of the files that ``datasets`` reads for the subset of a dataset at a commit."""
        from datasets import load_dataset_builder

        builder = load_dataset_builder(
            dataset.source,
            dataset.subset,
            revision=dataset.revision,
            token=self._token,
            cache_dir=rows_cache(dataset),
        )
        prefix = f"hf://datasets/{dataset.source}@{dataset.revision}/"
        urls = [url for split in (builder.config.data_files or {}).values() for url in split]
        return [url.removeprefix(prefix) for url in urls if url.startswith(prefix)]


def _at(dataset: DatasetSection, commit: str) -> DatasetSection:
    return dataset.model_copy(update={"revision": commit})


def _local_sources(spec: RunSpec, repos: tuple[Repo, ...]) -> list[tuple[str, str]]:
    remote = {(repo.kind, repo.source) for repo in repos}
    named = [("model", "model.source", spec.model.source)]
    named += [("dataset", "data.source", dataset.source) for dataset in spec.data.datasets]
    return [(key, source) for kind, key, source in named if (kind, source) not in remote]


def _final(error: Exception, repo: Repo) -> QLoRAError:
    if isinstance(error, QLoRAError):
        return error
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return QLoRAError(f"{repo.key}: {repo.folder} cannot be written: the disk is full")
    message = explain(error, kind=repo.kind, key=repo.key, source=repo.source)
    return ModelError(message) if repo.dataset is None else DataError(message)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _may_pass(error: Exception) -> bool:
    """Whether the network is to blame, so that the same request may succeed later."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, XetDownloadError

    chain = causes(error)
    for link in chain:
        if isinstance(link, HfHubHTTPError):
            return link.response.status_code >= 500 or link.response.status_code in (408, 429)
        if isinstance(link, OfflineModeIsEnabled):
            return False
    return any(
        isinstance(link, httpx.HTTPError | ConnectionError | XetDownloadError)
        # What huggingface_hub says of a file that came shorter than announced.
        or "Consistency check failed" in str(link)
        for link in chain
    )
