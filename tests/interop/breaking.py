"""A server between a substitute server and its clients, which does not send what it should."""

from __future__ import annotations

import http.server
import threading
import urllib.request
from typing import Any

from twisted.trial.unittest import SynchronousTestCase


class Breaking:
    """Passes on what the server ORIGIN has, but for archives.

    :param missing: whether there are none; else they come in thirds, each of which breaks off.
    :ivar ranges: where each request for an archive wanted it to begin.
    """

    def __init__(self, case: SynchronousTestCase, origin: str, *, missing: bool) -> None:
        self.ranges: list[int] = []
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler(origin, missing))
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()

        def stop() -> None:
            server.shutdown()
            thread.join()
            server.server_close()

        case.addCleanup(stop)
        self.url = f"http://127.0.0.1:{server.server_address[1]}"

    def _handler(self, origin: str, missing: bool) -> Any:
        ranges = self.ranges

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                begin, status, archive = 0, 200, "/nar/" in self.path
                if archive:
                    begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
                    ranges.append(begin)
                    status = 206 if begin else 200
                if archive and missing:
                    self.send_error(404)
                    return
                try:
                    with urllib.request.urlopen(origin + self.path) as answer:
                        data = answer.read()
                except urllib.error.HTTPError as error:
                    self.send_error(error.code)
                    return
                self.send_response(status)
                self.send_header("ETag", '"same"')
                self.send_header("Content-Length", str(len(data) - begin))
                if begin:
                    self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
                self.end_headers()
                size = len(data) // 3 + 1 if archive else len(data)
                self.wfile.write(data[begin : begin + size])
                self.close_connection = begin + size < len(data)

        return Handler
