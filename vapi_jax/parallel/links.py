"""Connections between process 0 and the others: made at the start, open as long as both live.

Process 0 listens at the coordinator's address until every other process has come. Who connects is
sent a nonce, and says which process it is with an HMAC of both under the secret in VAPI_JAX_SECRET,
which all processes share (an empty one turns away strangers that do not know this protocol). Whoever
does not, or claims a number that is taken, is told why, closed and logged, and the run goes on.

JAX's own service would end the run at a second client with a taken number, and two services of one
user may listen at one port. So it gets a port that the processes alone are told: bound here before it
is handed out, and let go when JAX has it.
"""

import contextlib
import hmac
import ipaddress
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

from vapi_jax.parallel.cluster import DistributedError, Process

logger = logging.getLogger(__name__)

SECRET = "VAPI_JAX_SECRET"
"""The environment variable that holds what all processes of a run know and others do not."""
SILENCE = 30
"""Seconds after which a machine that answers no keepalive probe is given up."""

_LONGEST = 4096  # bytes of a message
_GREETING = 5.0  # seconds for each word of whoever connects
_RETRY = 0.5


class Link:
    """A connection to another process: JSON objects, one a line.

    Attributes:
      process_id, host: of the other one.
      heard: when something has come last, by `time.monotonic`.
      finished: set when it has said why it ends, or that it is done.
      closed: set when the connection has ended.
    """

    def __init__(self, connection: socket.socket, process_id: int = 0, host: str = ""):
        self.process_id, self.host = process_id, host
        self.heard = time.monotonic()
        self.finished, self.closed = threading.Event(), threading.Event()
        self._socket = connection
        self._lines: BinaryIO = connection.makefile("rb")
        # The kernel asks whether the other machine is there, also while Python is busy.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", SILENCE // 2),
            ("TCP_KEEPALIVE", SILENCE // 2),  # what macOS calls it
            ("TCP_KEEPINTVL", SILENCE // 6),
            ("TCP_KEEPCNT", 3),
            ("TCP_USER_TIMEOUT", 1000 * SILENCE),  # where something had been sent before
        ):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, **message: Any) -> None:
        """Sends, or does nothing where nobody is there any more: the listening end notices."""
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode()[: _LONGEST - 1] + b"\n")

    def receive(self, timeout: float | None = None) -> dict[str, Any]:
        """The next message; {} where the connection has ended, or what comes is no message."""
        try:
            self._socket.settimeout(timeout)
            message = json.loads(self._lines.readline(_LONGEST))
        except (OSError, ValueError, RecursionError):
            return {}
        return message if isinstance(message, dict) else {}

    def close(self) -> None:
        """Ends the connection; the other end notices."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@contextlib.contextmanager
def joined(me: Process, timeout: float) -> Iterator[tuple[list[Link], int, str]]:
    """While this lasts, JAX's port is kept for JAX.

    Args:
      me: this process.
      timeout: seconds to wait for the others.

    Yields:
      Links to all others (process 0) or to process 0; the port of JAX's service; and the address
      that process 0 is to bind it to.

    Raises:
      DistributedError: the processes do not come together; says which and why.
    """
    if me.process_id:
        link, port = _call(me, timeout)
        yield [link], port, ""
        return
    address = _own_address(me)
    links = _gather(me, address, timeout)
    with _bound(address, 0, socket.SO_REUSEPORT) as kept:  # JAX binds with this option as well
        port = kept.getsockname()[1]
        for link in links:
            link.send(port=port)
        yield links, port, address


def _proof(nonce: str, process_id: int) -> str:
    secret = os.environ.get(SECRET, "").encode()
    return hmac.new(secret, f"{nonce} {process_id}".encode(), "sha256").hexdigest()


# --- process 0 ------------------------------------------------------------------------------------


def _own_address(me: Process) -> str:
    """The address of this machine that the others use; "::" or "0.0.0.0" where its name says none."""
    host, port = me.address
    with contextlib.suppress(socket.gaierror):
        for *_, (address, *_) in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            # Some machines know their own name as 127.0.1.1, which means nothing to the others.
            loopback = ipaddress.ip_address(str(address).partition("%")[0]).is_loopback
            if not loopback or host in ("localhost", address):
                with contextlib.suppress(OSError):
                    _bound(str(address), 0).close()
                    return str(address)
    logger.warning(
        "%s names no network address of this machine: listening at all of its addresses", host
    )
    return "::" if socket.has_dualstack_ipv6() else "0.0.0.0"


def _bound(address: str, port: int, *options: int) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        for option in options:
            made.setsockopt(socket.SOL_SOCKET, option, 1)
        if address == "::":
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        made.bind((address, port))
    except OSError:
        made.close()
        raise
    return made


def _gather(me: Process, address: str, timeout: float) -> list[Link]:
    """Links to all other processes."""
    links: dict[int, Link] = {}
    lock, deadline = threading.Lock(), time.monotonic() + timeout

    def greet(connection: socket.socket, caller: str) -> None:
        link, nonce = Link(connection), secrets.token_hex(16)
        link.send(nonce=nonce)
        said = link.receive(_GREETING)
        with lock:
            objection = _objection(said, nonce, me, links)
            if not objection:
                link.process_id, link.host = said["process_id"], str(said.get("host"))[:99]
                links[link.process_id] = link
                return
        logger.warning("a connection from %s was closed: %s", caller, objection)
        link.send(refused=objection)
        link.close()

    try:
        listener = _bound(address, me.address[1], socket.SO_REUSEADDR)
        listener.listen(me.num_processes)
    except OSError as error:
        raise DistributedError(
            f"process 0 cannot listen on port {me.address[1]} of {me.address[0]} "
            f"({error.strerror}): is another run using it? Give another port in --coordinator"
        ) from error
    with listener:
        listener.settimeout(0.1)  # how late it may notice that the last has come
        while missing := set(range(1, me.num_processes)) - links.keys():
            with contextlib.suppress(OSError):  # nobody called, or one who has gone again
                connection, caller = listener.accept()
                connection.settimeout(_GREETING)
                threading.Thread(target=greet, args=(connection, caller[0]), daemon=True).start()
            if time.monotonic() > deadline:
                reason = (
                    f"{len(missing)} of {me.num_processes} processes did not come within "
                    f"{timeout:g} s: {_listed(missing)}. Start each with --coordinator="
                    f"{me.coordinator_address} --num_processes={me.num_processes} and its own "
                    "--process_id, and look at their output"
                )
                for link in list(links.values()):
                    link.send(refused=reason)
                    link.close()
                raise DistributedError(reason)
    return list(links.values())


def _objection(said: dict[str, Any], nonce: str, me: Process, links: dict[int, Link]) -> str:
    """Why whoever has said this is not let in, or ""."""
    index, count = said.get("process_id"), said.get("num_processes")
    if type(index) is not int or type(count) is not int:
        return "this is process 0 of a run of vapi_jax, and that was no process of one"
    if not hmac.compare_digest(str(said.get("proof")).encode(), _proof(nonce, index).encode()):
        return f"the {SECRET} of process {index} is not the one of process 0"
    if count != me.num_processes or not 0 < index < count:
        return (
            f"process {index} takes part in a run of {count} processes, process 0 in one of "
            f"{me.num_processes}: give all of them the same --num_processes"
        )
    if index in links:
        return (
            f"process {index} has come already, from {links[index].host}: give each process its own "
            "--process_id, and each run its own port in --coordinator"
        )
    return ""


def _listed(numbers: set[int]) -> str:
    shown = ", ".join(map(str, sorted(numbers)[:10]))
    return shown + (f" and {len(numbers) - 10} more" if len(numbers) > 10 else "")


# --- the others -----------------------------------------------------------------------------------


def _call(me: Process, timeout: float) -> tuple[Link, int]:
    """Another process: its link to process 0, and the port of JAX's service."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection = socket.create_connection(me.address, timeout=_GREETING)
            break
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() + _RETRY > deadline:
            raise DistributedError(
                f"process {me.process_id} could not reach process 0 at {me.coordinator_address} "
                f"within {timeout:g} s ({reason}). Is process 0 started with the same --coordinator, "
                "and may its port be reached from here?"
            )
        time.sleep(_RETRY)
    link = Link(connection, 0, me.address[0])
    link.send(
        process_id=me.process_id,
        num_processes=me.num_processes,
        host=socket.gethostname(),
        proof=_proof(str(link.receive(_GREETING).get("nonce")), me.process_id),
    )
    # Process 0 may have begun to wait later than this one.
    message = link.receive(timeout + _GREETING)
    if "port" in message:
        return link, int(message["port"])
    said = message.get("refused", "what answers there is no run of vapi_jax, or has ended")
    raise DistributedError(f"process 0 at {me.coordinator_address} does not take part: {said}")
