"""A run in which nothing moves any more says where it stands, ends, and goes on from there."""

import json
import time

from qlora_dist.layout import RunDir
from qlora_dist.ledger import measured
from qlora_dist.ranks import live_ranks
from qlora_dist.train.compare import differences


def test_a_rank_that_hangs_is_found_and_the_run_goes_on(config, qlora, tmp_path, whole_run):
    path = config("hung", resources__timeout_s=25)
    begin = time.monotonic()
    done = qlora("run", path, code=87, env={"QLORA_FAULT": "accumulation#9@1~0=hang"})
    # It does not wait for a collective to give up, which would be two minutes later.
    assert time.monotonic() - begin < 120
    run = RunDir(tmp_path / "hung")
    cause = "nothing has moved for 25 s: rank 1 in training, after step 4; rank 0 waiting"
    assert cause in done.stderr
    for rank, place in ((0, "in any"), (1, "in reach")):
        log = run.rank_log(0, rank).read_text()
        assert "most recent call first" in log
        assert place in log
    assert live_ranks(run, 0) == []
    end = json.loads((run.attempt(0) / "attempt.json").read_text())["end"]
    assert (end["code"], end["cause"]) == (87, cause)
    assert measured(run).save_s > 0
    qlora("resume", run.root, env={"QLORA_FAULT": "accumulation#9@1~0=hang"})
    assert differences(whole_run, run) == []
