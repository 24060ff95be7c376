"""Images at urls. Each is fetched once into a folder in which the hash of a file is its name.

`CACHE/blobs/ab/<sha256>` holds contents. `CACHE/urls/<sha256 of the url>.json` says which content a
url had, or why it never gives an image. Such a final failure is remembered, so that a resumed run
skips the same records. Any number of threads and processes may share the folder: a file appears
whole or not at all, and a content that does not match its name counts as missing.

A url comes from a dataset, and so from a stranger. A host is asked only if every address of its
name is public, and the check is repeated after each redirect. The connection goes to the address
that was checked: the name is not resolved a second time.
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
from typing import TypeGuard
from urllib.parse import urljoin

from urllib3 import HTTPResponse
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, LocationParseError
from urllib3.util import Url, parse_url

from pg_ground.config import Fetch
from pg_ground.data.records import BadRecord, short
from pg_ground.storage.paths import PACKAGES, local_path
from pg_ground.types import JsonDict, UserError

MAX_REDIRECTS = 5

REDIRECT_STATUSES = (301, 302, 303, 307, 308)

RETRY_STATUSES = (408, 425, 429)
"""HTTP statuses below 500 after which another try may succeed."""

HEADERS = {"User-Agent": "pg_ground", "Accept": "image/*, */*;q=0.5"}

CHUNK_BYTES = 2**16

NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""Addresses of IPv4 hosts, in the last 32 bits, on networks that have IPv6 only (RFC 6052)."""

UrlAndHash = tuple[str, str | None]
"""A url and the sha256 of its content, or None if the hash is unknown."""


class _Unreachable(Exception):
    """A failure after which another try may succeed.

    There was no connection, no whole answer in time, or the server was busy or broken.
    """


def is_url(value: object) -> TypeGuard[str]:
    """Returns whether an image value is a url of any scheme that is not read as a file.

    gs://bucket/a.jpg is a file of a bucket.
    """
    if not isinstance(value, str) or value.partition("://")[0] in PACKAGES:
        return False
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value) is not None


def cached(url: str, sha256: str | None, fetch: Fetch, retry_failed: bool = False) -> bytes:
    """Returns the content of `url` from the cache. If it is not there, fetches and stores it.

    Args:
      url: address of the image.
      sha256: the hash that the content must have, in hexadecimal; None accepts any content.
      fetch: the settings.
      retry_failed: fetches again what failed finally before.

    Raises:
      BadRecord: refused_url, wrong_sha256, too_large, fetch_failed; or not_fetched, if the content
        is not in the cache and `fetch` is offline, or `fetch` names no folder.
    """
    fault = cache_fault(fetch)
    if fault:
        raise BadRecord("not_fetched", f"{fault}, so {short(url)} is not fetched")
    content = _from_cache(url, sha256, fetch, retry_failed)
    return _fetch_and_store(url, sha256, fetch) if content is None else content


def cache_fault(fetch: Fetch) -> str:
    """Returns why no image can be fetched, or "" if `cache_dir` is a folder of this machine."""
    try:
        _folder(fetch)
    except UserError as error:
        return str(error)
    return ""


def prefetch(
    urls: Iterable[UrlAndHash],
    fetch: Fetch,
    progress: Callable[[str], object],
    retry_failed: bool = False,
) -> Counter[str]:
    """Returns how many urls had each outcome: "fetched", "cached", or the kind of a `BadRecord`.

    A url that fails stops no other url. What is in the cache is not fetched again, so a new call
    continues where the last call ended.

    Args:
      urls: are read while the fetching goes on, so that the iterator may be long.
      fetch: the settings.
      progress: is called with each outcome, from the calling thread.
      retry_failed: fetches again what failed finally before.

    Raises:
      UserError: `fetch` names no folder.
    """
    outcomes: Counter[str] = Counter()
    for outcome in _outcomes(urls, fetch, retry_failed):
        outcomes[outcome] += 1
        progress(outcome)
    return outcomes


def is_public(address: str) -> bool:
    """Returns whether an IP address is on the open internet.

    Addresses of this machine, of private networks and of multicast groups are not.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour
        if embedded is None and ip in NAT64:
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded is not None:
            return is_public(str(embedded))
        if ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def _outcomes(urls: Iterable[UrlAndHash], fetch: Fetch, retry_failed: bool) -> Iterator[str]:
    """Yields an outcome for every url, as they finish."""
    running: dict[UrlAndHash, Future[str]] = {}
    # Neighbouring records often share an image. It is fetched once and counted for each of them.
    repeats: Counter[UrlAndHash] = Counter()
    pool = ThreadPoolExecutor(fetch.concurrency)
    try:
        for pair in urls:
            _folder(fetch)
            repeats[pair] += 1
            if pair not in running:
                running[pair] = pool.submit(_outcome, *pair, fetch, retry_failed)
            if len(running) >= 2 * fetch.concurrency:
                yield from _finished(running, repeats)
        while running:
            yield from _finished(running, repeats)
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(
    running: dict[UrlAndHash, Future[str]], repeats: Counter[UrlAndHash]
) -> Iterator[str]:
    """Waits for at least one of `running`, removes what is done, and yields its outcomes."""
    wait(running.values(), return_when=FIRST_COMPLETED)
    for pair in [pair for pair, future in running.items() if future.done()]:
        outcome = running.pop(pair).result()
        yield outcome
        repeated = "cached" if outcome == "fetched" else outcome
        for _ in range(repeats.pop(pair) - 1):
            yield repeated


def _outcome(url: str, sha256: str | None, fetch: Fetch, retry_failed: bool) -> str:
    try:
        if _from_cache(url, sha256, fetch, retry_failed) is not None:
            return "cached"
        _fetch_and_store(url, sha256, fetch)
        return "fetched"
    except BadRecord as bad:
        return bad.kind


def _from_cache(url: str, sha256: str | None, fetch: Fetch, retry_failed: bool) -> bytes | None:
    """Returns the content from the cache, or None if it has to be fetched.

    Raises:
      BadRecord: a remembered failure.
    """
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise BadRecord(
            "wrong_sha256",
            f"{url!r:.200}: {sha256!r:.80} is no sha256, which has 64 hexadecimal digits",
        )
    memo = _read_memo(url, fetch)
    digest = sha256.lower() if sha256 else memo.get("sha256")
    content = _read_blob(digest, fetch) if digest else None
    if content is not None or retry_failed:
        return content
    # A larger limit than at the time of the failure may let the content pass.
    if "kind" in memo and fetch.max_bytes <= memo.get("max_bytes", fetch.max_bytes):
        raise BadRecord(memo["kind"], memo["message"])
    if "sha256" in memo and memo["sha256"] != digest:
        raise _wrong_sha256(url, memo["sha256"], digest)
    return None


def _fetch_and_store(url: str, sha256: str | None, fetch: Fetch) -> bytes:
    """Returns the content of `url` and stores it. Remembers a final failure.

    Raises:
      BadRecord: the url gives no image.
    """
    if fetch.offline:
        raise BadRecord(
            "not_fetched",
            f"{url!r:.200} is not in {fetch.cache_dir}, and nothing is fetched offline",
        )
    try:
        content = _download_with_retries(url, fetch)
    except _Unreachable as error:
        raise BadRecord(
            "fetch_failed", f"{url!r:.200}: {error}, after {fetch.retries + 1} tries"
        ) from error
    except BadRecord as bad:
        limit = {"max_bytes": fetch.max_bytes} if bad.kind == "too_large" else {}
        # A refusal is not final: it depends on a setting and on today's addresses of the name.
        if bad.kind != "refused_url":
            _write_memo(url, fetch, {"kind": bad.kind, "message": str(bad), **limit})
        raise
    digest = hashlib.sha256(content).hexdigest()
    is_right = sha256 is None or sha256.lower() == digest
    if is_right:
        _write_atomically(_blob_path(digest, fetch), content)
    _write_memo(url, fetch, {"sha256": digest})
    if not is_right:
        raise _wrong_sha256(url, digest, sha256)
    return content


def _wrong_sha256(url: str, digest: str, expected: str | None) -> BadRecord:
    return BadRecord(
        "wrong_sha256", f"{url!r:.200}: its content has sha256 {digest}, not {expected}"
    )


def _folder(fetch: Fetch) -> Path:
    if not fetch.cache_dir:
        raise UserError(
            "config.data.fetch.cache_dir is '': it must name a folder for images at addresses"
        )
    folder = local_path(fetch.cache_dir, "config.data.fetch.cache_dir")
    if folder.is_file():
        raise UserError(
            f"config.data.fetch.cache_dir is {fetch.cache_dir}, a file: it must be a folder"
        )
    return folder


def _blob_path(digest: str, fetch: Fetch) -> Path:
    return _folder(fetch) / "blobs" / digest[:2] / digest


def _memo_path(url: str, fetch: Fetch) -> Path:
    return _folder(fetch) / "urls" / f"{_url_digest(url)}.json"


def _url_digest(url: str) -> str:
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()


def _read_blob(digest: str, fetch: Fetch) -> bytes | None:
    """Returns the content, or None if it is missing or damaged, for example by a full disk."""
    try:
        content = _blob_path(digest, fetch).read_bytes()
    except FileNotFoundError:
        return None
    return content if hashlib.sha256(content).hexdigest() == digest else None


def _read_memo(url: str, fetch: Fetch) -> JsonDict:
    """Returns the memo of `url`: its sha256, or kind and message of a failure, or {}."""
    try:
        return json.loads(_memo_path(url, fetch).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def _write_memo(url: str, fetch: Fetch, fields: JsonDict) -> None:
    _write_atomically(_memo_path(url, fetch), json.dumps({"url": url, **fields}).encode())


def _write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that appears whole, also if other processes write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _download_with_retries(url: str, fetch: Fetch) -> bytes:
    """Returns the content. Tries again after growing pauses.

    Raises:
      BadRecord: the failure is final.
      _Unreachable: the last try failed.
    """
    rng = random.Random(_url_digest(url))
    for attempt in range(fetch.retries):
        try:
            return _download(url, fetch)
        except _Unreachable:
            time.sleep(fetch.backoff_s * 2**attempt * rng.uniform(0.5, 1.5))
    return _download(url, fetch)


def _download(url: str, fetch: Fetch) -> bytes:
    """Returns the content of `url` and follows redirects.

    Raises:
      BadRecord: the failure is final.
      _Unreachable: another try may succeed.
    """
    location = url
    for _ in range(MAX_REDIRECTS + 1):
        with _get(location, fetch) as response:
            status = response.status
            if status == 200:
                return _read_body(response, url, fetch.max_bytes)
            if status in RETRY_STATUSES or status >= 500:
                raise _Unreachable(f"HTTP status {status}")
            if status not in REDIRECT_STATUSES or "location" not in response.headers:
                raise BadRecord("fetch_failed", f"{url!r:.200}: HTTP status {status}")
            location = _redirect_url(location, response.headers["location"])
    raise BadRecord("fetch_failed", f"{url!r:.200}: more than {MAX_REDIRECTS} redirects")


def _redirect_url(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise BadRecord(
            "refused_url", f"{url!r:.200} redirects to {location!r:.80}, which is no url"
        ) from error


def _read_body(response: HTTPResponse, url: str, max_bytes: int) -> bytes:
    """Returns the body. Raises BadRecord (too_large) without reading more than `max_bytes`."""
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
def _get(url: str, fetch: Fetch) -> Iterator[HTTPResponse]:
    """Yields the answer to one request, with its body unread.

    Raises:
      BadRecord: refused_url.
      _Unreachable: another try may succeed. A failure while the caller reads the body is included.
    """
    parts = _parse(url)
    try:
        with (
            contextlib.closing(_connect(parts, fetch)) as connection,
            _deadline(fetch.timeout_s, connection.sock),
        ):
            connection.request(
                "GET",
                parts.request_uri,
                headers={"Host": parts.netloc or "", **HEADERS},
                preload_content=False,
            )
            with connection.getresponse() as response:
                yield response
    except (OSError, HTTPError, HTTPException) as error:
        raise _Unreachable(f"{type(error).__name__}: {error}") from error


def _parse(url: str) -> Url:
    try:
        parts = parse_url(url)
    except LocationParseError as error:
        raise BadRecord("refused_url", f"{url!r:.200} does not parse as a url") from error
    if parts.scheme not in ("http", "https") or not parts.host:
        raise BadRecord(
            "refused_url", f"{url!r:.200}: only http and https urls with a host are fetched"
        )
    return parts


def _connect(parts: Url, fetch: Fetch) -> HTTPConnection:
    """Returns a connection to the first address of the host that accepts one.

    Raises:
      BadRecord: refused_url.
      OSError, HTTPError: no address accepts a connection.
    """
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
        except (OSError, HTTPError) as error:
            connection.close()
            failure = error
    raise failure


def _addresses(host: str, port: int, allow_private: bool) -> list[str]:
    """Returns every IP address of `host`.

    Raises:
      BadRecord: refused_url, if an address is not public.
      OSError: the name has no address.
    """
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except ValueError as error:  # Python itself rejects a label that is too long
        raise BadRecord("refused_url", f"{host!r:.200} is no host name") from error
    addresses = list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in infos))
    private = [address for address in addresses if not is_public(address)]
    if private and not allow_private:
        raise BadRecord(
            "refused_url",
            f"{host!r:.200} is at {private[0]}, which is not public: see data.fetch.allow_private",
        )
    return addresses


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Returns the certificates that this machine trusts. Reading them is slower than connecting."""
    return ssl.create_default_context()


@contextlib.contextmanager
def _deadline(timeout_s: float, sock: socket.socket) -> Iterator[None]:
    """Shuts `sock` down after `timeout_s`.

    The timeout of single reads is not enough: a server that sends a byte now and then never
    exceeds it.

    Raises:
      TimeoutError: the socket was shut down.
    """
    is_late = threading.Event()

    def shut_down() -> None:
        is_late.set()
        with contextlib.suppress(OSError):
            # Not SSLSocket.shutdown: it would go on in plain text.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    timer = threading.Timer(timeout_s, shut_down)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        if is_late.is_set():
            raise TimeoutError(f"no whole answer within {timeout_s:g} s")
