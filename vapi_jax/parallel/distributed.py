"""Several processes as one run, which begin, fail and end together.

`cluster` says which process this is and `links` connects it; `together` calls the run's work in all of
them. A process that fails sends the reason over its connection, and where a process is killed the
kernel closes it. Either way the others end too, with a sentence and status 1. JAX alone would end them
with a stack of C++ frames after a heartbeat timeout, and a process that failed with an exception might
first wait for the others in a barrier.

Who notices what, and when (the bounds are constants):
  an error in a process       told to all within `PAUSE`; all have ended within `UNWINDING` after that
  a process killed            at once, by its closed connection
  a machine or network gone   by TCP keepalive, within `BEAT + links.SILENCE`
  a process frozen            said after `STILL`; ended by JAX's heartbeats, within `HEARTBEAT`
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int

from vapi_jax.common import progress
from vapi_jax.common.errors import exit_status
from vapi_jax.parallel.cluster import TIMEOUT, Process, find_process
from vapi_jax.parallel.links import Link, joined
from vapi_jax.parallel.preemption import Stopped
from vapi_jax.parallel.sharding import all_devices

PAUSE = 1.0
"""Seconds before a process tells of its error: it may be but the consequence of another's death."""
UNWINDING = 10.0
"""Seconds that a process which has failed may take to put things away."""
BEAT, STILL = 10.0, 80.0
"""Seconds between two signs of life, and after which it is said that none has come. Nobody is ended for that:
Python may be held up for long by what is no fault, and JAX's own heartbeats do without it."""
HEARTBEAT = 100
"""Seconds after which JAX gives up a process that sends no heartbeat."""


class _Group:
    """The other processes, watched: by process 0 all of them, by the others process 0."""

    def __init__(self, me: Process, links: list[Link]):
        self._me, self._links = me, links
        self._lock = threading.Lock()
        self._failing = False  # this process is about to tell of an error of its own
        self._settled = False  # it is settled why this process ends
        for link in links:
            threading.Thread(target=self._watch, args=(link,), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        still = set(self._links)
        while True:
            before = time.monotonic()
            time.sleep(BEAT)
            self._send(alive=True)
            now = time.monotonic()
            if (
                now - before > 2 * BEAT
            ):  # this process was the frozen one, and has not read its mail
                continue
            for link in list(still):
                if now - link.heard <= STILL or link.finished.is_set():
                    continue
                still.discard(link)
                _say(
                    f"process {link.process_id} on {link.host} has given no sign of life for {STILL:g} s: "
                    f"frozen, or its machine is overloaded. JAX ends all {HEARTBEAT} s after the last one"
                )

    def _watch(self, link: Link) -> None:
        while message := link.receive():
            link.heard = time.monotonic()
            if "alive" in message:
                continue
            link.finished.set()
            if "died" in message or ("failed" in message and not self._failing):
                # In a thread of its own: this one goes on to see the connection close.
                threading.Thread(target=self._end, args=(message,), daemon=True).start()
        link.closed.set()
        if not link.finished.is_set():
            reason = (
                f"process {link.process_id} on {link.host} has ended without saying why: killed, out of "
                "memory, or its machine or network is gone"
            )
            self._end({"died": reason})

    def _settle(self) -> bool:
        with self._lock:
            first, self._settled = not self._settled, True
        return first

    def _end(self, message: dict[str, Any]) -> None:
        """Ends this process for what another one has said, or for another one's death."""
        if not self._settle():
            return
        reason = message.get("died") or message.get("failed")
        _say(f"error: {reason}. This process ends as well; start all again with the same command")
        self._send(**message)
        self.wait_for_others()
        os._exit(1)

    def _send(self, **message: Any) -> None:
        for link in self._links:
            link.send(**message)

    def wait_for_others(self) -> None:
        """Process 0: JAX's service lives here, and while it does, the others end in their own words."""
        deadline = time.monotonic() + UNWINDING + 2.0
        for link in self._links:
            if link.process_id:
                link.closed.wait(max(deadline - time.monotonic(), 0.0))

    def tell(self, error: BaseException | int) -> None:
        """Tells the others that this process fails, and ends it if it has not ended soon."""
        if self._failing:
            return
        self._failing = True
        time.sleep(PAUSE)  # if another has died, the watcher ends this process here
        if not self._settle():
            return
        lines = str(error).strip().splitlines() or [""]
        what = f"{type(error).__name__}: {lines[0]}" if isinstance(error, BaseException) else ""
        what = f" with {what[:500]}" if what else f" with status {error}; its own output says why"
        reason = f"process {self._me.process_id} on {socket.gethostname()} has failed{what}"
        self._send(failed=reason.rstrip("."))
        last = threading.Timer(UNWINDING, self._give_up, args=(error,))
        last.daemon = True
        last.start()

    def _give_up(self, error: BaseException | int) -> None:
        _say(f"error: {error}. Ending without more ado after {UNWINDING:g} s")
        os._exit(1)

    def leave(self) -> None:
        """The work is done here; waits for the others, however long theirs takes.

        JAX's own barrier at the end gives up after `TIMEOUT`, and process 0 may have much to put together.
        """
        self._send(done=True)
        for link in self._links:
            link.finished.wait()
        jax.distributed.shutdown()
        for link in self._links:
            link.close()


_group: _Group | None = None


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Tells the other processes of an error that leaves this context, before anything waits for them.

    Nothing, where there is one process; a stop that all have agreed on is no error.
    """
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        if _group is not None:
            _group.tell(error)
        raise


def as_one(
    work: Callable[[], int | None],
    *,
    preemption: bool = False,
    stopped: str = "stopped",
    timeout: float = TIMEOUT,
    **process: Any,
) -> int:
    """A command of one or several processes: finds the others, calls `work` in all; the exit status.

    Args:
      work: returns an exit status, None for 0. What it raises is told to the others, and is a sentence
        where `exit_status` knows one.
      preemption: whether `work` asks JAX for a step to stop at; SIGTERM ends a process there and then
        where it does not.
      stopped: what to say after Ctrl-C.
      timeout: seconds to wait for the others at the start.
      process: which process this is, as far as that is told; see `cluster.find_process`.
    """

    def told() -> int | None:
        with telling():
            return work()

    def join() -> int:
        me = find_process(**process, timeout=timeout)
        if me is not None and not preemption:
            jax.config.update("jax_enable_preemption_service", False)
        return together(me, lambda: exit_status(told, stopped), timeout)

    return exit_status(join, stopped)


def by_one(work: Callable[[], None]) -> None:
    """Work of process 0 alone, on its own devices; the others wait at the end of the command.

    Raises:
      DevicesError: see `all_devices`.
    """
    all_devices()
    if jax.process_index() == 0:
        work()


def deal(wanted: Int[np.ndarray, " N"], count: int) -> list[int]:
    """This process's share of what process 0 finds to be done; all wait for it to say so.

    Args:
      wanted: numbers below `count`; only those of process 0 matter.
      count: the same in all processes.
    """
    asked = np.zeros(count, np.uint8)
    asked[wanted] = 1
    if jax.process_count() > 1:
        asked = multihost_utils.broadcast_one_to_all(asked)
    return np.flatnonzero(asked).tolist()[jax.process_index() :: jax.process_count()]


def together(me: Process | None, work: Callable[[], int], timeout: float = TIMEOUT) -> int:
    """Calls `work` in all processes, before any of them has used JAX's devices.

    Args:
      me: from `cluster.find_process`; with None, `work` is called and nothing else happens.
      work: returns an exit status; its errors are announced by `telling` at the latest here.
      timeout: seconds to wait for the other processes at the start.

    Returns:
      The status of `work` where it is 0. Otherwise, and where another process fails or dies, this
      process ends here: what is left of a broken run could only wait for the others.

    Raises:
      DistributedError: the processes do not come together.
    """
    global _group
    if me is None:
        return work()
    if me.process_id:
        progress.silence()
    with contextlib.ExitStack() as starting:
        links, port, address = starting.enter_context(joined(me, timeout))
        _group = _Group(me, links)
        try:
            _initialize(me, port, address)
            starting.close()
            status = work()
            if status == 0:
                _group.leave()
                return 0
            _group.tell(status)
        except KeyboardInterrupt:
            status = 128 + signal.SIGINT
            _group.tell(status)
            _say("stopped")
        except BaseException as error:
            _group.tell(error)
            traceback.print_exc()
            status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    _group.wait_for_others()
    os._exit(status)


def _initialize(me: Process, port: int, address: str) -> None:
    """Starts JAX's own service (process 0) and client, with a port that the processes alone know."""

    def at(host: str) -> str:
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    # On CPU two steps under way at once mix up their collectives, and hang.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(
        at(me.address[0]),
        me.num_processes,
        me.process_id,
        local_device_ids=me.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=int(TIMEOUT),
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=int(TIMEOUT),
        coordinator_bind_address=at(address) if address else None,
    )


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())  # at once, whatever the main thread holds
