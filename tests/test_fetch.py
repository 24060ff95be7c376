"""Fetching, from a server on this machine. Most tests allow private addresses for that."""

import contextlib
import gzip
import hashlib
import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from absl import flags

from pg_ground import cli, prefetch
from pg_ground.config import Config, Data, Eval, Grpo, Sft, Source
from pg_ground.data import fetch as fetching
from pg_ground.data import prefetching
from pg_ground.data.fetch import Fetch, cached, is_public, is_url
from pg_ground.data.records import BadRecord
from pg_ground.types import UserError

IMAGE = bytes(range(256)) * 300  # some chunks
DIGEST = hashlib.sha256(IMAGE).hexdigest()
OTHER = "0" * 64


NO_WEB_ADDRESSES = (
    "ftp://127.0.0.1/a",
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "data:,a",
    "http:///a",
    "http://",
    "//host/a",
    "a.jpg",
    "",
    "http://[::1",
    "http://a b/",
    "http://a:99999/",
    f"http://{'a' * 80}.test/",
    "http://a..test/",
    "http://\x00/",
    "http://\ud800/",
)

PRIVATE_HOSTS = (
    "127.0.0.1",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:a9fe:a9fe]",
    "169.254.169.254",
    "10.0.0.1",
    "user:password@192.168.0.1",
    "localhost",
    "[fe80::1]",
    "[fd00::1]",
    "224.0.0.1",
)


class Answers(BaseHTTPRequestHandler):
    """Calls the route's function with the handler and the number of the request for the path."""

    server: "Server"

    def do_GET(self):
        with self.server.lock:
            self.server.asked[self.path] += 1
            count = self.server.asked[self.path]
        self.server.hosts.append(self.headers["Host"])
        with contextlib.suppress(ConnectionError):  # the client hung up
            self.server.routes.get(self.path, status(404))(self, count)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = False  # so that they are joined: no thread outlives its test

    def __init__(self, host: str):
        super().__init__((host, 0), Answers)
        self.routes: dict[str, Callable[[Answers, int], None]] = {"/image": send(IMAGE)}
        self.asked: Counter[str] = Counter()
        self.hosts: list[str] = []
        self.lock = threading.Lock()
        self.scheme = "http"

    def url(self, path: str = "/image", host: str = "") -> str:
        return f"{self.scheme}://{host or self.server_address[0]}:{self.server_address[1]}{path}"

    def handle_error(self, request, client_address):
        """Prints nothing: in some tests the client hangs up on purpose."""


@contextlib.contextmanager
def serving(host: str = "127.0.0.1", certificate: Path | None = None) -> Iterator[Server]:
    server = Server(host)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.scheme = "https"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def fetch(tmp_path) -> Fetch:
    return Fetch(
        str(tmp_path / "cache"), concurrency=4, backoff_s=0.0, timeout_s=20.0, allow_private=True
    )


def send(content: bytes, **headers: str) -> Callable[[Answers, int], None]:
    def answer(handler: Answers, _: int) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def status(code: int, location: str = "") -> Callable[[Answers, int], None]:
    def answer(handler: Answers, _: int) -> None:
        handler.send_response(code)
        if location:
            handler.send_header("Location", location)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def in_turn(*answers: Callable[[Answers, int], None]) -> Callable[[Answers, int], None]:
    """Returns a route that gives each answer once, and then repeats the last answer."""
    return lambda handler, count: answers[min(count, len(answers)) - 1](handler, count)


def kind_and_text(url: str, fetch: Fetch, sha256: str | None = None, **more) -> tuple[str, str]:
    with pytest.raises(BadRecord) as bad:
        cached(url, sha256, fetch, **more)
    return bad.value.kind, str(bad.value)


def kind_of(url: str, fetch: Fetch, sha256: str | None = None, **more) -> str:
    return kind_and_text(url, fetch, sha256, **more)[0]


def blobs(fetch: Fetch) -> list[str]:
    return sorted(path.name for path in Path(fetch.cache_dir).glob("blobs/*/*"))


def resolving(monkeypatch, names: dict[str, list[list[str]]]) -> None:
    """Makes each name resolve to its lists of addresses in turn, and then to the last list."""
    real = socket.getaddrinfo
    asked: Counter[str] = Counter()

    def resolve(host, port, *args, **kwargs):
        if host not in names:
            return real(host, port, *args, **kwargs)
        answers = names[host][min(asked[host], len(names[host]) - 1)]
        asked[host] += 1
        return [
            addresses for address in answers for addresses in real(address, port, *args, **kwargs)
        ]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


def test_an_image_is_fetched_once_and_kept_by_its_content(server, fetch):
    for sha256 in (None, DIGEST, DIGEST.upper(), None):
        assert cached(server.url(), sha256, fetch) == IMAGE
    assert server.asked == {"/image": 1}
    assert blobs(fetch) == [DIGEST]
    assert (Path(fetch.cache_dir) / "blobs" / DIGEST[:2] / DIGEST).read_bytes() == IMAGE
    (memo,) = Path(fetch.cache_dir).glob("urls/*")
    assert memo.stem == hashlib.sha256(server.url().encode()).hexdigest()
    assert json.loads(memo.read_text()) == {"url": server.url(), "sha256": DIGEST}


def test_a_known_content_is_not_asked_for_under_another_url(server, fetch):
    cached(server.url(), None, fetch)
    assert cached(server.url("/mirror"), DIGEST, fetch) == IMAGE
    assert server.asked == {"/image": 1}


def test_a_content_that_is_not_what_its_name_says_is_fetched_again(server, fetch):
    cached(server.url(), None, fetch)
    blob = Path(fetch.cache_dir) / "blobs" / DIGEST[:2] / DIGEST
    blob.write_bytes(IMAGE[:100])
    assert kind_of(server.url(), replace(fetch, offline=True)) == "not_fetched"
    assert cached(server.url(), None, fetch) == IMAGE == blob.read_bytes()


def test_a_broken_memo_counts_as_missing(server, fetch):
    cached(server.url(), None, fetch)
    (memo,) = Path(fetch.cache_dir).glob("urls/*")
    memo.write_bytes(b"")
    assert cached(server.url(), None, fetch) == IMAGE
    assert server.asked["/image"] == 2


def test_a_wrong_hash_keeps_nothing_and_is_remembered(server, fetch):
    first = kind_and_text(server.url(), fetch, OTHER)
    assert first == kind_and_text(server.url(), fetch, OTHER) == ("wrong_sha256", first[1])
    assert DIGEST in first[1] and OTHER in first[1]
    assert blobs(fetch) == [] and server.asked["/image"] == 1
    assert cached(server.url(), DIGEST, fetch) == IMAGE
    assert kind_and_text(server.url(), fetch, OTHER) == first
    assert server.asked["/image"] == 2


@pytest.mark.parametrize("sha256", ["", "12", "../../../x", "g" * 64, DIGEST + "\n"])
def test_a_text_that_is_no_hash_is_wrong(server, fetch, sha256):
    assert kind_of(server.url(), fetch, sha256) == "wrong_sha256"
    assert not server.asked


@pytest.mark.parametrize("code", [304, 400, 403, 404, 410])
def test_a_final_status_is_remembered_until_a_retry(server, fetch, code):
    server.routes["/gone"] = in_turn(status(code), send(IMAGE))
    first = kind_and_text(server.url("/gone"), fetch)
    assert first[0] == "fetch_failed" and str(code) in first[1] and server.url("/gone") in first[1]
    assert kind_and_text(server.url("/gone"), replace(fetch, offline=True)) == first
    assert kind_and_text(server.url("/gone"), fetch) == first and server.asked["/gone"] == 1
    assert cached(server.url("/gone"), None, fetch, retry_failed=True) == IMAGE
    assert cached(server.url("/gone"), None, fetch) == IMAGE and server.asked["/gone"] == 2


@pytest.mark.parametrize("code", [408, 429, 500, 503])
def test_a_temporary_failure_is_tried_again(server, fetch, code):
    server.routes["/busy"] = in_turn(status(code), status(code), send(IMAGE))
    assert cached(server.url("/busy"), None, fetch) == IMAGE
    assert server.asked["/busy"] == 3


def test_a_failure_that_lasts_ends_the_tries_and_is_not_remembered(server, fetch):
    server.routes["/busy"] = status(503)
    for times in (1, 2):
        kind, text = kind_and_text(server.url("/busy"), fetch)
        assert kind == "fetch_failed" and "503" in text and "4 tries" in text
        assert server.asked["/busy"] == 4 * times


def test_pauses_double_within_a_half_and_are_the_same_every_time(server, fetch, monkeypatch):
    server.routes["/busy"] = status(503)
    pauses: list[float] = []
    monkeypatch.setattr(fetching.time, "sleep", pauses.append)
    for _ in range(2):
        kind_of(server.url("/busy"), replace(fetch, backoff_s=1.0))
    assert pauses[:3] == pauses[3:]
    assert all(0.5 <= pause / 2**i <= 1.5 for i, pause in enumerate(pauses[:3]))
    assert len({pause / 2**i for i, pause in enumerate(pauses[:3])}) == 3


def test_no_connection_and_no_such_name_are_temporary_failures(fetch, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    assert "refused" in kind_and_text(f"http://127.0.0.1:{port}/", fetch)[1]

    def resolve(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    kind, text = kind_and_text("http://nowhere.test/a", fetch)
    assert kind == "fetch_failed" and "not known" in text
    assert not (Path(fetch.cache_dir) / "urls").exists()


def test_a_body_that_is_cut_off_is_tried_again(server, fetch):
    def cut(handler: Answers, _: int) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(IMAGE)))
        handler.end_headers()
        handler.wfile.write(IMAGE[:1000])

    server.routes["/cut"] = in_turn(cut, send(IMAGE))
    assert cached(server.url("/cut"), None, fetch) == IMAGE
    assert server.asked["/cut"] == 2


@pytest.mark.parametrize("part", ["status", "header", "body", "nothing"])
def test_a_slow_server_is_given_up(server, fetch, part):
    """A byte now and then never exceeds the timeout of a read, so the answer has a deadline."""
    left = threading.Event()

    def answer_slowly(handler: Answers, _: int) -> None:
        start = {
            "status": b"",
            "header": b"HTTP/1.0 200 OK\r\nX: ",
            "body": b"HTTP/1.0 200 OK\r\n\r\n",
            "nothing": b"",
        }[part]
        handler.wfile.write(start)
        try:
            while not left.wait(0.02):
                if part != "nothing":
                    handler.wfile.write(b"H")
        except OSError:
            return

    server.routes["/slow"] = answer_slowly
    try:
        kind, text = kind_and_text(server.url("/slow"), replace(fetch, timeout_s=0.2, retries=1))
    finally:
        left.set()
    assert kind == "fetch_failed" and ("0.2 s" in text or "timed out" in text) and "2 tries" in text
    assert blobs(fetch) == []


@pytest.mark.parametrize("start", [b"", b"\x16\x03\x03\x40\x00", b"\x16\x03\x03\x40\x00\x02"])
def test_a_slow_handshake_is_given_up(fetch, start):
    """A TLS record of 16 KB comes byte by byte. Python gives the whole handshake one deadline."""
    left = threading.Event()

    def answer_slowly(listener: socket.socket) -> None:
        client, _ = listener.accept()
        with client, contextlib.suppress(OSError):
            client.sendall(start)
            while not left.wait(0.02):
                if start:
                    client.sendall(b"\0")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer_slowly, args=(listener,))
        thread.start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/a"
        begin = time.monotonic()
        try:
            kind, text = kind_and_text(url, replace(fetch, timeout_s=0.3, retries=0))
        finally:
            seconds = time.monotonic() - begin
            left.set()
            thread.join()
    assert kind == "fetch_failed" and ("0.3 s" in text or "timed out" in text), text
    assert seconds < 10


def test_too_large_by_its_header_is_not_read(server, fetch):
    def announce(handler: Answers, _: int) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(10**12))
        handler.end_headers()
        handler.rfile.read()  # nothing: returns when the client hangs up

    server.routes["/big"] = announce
    kind, text = kind_and_text(server.url("/big"), fetch)
    assert kind == "too_large" and "1000000000000 bytes" in text
    assert kind_and_text(server.url("/big"), fetch) == (kind, text) and server.asked["/big"] == 1


@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_without_a_length_is_given_up_early(server, fetch, chunked):
    """The server never stops: the test ends because the client does."""

    def send_forever(handler: Answers, _: int) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        if chunked:
            handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        while True:
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(IMAGE), IMAGE) if chunked else IMAGE)

    server.routes["/endless"] = send_forever
    assert kind_of(server.url("/endless"), replace(fetch, max_bytes=200_000)) == "too_large"
    assert blobs(fetch) == []


def test_a_decompression_bomb_is_too_large(server, fetch):
    server.routes["/bomb"] = send(gzip.compress(bytes(10**7)), Content_Encoding="gzip")
    assert kind_of(server.url("/bomb"), replace(fetch, max_bytes=10**6)) == "too_large"


def test_an_encoded_body_is_decoded(server, fetch):
    server.routes["/gzip"] = send(gzip.compress(IMAGE), Content_Encoding="gzip")
    assert cached(server.url("/gzip"), DIGEST, fetch) == IMAGE


def test_the_largest_size_is_allowed_and_a_higher_limit_asks_again(server, fetch):
    small = replace(fetch, max_bytes=len(IMAGE) - 1)
    assert kind_of(server.url(), small) == "too_large"
    assert kind_of(server.url(), replace(small, max_bytes=100)) == "too_large"
    assert server.asked["/image"] == 1
    assert cached(server.url(), None, replace(fetch, max_bytes=len(IMAGE))) == IMAGE
    assert cached(server.url(), None, small) == IMAGE and server.asked["/image"] == 2


def test_offline_only_the_cache_is_asked(server, fetch):
    offline = replace(fetch, offline=True)
    assert kind_of(server.url(), offline) == "not_fetched" and not server.asked
    cached(server.url(), None, fetch)
    assert cached(server.url(), None, offline) == IMAGE and server.asked["/image"] == 1


@pytest.mark.parametrize("folder", ["", "gs://bucket/images", __file__])
def test_a_cache_needs_a_folder_of_this_machine(server, folder):
    fetch = Fetch(cache_dir=folder, allow_private=True)
    with pytest.raises(BadRecord, match="config.data.fetch.cache_dir") as bad:
        cached(server.url(), None, fetch)
    assert bad.value.kind == "not_fetched" and not server.asked
    with pytest.raises(UserError, match="cache_dir"):
        fetching.prefetch([(server.url(), None)], fetch, print)
    assert fetching.prefetch([], fetch, print) == {}


def test_redirects_are_followed_to_a_relative_url(server, fetch):
    server.routes |= {"/a/b": status(302, "../c"), "/c": status(308, server.url())}
    assert cached(server.url("/a/b"), None, fetch) == IMAGE
    assert cached(server.url("/a/b"), None, fetch) == IMAGE
    assert server.asked == {"/a/b": 1, "/c": 1, "/image": 1}


def test_five_redirects_are_followed_and_a_loop_is_given_up(server, fetch):
    server.routes |= {f"/{i}": status(301, f"/{i + 1}") for i in range(5)} | {
        "/5": send(IMAGE),
        "/loop": status(301, "/loop"),
    }
    assert cached(server.url("/0"), None, fetch) == IMAGE
    kind, text = kind_and_text(server.url("/loop"), fetch)
    assert kind == "fetch_failed" and "5 redirects" in text
    assert kind_of(server.url("/loop"), fetch) == kind and server.asked["/loop"] == 6


@pytest.mark.parametrize(
    "url",
    NO_WEB_ADDRESSES,
)
def test_a_value_that_is_no_web_address_is_refused(url, fetch):
    assert kind_of(url, fetch) == "refused_url"


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://127.0.0.1/", "http://[::1/", "gopher://127.0.0.1/"]
)
def test_a_redirect_to_another_scheme_is_refused(server, fetch, location):
    server.routes["/out"] = status(302, location)
    assert kind_of(server.url("/out"), fetch) == "refused_url"


@pytest.mark.parametrize(
    "host",
    PRIVATE_HOSTS,
)
def test_an_address_that_is_not_public_is_refused(host, fetch, monkeypatch):
    def connect(*_):
        raise AssertionError("a refused address was connected to")

    monkeypatch.setattr(fetching.HTTPConnection, "connect", connect)
    assert kind_of(f"http://{host}/a", replace(fetch, allow_private=False)) == "refused_url"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::8.8.8.8", True),
        ("2002:808:808::1", True),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("127.0.0.53", False),
        ("169.254.169.254", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("224.0.0.251", False),
        ("239.1.1.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::10.0.0.1", False),
        ("64:ff9b:1::1", False),
        ("2001:0:7f00:1::1", False),
        ("2001:db8::1", False),
        ("2002:7f00:1::1", False),
        ("fc00::1", False),
        ("fe80::1%eth0", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("ff0e::1", False),
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) is public


def test_a_redirect_to_this_machine_is_refused(fetch, monkeypatch):
    """Here 127.0.0.2 counts as public, like a server on the internet."""
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.2")
    guarded = replace(fetch, allow_private=False)
    with serving() as inside, serving("127.0.0.2") as outside:
        outside.routes["/in"] = status(302, inside.url())
        kind, text = kind_and_text(outside.url("/in"), guarded)
        assert kind == "refused_url" and "127.0.0.1" in text and "allow_private" in text
        assert outside.asked == {"/in": 1} and not inside.asked
        assert cached(outside.url(), None, guarded) == IMAGE
        assert cached(outside.url("/in"), None, fetch) == IMAGE


def test_one_private_address_of_a_name_is_enough_to_refuse_it(server, fetch, monkeypatch):
    resolving(monkeypatch, {"images.test": [["8.8.8.8", "127.0.0.1"]]})
    assert (
        kind_of(server.url(host="images.test"), replace(fetch, allow_private=False))
        == "refused_url"
    )
    assert not server.asked


def test_the_address_that_was_checked_is_the_one_that_is_asked(fetch, monkeypatch):
    """DNS rebinding: the name resolves to a public address (here 127.0.0.2), then to 127.0.0.1."""
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.2")
    resolving(monkeypatch, {"images.test": [["127.0.0.2"], ["127.0.0.1"]]})
    with serving("127.0.0.2") as outside:
        url = outside.url(host="images.test")
        assert cached(url, None, replace(fetch, allow_private=False)) == IMAGE
        assert outside.hosts == [f"images.test:{outside.server_address[1]}"]
        assert kind_of(url + "?", replace(fetch, allow_private=False)) == "refused_url"


def test_the_next_address_is_asked_where_the_first_takes_no_connection(server, fetch, monkeypatch):
    resolving(monkeypatch, {"images.test": [["127.0.0.3", "127.0.0.1"]]})
    assert cached(server.url(host="images.test"), None, replace(fetch, retries=0)) == IMAGE


def test_tls_checks_the_name_of_the_url_not_the_address(tmp_path, fetch, monkeypatch):
    if not shutil.which("openssl"):
        pytest.skip("makes its certificate with openssl")
    certificate = tmp_path / "images.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=images.test",
        "-addext",
        "subjectAltName=DNS:images.test",
        "-keyout",
        str(tmp_path / "key.pem"),
        "-out",
        str(tmp_path / "cert.pem"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    certificate.write_bytes(
        (tmp_path / "cert.pem").read_bytes() + (tmp_path / "key.pem").read_bytes()
    )
    resolving(monkeypatch, {"images.test": [["127.0.0.1"]], "other.test": [["127.0.0.1"]]})
    with serving(certificate=certificate) as server:
        kind, text = kind_and_text(server.url(host="images.test"), fetch)
        assert kind == "fetch_failed" and "certificate verify failed" in text
        trusting = ssl.create_default_context(cafile=str(certificate))
        monkeypatch.setattr(fetching, "_certificates", lambda: trusting)
        resolving(
            monkeypatch, {"images.test": [["127.0.0.1"], ["127.0.0.9"]]}
        )  # a second look-up would give another address
        assert cached(server.url(host="images.test"), None, replace(fetch, retries=0)) == IMAGE
        kind, text = kind_and_text(server.url(host="other.test"), fetch)
        assert kind == "fetch_failed" and "other.test" in text


def together(n: int) -> Callable[[Answers, int], None]:
    """Returns a route that answers when `n` requests have come."""
    barrier = threading.Barrier(n)

    def answer(handler: Answers, count: int) -> None:
        barrier.wait(200)
        send(IMAGE)(handler, count)

    return answer


def test_threads_at_once_end_with_one_content(server, fetch):
    server.routes["/image"] = together(4)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: cached(server.url(), DIGEST, fetch), range(4))) == {IMAGE}
    assert blobs(fetch) == [DIGEST] and len(list(Path(fetch.cache_dir).glob("urls/*"))) == 1
    assert cached(server.url(), None, fetch) == IMAGE and server.asked["/image"] == 4


def test_processes_at_once_end_with_one_content(server, fetch):
    server.routes["/image"] = together(2)
    program = "import sys; from pg_ground.data.fetch import Fetch, cached; "
    program += "fetch = Fetch(sys.argv[2], allow_private=True, timeout_s=200.0); "
    program += "sys.stdout.buffer.write(cached(sys.argv[1], None, fetch))"
    command = [sys.executable, "-c", program, server.url(), fetch.cache_dir]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    assert [run.communicate()[0] for run in runs] == [IMAGE, IMAGE]
    assert blobs(fetch) == [DIGEST] and server.asked["/image"] == 2
    assert cached(server.url(), None, fetch) == IMAGE and server.asked["/image"] == 2


def test_a_content_that_cannot_be_written_leaves_no_file(server, fetch, monkeypatch):
    def replace_file(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetching.os, "replace", replace_file)
    with pytest.raises(OSError, match="No space"):
        cached(server.url(), None, fetch)
    assert [path for path in Path(fetch.cache_dir).rglob("*") if path.is_file()] == []


def test_prefetch_counts_outcomes_and_no_failure_stops_the_others(server, fetch):
    server.routes |= {f"/{i}": send(b"%d" % i) for i in range(20)} | {"/busy": status(503)}
    urls = [(server.url(f"/{i}"), None) for i in range(20)]
    urls += [
        (server.url(), DIGEST),
        (server.url("/gone"), None),
        (server.url("/0"), OTHER),
        (server.url("/busy"), None),
    ]
    urls += [("ftp://a/b", None)]
    seen: list[str] = []
    outcomes = fetching.prefetch(urls, replace(fetch, concurrency=3), seen.append)
    assert (
        outcomes
        == {"fetched": 21, "fetch_failed": 2, "wrong_sha256": 1, "refused_url": 1}
        == Counter(seen)
    )
    assert len(blobs(fetch)) == 21


def test_prefetch_continues_where_it_was_stopped(server, fetch):
    server.routes |= {f"/{i}": send(b"%d" % i) for i in range(20)}
    urls = [(server.url(f"/{i}"), None) for i in range(20)] + [(server.url("/gone"), None)]

    class Stop(Exception):
        pass

    def stop(_: str) -> None:
        raise Stop

    with pytest.raises(Stop):
        fetching.prefetch(urls, replace(fetch, concurrency=2), stop)
    before = len(blobs(fetch))
    assert 0 < before < 20
    outcomes = fetching.prefetch(urls, fetch, lambda _: None)
    assert outcomes == {"fetched": 20 - before, "cached": before, "fetch_failed": 1}
    assert fetching.prefetch(urls, fetch, lambda _: None) == {"cached": 20, "fetch_failed": 1}
    assert server.asked == {path: 1 for path in [f"/{i}" for i in range(20)] + ["/gone"]}
    server.routes["/gone"] = send(IMAGE)
    assert fetching.prefetch(urls, fetch, lambda _: None, retry_failed=True) == {
        "cached": 20,
        "fetched": 1,
    }


def test_prefetch_asks_once_for_an_image_that_neighbours_share(server, fetch):
    urls = [(server.url(), None)] * 50 + [(server.url("/gone"), None)] * 7
    outcomes = fetching.prefetch(urls, fetch, lambda _: None)
    assert outcomes == {"fetched": 1, "cached": 49, "fetch_failed": 7}
    assert server.asked == {"/image": 1, "/gone": 1}


def test_prefetch_reads_no_further_ahead_than_it_works(server, fetch):
    read = 0

    def endless() -> Iterator[tuple[str, str | None]]:
        nonlocal read
        while True:
            read += 1
            yield server.url(f"/{read}"), None

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetching.prefetch(endless(), fetch, stop)
    assert read == 2 * fetch.concurrency


def test_urls_and_file_names_are_distinguished():
    for value in ("http://a/b.jpg", "HTTPS://a", "ftp://a/b"):
        assert is_url(value)
    for value in (
        "images/a.jpg",
        "gs://a/b.jpg",
        "/a/b",
        "C:\\a",
        "a/http://b",
        "",
        None,
        3,
        b"http://a",
    ):
        assert not is_url(value)


def config_of(tmp_path: Path, fetch: Fetch, **sources: Source) -> Config:
    sft, grpo, held_out = (dict([pair]) for pair in sources.items())
    return Config(
        data=Data(fetch=fetch),
        sft=Sft(sources=sft),
        grpo=Grpo(sources=grpo),
        eval=Eval(sources=held_out),
    )


def source_of(path: Path, records: list, **settings: str) -> Source:
    path.write_text("\n".join(map(json.dumps, records)))
    return Source(uri=f"jsonl:{path}", **settings)


@pytest.fixture
def config(tmp_path, server, fetch) -> Config:
    a = source_of(
        tmp_path / "a.jsonl",
        [{"image": server.url(), "box": 1}, {"image": "a.jpg"}, {"box": 2}, "no record"],
    )
    hashes = [{"at": {"url": server.url("/b"), "sha": sha}} for sha in (None, OTHER, 5)]
    b = source_of(tmp_path / "b.jsonl", hashes, image="at.url", image_sha256="at.sha")
    return config_of(tmp_path, fetch, sft=a, grpo=b, eval=a)


def test_urls_of_a_config(config, server):
    sections = [config.sft.sources, config.grpo.sources, config.eval.sources]
    assert list(prefetching.image_urls(sections, config.data, config.seed)) == [
        (server.url(), None),
        (server.url("/b"), None),
        (server.url("/b"), OTHER),
        (server.url("/b"), "5"),
    ]


def test_drawn_scenes_have_no_urls_to_wait_for():
    sources = {"scenes": Source(uri="synthetic:train?scenes=2000000000", boxes="box")}
    assert list(prefetching.image_urls([sources], Data(), seed=0)) == []


def test_the_command_counts_on_stdout_and_asks_again_with_retry_failed(config, server, capsys):
    def run(retry_failed: bool) -> dict[str, int]:
        values = flags.FlagValues()
        prefetch.COMMAND.define_flags(values)
        values([prefetch.COMMAND.name, f"--retry_failed={retry_failed}"])
        prefetch.main(cli.Arguments(values, config))
        out, err = capsys.readouterr()
        assert "4 images" in err
        return json.loads(out)

    failed = {"fetch_failed": 2, "wrong_sha256": 1}  # /b is not there, and 5 is no hash
    assert run(False) == {"fetched": 1, **failed}
    assert run(False) == {"cached": 1, **failed}
    server.routes["/b"] = send(b"b")
    assert run(False) == {"cached": 1, **failed}
    assert run(True) == {"cached": 1, "fetched": 1, "wrong_sha256": 2}
