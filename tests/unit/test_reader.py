"""Files of every kind give their rows, as text and in order."""

import json
import os

import pytest

from qlora_dist.data.reader import read_rows
from qlora_dist.errors import DataError
from qlora_dist.spec_file import spec_from_tree
from tests.unit.test_spec import GOOD


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(path):
    data = {"source": str(path), "format": "ptt", "max_tokens": 9}
    spec = spec_from_tree({**GOOD, "data": data})
    return list(read_rows(spec.data.datasets[0], None))


def write(path, text, encoding="utf-8"):
    path.write_text(text, encoding=encoding)
    return path


def test_csv_fields_stay_the_text_that_they_are(tmp_path):
    text = 'question,answer\n1,NA\n"a, ""b""",null\n為什麼,\n3,"two\nlines"\n'
    for encoding in ("utf-8", "utf-8-sig"):
        path = write(tmp_path / f"{encoding}.csv", text, encoding)
        assert rows(path) == [
            {"question": "1", "answer": "NA"},
            {"question": 'a, "b"', "answer": "null"},
            {"question": "為什麼", "answer": ""},
            {"question": "3", "answer": "two\nlines"},
        ]


def test_new_content_with_an_old_time_is_not_taken_for_the_old(tmp_path):
    """As rsync -t and tar leave it; ``datasets`` itself looks at the time only."""
    path = write(tmp_path / "x.jsonl", '{"input": "a", "output": "b"}\n')
    stat = path.stat()
    assert rows(path) == [{"input": "a", "output": "b"}]
    write(path, '{"input": "c", "output": "d"}\n')
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert rows(path) == [{"input": "c", "output": "d"}]


def test_tsv_has_a_header_and_txt_has_lines(tmp_path):
    assert rows(write(tmp_path / "x.tsv", "a\tb\n1\t2\n")) == [{"a": "1", "b": "2"}]
    assert rows(write(tmp_path / "x.txt", "a\tb\n1\t2\n")) == [{"text": "a\tb"}, {"text": "1\t2"}]


def test_json_lines_and_a_json_list_are_the_same(tmp_path):
    expected = [{"input": "a", "output": "b"}, {"input": "臺灣", "output": "d"}]
    lines = "".join(json.dumps(row) + "\n" for row in expected)
    assert rows(write(tmp_path / "x.jsonl", lines)) == expected
    assert rows(write(tmp_path / "x.json", json.dumps(expected))) == expected


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("x.jsonl", "{", "cannot be read"),
        ("x.csv", "", "is empty"),
        ("x.csv", "question,answer\n", "holds no rows"),
        ("x.parquet", "x", "is of no known kind; known: .json, .jsonl, .csv"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_message(tmp_path, name, text, expected):
    with pytest.raises(DataError, match=expected):
        rows(write(tmp_path / name, text))


def test_a_file_that_is_not_text_is_one_message(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"question,answer\n\xff\xfe,\x80\n")
    with pytest.raises(DataError):
        rows(path)
