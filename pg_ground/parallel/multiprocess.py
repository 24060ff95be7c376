"""Runs of several processes: joining, exchanging values, comparing settings, ending together.

In a run of one process nothing here connects, sends or waits.
"""

import contextlib
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pg_ground.types import JsonDict, JsonObject, UserError

EXPLICIT_ADDRESS = re.compile(r"(?P<address>(?P<host>.+):\d+),(?P<index>\d+)/(?P<count>[1-9]\d*)")
"""HOST:PORT of process 0, then this process's number and the number of processes."""

JOIN_TIMEOUT_S = 300
"""Seconds in which all processes must join: the machines of one pod start minutes apart."""

HEARTBEAT_TIMEOUT_S = 20
"""Seconds after which a silent machine counts as lost. A busy process is not silent: a separate
thread sends its heartbeats."""

EXIT_GRACE_S = 2.0
"""Seconds that process 0 waits after another process ended. If all processes hit the same mistake,
each can report it first."""

SHUTDOWN_WAIT_S = 5.0
"""Seconds that process 0 waits for the others to end. They need jax's coordination service, which
ends with process 0."""

CONNECT_TIMEOUT_S = 5.0

EXIT_PROCESS_LOST = 3
"""Exit code if another process ended. It is neither a mistake in this process's input (2) nor a
fault of its program (1)."""

LOST_PROCESS_WORDS = (
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "ABORTED",
    "CANCELLED",
    "Gloo",
    "NCCL",
    "coordination service",
)
"""Words in jax's errors that mean another process ended."""


def initialize(distributed: str) -> str:
    """Joins this process to a run of several processes. Call it before jax first uses a device.

    Args:
      distributed: "" for a run of one process; "auto" to ask the cluster (TPU pods, GKE, Slurm,
        MPI); or HOST:PORT,INDEX/COUNT.

    Returns:
      The host of process 0, or "" if `distributed` does not name it.

    Raises:
      UserError: another form of `distributed`, or no cluster is found. If some processes have not
        joined after `JOIN_TIMEOUT_S`, this process ends with one line and exit code 2.
    """
    if not distributed:
        return ""
    address = _parse_address(distributed)
    arguments: JsonDict = {}
    if address:
        arguments = {
            "coordinator_address": address["address"],
            "num_processes": int(address["count"]),
            "process_id": int(address["index"]),
            "cluster_detection_method": "deactivate",
        }
    timer = threading.Timer(JOIN_TIMEOUT_S, _end_after_timeout, [distributed])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **arguments,
            # Our timer fires first. At its own timeout jax aborts with pages of C++.
            initialization_timeout=2 * JOIN_TIMEOUT_S,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        )
    except (ValueError, RuntimeError) as error:  # no cluster, or no process 0
        reason = str(error).splitlines()[0]
        if not address and "coordinator_address" in reason:
            reason = "there is no TPU slice, Slurm or MPI here: leave it out on one machine"
        raise UserError(f"--distributed={distributed}: {reason}") from None
    finally:
        timer.cancel()
    return address["host"] if address else ""


def _parse_address(distributed: str) -> re.Match[str] | None:
    """Returns the parts of HOST:PORT,INDEX/COUNT, or None for "auto"."""
    match = EXPLICIT_ADDRESS.fullmatch(distributed)
    if distributed == "auto" or (match and int(match["index"]) < int(match["count"])):
        return match
    raise UserError(
        f"--distributed={distributed}: it must be auto, "
        f"or HOST:PORT,INDEX/COUNT with INDEX from 0 to COUNT - 1"
    )


def _end_after_timeout(distributed: str) -> None:
    print(
        f"error: --distributed={distributed}: "
        f"not all of the processes came within {JOIN_TIMEOUT_S} s",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)  # the main thread waits in C++ code, which no exception reaches


def is_main_process() -> bool:
    """Returns whether this process is process 0, which writes the files and lines of the run."""
    return jax.process_index() == 0


def print_once(text: str) -> None:
    """Prints a line in process 0 only."""
    if is_main_process():
        print(text, flush=True)


def all_gather(value: object) -> list[Any]:
    """Returns the values of all processes, by process index.

    All processes must call it at the same point.

    Args:
      value: anything that JSON represents.
    """
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = _all_gather_arrays(np.array([len(data)], np.int32))[:, 0]
    # Lengths are rounded up to powers of two: few programs are compiled for many lengths.
    padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)
    padded[: len(data)] = data
    rows = _all_gather_arrays(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def _all_gather_arrays(array: np.ndarray) -> np.ndarray:
    """Returns the arrays of all processes, stacked; they must have the same shape.

    One device of each process takes part, because processes may have different numbers of devices.
    """
    first_device = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([first_device[index] for index in sorted(first_device)]), ("processes",))
    shard = jax.device_put(array[None], first_device[jax.process_index()])
    stacked = jax.make_array_from_single_device_arrays(
        (len(first_device), *array.shape),
        NamedSharding(mesh, PartitionSpec("processes")),
        [shard],
    )
    return multihost_utils.process_allgather(stacked, tiled=True)


def barrier(name: str) -> None:
    """Waits until all processes have called `barrier` with the same name."""
    names = all_gather(name)
    assert len(set(names)) == 1, f"processes are at different points of the program: {names}"


def sum_over_processes(counts: Mapping[str, float]) -> dict[str, float]:
    """Returns the sum over all processes of each count, by name."""
    all_counts = all_gather(dict(counts)) if counts else []
    return {name: sum(process_counts[name] for process_counts in all_counts) for name in counts}


def flatten_settings(tree: JsonObject, prefix: str = "") -> JsonDict:
    """Returns the values of nested dicts by dotted name."""
    values: JsonDict = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            values |= flatten_settings(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values


def check_same_settings(settings: JsonObject) -> None:
    """Checks that all processes have the same settings.

    Args:
      settings: values by dotted name.

    Raises:
      UserError: settings differ (every process raises it), or jax has several processes that have
        not joined with `initialize`.
    """
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"jax finds {jax.process_count()} processes: "
            f"--distributed=auto is needed, in each of them"
        )
    first, *others = all_gather(settings)
    for index, other in enumerate(others, 1):
        differences = [
            f"{name} is {first.get(name, 'absent')!r} in process 0 "
            f"and {other.get(name, 'absent')!r} in process {index}"
            for name in sorted(first.keys() | other.keys())
            if first.get(name, ()) != other.get(name, ())
        ]
        if differences:
            raise UserError(
                f"{'; '.join(differences[:3])}: all processes of a run need the same settings"
            )


def is_lost_process(error: BaseException) -> bool:
    """Returns whether an error of jax means that another process ended."""
    return isinstance(error, jax.errors.JaxRuntimeError) and any(
        word in str(error) for word in LOST_PROCESS_WORDS
    )


def lost_process_line(reason: str) -> str:
    """Returns the error line of a process that ends because another process ended."""
    reason = " ".join(reason.split())[:300]
    return (
        f"error: another process of this run ended: {reason}; start all of them again with the "
        f"same command, and the run goes on from its newest checkpoint"
    )


class ProcessGroup:
    """The processes of a run, from joining to leaving.

    If one process ends, the others end at once with one line.

    Each process holds a connection to process 0. The operating system closes the connections of a
    dead process, and process 0 then tells the others. jax's own heartbeats are slower and end a
    process with pages of C++. They remain as a fallback for a machine that vanishes.
    """

    def __init__(self, distributed: str):
        """Joins the run, as `initialize` does.

        Raises:
          UserError: as `initialize` raises.
        """
        self._host = initialize(distributed)
        self.joined = bool(distributed)
        """Whether this run may have other processes."""
        self._leaving = threading.Event()
        self._connections: list[socket.socket] = []
        self._watchers: list[threading.Thread] = []

    def start(self, settings: JsonObject) -> None:
        """Connects the processes and checks that their settings are the same.

        jax may be used before this call.

        Raises:
          UserError: as `check_same_settings` raises.
        """
        if jax.process_count() > 1 and jax.distributed.is_initialized():
            self._connect()
        check_same_settings(settings)

    def _connect(self) -> None:
        """Opens one connection from every other process to process 0."""
        token = secrets.token_hex(16)
        with socket.create_server(("", 0), backlog=jax.process_count()) as server:
            address = [self._host or _own_address(), server.getsockname()[1], token]
            host, port, token = all_gather(address)[0]
            connected = False
            if not is_main_process():
                # If process 0 cannot be reached, jax's heartbeats are left.
                with contextlib.suppress(OSError):
                    connection = socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S)
                    connection.settimeout(None)
                    connection.sendall(f"{token}{jax.process_index():08d}".encode())
                    self._watch(connection, self._end_now)
                    connected = True
            expected = sum(all_gather(connected))
            if is_main_process():
                self._accept(server, expected, token)

    def _accept(self, server: socket.socket, expected: int, token: str) -> None:
        """Accepts `expected` connections. Each begins with the token and its process number."""
        server.settimeout(CONNECT_TIMEOUT_S)
        for _ in range(expected):
            connection, _ = server.accept()
            greeting = connection.recv(len(token) + 8, socket.MSG_WAITALL).decode(errors="replace")
            if greeting[: len(token)] == token:
                index = int(greeting[len(token) :])
                self._watch(connection, partial(self._end_all, index))

    def _watch(self, connection: socket.socket, on_close: Callable[[str], None]) -> None:
        """Calls `on_close` with the received text once the other side closes the connection."""

        def wait() -> None:
            received = b""
            with contextlib.suppress(OSError):
                while part := connection.recv(1024):
                    received += part
            if not self._leaving.is_set():
                on_close(received.decode(errors="replace"))

        self._connections.append(connection)
        watcher = threading.Thread(target=wait, daemon=True)
        self._watchers.append(watcher)
        watcher.start()

    def _end_all(self, index: int, _: str) -> None:
        """Ends process 0 and all other processes because process `index` ended."""
        time.sleep(EXIT_GRACE_S)
        if self._leaving.is_set():
            return
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.sendall(f"process {index}".encode())
        self._end_now(f"process {index}")

    def _end_now(self, ended_process: str) -> None:
        """Ends this process because another one ended. An empty name means process 0."""
        print(lost_process_line(ended_process or "process 0"), file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(EXIT_PROCESS_LOST)  # the main thread may wait in C++, which no exception reaches

    def exit(self, code: int) -> NoReturn:
        """Ends this process: after all other processes if `code` is 0, else at once."""
        if self.joined and code == 0:
            jax.distributed.shutdown()
        self._leaving.set()
        if self.joined and not self._watchers:
            # `start` has not run, so this process may be process 0 without knowing it. The other
            # processes may need the coordination service a little longer, to report the same error.
            time.sleep(EXIT_GRACE_S)
        elif self.joined and is_main_process():
            deadline = time.monotonic() + SHUTDOWN_WAIT_S
            for watcher in self._watchers:
                watcher.join(max(0.0, deadline - time.monotonic()))
        if code == 0 or not self.joined:
            sys.exit(code)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # `sys.exit` would wait for threads and services that wait for the others


def _own_address() -> str:
    """Returns the address by which other machines reach this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # A reserved address (RFC 5737). Connecting a UDP socket sends nothing; it only chooses
            # a route.
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()
