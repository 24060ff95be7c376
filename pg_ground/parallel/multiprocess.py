"""A run of several processes: how they find one another, speak with one voice, and end together.

For one process nothing here connects, sends or waits: every function is the identity.
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

from pg_ground.types import UserError

BY_HAND = re.compile(r"(?P<address>(?P<host>.+):\d+),(?P<index>\d+)/(?P<count>[1-9]\d*)")

START_S = 300
"""Seconds in which all processes must have come: machines of one pod start minutes apart."""

HEARTBEAT_S = 20
"""Seconds after which a machine that no longer answers is given up. What says nothing so long is not merely busy: the beats come
from a thread of their own."""

GRACE_S = 2.0
"""Seconds that process 0 waits once another has ended: where all found the same mistake, each says so itself."""

LINGER_S = 5.0
"""Seconds that process 0 waits for the others to end. With it goes the service that they need."""

CONNECT_S = 5.0

LOST = 3
"""Exit code where another process ended: neither a mistake of this one's input (2) nor of its program (1)."""

WORDS_OF_LOSS = (
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "ABORTED",
    "CANCELLED",
    "Gloo",
    "NCCL",
    "coordination service",
)
"""What errors of jax say that come from another process."""


def join(where: str) -> str:
    """Makes this one of the processes that `where` tells of; returns the host of process 0, "" where that is not told.

    `where` is "" for a run of one process, "auto" for what the cluster says (TPU pods, GKE, Slurm, MPI), or, by hand,
    HOST:PORT,INDEX/COUNT. Only before jax is first asked for a device.

    Raises:
      UserError: anything else, or no cluster. Where not all come in `START_S`, the process ends so, with exit code 2.
    """
    if not where:
        return ""
    given = BY_HAND.fullmatch(where)
    if where != "auto" and (not given or int(given["index"]) >= int(given["count"])):
        raise UserError(
            f"--distributed={where}: it must be auto, or HOST:PORT,INDEX/COUNT with INDEX from 0 to COUNT - 1"
        )
    by_hand: dict[str, Any] = {}
    if given:
        by_hand = {
            "coordinator_address": given["address"],
            "num_processes": int(given["count"]),
            "process_id": int(given["index"]),
            "cluster_detection_method": "deactivate",
        }
    alone = threading.Timer(START_S, _end_alone, [where])
    alone.daemon = True
    alone.start()
    try:
        jax.distributed.initialize(
            **by_hand,
            initialization_timeout=2
            * START_S,  # not reached: what jax does then is to abort, with pages of C++
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=HEARTBEAT_S,
        )
    except (ValueError, RuntimeError) as error:  # jax's words for no cluster, and for nobody there
        raise UserError(f"--distributed={where}: {str(error).splitlines()[0]}") from None
    finally:
        alone.cancel()
    return given["host"] if given else ""


def _end_alone(where: str) -> None:
    print(
        f"error: --distributed={where}: not all of the processes came within {START_S} s",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)  # the main thread waits in what no exception reaches


def is_writer() -> bool:
    """Returns whether this process writes what is written once: process 0 does."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, once."""
    if is_writer():
        print(text, flush=True)


def gather(value: Any) -> list[Any]:
    """Returns what each process gave, by its index. Values are JSON; all call it at the same point of their program."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = _stacked(np.array([len(data)], np.int32))[:, 0]
    padded = np.zeros(
        1 << int(sizes.max() - 1).bit_length(), np.uint8
    )  # powers of two: few programs for many lengths
    padded[: len(data)] = data
    return [
        json.loads(row[:size].tobytes()) for row, size in zip(_stacked(padded), sizes, strict=True)
    ]


def _stacked(mine: np.ndarray) -> np.ndarray:
    """Returns the arrays of all processes, of one shape, stacked; by one device of each, as they may have different numbers."""
    first = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([first[index] for index in sorted(first)]), ("processes",))
    place = NamedSharding(mesh, PartitionSpec("processes"))
    shard = jax.device_put(mine[None], first[jax.process_index()])
    whole = jax.make_array_from_single_device_arrays((len(first), *mine.shape), place, [shard])
    return multihost_utils.process_allgather(whole, tiled=True)


def barrier(name: str) -> None:
    """Returns when all processes have come here."""
    found = gather(name)
    assert len(set(found)) == 1, f"processes are at different points of the program: {found}"


def summed(counts: Mapping[str, float]) -> dict[str, float]:
    """Returns the sums over all processes, by name."""
    found = gather(dict(counts)) if counts else [{}]
    return {name: sum(one[name] for one in found) for name in counts}


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested dicts by dotted name."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= (
            leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return found


def agree(settings: Mapping[str, Any]) -> None:
    """Raises UserError, in every process, if values by dotted name are not the same in all of them.

    Raises:
      UserError: also if jax finds several processes that have not joined.
    """
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"jax finds {jax.process_count()} processes: --distributed=auto is needed, in each of them"
        )
    first, *others = gather(settings)
    for index, other in enumerate(others, 1):
        differing = [
            f"{name} is {first.get(name, 'absent')!r} in process 0 and {other.get(name, 'absent')!r} in process {index}"
            for name in sorted(first.keys() | other.keys())
            if first.get(name, ()) != other.get(name, ())
        ]
        if differing:
            raise UserError(
                f"{'; '.join(differing[:3])}: all processes of a run need the same settings"
            )


def is_loss(error: BaseException) -> bool:
    """Returns whether an error of jax tells that another process ended."""
    return isinstance(error, jax.errors.JaxRuntimeError) and any(
        word in str(error) for word in WORDS_OF_LOSS
    )


def loss_line(what: str) -> str:
    """Returns what a process says that ends because another did."""
    what = " ".join(what.split())[:300]
    return (
        f"error: another process of this run ended: {what}; start all of them again with the same command, and the run goes on "
        f"from its newest checkpoint"
    )


class Group:
    """The processes of a run, from joining to leaving. Where one ends, so do the others, at once and with a word.

    Each holds a connection to process 0, which tells the others: an operating system closes those of a dead process. jax's own
    heartbeats take longer, and end a process with pages of C++; they remain, for a machine that vanishes.
    """

    def __init__(self, where: str):
        """Joins, as `join` does.

        Raises:
          UserError: as `join`.
        """
        self._host = join(where)
        self.joined = bool(where)
        """Whether there may be others."""
        self._leaving = threading.Event()
        self._peers: list[socket.socket] = []
        self._followers: list[threading.Thread] = []

    def open(self, settings: Mapping[str, Any]) -> None:
        """Sees that all processes have the same settings, and holds them together from here on. jax may be used before.

        Raises:
          UserError: as `agree`.
        """
        if jax.process_count() > 1 and jax.distributed.is_initialized():
            self._connect()
        agree(settings)

    def _connect(self) -> None:
        token = secrets.token_hex(16)
        with socket.create_server(("", 0), backlog=jax.process_count()) as server:
            host, port, token = gather(
                [self._host or _own_address(), server.getsockname()[1], token]
            )[0]
            connected = False
            if not is_writer():
                with contextlib.suppress(OSError):  # no way there: what is left are the heartbeats
                    peer = socket.create_connection((host, port), timeout=CONNECT_S)
                    peer.settimeout(None)
                    peer.sendall(f"{token}{jax.process_index():08d}".encode())
                    self._follow(peer, self._end_now)
                    connected = True
            server.settimeout(CONNECT_S)
            expected = sum(gather(connected))
            for _ in range(expected if is_writer() else 0):
                peer, _ = server.accept()
                said = peer.recv(len(token) + 8, socket.MSG_WAITALL).decode(errors="replace")
                if said[: len(token)] == token:
                    self._follow(peer, partial(self._end_with, int(said[len(token) :])))

    def _follow(self, peer: socket.socket, at_end: Callable[[str], None]) -> None:
        def wait() -> None:
            said = b""
            with contextlib.suppress(OSError):
                while part := peer.recv(1024):
                    said += part
            if not self._leaving.is_set():
                at_end(said.decode(errors="replace"))

        self._peers.append(peer)
        self._followers.append(threading.Thread(target=wait, daemon=True))
        self._followers[-1].start()

    def _end_with(self, index: int, _: str) -> None:
        """Ends process 0, and all that follow it, because process `index` ended."""
        time.sleep(GRACE_S)
        if self._leaving.is_set():
            return
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.sendall(f"process {index}".encode())
        self._end_now(f"process {index}")

    def _end_now(self, who: str) -> None:
        print(loss_line(who or "process 0"), file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(LOST)  # the main thread may be waiting for ever, in what no exception reaches

    def leave(self, code: int) -> NoReturn:
        """Ends this process: one that succeeded when all have, another at once."""
        if self.joined and code == 0:
            jax.distributed.shutdown()
        self._leaving.set()
        if self.joined and not self._followers:
            time.sleep(
                GRACE_S
            )  # who is process 0 is not known before the devices are, and the others may have to say the same
        elif self.joined and is_writer():
            deadline = time.monotonic() + LINGER_S
            for follower in self._followers:
                follower.join(max(0.0, deadline - time.monotonic()))
        if code == 0 or not self.joined:
            sys.exit(code)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # an exit by Python waits for threads and services that wait for the others


def _own_address() -> str:
    """Returns the address that other machines reach this one by; nothing is sent to find it out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(
                ("192.0.2.1", 9)
            )  # an address that is nobody's (RFC 5737): what counts is the way there
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()
