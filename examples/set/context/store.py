"""Keep what is put here until somebody deletes it all; then write it down and end."""

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

kept = {}
over = False


class Store(BaseHTTPRequestHandler):
    def do_PUT(self):
        kept[self.path[1:]] = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.answer(len(kept))

    def do_GET(self):
        self.answer(kept)

    def do_DELETE(self):
        global over
        over = True
        self.answer(None)

    def answer(self, value):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())


server = HTTPServer(("", 8000), Store)
while not over:
    server.handle_request()
Path("/scratch/kept.json").write_text(json.dumps(kept))
