"""Work spread over a cluster: the same bytes although a worker is killed, and one sentence for whatever is wrong with the cluster."""
import socket
import sys

import psutil
import pytest
import tasks
from clusters import Cluster, bounded, cluster, contents, pinned, said, script, wait_for

from sage_nb.core import DataError, parallel_map


def refused(call) -> str:
    "The sentence of a `DataError`, said without a word on standard error."
    error, heard = call.result()
    assert type(error) is DataError and "\n" not in str(error) and said(heard) == "", (error, heard)
    return str(error)


def test_a_worker_killed_half_way_changes_no_byte(tmp_path, cluster, pinned):
    doomed = cluster.add_worker()
    own = {process.pid for process in psutil.Process(doomed.pid).children()}
    running = pinned(tasks.heard, parallel_map, tasks.work, [(tmp_path / "out", i, 0.3) for i in range(12)], scheduler=cluster.address)
    wait_for(lambda: sum(process in own for _, process in tasks.began(tmp_path / "out")) == 3)  # it is at its third task
    cluster.kill(doomed)
    results, heard = running.result()
    assert results == list(range(12)) and said(heard) == ""
    history = tasks.began(tmp_path / "out")
    lost = [i for i, process in history if process in own][-1]
    assert {process for i, process in history if i == lost} - own, "nobody did it again"
    pinned(parallel_map, tasks.work, [(tmp_path / "alone", i, 0) for i in range(12)], workers=1).result()
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_cluster_keeps_order_and_hands_errors_back(tmp_path, cluster, pinned):
    def on_cluster(function, **options):
        return pinned(tasks.heard, parallel_map, function, [(tmp_path, i) for i in range(6)], scheduler=cluster.address, **options)

    assert refused(on_cluster(tasks.fail)) == f"{tmp_path}/1: bad; mend it"
    results, heard = on_cluster(tasks.fail_by_data, keep_going=True).result()
    assert str(results.pop(1)) == f"{tmp_path}/1: bad; mend it" and results == [0, 2, 3, 4, 5] and said(heard) == ""
    assert type(on_cluster(tasks.fail, keep_going=True).result()[0]) is ZeroDivisionError


def test_a_task_that_kills_workers_is_named_as_the_reason(cluster, pinned):
    sentence = refused(pinned(tasks.heard, parallel_map, tasks.end, [0], title="counting", scheduler=cluster.address))
    assert sentence.startswith("counting: 2 workers died at the same task, the last at tcp://127.0.0.1:")
    assert pinned(parallel_map, abs, [-1], scheduler=cluster.address).result() == [1]


@pytest.mark.parametrize("name", ["sage_nb", "torch", "numpy exp"])
def test_a_worker_of_another_kind_is_refused(cluster, pinned, name):
    sentence = refused(pinned(tasks.heard, tasks.unlike, name, cluster.address))
    assert sentence.startswith("tcp://127.0.0.1:") and f"would not compute the same bytes ({name} is " in sentence and "here another)" in sentence


@pytest.mark.parametrize("options, fault", [(dict(pin=False, pythonpath=""), "sage_nb is missing or too old"), (dict(pin=False), "ATEN_CPU_CAPABILITY is not set, here avx2")])
def test_a_worker_started_wrongly_is_refused(tmp_path, cluster, pinned, options, fault):
    other = cluster.add_worker(**options)
    try:
        assert fault in refused(pinned(tasks.heard, parallel_map, tasks.work, [(tmp_path / "out", i, 0.1) for i in range(20)], scheduler=cluster.address))
    finally:
        cluster.kill(other)


def test_a_cluster_without_workers_is_refused(tmp_path, pinned):
    with Cluster(tmp_path / "cluster") as cluster:
        sentence = refused(pinned(tasks.heard, tasks.impatient, abs, [-1], title="counting", scheduler=cluster.address))
        assert sentence == f"counting: the scheduler at {cluster.address} has no workers; start some and run again, what was finished is kept"


def test_an_address_without_a_scheduler_is_refused(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as closed:
        used, free = (f"tcp://127.0.0.1:{server.getsockname()[1]}" for server in (silent, closed))
        closed.close()
        running = script(tmp_path, f"""
for address in ("somewhere", "foo://127.0.0.1:8786", 8786, {used!r}, {free!r}):
    try:
        tasks.impatient(abs, [-1], scheduler=address)
    except core.DataError as error:
        print(error)""")
        out, heard = running.communicate()
    assert heard == "" and [line.partition(": no Dask scheduler answers at this address (")[0] for line in out.splitlines()] == [
        "somewhere", "foo://127.0.0.1:8786", "8786", used, free]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(DataError, match=r"pip install 'sage_nb\[cluster\]'"):
        parallel_map(abs, [-1], scheduler="tcp://127.0.0.1:8786")
    assert parallel_map(abs, [], scheduler="tcp://127.0.0.1:8786") == []


def test_a_scheduler_that_dies_is_one_sentence(tmp_path, cluster, pinned):  # the last of this file: it takes the cluster with it
    running = pinned(tasks.heard, parallel_map, tasks.work, [(tmp_path / "out", i, 0.1) for i in range(1000)], title="counting", scheduler=cluster.address)
    wait_for(lambda: len(tasks.began(tmp_path / "out")) > 2)
    cluster.scheduler.kill()
    assert refused(running) == f"counting: the scheduler at {cluster.address} is gone; start it and run again, what was finished is kept"
