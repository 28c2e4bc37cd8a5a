"""Processes that come together, among strangers."""

import contextlib
import hmac
import json
import socket
import threading
import time

import pytest

from tests.helpers.messages import assert_mentions
from tests.helpers.processes import call, free_port
from vapi_jax.parallel import links
from vapi_jax.parallel.cluster import DistributedError, Process


def meet(processes, timeout=10.0, after_an_error=()):
    """What each of several processes, here threads, gets: links, port and address, or an error.

    `after_an_error` come when one of the others has got an error.
    """
    count, processes = len(processes), [*processes, *after_an_error]
    found = [None] * len(processes)

    def one(number, me):
        try:
            with links.joined(me, timeout) as joined:
                found[number] = joined
        except DistributedError as error:
            found[number] = str(error)

    threads = [threading.Thread(target=one, args=item) for item in enumerate(processes)]
    for number, thread in enumerate(threads):
        deadline = time.monotonic() + timeout
        while number >= count and not any(isinstance(said, str) for said in found):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        thread.start()
    for thread in threads:
        thread.join(30)
    for result in found:
        if isinstance(result, tuple):
            for link in result[0]:
                link.close()
    return found


def claim(**said):
    return json.dumps({"process_id": 1, "num_processes": 3, "host": "x", "proof": "é"} | said)


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 10000, b"[" * 4095 + b"\n", b"[]\n", b"{}\n", b"",
        f"{claim()}\n".encode(), f"{claim(process_id='1')}\n".encode(), f"{claim(proof=[])}\n".encode(),
    ],
)  # fmt: skip
def test_strangers_are_closed_and_logged_and_hold_nobody_up(said, caplog):
    address = f"127.0.0.1:{free_port()}"
    found = {}
    gathering = threading.Thread(
        target=lambda: found.update(all=meet([Process(address, 3, i) for i in (0, 1)], 30.0))
    )
    gathering.start()
    strangers = [call(address, said) for _ in range(5)]
    start = time.monotonic()
    meeting = meet([Process(address, 3, 2)], 30.0)
    assert time.monotonic() - start < links._GREETING - 1.0
    gathering.join(10)
    assert sorted(link.process_id for link in found["all"][0][0]) == [1, 2]
    assert len({port for _, port, _ in [*found["all"], *meeting]}) == 1
    for stranger in strangers:
        stranger.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(4096):
                pass
        stranger.close()
    assert caplog.text.count("a connection from 127.0.0.1 was closed") >= 5


def test_who_does_not_come_is_named_to_all_who_came():
    address = f"127.0.0.1:{free_port()}"
    found = meet([Process(address, 4, 0), Process(address, 4, 2)], timeout=1.5)
    assert "2 of 4 processes did not come within 1.5 s: 1, 3." in found[0]
    assert found[0] in found[1]


def test_a_coordinator_out_of_reach_is_named():
    address = f"127.0.0.1:{free_port()}"
    (said,) = meet([Process(address, 2, 1)], timeout=1.0)
    assert (
        f"process 1 could not reach process 0 at {address} within 1 s (Connection refused)" in said
    )


def test_another_program_at_the_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: server.accept()[0].close(), daemon=True).start()
        (said,) = meet([Process(f"127.0.0.1:{server.getsockname()[1]}", 2, 1)])
    assert "no run of vapi_jax" in said


def test_a_second_process_of_one_number_is_refused_and_the_run_goes_on(caplog):
    address = f"127.0.0.1:{free_port()}"
    zero, one, two = (Process(address, 3, i) for i in range(3))
    found = meet([zero, one, one], after_an_error=[two])
    (refused,) = [said for said in found if isinstance(said, str)]
    assert refused in found[1:3]
    assert "process 1 has come already" in refused
    assert "process 1 has come already" in caplog.text
    assert sorted(link.process_id for link in found[0][0]) == [1, 2]


@pytest.mark.parametrize("stranger", [(1, 3), (3, 3), (0, 2), (-1, 2)])
def test_a_process_of_a_run_of_another_size_is_refused_and_the_run_goes_on(stranger):
    address = f"127.0.0.1:{free_port()}"
    index, count = stranger
    found = {}
    first = threading.Thread(
        target=lambda: found.update(all=meet([Process(address, 2, 0)], 30.0)), daemon=True
    )
    first.start()
    caller = call(address, b"")
    nonce = json.loads(caller.makefile().readline())["nonce"]
    said = claim(process_id=index, num_processes=count, proof=links._proof(nonce, index))
    caller.sendall(f"{said}\n".encode())
    refused = json.loads(caller.makefile().readline())["refused"]
    caller.close()
    assert f"a run of {count} processes, process 0 in one of 2" in refused
    (mine,) = meet([Process(address, 2, 1)])
    first.join(10)
    assert mine[1] == found["all"][0][1]


def test_a_process_with_another_secret_is_refused(monkeypatch):
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv(links.SECRET, "ours")
    found = {}
    first = threading.Thread(
        target=lambda: found.update(all=meet([Process(address, 2, 0)], 30.0)), daemon=True
    )
    first.start()
    caller = call(address, b"")
    nonce = json.loads(caller.makefile().readline())["nonce"]
    guess = hmac.new(b"theirs", f"{nonce} 1".encode(), "sha256").hexdigest()
    caller.sendall(f"{claim(num_processes=2, proof=guess)}\n".encode())
    assert links.SECRET in json.loads(caller.makefile().readline())["refused"]
    caller.close()
    (mine,) = meet([Process(address, 2, 1)])
    first.join(10)
    assert mine[1] == found["all"][0][1]


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        (said,) = meet([Process(f"127.0.0.1:{server.getsockname()[1]}", 2, 0)])
    assert_mentions(said, "listen", "port")


def test_process_0_listens_where_the_others_call_and_nowhere_else():
    port = free_port()
    first = threading.Thread(target=meet, args=([Process(f"localhost:{port}", 2, 0)], 2.0))
    first.start()
    call(f"127.0.0.1:{port}", b"").close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port))
    first.join()


@pytest.mark.parametrize(
    ("coordinator", "expected"),
    [
        ("127.0.0.1:1", ["127.0.0.1"]),
        ("localhost:1", ["127.0.0.1", "::1"]),
        ("192.0.2.1:1", ["::", "0.0.0.0"]),  # an address in front of this machine, not one of it
        ("no-such-host.invalid:1", ["::", "0.0.0.0"]),
    ],
)
def test_the_address_to_listen_at(coordinator, expected, caplog):
    assert links._own_address(Process(coordinator, 2, 0)) in expected
    assert ("listening at all" in caplog.text) == (expected[0] == "::")


def test_nobody_else_gets_the_port_of_jax_before_jax_has_it():
    address = f"127.0.0.1:{free_port()}"
    other = threading.Thread(target=meet, args=([Process(address, 2, 1)],))
    other.start()
    with links.joined(Process(address, 2, 0), 10.0) as (_, port, bound):
        assert bound == "127.0.0.1"
        with pytest.raises(OSError, match="in use"), socket.create_server(("127.0.0.1", port)):
            pass
        with pytest.raises(ConnectionRefusedError):  # nobody listens there yet
            socket.create_connection(("127.0.0.1", port))
    other.join()
    with socket.create_server(("127.0.0.1", port)):
        pass
