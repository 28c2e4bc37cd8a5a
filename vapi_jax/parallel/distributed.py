"""Several processes as one run: meeting at the start, and ending together.

`cluster` says which process this is; `together` calls the run's work in all of them. Process 0
listens at the coordinator's address until every other process has said hello, or says who is missing;
then JAX is started in all of them, with a port of its own. The connections stay open: a process that
fails sends the reason over its connection, and where a process is killed the kernel closes it. Either
way the others end too, with a sentence and status 1.

JAX alone would end them too, but with a stack of C++ frames, after a heartbeat timeout, and a process
that failed with an exception might first wait for the others in a barrier.

Who notices what, and when (the bounds are the constants below):
  an error in a process       told to all within `PAUSE`; all have ended within `UNWINDING` after that
  a process killed            at once, by its closed connection
  a machine or network gone   by TCP keepalive, within `SILENCE`
  a process frozen            by JAX's heartbeats, within `HEARTBEAT`

Nothing here imports JAX before it is needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from vapi_jax.parallel.cluster import DistributedError, Place

MEETING = 300.0
"""Seconds that processes wait for each other at the start, unless told otherwise."""
PAUSE = 1.0
"""Seconds before a process tells of its error: it may be but the consequence of another's death."""
UNWINDING = 10.0
"""Seconds that a process which has failed may take to put things away."""
SILENCE = 30
"""Seconds after which a machine that answers no keepalive probe is given up."""
HEARTBEAT = 100
"""Seconds after which JAX gives up a process that sends no heartbeat."""

_LONGEST = 4096  # bytes of a message
_GREETING = 5.0  # seconds that a stranger at the door may take
_RETRY = 0.5
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


# --- connections ----------------------------------------------------------------------------------


class _Link:
    """A connection to another process: JSON objects, one a line."""

    def __init__(self, connection: socket.socket, process: int, host: str):
        self.process, self.host = process, host
        self.finished = False  # it has said why it ends, or that it is done
        self.closed = threading.Event()
        self._socket = connection
        self._lines: BinaryIO = connection.makefile("rb")
        _keep_alive(connection)

    @property
    def name(self) -> str:
        return f"process {self.process} on {self.host}"

    def send(self, **message: Any) -> None:
        """Sends, or does nothing where nobody is there any more: the listening end notices."""
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode()[: _LONGEST - 1] + b"\n")

    def receive(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next message; None where the connection has ended, or what comes is no message."""
        try:
            self._socket.settimeout(timeout)
            message = json.loads(self._lines.readline(_LONGEST))
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _keep_alive(connection: socket.socket) -> None:
    """The kernel asks whether the other machine is there, also while Python is busy."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": SILENCE // 2,
        "TCP_KEEPALIVE": SILENCE // 2,  # what macOS calls it
        "TCP_KEEPINTVL": SILENCE // 6,
        "TCP_KEEPCNT": 3,
        "TCP_USER_TIMEOUT": 1000 * SILENCE,  # where something had been sent before
    }
    for name, value in options.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _listen(place: Place) -> socket.socket:
    host, port = place.address
    try:
        if host in _LOOPBACK:
            return socket.create_server((socket.gethostbyname(host), port), backlog=place.processes)
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        return socket.create_server(
            ("", port), family=family, backlog=place.processes, dualstack_ipv6=dual
        )
    except OSError as error:
        raise DistributedError(
            f"process 0 cannot listen on port {port} of {host} ({error.strerror}): is another run "
            "using it? Give another port in --coordinator"
        ) from error


def _welcome(place: Place, timeout: float) -> tuple[list[_Link], int]:
    """Process 0: links to all others, and the port that JAX is to use."""
    links: dict[int, _Link] = {}
    deadline = time.monotonic() + timeout
    with _listen(place) as listener:
        try:
            while missing := set(range(1, place.processes)) - links.keys():
                listener.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    raise DistributedError(
                        f"{len(missing)} of {place.processes} processes did not come within "
                        f"{timeout:g} s: {_listed(missing)}. Start each with --coordinator="
                        f"{place.coordinator} --num_processes={place.processes} and its own "
                        "--process_id, and look at their output"
                    ) from None
                link = _greet(connection, place)
                if link is None:
                    continue
                if link.process in links:
                    reason = (
                        f"two processes call themselves process {link.process}, on "
                        f"{links[link.process].host} and on {link.host}: give each its own "
                        "--process_id"
                    )
                    link.send(refused=reason)
                    raise DistributedError(reason)
                links[link.process] = link
        except DistributedError as error:
            for link in links.values():
                link.send(refused=str(error))
                link.close()
            raise
    host = socket.gethostbyname(place.address[0]) if place.address[0] in _LOOPBACK else ""
    with socket.create_server((host, 0)) as free:  # JAX takes it a moment later
        port = free.getsockname()[1]
    for link in links.values():
        link.send(port=port)
    return list(links.values()), port


def _greet(connection: socket.socket, place: Place) -> _Link | None:
    """The link to a process that has said hello; None for whoever else calls.

    Raises:
      DistributedError: it belongs to a run of another size.
    """
    link = _Link(connection, 0, "")
    message = link.receive(_GREETING) or {}
    process, processes = message.get("process"), message.get("processes")
    if message.get("hello") != "vapi_jax" or type(process) is not int:
        link.close()
        return None
    link.process, link.host = process, str(message.get("host"))[:99]
    if processes != place.processes or not 0 < process < place.processes:
        reason = (
            f"{link.name} takes part in a run of {processes!r:.20} processes, process 0 in one of "
            f"{place.processes}: give all of them the same --num_processes"
        )
        link.send(refused=reason)
        link.close()
        raise DistributedError(reason)
    return link


def _call(place: Place, timeout: float) -> tuple[list[_Link], int]:
    """Another process: its link to process 0, and the port that JAX is to use."""
    deadline = time.monotonic() + timeout
    reason = ""
    while True:
        try:
            connection = socket.create_connection(place.address, timeout=_GREETING)
            break
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() + _RETRY > deadline:
            raise DistributedError(
                f"process {place.process} could not reach process 0 at {place.coordinator} within "
                f"{timeout:g} s ({reason}). Is process 0 started with the same --coordinator, and "
                "may its port be reached from here?"
            )
        time.sleep(_RETRY)
    link = _Link(connection, 0, place.address[0])
    link.send(
        hello="vapi_jax",
        process=place.process,
        processes=place.processes,
        host=socket.gethostname(),
    )
    # Process 0 may have begun to wait later than this one.
    message = link.receive(timeout + _GREETING)
    if message is None:
        raise DistributedError(
            f"process 0 at {place.coordinator} ended, or did not answer, while processes gathered"
        )
    if "refused" in message:
        raise DistributedError(str(message["refused"]))
    return [link], int(message["port"])


def _listed(numbers: set[int]) -> str:
    shown = ", ".join(map(str, sorted(numbers)[:10]))
    return shown + (f" and {len(numbers) - 10} more" if len(numbers) > 10 else "")


# --- one end for all ------------------------------------------------------------------------------


class _Group:
    """The other processes, watched: by process 0 all of them, by the others process 0."""

    def __init__(self, place: Place, links: list[_Link]):
        self.place, self._links = place, links
        self._lock = threading.Lock()
        self._ending = self._failing = self._told = False
        for link in links:
            threading.Thread(target=self._watch, args=(link,), daemon=True).start()

    def _watch(self, link: _Link) -> None:
        while message := link.receive():
            link.finished = True
            if "done" in message:
                continue
            # Where this process has failed itself, its own error is about to be told.
            if "died" in message or not self._failing:
                # In a thread of its own: this one goes on to see the connection close.
                threading.Thread(target=self._end, args=(message,), daemon=True).start()
        link.closed.set()
        if not link.finished:
            self._end(
                {
                    "died": f"{link.name} has ended without saying why: killed, out of memory, or "
                    "its machine or network is gone"
                }
            )

    def _end(self, message: dict[str, Any]) -> None:
        with self._lock:
            if self._ending or self._told:
                return
            self._ending = True
        reason = str(message.get("died") or message.get("failed"))
        _say(f"error: {reason}. This process ends as well; start all again with the same command")
        if self.place.process == 0:
            for link in self._links:
                link.send(**message)
            # JAX's service lives here: while it does, the others can end in their own words.
            self._wait_for_others()
        os._exit(1)

    def _wait_for_others(self) -> None:
        deadline = time.monotonic() + UNWINDING + 2.0
        for link in self._links:
            link.closed.wait(max(deadline - time.monotonic(), 0.0))

    def tell(self, error: BaseException | int) -> None:
        """Tells the others that this process fails, and ends it if it has not ended soon."""
        if self._failing:
            return
        self._failing = True
        time.sleep(PAUSE)  # if another has died, the watcher ends this process here
        with self._lock:
            if self._ending:
                return
            self._told = True
        lines = str(error).strip().splitlines() or [""]
        what = f"{type(error).__name__}: {lines[0]}" if isinstance(error, BaseException) else ""
        what = f" with {what[:500]}" if what else f" with status {error}; its own output says why"
        reason = f"process {self.place.process} on {socket.gethostname()} has failed{what}"
        for link in self._links:
            link.send(failed=reason.rstrip("."))
        last = threading.Timer(UNWINDING, self._give_up, args=(error,))
        last.daemon = True
        last.start()

    def _give_up(self, error: BaseException | int) -> None:
        _say(f"error: {error}. Ending without more ado after {UNWINDING:g} s")
        os._exit(1)

    def leave(self) -> None:
        """The work is done here; waits for the others."""
        import jax

        for link in self._links:
            link.send(done=True)
        jax.distributed.shutdown()
        for link in self._links:
            link.close()


_group: _Group | None = None


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Tells the other processes of an error that leaves this context, before anything waits for them.

    Nothing, where there is one process; a stop that all have agreed on is no error.
    """
    from vapi_jax.parallel.preemption import Stopped

    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        if _group is not None:
            _group.tell(error)
        raise


def together(place: Place | None, work: Callable[[], int], timeout: float = MEETING) -> int:
    """Calls `work` in all processes, before any of them has used JAX's devices.

    Args:
      place: from `cluster.find_place`; with None, `work` is called and nothing else happens.
      work: returns an exit status; its errors are announced by `telling` at the latest here.
      timeout: seconds to wait for the other processes at the start.

    Returns:
      The status of `work` where it is 0. Otherwise, and where another process fails or dies, this
      process ends here: what is left of a broken run could only wait for the others.

    Raises:
      DistributedError: the processes do not come together.
    """
    global _group
    if place is None:
        return work()
    _group = _join(place, timeout)
    try:
        status = work()
        if status == 0:
            _group.leave()
            return 0
        _group.tell(status)
    except BaseException as error:
        _group.tell(error)
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if place.process == 0:
        _group._wait_for_others()
    os._exit(status)


def _join(place: Place, timeout: float) -> _Group:
    links, port = (_welcome if place.process == 0 else _call)(place, timeout)
    group = _Group(place, links)
    import jax

    # On CPU two steps under way at once mix up their collectives, and hang.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    host = place.address[0]
    jax.distributed.initialize(
        f"{f'[{host}]' if ':' in host else host}:{port}",
        place.processes,
        place.process,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(MEETING),
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=int(MEETING),
        coordinator_bind_address=(
            f"{socket.gethostbyname(host)}:{port}" if host in _LOOPBACK else None
        ),
    )
    return group


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())  # at once, whatever the main thread holds
