"""The page's server: a few fixed files, the facts, and requests for pictures, answered line by line as they grow.

Whoever can reach the port can draw: it listens on the loopback interface unless told otherwise. The Host header must be
a name that the page is meant to be reached by (a foreign site's name may be made to lead to this machine), and requests
must come from the page itself (Origin). No name or text of a request becomes part of a path or of HTML.
"""

from __future__ import annotations

import json
import logging
import select
import socket
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from engine.page.limits import IDLE_S, MAX_BODY, MAX_CONNECTIONS, MAX_WAITING
from engine.page.opened import open_file
from engine.page.studio import Studio
from engine.page.turns import BusyError, Turns
from engine.page.wish import read_question
from util.failures import one_line
from util.read import parse_json

logger = logging.getLogger(__name__)

STATIC = Path(__file__).with_name("static")
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
FILES = {f"/{path.name}": path for path in sorted(STATIC.iterdir()) if path.suffix in KINDS}
FILES["/"] = STATIC / "index.html"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class PageServer(ThreadingHTTPServer):
    """Serves until `shutdown`. hosts: the names by which it is reached, beside those of the loopback interface."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str, port: int, studio: Studio, hosts: tuple[str, ...] = ()) -> None:
        """Raises ValueError naming host and port if they cannot be had. port 0: any free one."""
        self.studio, self.hosts = studio, {*LOOPBACK, *(each.lower() for each in hosts)}
        self.turns, self.is_closing = Turns(MAX_WAITING), threading.Event()
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), PageHandler)
        except (OSError, OverflowError) as error:
            raise ValueError(f"cannot listen on host {host}, port {port}: {one_line(error)}") from error

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        name = str(host)
        return f"http://{f'[{name}]' if ':' in name else name}:{port}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own; connections beyond the limit are closed."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are no news."""
        logger.debug("connection of %s broke", client_address, exc_info=True)

    def server_close(self) -> None:
        self.is_closing.set()
        super().server_close()


class RefusedError(Exception):
    """An answer other than 200, with a reason for whoever reads it."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class PageHandler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "StructMAR", ""
    timeout = IDLE_S
    server: PageServer

    def do_GET(self) -> None:
        self._answering(self._get)

    def do_HEAD(self) -> None:
        self._answering(self._get)

    def do_POST(self) -> None:
        self._answering(self._post)

    def _answering(self, answer: Callable[[], None]) -> None:
        try:
            self._require_host()
            answer()
        except RefusedError as refusal:
            self._refuse(refusal.status, refusal.reason)
        except ValueError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, one_line(error))
        except BusyError as error:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
        except OSError:  # the connection broke: nobody is there to be told
            self.close_connection = True
        except Exception:
            logger.exception("a request failed")
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed; its log says how")

    def _get(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/facts":
            self._send_json(HTTPStatus.OK, self.server.studio.facts())
            return
        file = FILES.get(path)
        if file is None:
            raise RefusedError(HTTPStatus.NOT_FOUND, "there is no such page")
        self._send(HTTPStatus.OK, file.read_bytes(), f"{KINDS[file.suffix]}; charset=utf-8")

    def _post(self) -> None:
        self._require_own_page()
        body, studio = self._read_json(), self.server.studio
        if self.path == "/open":
            self._send_json(HTTPStatus.OK, open_file(body, studio))
        elif self.path == "/propose":
            prompt, seed = read_question(body)
            with self.server.turns.place() as ticket:
                listener = _Listener(self.connection, self.wfile, self.server.is_closing)
                if self.server.turns.wait(ticket, lambda ahead: None, listener.is_gone):
                    self._send_json(HTTPStatus.OK, studio.propose(prompt, seed))
        elif self.path == "/draw":
            wish = studio.read(body)
            self._stream(lambda tell, is_gone: studio.draw(wish, tell, is_gone))
        else:
            raise RefusedError(HTTPStatus.NOT_FOUND, "there is no such page")

    def _require_host(self) -> None:
        host = self.headers.get("Host", "")
        name = (urlsplit(f"//{host}").hostname or "") if host.isprintable() and "@" not in host else ""
        if name not in self.server.hosts:
            raise RefusedError(
                HTTPStatus.FORBIDDEN, "the page is not served under this name; --allowed_hosts adds names"
            )

    def _require_own_page(self) -> None:
        """Browsers say where a request comes from; other programs need not."""
        origin, host = self.headers.get("Origin"), self.headers.get("Host", "")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise RefusedError(HTTPStatus.FORBIDDEN, "requests of other pages are not answered")
        if self.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            raise RefusedError(HTTPStatus.FORBIDDEN, "requests of other pages are not answered")
        if self.headers.get_content_type() != "application/json":
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "requests are application/json")

    def _read_json(self) -> Any:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()) or "Transfer-Encoding" in self.headers:
            raise RefusedError(HTTPStatus.LENGTH_REQUIRED, "a request says its Content-Length")
        if len(length) > 12 or int(length) > MAX_BODY:
            limit = f"a request has at most {MAX_BODY // 2**20} MiB"
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{limit}, this one {length[:12]} bytes")
        content = self.rfile.read(int(length))
        try:
            return parse_json(content.decode("utf-8"), "the request")
        except UnicodeDecodeError as error:
            raise ValueError("the request is not UTF-8 text") from error

    def _stream(self, work: Callable[[Callable[[Mapping[str, Any]], None], Callable[[], bool]], None]) -> None:
        """Lines of JSON, when it is this request's turn, until the work is done or the browser has gone."""
        with self.server.turns.place() as ticket:
            self.close_connection = True
            self._send_head(HTTPStatus.OK, "application/x-ndjson", {"Connection": "close"})
            listener = _Listener(self.connection, self.wfile, self.server.is_closing)
            try:
                if self.server.turns.wait(ticket, listener.tell_waiting, listener.is_gone):
                    work(listener.tell, listener.is_gone)
            except ValueError as error:
                listener.tell({"event": "error", "error": one_line(error)})
            except OSError:
                raise
            except Exception:
                logger.exception("drawing failed")
                listener.tell({"event": "error", "error": "the server failed; its log says how"})

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class says of requests that it does not understand, as JSON too."""
        self._refuse(HTTPStatus(code), message or HTTPStatus(code).phrase)

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self.close_connection = True  # the request may not have been read
        self._send_json(status, {"error": reason}, {"Connection": "close"})

    def _send_json(self, status: HTTPStatus, value: Any, headers: Mapping[str, str] | None = None) -> None:
        content = json.dumps(value, allow_nan=False).encode()
        self._send(status, content, "application/json", headers)

    def _send(self, status: HTTPStatus, content: bytes, kind: str, headers: Mapping[str, str] | None = None) -> None:
        self._send_head(status, kind, {"Content-Length": str(len(content)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_head(self, status: HTTPStatus, kind: str, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **HEADERS, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("%s %s", self.address_string(), format % args)


class _Listener:
    """Who gets the lines of an answer, for as long as the connection stands."""

    def __init__(self, connection: socket.socket, file: Any, is_closing: threading.Event) -> None:
        self._connection, self._file, self._is_closing = connection, file, is_closing
        self._has_left = False

    def tell(self, event: Mapping[str, Any]) -> None:
        """One line; none once the connection broke."""
        if self._has_left:
            return
        try:
            self._file.write(json.dumps(event, allow_nan=False).encode() + b"\n")
            self._file.flush()
        except OSError:
            self._has_left = True

    def tell_waiting(self, ahead: int) -> None:
        self.tell({"event": "waiting", "ahead": ahead})

    def is_gone(self) -> bool:
        """Whether nobody listens any more: a browser that is stopped closes the connection."""
        if not self._has_left and select.select([self._connection], [], [], 0)[0]:
            try:
                self._has_left = self._connection.recv(1, socket.MSG_PEEK) == b""
            except OSError:
                self._has_left = True
        return self._has_left or self._is_closing.is_set()
