"""Branches, tags and absent revisions of hub repositories become commits, which a run keeps."""

from collections.abc import Sequence
from pathlib import Path

from qlora_dist.errors import RunDirError
from qlora_dist.hub import read_token
from qlora_dist.layout import RunDir, open_run, run_dir_of
from qlora_dist.spec import RunSpec
from qlora_launch.hub_cache import Repo, hub_repos


def pin(spec: RunSpec, *, ask_hub: bool) -> RunSpec:
    """The spec with a commit for each model and dataset on the hub.

    In this order: the commit of the run, if its directory is there and the config names no
    revision; the cache's; the hub's. What none of them knows stays as it is.

    Args:
        spec: Any.
        ask_hub: Whether the network may be used.

    Raises:
        ModelError: ``model.token_file`` cannot be read.
    """
    spec = keep_commits(spec)
    commits: dict[tuple[str, str, str | None], str | None] = {}
    for repo in hub_repos(spec):
        commit = repo.commit
        if commit is None and ask_hub:
            commit = _ask_hub(repo, read_token(spec.model.token_file))
        commits[repo.kind, repo.source, repo.revision] = commit
    model = spec.model
    return with_revisions(
        spec,
        commits.get(("model", model.source, model.revision)) or model.revision,
        [commits.get(("dataset", d.source, d.revision)) or d.revision for d in spec.data.datasets],
    )


def pin_changed(before: RunSpec, spec: RunSpec, *, ask_hub: bool) -> RunSpec:
    """The changed spec of a run, with a commit for each dataset that is another one now.

    Raises:
        ModelError: ``model.token_file`` cannot be read.
    """
    datasets = [dataset.revision for dataset in spec.data.datasets]
    for i, (old, new) in enumerate(zip(before.data.datasets, spec.data.datasets, strict=False)):
        # The commit that came out of run.json is one of another repository.
        if old.source != new.source and old.revision == new.revision:
            datasets[i] = None
    pinned = pin(with_revisions(spec, spec.model.revision, datasets), ask_hub=ask_hub)
    return with_revisions(
        pinned, spec.model.revision, [dataset.revision for dataset in pinned.data.datasets]
    )


def keep_commits(spec: RunSpec) -> RunSpec:
    """The spec with the revisions of its run, if that is there, wherever the spec names none."""
    run = RunDir(run_dir_of(spec))
    if not run.run_json.exists():
        return spec
    try:
        _, there = open_run(run.root)
    except RunDirError:
        # Whoever is about to use the directory says what is wrong with it.
        return spec

    model = spec.model.revision
    if model is None and spec.model.source == there.model.source:
        model = there.model.revision
    datasets = [dataset.revision for dataset in spec.data.datasets]
    for i, (ours, its) in enumerate(zip(spec.data.datasets, there.data.datasets, strict=False)):
        if ours.revision is None and ours.source == its.source:
            datasets[i] = its.revision
    return with_revisions(spec, model, datasets)


def with_revisions(spec: RunSpec, model: str | None, datasets: Sequence[str | None]) -> RunSpec:
    """The spec with these revisions, those of the datasets in the order of the spec."""
    data = spec.data
    if data.mix is None:
        data = data.model_copy(update={"revision": datasets[0]})
    else:
        mix = [
            dataset.model_copy(update={"revision": revision})
            for dataset, revision in zip(data.mix, datasets, strict=True)
        ]
        data = data.model_copy(update={"mix": mix})
    pinned = spec.model.model_copy(update={"revision": model})
    return spec.model_copy(update={"model": pinned, "data": data})


def _ask_hub(repo: Repo, token: str | None) -> str | None:
    """The commit that the hub has for a revision, which the cache then has as well."""
    import httpx
    from huggingface_hub import snapshot_download

    from qlora_launch.progress import NO_BAR

    try:
        folder = snapshot_download(
            repo.source,
            repo_type=repo.kind,
            revision=repo.revision,
            allow_patterns=["config.json" if repo.kind == "model" else "README.md"],
            token=token,
            tqdm_class=NO_BAR,
        )
    except (OSError, ValueError, httpx.HTTPError):
        return None
    return Path(folder).name
