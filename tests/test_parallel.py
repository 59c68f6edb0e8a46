"""Work spread over the processes of this machine: order, errors, killing, and the bytes of a single process."""
import os
import pickle
import signal
import time

import psutil
import pytest
import tasks
from clusters import bounded, contents, family, said, script, wait_for

from sage_nb import core
from sage_nb.core import DataError, parallel_map


def test_results_are_in_order_and_no_process_is_left(tmp_path):
    results, processes = zip(*parallel_map(tasks.last_first, [(tmp_path, i) for i in range(7)], workers=2))
    assert results == tuple(range(7)) and len(set(processes)) == 2 and os.getpid() not in processes
    assert not any(map(psutil.pid_exists, processes))


def test_processes_write_the_bytes_of_this_one(tmp_path):
    assert parallel_map(tasks.work, [(tmp_path / "spread", i, 0.02) for i in range(12)], workers=3) == list(range(12))
    parallel_map(tasks.work, [(tmp_path / "alone", i, 0) for i in range(12)], workers=1)
    assert contents(tmp_path / "spread") == contents(tmp_path / "alone") and len(contents(tmp_path / "spread")) == 12


def test_processes_inherit_the_environment_and_nothing_more(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    names = [*core._PINNED, "PYTHONHASHSEED"]
    assert parallel_map(tasks.environment, [names, names], workers=2) == [tasks.environment(names)] * 2


def test_an_error_arrives_unchanged_and_ends_the_work(tmp_path):
    with pytest.raises(DataError, match="/1: bad; mend it$"):
        parallel_map(tasks.fail, [(tmp_path, i) for i in range(40)], workers=2)
    assert "1" in contents(tmp_path) and len(contents(tmp_path)) < 8


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_data_can_stand_among_the_results_but_a_mistake_cannot(tmp_path, workers):
    results = parallel_map(tasks.fail_by_data, [(tmp_path, i) for i in range(6)], workers, keep_going=True)
    assert [*results[:1], *results[2:]] == [0, 2, 3, 4, 5]
    assert type(results[1]) is DataError and str(pickle.loads(pickle.dumps(results[1]))) == f"{tmp_path}/1: bad; mend it"
    with pytest.raises(ZeroDivisionError):
        parallel_map(tasks.fail, [(tmp_path, i) for i in range(6)], workers, keep_going=True)


@pytest.mark.parametrize("keep_going", [False, True])
def test_a_killed_process_is_one_sentence(tmp_path, keep_going):
    running = script(tmp_path, f"""
try:
    core.parallel_map(tasks.work, [("out", i, 0.05 if i < 2 else 30) for i in range(9)], 2, "counting", keep_going={keep_going})
except core.DataError as error:
    print(error)""")
    wait_for(lambda: len(tasks.began(tmp_path / "out")) > 3)
    os.kill(tasks.began(tmp_path / "out")[-1][1], signal.SIGKILL)
    out, heard = running.communicate()
    assert said(heard) == "" and out == "counting: a worker process was killed (by hand, or for want of memory); run again, what was finished is kept\n"
    assert sorted(contents(tmp_path / "out")) == ["0.safetensors", "1.safetensors"]
    wait_for(lambda: not family(tmp_path))


def test_a_process_that_is_replaced_says_nothing(tmp_path):
    running = script(tmp_path, "print(core.parallel_map(tasks.outgrow, [('out', i, 0.1) for i in range(10)], 2))")
    out, heard = running.communicate()
    assert (out, said(heard)) == (f"{list(range(10))}\n", "")
    assert len({process for _, process in tasks.began(tmp_path / "out")}) > 2


def test_no_process_outlives_a_killed_parent_not_even_one_that_replaced_another(tmp_path):
    running = script(tmp_path, "core.parallel_map(tasks.outgrow, [('out', i, 0.1) for i in range(1000)], 2)")
    wait_for(lambda: len({process for _, process in tasks.began(tmp_path / "out")}) > 2)
    assert len(family(tmp_path)) > 2
    running.kill()
    wait_for(lambda: not family(tmp_path), 10)
    running.communicate()


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_is_answered_once_and_at_once(tmp_path, times):
    running = script(tmp_path, "core.parallel_map(tasks.work, [('out', i, 60) for i in range(4)], 2)")
    wait_for(lambda: len(tasks.began(tmp_path / "out")) == 2)
    for _ in range(times):
        os.killpg(running.pid, signal.SIGINT)
        time.sleep(0.2)
    out, heard = running.communicate(timeout=30)
    assert running.returncode == -signal.SIGINT and "LokyProcess" not in out + heard
    assert times == 2 or heard.count("KeyboardInterrupt") == 1 and heard.endswith("KeyboardInterrupt\n")
    wait_for(lambda: not family(tmp_path))
