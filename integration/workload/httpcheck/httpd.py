#!/usr/bin/env python3
"""The HTTP server of httpcheck in Python, from the standard library alone.

    httpd.py [ADDRESS [PORT]]

PUT and GET /kv/KEY, GET /stat; every answer says in Connection-Requests how many
requests its connection has made.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MAX_VALUE = 64 << 20


class State:
    def __init__(self):
        self.lock = threading.Lock()
        self.kv = {}
        self.requests = 0
        self.connections = 0
        self.started = time.monotonic()


STATE = State()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keep-alive

    def setup(self):
        super().setup()
        # Headers and body are two writes: without this, Nagle makes 40 ms of them.
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.count = 0
        with STATE.lock:
            STATE.connections += 1

    def answer(self, status, body=b"", kind="application/octet-stream"):
        self.send_response(status)
        self.send_header("Connection-Requests", str(self.count))
        self.send_header("Content-Type", kind)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def counted(self):
        self.count += 1
        with STATE.lock:
            STATE.requests += 1

    def do_PUT(self):
        self.counted()
        length = int(self.headers.get("Content-Length", "-1"))
        if not self.path.startswith("/kv/") or not 0 <= length <= MAX_VALUE:
            self.close_connection = True
            self.answer(400)
            return
        body = self.rfile.read(length)
        if len(body) != length:  # the client went away
            self.close_connection = True
            return
        with STATE.lock:
            STATE.kv[self.path[4:]] = body
        self.answer(204)

    def do_GET(self):
        self.counted()
        if self.path == "/stat":
            with STATE.lock:
                stat = {
                    "requests": STATE.requests,
                    "connections": STATE.connections,
                    "keys": len(STATE.kv),
                    "bytes": sum(map(len, STATE.kv.values())),
                    "uptime_ms": (time.monotonic() - STATE.started) * 1000,
                    "pid": os.getpid(),
                }
            self.answer(200, json.dumps(stat).encode(), "application/json")
            return
        with STATE.lock:
            value = STATE.kv.get(self.path[4:]) if self.path.startswith("/kv/") else None
        if value is None:
            self.answer(404)
        else:
            self.answer(200, value)

    def log_message(self, *_):
        pass  # a line a request is no use to anybody


def main():
    address = sys.argv[1] if len(sys.argv) > 1 else "0.0.0.0"
    port = int(sys.argv[2]) if len(sys.argv) > 2 else 8080
    server = ThreadingHTTPServer((address, port), Handler)
    server.daemon_threads = True
    # As pid 1 of a container SIGTERM has no default action.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print(json.dumps({"ready": True, "listen": "%s:%d" % server.server_address[:2]}), flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
