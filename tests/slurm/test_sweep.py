"""A sweep is one array; each run of it lives by itself."""

import json
import shlex

import pytest

from qlora_dist.layout import RunDir
from qlora_dist.train.compare import differences
from tests.conftest import qlora_argv, run_qlora, write_config
from tests.slurm.conftest import RESOURCES, SLOW, state, steps, wait_until

pytestmark = pytest.mark.matrix

LRS = ("1e-4", "2e-4", "5e-4", "1e-3")


def test_one_of_four_runs_is_preempted_and_all_end(
    testbed, tmp_path, tiny_model, pairs_file, monkeypatch
):
    monkeypatch.setenv("SLURM_CONF", testbed.env["SLURM_CONF"])
    profile = tmp_path / "site.yaml"
    # Each element has a node for itself, so that a job that wants one node hits one of them.
    memory_gb = testbed.settings.memory_mib_per_node // 1024
    profile.write_text(json.dumps({"partition": "low", "mem_gb": memory_gb, "signal_lead_s": 30}))
    changes = SLOW | {
        "strategy": {"kind": "single"},
        "batch__global_size": 16,
        "resources": RESOURCES | {"nodes": 1, "profile": str(profile)},
    }
    config = write_config(tmp_path, tiny_model, pairs_file, "sweep", changes)
    sweep = ("--sweep", f"optimizer.lr={','.join(LRS)}", "--parallel", "2")
    dry = run_qlora(tmp_path, "submit", config, *sweep, "--dry-run").stdout
    assert "#SBATCH --array=0-3%2\n" in dry
    assert not (tmp_path / "sweep").exists()
    done = run_qlora(tmp_path, "submit", config, *sweep)
    assert "4 runs, 2 at once" in done.stdout
    folder = tmp_path / "sweep"
    runs = [RunDir(folder / f"lr-{lr}") for lr in LRS]
    again = run_qlora(tmp_path, "resume", runs[3].root, code=2)
    assert "is in the queue already, as job" in again.stderr
    assert [state(run) for run in runs[2:]] == ["queued", "queued"]

    wait_until(lambda: steps(runs[0]) >= 10)
    node = json.loads((runs[0].attempt(0) / "attempt.json").read_text())["nodes"]
    testbed.run(
        *("sbatch", "-phigh", f"--nodelist={node}", "--exclusive"),
        *("--output=/dev/null", "--wrap=sleep 1"),
    )
    wait_until(lambda: all(state(run) == "done" for run in runs), timeout_s=400)
    testbed.wait_idle()

    status = [json.loads(run_qlora(tmp_path, "status", run.root, "--json").stdout) for run in runs]
    assert [len(one["attempts"]) for one in status] == [2, 1, 1, 1]
    assert [one["step"] for one in status] == [60] * 4
    first, second = status[0]["attempts"]
    assert (first["code"], second["code"]) == (85, 0)
    assert first["where"].endswith("_0.0")
    assert second["where"].endswith("_0.1")
    table = run_qlora(tmp_path, "list", folder).stdout
    assert table.count("done") == 4
    assert len({json.dumps(run.metrics.read_text()) for run in runs}) == 4

    local = changes | {"optimizer__lr": 1e-4, "resources": {"gpus_per_node": 0}}
    path = write_config(tmp_path, tiny_model, pairs_file, "whole", local)
    run_qlora(tmp_path, "run", path, "resources.cpus_per_process=1")
    assert differences(RunDir(tmp_path / "whole"), runs[0]) == []


def test_a_run_inside_an_allocation_and_one_after_another(
    testbed, tmp_path, tiny_model, pairs_file, monkeypatch
):
    monkeypatch.setenv("SLURM_CONF", testbed.env["SLURM_CONF"])
    config = write_config(
        tmp_path, tiny_model, pairs_file, "here", {"resources": RESOURCES | {"profile": None}}
    )
    outside = run_qlora(tmp_path, "run", config, "resources.backend=allocation", code=2)
    assert "get one first with: salloc --nodes=2" in outside.stderr
    script = f"exec {shlex.join(qlora_argv('run', config))} resources.backend=allocation"
    testbed.run("salloc", "-plow", "-N2", "--mem=1000", "bash", "-c", script)
    whole = write_config(
        tmp_path,
        tiny_model,
        pairs_file,
        "whole",
        {"resources": {"gpus_per_node": 0, "processes_per_node": 2, "cpus_per_process": 1}},
    )
    run_qlora(tmp_path, "run", whole)
    assert differences(RunDir(tmp_path / "whole"), RunDir(tmp_path / "here")) == []
