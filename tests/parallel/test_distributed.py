"""Several processes: ending together, and dealing out work."""

import time

import numpy as np
import pytest

from tests.helpers.processes import at_work, call, ends, free_port, started, work
from vapi_jax.parallel import distributed


@pytest.mark.parametrize("ending", ["well", "late"])
def test_processes_that_are_done_end_with_0_also_where_one_has_much_more_to_do(ending):
    with at_work(2, ending) as processes:
        assert [ends(process)[0] for process in processes] == [0, 0]


def test_neither_strangers_nor_a_second_process_of_one_number_end_a_run():
    address = f"127.0.0.1:{free_port()}"
    first, last = [work(i, 3, address, "well") for i in (0, 1, 1)], work(2, 3, address, "well")
    with started(first) as processes:
        strangers = [
            call(address, said) for said in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 9999, b"")
        ]
        deadline = (
            time.monotonic() + 90.0
        )  # the one that is turned away ends while process 2 is awaited
        while all(process.poll() is None for process in processes[1:]):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with started([last]) as more:
            found = [ends(process, within=90.0) for process in [*processes, *more]]
    assert [found[0][0], found[3][0]] == [0, 0]
    assert sorted([found[1][0], found[2][0]]) == [0, 1]
    (refused,) = [output for status, output in found if status == 1]
    assert "process 1 has come already" in refused
    assert "process 1 has come already" in found[0][1]
    assert found[0][1].count("a connection from 127.0.0.1 was closed") >= 3
    for stranger in strangers:
        stranger.close()


def test_an_error_in_one_process_ends_all_with_its_reason():
    with at_work(3, "error") as processes:
        found = [ends(process, within=distributed.PAUSE + 5.0) for process in processes]
    assert [status for status, _ in found] == [1, 1, 1]
    for _, output in found[:2]:
        assert "error: process 2 on" in output
        assert "has failed with ValueError: the disk is full" in output
        assert "Traceback" not in output
    assert "ValueError: the disk is full" in found[2][1]


def test_a_status_of_process_0_ends_all():
    with at_work(2, "status") as processes:
        found = [ends(process) for process in processes]
    assert [status for status, _ in found] == [3, 1]
    assert "process 0 on" in found[1][1]
    assert "has failed with status 3; its own output says why" in found[1][1]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_other_at_once(victim):
    with at_work(2, "never") as processes:
        processes[victim].kill()
        status, output = ends(processes[1 - victim], within=5.0)
    assert status != 0
    # Process 0 takes JAX's service with it, and JAX may be the first to say so.
    said = f"error: process {victim} on"
    assert said in output or (victim == 0 and "leader task" in output), output


def test_chunks_are_dealt_out():
    assert distributed.deal(np.array([1, 3, 4]), 6) == [1, 3, 4]
    assert distributed.deal(np.array([], int), 6) == []
