"""Images by url, fetched once into a folder that is addressed by content.

`CACHE/blobs/ab/<sha256>` holds contents. `CACHE/urls/<sha256 of the url>.json` says what a url held, or why it never will
hold an image: a final failure is remembered, so that a resumed run skips the same records. Any number of threads and
processes may share a folder: files appear whole, and a content that is not what its name says counts as missing.

A url comes from a data set, and so from a stranger. It is asked only if every address that its name resolves to is public,
again after each redirect; the connection goes to the address that was checked, and the name is not resolved a second time.
"""

import contextlib
import functools
import hashlib
import ipaddress
import json
import os
import random
import re
import socket
import ssl
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import urljoin

from urllib3 import HTTPResponse
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, LocationParseError
from urllib3.util import Url, parse_url

from pg_ground.config import Fetch
from pg_ground.data.records import BadRecord
from pg_ground.types import UserError, expand_path

MAX_REDIRECTS = 5

REDIRECTS = (301, 302, 303, 307, 308)

TRY_AGAIN = (408, 425, 429)
"""Statuses below 500 that say nothing final."""

HEADERS = {"User-Agent": "pg_ground", "Accept": "image/*, */*;q=0.5"}

CHUNK_BYTES = 2**16

NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""Stands for an IPv4 address, in its last 32 bits, where a network has IPv6 only (RFC 6052)."""


class _Unreachable(Exception):
    """What another try may mend: no connection, no whole answer in time, a server that is busy or broken."""


def is_url(value: object) -> TypeGuard[str]:
    """Returns whether an image is named by a url, of whatever scheme, rather than by a file name."""
    return isinstance(value, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value) is not None


def cached(url: str, sha256: str | None, fetch: Fetch, retry_failed: bool = False) -> bytes:
    """Returns what `url` holds: from the cache, or fetched now and kept.

    Args:
      sha256: what the content is known to have, in hexadecimal; None takes what comes.
      retry_failed: ask again for what failed finally before.

    Raises:
      BadRecord: refused_url, wrong_sha256, too_large, fetch_failed or not_fetched (it is missing, and `fetch` is offline).
      UserError: `fetch` names no folder.
    """
    content = _kept(url, sha256, fetch, retry_failed)
    return _fetched(url, sha256, fetch) if content is None else content


def prefetch(
    urls: Iterable[tuple[str, str | None]],
    fetch: Fetch,
    progress: Callable[[str], object],
    retry_failed: bool = False,
) -> Counter[str]:
    """Returns how many urls came out how: "fetched" now, "cached" before, or the kind of a `BadRecord`.

    A url that fails stops no other. What is cached is not asked for again, so that a call goes on where the last ended.

    Args:
      urls: each with the sha256 of its content, if known. They are read as they are worked through.
      progress: called with each outcome, from the calling thread.
      retry_failed: ask again for what failed finally before.

    Raises:
      UserError: `fetch` names no folder.
    """
    outcomes: Counter[str] = Counter()
    for outcome in _outcomes(urls, fetch, retry_failed):
        outcomes[outcome] += 1
        progress(outcome)
    return outcomes


def is_public(address: str) -> bool:
    """Returns whether an IP address is one of the open internet: no machine's own, no private network's, no group's."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = (
            ip.ipv4_mapped
            or ip.sixtofour
            or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else None)
        )
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def _outcomes(
    urls: Iterable[tuple[str, str | None]], fetch: Fetch, retry_failed: bool
) -> Iterator[str]:
    """Yields an outcome for every url, in the order in which they come."""
    running: dict[tuple[str, str | None], Future[str]] = {}
    times: Counter[tuple[str, str | None]] = (
        Counter()
    )  # records side by side often share an image: it is asked for once
    pool = ThreadPoolExecutor(fetch.concurrency)
    try:
        for pair in urls:
            times[pair] += 1
            if pair not in running:
                running[pair] = pool.submit(_outcome, *pair, fetch, retry_failed)
            if len(running) >= 2 * fetch.concurrency:
                yield from _settled(running, times)
        while running:
            yield from _settled(running, times)
    finally:
        pool.shutdown(cancel_futures=True)


def _settled(
    running: dict[tuple[str, str | None], Future[str]], times: Counter[tuple[str, str | None]]
) -> Iterator[str]:
    """Waits for one of `running` at least, removes what is done, and yields its outcomes."""
    wait(running.values(), return_when=FIRST_COMPLETED)
    for pair in [pair for pair, future in running.items() if future.done()]:
        outcome = running.pop(pair).result()
        yield outcome
        yield from ["cached" if outcome == "fetched" else outcome] * (times.pop(pair) - 1)


def _outcome(url: str, sha256: str | None, fetch: Fetch, retry_failed: bool) -> str:
    try:
        if _kept(url, sha256, fetch, retry_failed) is not None:
            return "cached"
        _fetched(url, sha256, fetch)
        return "fetched"
    except BadRecord as e:
        return e.kind


def _kept(url: str, sha256: str | None, fetch: Fetch, retry_failed: bool) -> bytes | None:
    """Returns the content from the cache, or None where the url is to be asked. Raises BadRecord as it is remembered."""
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise BadRecord(
            "wrong_sha256",
            f"{url!r:.200}: {sha256!r:.80} is no sha256, which has 64 hexadecimal digits",
        )
    known = _recall(url, fetch)
    digest = sha256.lower() if sha256 else known.get("sha256")
    content = _read_blob(digest, fetch) if digest else None
    if content is not None or retry_failed:
        return content
    if "kind" in known and fetch.max_bytes <= known.get("max_bytes", fetch.max_bytes):
        raise BadRecord(known["kind"], known["message"])
    if "sha256" in known and known["sha256"] != digest:
        raise _wrong_sha256(url, known["sha256"], digest)
    return None


def _fetched(url: str, sha256: str | None, fetch: Fetch) -> bytes:
    """Returns what `url` holds now, and keeps it; what fails finally is remembered. Raises BadRecord."""
    if fetch.offline:
        raise BadRecord(
            "not_fetched",
            f"{url!r:.200} is not in {fetch.cache_dir}, and nothing is fetched offline",
        )
    try:
        content = _download_patiently(url, fetch)
    except _Unreachable as e:
        raise BadRecord(
            "fetch_failed", f"{url!r:.200}: {e}, after {fetch.retries + 1} tries"
        ) from e
    except BadRecord as e:
        limit = {"max_bytes": fetch.max_bytes} if e.kind == "too_large" else {}
        if e.kind != "refused_url":  # depends on a setting and on what names resolve to today
            _remember(url, fetch, {"kind": e.kind, "message": str(e), **limit})
        raise
    found = hashlib.sha256(content).hexdigest()
    right = sha256 is None or sha256.lower() == found
    if right:
        _write_whole(_blob_path(found, fetch), content)
    _remember(url, fetch, {"sha256": found})
    if not right:
        raise _wrong_sha256(url, found, sha256)
    return content


def _wrong_sha256(url: str, found: str, expected: str | None) -> BadRecord:
    return BadRecord(
        "wrong_sha256", f"{url!r:.200}: its content has sha256 {found}, not {expected}"
    )


def _folder(fetch: Fetch) -> Path:
    if not fetch.cache_dir:
        raise UserError(
            "config.data.fetch.cache_dir is '': images that are urls need a folder to be kept in"
        )
    return Path(expand_path(fetch.cache_dir))


def _blob_path(digest: str, fetch: Fetch) -> Path:
    return _folder(fetch) / "blobs" / digest[:2] / digest


def _memo_path(url: str, fetch: Fetch) -> Path:
    return _folder(fetch) / "urls" / f"{_address(url)}.json"


def _address(url: str) -> str:
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()


def _read_blob(digest: str, fetch: Fetch) -> bytes | None:
    """Returns the content, or None where it is missing or a broken disk or a lost machine left something else."""
    try:
        content = _blob_path(digest, fetch).read_bytes()
    except FileNotFoundError:
        return None
    return content if hashlib.sha256(content).hexdigest() == digest else None


def _recall(url: str, fetch: Fetch) -> dict[str, Any]:
    """Returns what is known of `url`: its "sha256", or "kind" and "message" of its failure, or nothing."""
    try:
        return json.loads(_memo_path(url, fetch).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def _remember(url: str, fetch: Fetch, what: dict[str, Any]) -> None:
    _write_whole(_memo_path(url, fetch), json.dumps({"url": url, **what}).encode())


def _write_whole(path: Path, content: bytes) -> None:
    """Puts `content` at `path` at once, whoever else does the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _download_patiently(url: str, fetch: Fetch) -> bytes:
    """Returns the content, trying again after a growing pause. Raises BadRecord, or _Unreachable after the last try."""
    rng = random.Random(_address(url))
    for attempt in range(fetch.retries):
        try:
            return _download(url, fetch)
        except _Unreachable:
            time.sleep(fetch.backoff_s * 2**attempt * rng.uniform(0.5, 1.5))
    return _download(url, fetch)


def _download(url: str, fetch: Fetch) -> bytes:
    """Returns what `url` holds, through redirects. Raises BadRecord for what is final, _Unreachable for what is not."""
    place = url
    for _ in range(MAX_REDIRECTS + 1):
        with _answer(place, fetch) as response:
            status = response.status
            if status == 200:
                return _body(response, url, fetch.max_bytes)
            if status in TRY_AGAIN or status >= 500:
                raise _Unreachable(f"HTTP status {status}")
            if status not in REDIRECTS or "location" not in response.headers:
                raise BadRecord("fetch_failed", f"{url!r:.200}: HTTP status {status}")
            place = _joined(place, response.headers["location"])
    raise BadRecord("fetch_failed", f"{url!r:.200}: more than {MAX_REDIRECTS} redirects")


def _joined(place: str, location: str) -> str:
    try:
        return urljoin(place, location)
    except ValueError as e:
        raise BadRecord(
            "refused_url", f"{place!r:.200} redirects to {location!r:.80}, which is no url"
        ) from e


def _body(response: HTTPResponse, url: str, max_bytes: int) -> bytes:
    content = bytearray()
    announced = response.length_remaining or 0
    if announced <= max_bytes:
        for chunk in response.stream(CHUNK_BYTES):
            content += chunk
            if len(content) > max_bytes:
                break
        else:
            return bytes(content)
    raise BadRecord(
        "too_large",
        f"{url!r:.200}: {announced or 'more'} bytes, but data.fetch.max_bytes is {max_bytes}",
    )


@contextlib.contextmanager
def _answer(url: str, fetch: Fetch) -> Iterator[HTTPResponse]:
    """Gives the answer to one request, body unread. Raises BadRecord (refused_url), or _Unreachable also out of its body."""
    parts = _parts(url)
    try:
        with (
            contextlib.closing(_connect(parts, fetch)) as connection,
            _ended_after(fetch.timeout_s, connection.sock),
        ):
            connection.request(
                "GET",
                parts.request_uri,
                headers={"Host": parts.netloc or "", **HEADERS},
                preload_content=False,
            )
            with connection.getresponse() as response:
                yield response
    except (OSError, HTTPError, HTTPException) as e:
        raise _Unreachable(f"{type(e).__name__}: {e}") from e


def _parts(url: str) -> Url:
    try:
        parts = parse_url(url)
    except LocationParseError as e:
        raise BadRecord("refused_url", f"{url!r:.200} is no url that can be read") from e
    if parts.scheme not in ("http", "https") or not parts.host:
        raise BadRecord(
            "refused_url", f"{url!r:.200}: only http and https urls with a host are fetched"
        )
    return parts


def _connect(parts: Url, fetch: Fetch) -> HTTPConnection:
    """Returns a connection to the first address that takes one. Raises BadRecord (refused_url), OSError or HTTPError."""
    host = (parts.host or "").strip("[]")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    failure: Exception = OSError(f"{host} has no address")
    for address in _addresses(host, port, fetch.allow_private):
        if parts.scheme == "https":
            connection = HTTPSConnection(
                address,
                port,
                timeout=fetch.timeout_s,
                server_hostname=host,
                ssl_context=_certificates(),
            )
        else:
            connection = HTTPConnection(address, port, timeout=fetch.timeout_s)
        try:
            connection.connect()
            return connection
        except (OSError, HTTPError) as e:
            connection.close()
            failure = e
    raise failure


def _addresses(host: str, port: int, allow_private: bool) -> list[str]:
    """Returns every IP address of `host`. Raises BadRecord (refused_url) if one is not public, OSError if there is none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except ValueError as e:  # a label that is too long, which Python finds before it asks
        raise BadRecord("refused_url", f"{host!r:.200} is no host name") from e
    addresses = list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))
    private = [address for address in addresses if not is_public(address)]
    if private and not allow_private:
        raise BadRecord(
            "refused_url",
            f"{host!r:.200} is at {private[0]}, which is not public: see data.fetch.allow_private",
        )
    return addresses


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Returns the certificates that this machine trusts; reading them takes longer than a connection."""
    return ssl.create_default_context()


@contextlib.contextmanager
def _ended_after(timeout_s: float, sock: socket.socket) -> Iterator[None]:
    """Ends what is read from `sock` after `timeout_s`: a byte now and then keeps within the timeouts of single reads.

    Raises:
      TimeoutError: it had to.
    """
    late = threading.Event()

    def end() -> None:
        late.set()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(
                sock, socket.SHUT_RDWR
            )  # an SSLSocket's own would go on in plain text

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        if late.is_set():
            raise TimeoutError(f"no whole answer within {timeout_s:g} s")
