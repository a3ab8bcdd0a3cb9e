"""A failed load says what it was and what to do, and shows no token."""

import httpx
import pytest
from huggingface_hub import errors

from qlora_dist.errors import ModelError
from qlora_dist.hub import explain, read_token

RESPONSE = httpx.Response(403, request=httpx.Request("GET", "http://localhost/x"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.GatedRepoError("x", response=RESPONSE), "is gated"),
        (errors.GatedRepoError("x", response=RESPONSE), "https://huggingface.co/meta-llama/x"),
        (errors.GatedRepoError("x", response=RESPONSE), "model.token_file"),
        (errors.RepositoryNotFoundError("x", response=RESPONSE), "neither a path on this machine"),
        (errors.RevisionNotFoundError("x", response=RESPONSE), "has no such revision"),
        (errors.LocalEntryNotFoundError("x"), "the hub cannot be reached"),
        (OSError("We couldn't connect to the hub"), "the hub cannot be reached"),
        (ValueError("odd weights\nsecond line"), "cannot be loaded: odd weights"),
    ],
)
def test_each_failure_has_its_message(error, expected):
    # transformers wraps the hub's errors in its own.
    outer = OSError("outer")
    outer.__cause__ = error
    for raised in (error, outer) if "odd" not in str(error) else (error,):
        text = explain(raised, kind="model", key="model.source", source="meta-llama/x")
        assert text.startswith("model.source: the model 'meta-llama/x'")
        assert expected in text


def test_a_token_file_must_be_private_and_not_empty(tmp_path):
    path = tmp_path / "token"
    path.write_text("hf_secret\n")
    path.chmod(0o600)
    assert read_token(str(path)) == "hf_secret"
    assert read_token(None) is None
    path.chmod(0o640)
    with pytest.raises(ModelError, match="chmod 600") as error:
        read_token(str(path))
    assert "hf_secret" not in str(error.value)
    path.chmod(0o600)
    path.write_text("")
    with pytest.raises(ModelError, match="is empty"):
        read_token(str(path))
