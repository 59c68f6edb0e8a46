"""What workers do in tests: small, importable and quick to import."""
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from sage_nb import core


def last_first(task):
    "Task 0 ends when task 3 has begun; it never would if a single process did the work."
    folder, i = task
    Path(folder, str(i)).touch()
    until = time.monotonic() + 60
    while i == 0 and not Path(folder, "3").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    return i, os.getpid()


def environment(names):
    return {name: os.environ.get(name) for name in names}


def fail(task):
    "Leave a mark; task 1 is bad data, task 3 a mistake."
    folder, i = task
    Path(folder, str(i)).touch()
    if i == 1:
        raise core.DataError(f"{folder}/{i}: bad; mend it")
    time.sleep(0.05)
    return i // (i - 3)


def fail_by_data(task):
    return task[1] if task[1] != 1 else fail(task)


def end(task):
    os._exit(1)


def work(task):
    "Say who began, pause, then write arrays that depend on every kernel's rounding."
    folder, i, pause = task
    with open(Path(folder).with_suffix(".began"), "a") as log:
        log.write(f"{i} {os.getpid()}\n")
    time.sleep(pause)
    x = np.random.default_rng(i).standard_normal((64, 64))
    core.write_arrays(Path(folder) / f"{i}.safetensors", {"x": np.exp(x @ x.T / 64), "sum": x.sum(0)}, {"i": i})
    return i


def began(folder) -> list[tuple[int, int]]:
    "Task and process, in the order in which `work` began."
    path = Path(folder).with_suffix(".began")
    return [tuple(map(int, line.split())) for line in path.read_text().splitlines()] if path.exists() else []


def outgrow(task):
    "Like `work`, in a process that is to be replaced for its size."
    from joblib.externals.loky import process_executor

    process_executor._MAX_MEMORY_LEAK_SIZE, process_executor._MEMORY_LEAK_CHECK_DELAY = -(1 << 60), 0
    return work(task)


def heard(function, *arguments, **options):
    "Result or error of a call, and what it wrote to standard error."
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            result = function(*arguments, **options)
        except Exception as error:
            result = error
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        return result, file.read().decode()


def unlike(name, scheduler):
    "`parallel_map` in a process that differs from the workers in one thing."
    before = core._surroundings
    core._surroundings = lambda: {**before(), name: "another"}
    try:
        return core.parallel_map(abs, [-1], scheduler=scheduler)
    finally:
        core._surroundings = before


def impatient(*arguments, **options):
    "`parallel_map` that waits for a second where it would wait for ten."
    before, core._PATIENCE = core._PATIENCE, 1.0
    try:
        return core.parallel_map(*arguments, **options)
    finally:
        core._PATIENCE = before


def extract(root, out, scheduler):
    "Prepare, encode and copy a corpus, from within its folder."
    from sage_nb.affwild2 import Corpus
    from sage_nb.features import encode_corpus, prepare_corpus
    from sage_nb.suite import encode_copies

    os.chdir(root)
    how = dict(workers=1, scheduler=scheduler)
    index = prepare_corpus(Corpus("corpus", dev_groups=1), f"{out}/prepared", skip_broken=True, **how)
    encode_corpus(f"{out}/prepared", "encoders", f"{out}/features", half=True, **how)
    encode_copies(f"{out}/prepared", "encoders", f"{out}/features", splits=("train",), **how)
    return set("abcdefgh") - set(index)
