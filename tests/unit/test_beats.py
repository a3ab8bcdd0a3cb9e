"""Signs of life: what a rank writes, and what a watcher makes of it."""

import time

import pytest

from qlora_dist.beats import Watch, read_beats
from qlora_dist.layout import RunDir
from qlora_dist.ledger import Measured, measured
from qlora_dist.train.pulse import Pulse


@pytest.fixture
def run(tmp_path):
    for attempt in range(2):
        RunDir(tmp_path).beats(attempt).mkdir(parents=True)
    return RunDir(tmp_path)


@pytest.fixture
def pulse(run):
    """Start the pulse of a rank; it beats for as long as the tests run."""

    def start(rank, attempt=0):
        pulse = Pulse()
        pulse.every_s = 0.02
        pulse.start(run.beats(attempt) / f"{rank:05d}.json")
        return pulse

    return start


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def test_a_beat_says_where_a_rank_is(run, pulse):
    one = pulse(1)
    one.at("training", 7)
    for micro_s in (9.0, 0.25, 0.125):
        one.took(micro_s=micro_s)
    for save_s in (2.0, 1.0):
        one.took(save_s=save_s)
    with one.waiting():
        beat = wait_for(lambda: (b := read_beats(run, 0)[1]).waits and b)
    assert (beat.stage, beat.step, beat.micro_s, beat.save_s) == ("training", 7, 0.25, 2.0)
    assert abs(beat.time - time.time()) < 10


def test_a_beat_that_is_being_written_is_left_out(run, pulse):
    pulse(0)
    (run.beats(0) / "00001.json").write_text('{"count": 3')
    assert list(read_beats(run, 0)) == [0]


def test_one_rank_that_gets_on_is_enough(run, pulse):
    one, two = pulse(0), pulse(1)
    two.at("data")
    watch = Watch(run, 0, world_size=2, limit_s=0.5)
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        one.at("data")
        assert watch.hung() is None
        time.sleep(0.02)
    assert wait_for(watch.hung) == "nothing has moved for 0 s: ranks 0, 1 in data, after step 0"


def test_who_is_waited_for_is_named(run, pulse):
    pulse(0).at("training", 3)
    watch = Watch(run, 0, world_size=3, limit_s=0.3)
    with pulse(2).waiting():
        assert wait_for(watch.hung).endswith("rank 1 never started; rank 2 waiting")
        pulse(1).at("evaluation", 3)
        watch = Watch(run, 0, world_size=3, limit_s=0.3)
        assert wait_for(watch.hung).endswith("ranks 0, 1 in training, after step 3; rank 2 waiting")


def test_the_newest_attempt_that_saved_tells_what_a_save_takes(run, pulse):
    assert measured(run) is None
    first = pulse(0)
    first.took(micro_s=9.0)
    first.took(micro_s=0.5, save_s=3.0)
    assert wait_for(lambda: measured(run)) == Measured(0.5, 3.0)
    pulse(0, attempt=1).took(micro_s=0.1)
    time.sleep(0.1)
    assert measured(run) == Measured(0.5, 3.0)


def test_a_beat_always_fits_its_place(run, pulse):
    one = pulse(0)
    one.at("joining the other processes", 2**40)
    for _ in range(2):
        one.took(micro_s=123456.123456789, save_s=123456.123456789)
    wait_for(lambda: read_beats(run, 0)[0].step == 2**40)
    assert (run.beats(0) / "00000.json").stat().st_size == 256
