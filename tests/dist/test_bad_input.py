"""Each mistake gets one message that says what would work, the right exit code, and nothing half done."""

import json

import pytest



def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_missing_data_file_leaves_nothing_behind(config, qlora, tmp_path):
    done = qlora("run", config(data__source="no/such/file.jsonl"), code=2)
    assert "data.source: there is no file 'no/such/file.jsonl'" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_first_start_that_failed_does_not_block_the_mended_config(config, qlora, tmp_path):
    bad = write(tmp_path / "bad.jsonl", json.dumps({"input": "q"}) + "\n")
    done = qlora("run", config(data__source=str(bad), data__validation_rows=0), code=2)
    assert "has no field 'output'" in done.stderr
    qlora("run", config(), "--prepare")


def test_a_missing_model_folder(config, qlora):
    path = config(model__source="./no-model", model__shape="smollm2-135m", data__max_tokens=64)
    done = qlora("data", path, code=2)
    assert "model.source: there is no folder './no-model'" in done.stderr


def test_a_model_that_is_not_here_while_offline(config, qlora, tmp_path):
    path = config(model__source="huggyllama/llama-7b")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = qlora("data", path, code=2, env=offline)
    assert "is not on this machine, and the hub cannot be reached" in done.stderr


def test_a_token_file_that_others_can_read(config, qlora, tmp_path):
    token = write(tmp_path / "token", "hf_secret")
    token.chmod(0o644)
    done = qlora("data", config(model__token_file=str(token)), code=2)
    assert f"run: chmod 600 {token}" in done.stderr
    assert "hf_secret" not in done.stderr


def test_an_empty_dataset(config, qlora, tmp_path):
    path = write(tmp_path / "empty.jsonl", "")
    assert "is empty" in qlora("data", config(data__source=str(path)), code=2).stderr


def test_rows_without_the_needed_fields(config, qlora, tmp_path):
    rows = [{"input": "q", "output": "a"}] * 3 + [{"input": "q", "answer": "a"}] * 5
    path = write(tmp_path / "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    done = qlora("data", config(data__source=str(path), data__validation_rows=0), code=2)
    assert "row 4 has no field 'output'; its fields: input, answer" in done.stderr
    assert "and 2 more" in done.stderr


def test_a_file_that_is_not_json(config, qlora, tmp_path):
    path = write(tmp_path / "x.jsonl", '{"input": "q", "output": "a"}\n{"input": \n')
    done = qlora("data", config(data__source=str(path)), code=2)
    assert "cannot be read" in done.stderr


def test_prompts_that_leave_no_room(config, qlora, tmp_path):
    row = json.dumps({"input": "word " * 200, "output": "a"}) + "\n"
    path = write(tmp_path / "x.jsonl", row * 3)
    done = qlora("data", config(data__source=str(path), data__validation_rows=0), code=2)
    assert "leaves nothing to train on" in done.stderr
    assert "3 x the prompt leaves no room for an answer within the limit" in done.stderr


def test_more_validation_rows_than_rows(config, qlora):
    done = qlora("data", config(data__validation_rows=40), code=2)
    assert "use at most 39" in done.stderr


def test_an_error_found_by_the_workers_is_one_message_too(config, qlora, tmp_path):
    path = write(tmp_path / "gone.jsonl", json.dumps({"input": "q", "output": "a"}) + "\n")
    config_path = config(data__source=str(path), data__validation_rows=0)
    qlora("run", config_path, "--prepare")
    path.unlink()
    done = qlora("resume", tmp_path / "run", code=2)
    assert "data.source: there is no file" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_shape_that_is_not_the_models(config, qlora):
    done = qlora("run", config(model__shape="smollm2-135m"), code=2)
    assert "vocab_size is 512, planned 49152" in done.stderr


def test_a_run_directory_of_another_spec(config, whole_run, qlora):
    path = config(run_dir=str(whole_run.root))
    done = qlora("run", path, "optimizer.lr=5e-4", code=2)
    assert "optimizer.lr: was 0.001, is 0.0005" in done.stderr


def test_an_export_never_replaces_what_it_did_not_make(whole_run, copy_of, qlora, tmp_path):
    run = copy_of(whole_run)
    thesis = write(tmp_path / "thesis.tex", "x")
    done = qlora("export", run.root, "--output", tmp_path, code=2)
    assert "was not made by qlora export" in done.stderr
    assert thesis.exists()
    for _ in range(2):
        qlora("export", run.root, "--base", "16bit", "--no-check")


@pytest.mark.parametrize("options", [["--max-new-tokens", "0"], ["--top-p", "2"]])
def test_generate_options_out_of_range(qlora, options):
    assert "usage: qlora generate" in qlora("generate", "x", *options, code=2).stderr


def test_options_may_stand_between_the_overrides(config, qlora, tmp_path):
    qlora("run", config(), "--prepare", "seed=9")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["spec"]["seed"] == 9


def test_a_folder_that_is_no_run(qlora, tmp_path):
    assert "is no run directory" in qlora("resume", tmp_path, code=2).stderr


def test_deepspeed_is_missing(config, qlora, tmp_path, monkeypatch):
    """Said before anything starts. An interpreter that finds no package of that name."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'deepspeed' else find(name, *rest)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    done = qlora("run", config(strategy__kind="zero3"), code=2)
    assert "zero3 needs DeepSpeed, which is not installed here: " in done.stderr
    assert not (tmp_path / "run").exists()
    planned = qlora("plan", config(strategy__kind="zero3")).stdout
    assert "strategy.kind: zero3 needs DeepSpeed" in planned



def test_a_loss_that_is_not_a_number_stops_the_run_for_good(config, qlora, tmp_path):
    path = config(optimizer__lr=1e30, optimizer__max_grad_norm=None)
    done = qlora("run", path, code=93)
    assert "Try a lower optimizer.lr" in done.stderr
    for follow in ((), ("-f",)):
        done = qlora("logs", tmp_path / "run", *follow, code=93 if follow else 0)
        assert "Try a lower optimizer.lr" in done.stdout


def test_a_time_limit_of_another_form(config, qlora):
    path = config(resources__time="5h")
    done = qlora("plan", path, code=2)
    assert "resources.time: should be [days-]hours:minutes:seconds" in done.stderr
    assert "got '5h'" in done.stderr
