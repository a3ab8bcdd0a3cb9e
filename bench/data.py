"""``make bench-data``: tokenising and packing of OASST1 dialogs, TRL's beside ours in the same run.

Each figure is the median of some rounds that take turns, since machines are noisy.
"""

import argparse
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from datasets import Dataset, disable_progress_bars
from trl.data_utils import pack_dataset

from qlora_dist.data.build import ensure_store
from qlora_dist.data.corpus import Corpus
from qlora_dist.data.formats import load_format
from qlora_dist.data.packing import best_fit
from qlora_dist.data.tokenizer import load_tokenizer
from qlora_dist.spec_file import spec_from_tree

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data" / "oasst1_validation_dialogs.jsonl"
MODEL = ROOT / ".cache" / "smollm2-135m-instruct"
_BATCH = 1000


def make_spec(args, source):
    """A packed corpus of whole conversations."""
    data = {"source": str(source), "format": "oasst1", "max_tokens": args.tokens, "packing": True}
    return spec_from_tree(
        {
            "name": "bench",
            "model": {"source": str(args.model)},
            "data": data,
            "schedule": {"steps": 1},
            "strategy": {"kind": "single"},
        }
    )


def repeat(source, folder, times):
    """The file so many times over, every row told apart, so that seconds can be measured."""
    lines = source.read_text(encoding="utf-8").splitlines()
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(times):
            for line in lines:
                row = json.loads(line)
                row["text"] = row["text"].replace("### Human:", f"### Human: {number}", 1)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def texts_of(source):
    """What the format makes of each row."""
    make = load_format("oasst1").examples
    rows = (json.loads(line) for line in source.read_text(encoding="utf-8").splitlines())
    return [example.target for row in rows for example in make(row)]


def tokenize_bare(tokenizer, texts):
    """Batches through the tokenizer, and nothing else."""
    ids = []
    for start in range(0, len(texts), _BATCH):
        ids += tokenizer(texts[start : start + _BATCH], add_special_tokens=False)["input_ids"]
    return ids


def timed(call):
    """Seconds, and what the call returned."""
    begin = time.perf_counter()
    value = call()
    return time.perf_counter() - begin, value


def tokenizing(args, folder, tokenizer):
    """The bare tokenizer, TRL's way (Dataset.map), and a store from the raw file, in turns."""
    source = repeat(args.data, folder, args.times)
    texts = texts_of(source)
    # What both share, and do once: datasets' reading of the file.
    dataset = Dataset.from_dict({"text": texts})
    seconds = {"bare tokenizer": [], "TRL: Dataset.map": [], "ours: raw file to store": []}
    for number in range(args.rounds):
        spent, ids = timed(lambda: tokenize_bare(tokenizer, texts))
        seconds["bare tokenizer"].append(spent)

        def mapped():
            return dataset.map(
                lambda rows: {
                    "input_ids": tokenizer(rows["text"], add_special_tokens=False)["input_ids"]
                },
                batched=True,
                remove_columns=["text"],
                load_from_cache_file=False,
            )

        seconds["TRL: Dataset.map"].append(timed(mapped)[0])
        spec = make_spec(args, source)
        place = folder / f"stores-{number}"
        spent, store = timed(lambda: ensure_store(spec, tokenizer, place))  # noqa: B023
        seconds["ours: raw file to store"].append(spent)
    count = sum(map(len, ids))
    print(f"\ntokenising {len(texts):,} conversations, {count:,} tokens, {args.rounds} rounds")
    bare = statistics.median(seconds["bare tokenizer"])
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(f"  {name:<24}  {count / middle:>12,.0f} tokens/s  {bare / middle:>5.2f} of bare")
    return [row[: args.tokens] for row in ids], Corpus(store)


def packing(args, rows, corpus):
    """TRL's best fit and ours on the same lengths, in turns."""
    lengths = np.array([len(row) for row in rows if row], np.int64)
    dataset = Dataset.from_dict({"input_ids": [row for row in rows if row]})
    seconds = {"TRL bfd": [], "ours": []}
    for _ in range(args.rounds):
        spent, packed = timed(
            lambda: pack_dataset(
                dataset,
                args.tokens,
                "bfd",
                map_kwargs={"load_from_cache_file": False, "keep_in_memory": True},
            )
        )
        seconds["TRL bfd"].append(spent)
        spent, (offsets, _) = timed(lambda: best_fit(lengths, capacity=args.tokens))
        seconds["ours"].append(spent)
    total = int(lengths.sum())
    print(f"\npacking {len(lengths):,} samples, {total:,} tokens, into {args.tokens}")
    for name, count in (("TRL bfd", len(packed)), ("ours", len(offsets) - 1)):
        middle = statistics.median(seconds[name])
        print(
            f"  {name:<10}  {count:>7,} sequences  {total / count / args.tokens:>8.3%} full  "
            f"{len(lengths) / middle:>10,.0f} samples/s"
        )
    print("  (TRL packs in batches of 1,000 rows, and copies the tokens; ours packs all at once)")
    fill = corpus.lengths.sum() / corpus.num_sequences / args.tokens
    print(
        f"  the store above, with BOS and EOS: {corpus.num_sequences:,} sequences, {fill:.3%} full"
    )


def main():
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="OASST1 dialogs, one a line")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of a tokenizer")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--times", type=int, default=8, help="repeat the file so often")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    disable_progress_bars()
    names = ("trl", "datasets", "tokenizers", "transformers")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
    with tempfile.TemporaryDirectory() as name:
        tokenizer = load_tokenizer(make_spec(args, args.data))
        rows, corpus = tokenizing(args, Path(name), tokenizer)
        packing(args, rows, corpus)
    return 0


if __name__ == "__main__":
    sys.exit(main())
