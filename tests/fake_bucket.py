"""A server on loopback that answers as Google Cloud Storage does, with one bucket in memory.

It has the parts of the JSON API (https://cloud.google.com/storage/docs/json_api/v1) that gcsfs,
tensorstore and google-cloud-storage use: objects, lists, conditional writes, ranges and uploads in
one or several requests. The emulators on PyPI have no conditional writes, which tensorstore needs.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "bucket"
FORBIDDEN = "forbidden"
"""A bucket that exists, but nobody may use it."""


class Stored(NamedTuple):
    """An object of the bucket."""

    data: bytes
    generation: int


class Storage(ThreadingHTTPServer):
    """The server. Its objects are those of `BUCKET`, by name."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, Stored] = {}
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        """Uploads in several requests: (name, data so far) by id."""
        self.lock = threading.Lock()
        self.numbers = itertools.count(1_700_000_000_000_000, 1_000_000)
        """Generations: microseconds. Each write is a second after the write before it."""

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which every client of a process uses this server."""
        address = f"http://127.0.0.1:{self.server_port}"
        return os.environ | {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,  # of array_record's reader
            # Otherwise the clients look for a login at the machine's metadata server.
            "GCE_METADATA_ROOT": "localhost:1",
            "NO_GCE_CHECK": "true",
            "CLOUDSDK_CONFIG": "/absent",
            # It asks for the kind of bucket by gRPC.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "NO_PROXY": "*",
        }

    def names(self, prefix: str = "") -> list[str]:
        """Returns the names of the objects that begin with `prefix`."""
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def put(self, name: str, data: bytes) -> Stored:
        """Writes an object. The caller holds the lock if it has read a condition before."""
        self.objects[name] = Stored(bytes(data), next(self.numbers))
        return self.objects[name]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Storage
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a killed client
            super().handle()

    def do_GET(self) -> None:
        self.answer("GET")

    def do_POST(self) -> None:
        self.answer("POST")

    def do_PUT(self) -> None:
        self.answer("POST")

    def do_DELETE(self) -> None:
        self.answer("DELETE")

    def answer(self, method: str) -> None:
        body = self.read_body()
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        path = url.path.removeprefix("/upload").removeprefix("/download")
        before, _, name = path.removeprefix("/storage/v1/b/").partition("/o")
        name = unquote(name.lstrip("/"))
        with self.server.lock:
            if before == FORBIDDEN:
                self.send_json(403, {"error": {"code": 403, "message": "no permission"}})
            elif before != BUCKET:
                self.send_json(404, {"error": {"code": 404, "message": f"no bucket {before}"}})
            elif method == "POST":
                self.upload(query, body)
            elif path == f"/storage/v1/b/{BUCKET}":
                self.send_json(200, {"kind": "storage#bucket", "name": BUCKET, "id": BUCKET})
            elif not name:
                self.send_json(200, self.list(query))
            elif name not in self.server.objects:
                self.send_json(404, {"error": {"code": 404, "message": f"no object {name}"}})
            elif status := self.failed_condition(name, query):
                self.send_json(status, {"error": {"code": status, "message": "condition"}})
            elif method == "DELETE":
                del self.server.objects[name]
                self.send(204, b"")
            elif query.get("alt") == "media":
                self.send_data(self.server.objects[name])
            else:
                self.send_json(200, metadata(name, self.server.objects[name]))

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def failed_condition(self, name: str, query: dict[str, str]) -> int:
        """Returns the status of a condition that does not hold, 0 if all hold."""
        stored = self.server.objects.get(name)
        generation = str(stored.generation) if stored else "0"
        if query.get("ifGenerationMatch", generation) != generation:
            return 412
        return 304 if query.get("ifGenerationNotMatch") == generation else 0

    def upload(self, query: dict[str, str], body: bytes) -> None:
        if "upload_id" in query:
            self.continue_upload(query["upload_id"], body)
            return
        name, data = query.get("name", ""), body
        if query["uploadType"] == "multipart":
            boundary = self.headers.get_param("boundary")
            _, header, data = body.split(f"--{boundary}".encode(), 2)
            name = json.loads(header.split(b"\n\n", 1)[-1].split(b"\r\n\r\n", 1)[-1])["name"]
            data = data.replace(b"\r\n\r\n", b"\n\n", 1).split(b"\n\n", 1)[1]
            data = data[: data.rindex(f"--{boundary}--".encode())].removesuffix(b"\n")
        if status := self.failed_condition(name, query):
            self.send_json(status, {"error": {"code": status, "message": "condition"}})
        elif query["uploadType"] == "resumable":
            number = str(next(self.server.numbers))
            self.server.uploads[number] = (name, bytearray())
            path = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&upload_id={number}"
            host = self.headers["Host"]
            self.send(200, b"{}", {"Location": f"http://{host}{path}"})
        else:
            self.send_json(200, metadata(name, self.server.put(name, data)))

    def continue_upload(self, number: str, body: bytes) -> None:
        name, data = self.server.uploads[number]
        data += body
        if self.headers["Content-Range"].endswith("*"):
            self.send(308, b"", {"Range": f"bytes=0-{len(data) - 1}"})
        else:
            self.send_json(200, metadata(name, self.server.put(name, data)))

    def list(self, query: dict[str, str]) -> dict[str, object]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        names = [
            name
            for name in sorted(self.server.objects)
            if name.startswith(prefix)
            and name >= query.get("startOffset", "")
            and ("endOffset" not in query or name < query["endOffset"])
        ]
        prefixes: dict[str, None] = {}
        items = []
        for name in names:
            folder, slash, _ = name[len(prefix) :].partition(delimiter or "\0")
            if slash:
                prefixes[prefix + folder + delimiter] = None
            else:
                items.append(metadata(name, self.server.objects[name]))
        return {"kind": "storage#objects", "items": items, "prefixes": list(prefixes)}

    def send_data(self, stored: Stored) -> None:
        headers = {"x-goog-generation": str(stored.generation)}
        asked = self.headers.get("Range", "").removeprefix("bytes=")
        if not asked:
            self.send(200, stored.data, headers)
            return
        first, _, last = asked.partition("-")
        size = len(stored.data)
        start = int(first) if first else size - int(last)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= size:
            self.send(416, b"", headers)
            return
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self.send(206, stored.data[start:stop], headers)

    def send_json(self, status: int, value: object) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        if status in (204, 304):  # the next answer would begin with a body that nobody reads
            body = b""
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def metadata(name: str, stored: Stored) -> dict[str, str]:
    """Returns the description of an object."""
    written = f"{datetime.fromtimestamp(stored.generation / 1e6, UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
    return {
        "kind": "storage#object",
        "name": name,
        "bucket": BUCKET,
        "size": str(len(stored.data)),
        "generation": str(stored.generation),
        "metageneration": "1",
        "md5Hash": base64.b64encode(hashlib.md5(stored.data).digest()).decode(),
        "crc32c": "AAAAAA==",
        "timeCreated": written,
        "updated": written,
        "storageClass": "STANDARD",
        "contentType": "application/octet-stream",
    }


@contextlib.contextmanager
def serve() -> Iterator[Storage]:
    """Yields a server that runs in a thread."""
    server = Storage()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
