"""The pool of threads that the CPU's kernels share."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from losart.backends.cpu import pool

CAPSULE = pool.__pyx_capi__["parallel_for"]
ITEM = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ssize_t)


def capsule_pointer(capsule):
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    return api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule))


parallel_for = ctypes.CFUNCTYPE(None, ITEM, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    capsule_pointer(CAPSULE)
)


def taken(count, share=True, item=lambda index: None):
    """The items of a region in the order in which they ran, each with its thread."""
    found = []

    def run(_, index):
        found.append((index, threading.get_ident()))
        item(index)

    parallel_for(ITEM(run), None, count, share)
    return found


def each_once(found, count):
    return Counter(index for index, _ in found) == Counter(range(count))


def in_process(script, **environment):
    """What a process of its own prints."""
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-c", "import test_pool as t\n" + script],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout.strip()


@given(st.integers(0, 300), st.booleans())
def test_each_item_runs_once(count, share):
    assert each_once(taken(count, share), count)


@given(st.lists(st.integers(0, 40), max_size=40))
def test_region_after_region(counts):
    for count in counts:
        assert each_once(taken(count), count)


def many_regions():
    """Regions of items that differ in length, on however many threads there are."""
    right = True
    for count in range(400):
        found = taken(count % 37, item=lambda index: time.sleep(1e-5) if index % 5 == 0 else None)
        right &= each_once(found, count % 37)
    return right


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads(threads):
    script = "print(t.pool.threads_in_use(), t.many_regions())"
    assert in_process(script, OMP_NUM_THREADS=str(threads)) == f"{threads} True"


def used():
    """Threads that took items of a region which waits for all of them."""
    meeting = threading.Barrier(pool.threads_in_use())
    return len({thread for _, thread in taken(pool.threads_in_use(), item=lambda _: meeting.wait(60))})


def test_all_threads_take_items():
    assert in_process("print(t.used())", OMP_NUM_THREADS="4") == "4"


def test_without_share_the_caller_runs_all():
    assert {thread for _, thread in taken(50, share=False)} == {threading.get_ident()}


@pytest.mark.parametrize(
    ("value", "threads"),
    [("3", 3), ("4,2", 4), (" 2 ", 2), ("", None), ("0", None), ("-1", None), ("many", None)],
)
def test_threads_wanted(monkeypatch, value, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert pool.wanted_threads() == (threads or len(os.sched_getaffinity(0)))


def test_no_thread_starts_on_import():
    count = "; import os; print(len(os.listdir('/proc/self/task')))"
    assert in_process("import losart.backends.cpu.backend" + count) == in_process("import numpy" + count)


def nested():
    inner = []
    outer = taken(20, item=lambda _: inner.append(each_once(taken(10), 10)))
    return each_once(outer, 20) and inner == [True] * 20


def test_regions_within_regions():
    assert in_process("print(t.nested())", OMP_NUM_THREADS="3") == "True"


def concurrent():
    """Regions of several callers at once."""
    right = []

    def call(seed):
        right.append(all(each_once(taken(count % 50), count % 50) for count in range(seed, seed + 150)))

    callers = [threading.Thread(target=call, args=(7 * number,)) for number in range(5)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return right == [True] * 5


def test_several_callers():
    assert in_process("print(t.concurrent())", OMP_NUM_THREADS="3") == "True"


def forked():
    """Whether a child of fork, and its parent after it, run regions on threads of their own."""
    before = used()
    child = os.fork()
    if not child:
        signal.alarm(60)
        os._exit(0 if used() == before and many_regions() else 1)
    _, status = os.waitpid(child, 0)
    return status == 0 and used() == before and many_regions()


def forked_within():
    """Of a process that was forked while another of its threads had a region."""
    begun, over = threading.Event(), threading.Event()
    caller = threading.Thread(target=lambda: taken(2, item=lambda _: (begun.set(), over.wait(60))))
    caller.start()
    begun.wait(60)
    child = os.fork()
    if not child:
        signal.alarm(60)
        os._exit(0 if used() == pool.threads_in_use() else 1)
    _, status = os.waitpid(child, 0)
    over.set()
    caller.join()
    return status == 0 and used() == pool.threads_in_use()


@pytest.mark.parametrize("case", ["forked", "forked_within"])
def test_children_of_fork(case):
    assert in_process(f"print(t.{case}())", OMP_NUM_THREADS="3") == "True"


def interrupted():
    """Which thread a signal comes to while the pool's threads sleep."""
    used()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    except KeyboardInterrupt:
        return threading.current_thread() is threading.main_thread()
    return False


def test_interrupts_are_the_main_thread_s():
    assert in_process("print(t.interrupted())", OMP_NUM_THREADS="3") == "True"
