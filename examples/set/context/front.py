"""Take the names of clients and put them into the store. When all have been here, write them down and end the store."""

import json
import os
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.request import Request, urlopen

known = {}


def store(method, path="", data=None):
    # The store may not listen yet: a connection waits for a job, not for its program.
    for _ in range(600):
        try:
            with urlopen(Request(f"http://store:8000/{path}", method=method, data=data), timeout=60) as answer:
                return json.load(answer)
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the store does not answer")


class Front(BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path[1:]
        store("PUT", name, b"was here")
        known.update(store("GET"))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"hello {name}\n".encode())


server = HTTPServer(("", 8001), Front)
while len(known) < int(os.environ["CLIENTS"]):
    server.handle_request()
Path("/scratch/visitors.txt").write_text("\n".join(sorted(known)) + "\n")
store("DELETE")
