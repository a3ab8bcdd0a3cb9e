"""Which store a spec's data had when it was last tokenised, for plans, which load no tokenizer."""

import contextlib
import hashlib
import json
from pathlib import Path

from qlora_dist.data.reader import local_file
from qlora_dist.errors import DataError
from qlora_dist.files import write_json
from qlora_dist.spec import RunSpec


def write(spec: RunSpec, folder: Path, store: str) -> None:
    """Note the name of a spec's store, where the storage lets us."""
    if read(spec, folder) == folder / store:
        return
    with contextlib.suppress(OSError):
        note = _path(spec, folder)
        note.parent.mkdir(mode=0o700, exist_ok=True)
        write_json(note, {"store": store})


def read(spec: RunSpec, folder: Path) -> Path | None:
    """Folder of the store; None where there is none yet, or a file has changed since."""
    try:
        tree = json.loads(_path(spec, folder).read_text(encoding="utf-8"))
        return folder / str(tree["store"])
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None


def _path(spec: RunSpec, folder: Path) -> Path:
    tree: list[object] = [spec.model.source, spec.model.revision]
    tree.append(spec.data.model_dump(mode="json", exclude={"store_dir", "num_samples"}))
    for dataset in spec.data.datasets:
        if (file := local_file(dataset)) is not None:
            stat = file.stat()
            tree.append([stat.st_size, stat.st_mtime_ns])
    key = hashlib.sha256(json.dumps(tree).encode()).hexdigest()[:32]
    return folder / "notes" / f"{key}.json"
