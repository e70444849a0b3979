"""A proxy before a server, which fails as networks and object stores do."""

import contextlib
import http.client
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# S3's answer to a request with expired credentials.
EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
FAULTS = ("503", "cut", "expired", "refused")
# The server carries out the request, and its answer gets lost.
LOST = "lost"


class Weather:
    """A proxy that records requests and can make them fail or wait.

    Attributes:
        address: URL of the proxy.
        seen: number of requests that met a fault.
        asked: method and path of each request since `calm`.
        sent: path, and bytes of content, of each answer to a GET since `calm`.
        delay: seconds by which each request is delayed.
        most: the most requests at the same time since `calm`.
    """

    def __init__(self, host: str, port: int) -> None:
        self.seen = 0
        self.asked = list[tuple[str, str]]()
        self._lock, self._now = threading.Lock(), 0
        self.sent = list[tuple[str, int]]()
        self._fault: Callable[[str, str], str]
        self.calm()
        weather = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                weather.asked.append((self.command, self.path))
                with weather._inside():
                    time.sleep(weather.delay)
                if fault := weather._fault(self.command, self.path):
                    weather.seen += 1
                    self._fail(fault, body)
                    return
                status, headers, content = self._ask(body)
                if self.command == "GET":
                    weather.sent.append((self.path, len(content)))
                self._answer(status, headers, content, len(content))

            def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
                upstream = http.client.HTTPConnection(host, port, timeout=60)
                with contextlib.closing(upstream):
                    headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
                    upstream.request(self.command, self.path, body, headers)
                    answer = upstream.getresponse()
                    return answer.status, answer.getheaders(), answer.read()

            def _answer(
                self, status: int, headers: list[tuple[str, str]], content: bytes, length: int
            ) -> None:
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                        self.send_header(name, value)
                told = {name.lower(): value for name, value in headers}.get("content-length")
                self.send_header("Content-Length", told if self.command == "HEAD" and told else str(length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def _fail(self, fault: str, body: bytes) -> None:
                if fault == "503":
                    content = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
                    self._answer(503, [("Content-Type", "application/xml")], content, len(content))
                elif fault == "expired":
                    self._answer(403, [("Content-Type", "application/xml")], EXPIRED, len(EXPIRED))
                elif fault == "cut" and self.command == "GET":
                    status, headers, content = self._ask(body)
                    self._answer(status, headers, content[: len(content) // 2], len(content))
                    self.close_connection = True
                else:
                    if fault == LOST:
                        self._ask(body)
                    self.close_connection = True  # without an answer

            do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = do_HEAD = _pass_on

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True, name="weather").start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        yield
        with self._lock:
            self._now -= 1

    def calm(self) -> None:
        """End all faults and delays, and clear the records."""
        self._fault, self.delay, self.most = lambda method, path: "", 0.0, 0
        self.asked.clear()
        self.sent.clear()

    def storm(self, kind: str, seconds: float, which: Callable[[str, str], bool]) -> None:
        """Let the chosen requests meet a fault for `seconds`, counted from the first of them.

        Args:
            kind: one of `FAULTS`, or `LOST`.
            which: chooses requests by method and path.
        """
        end = 0.0

        def fault(method: str, path: str) -> str:
            nonlocal end
            if not which(method, path):
                return ""
            end = end or time.monotonic() + seconds
            return kind if time.monotonic() < end else ""

        self._fault = fault
