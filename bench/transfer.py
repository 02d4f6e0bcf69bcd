"""A 1 GiB disk up to the server and down again through the API, verified, against curl on nginx and sha256sum.

Both sides speak TLS 1.3 on loopback and read and write files in the same folder. The yardstick of one direction is curl to or
from nginx, then sha256sum of the file: what a careful person would do by hand.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import structlog

sys.path.insert(0, str(Path(__file__).parent))
from report import Figure, arguments, median_of, publish

from deskgrid.client.grid import describe_file
from deskgrid.client.transport import Transport, load_credentials, save_credentials
from deskgrid.model.data import Blob
from deskgrid.testing.grids import running_grid

_NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log; events {{ }}
http {{
  access_log off; sendfile on; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{
    listen 127.0.0.1:{port} ssl; ssl_protocols TLSv1.3;
    ssl_certificate {home}/authority/server.pem; ssl_certificate_key {home}/authority/server.key;
    location / {{ root {folder}/www; }}
    location /up {{ client_max_body_size 0; client_body_in_file_only clean; proxy_pass_request_body off;
                    proxy_set_header Content-Length ""; proxy_pass http://127.0.0.1:{sink}; }}
  }}
  server {{ listen 127.0.0.1:{sink}; location / {{ return 200; }} }}
}}
"""


async def measure(folder: Path, size_bytes: int, runs: int) -> list[Figure]:
    """Run both sides in turn and return the figures."""
    source = folder / "www" / "disk"
    source.parent.mkdir()
    _fill(source, size_bytes)
    async with running_grid(folder / "server") as grid:
        save_credentials(folder / "credentials.json", await grid.admin())
        port, nginx = _start_nginx(folder)
        try:
            up, down, curl_up, curl_down = [], [], [], []
            for number in range(runs):
                source.write_bytes(os.urandom(64) + source.read_bytes()[64:])  # another blob each time
                blob = await asyncio.to_thread(describe_file, source)
                sent, fetched = await _client(folder, source, blob)
                up.append(sent)
                down.append(fetched)
                curl_up.append(await asyncio.to_thread(_curl, folder, port, source, upload=True))
                curl_down.append(await asyncio.to_thread(_curl, folder, port, source, upload=False))
                print(
                    f"run {number + 1}: up {sent:.2f} s, curl {curl_up[-1]:.2f} s; down {fetched:.2f} s, curl {curl_down[-1]:.2f} s"
                )
        finally:
            nginx.terminate()
            nginx.wait()
    mib = size_bytes / (1 << 20)
    return [
        Figure("upload", mib / median_of(up), "MiB/s", mib / median_of(curl_up), median_of(up) / median_of(curl_up), None),
        Figure(
            "download", mib / median_of(down), "MiB/s", mib / median_of(curl_down), median_of(down) / median_of(curl_down), None
        ),
    ]


async def _client(folder: Path, source: Path, blob: Blob) -> tuple[float, float]:
    """Send and fetch in a process of its own, as the command line would; return the seconds."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--client", str(folder), str(source), blob.sha256, str(blob.size_bytes), stdout=subprocess.PIPE
    )
    out, _ = await child.communicate()
    sent, fetched = map(float, out.split())
    return sent, fetched


async def client(folder: Path, source: Path, blob: Blob) -> None:
    """The part that runs in the client's process."""
    async with Transport(load_credentials(folder / "credentials.json")) as transport:
        start = time.perf_counter()
        await transport.upload(source, blob)
        between = time.perf_counter()
        target = folder / "fetched"
        target.unlink(missing_ok=True)
        await transport.download(blob, target)
        print(between - start, time.perf_counter() - between)


def _curl(folder: Path, port: int, source: Path, *, upload: bool) -> float:
    target = folder / "curled"
    target.unlink(missing_ok=True)
    url = f"https://server.deskgrid:{port}/{'up' if upload else 'disk'}"
    trust: list[str | Path] = [
        "--cacert",
        folder / "server" / "authority" / "authority.pem",
        "--resolve",
        f"server.deskgrid:{port}:127.0.0.1",
    ]
    start = time.perf_counter()
    way: list[str | Path] = ["-T", source, "-o", "/dev/null"] if upload else ["-o", target]
    subprocess.run(["curl", "-sSf", *trust, *way, url], check=True)
    subprocess.run(["sha256sum", source if upload else target], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _start_nginx(folder: Path) -> tuple[int, psutil.Popen]:
    port, sink = _free_port(), _free_port()
    config = folder / "nginx.conf"
    config.write_text(_NGINX.format(folder=folder, home=folder / "server", port=port, sink=sink))
    process = psutil.Popen(["nginx", "-c", config, "-e", folder / "error.log"])
    for _ in range(100):
        if subprocess.run(["curl", "-sk", f"https://127.0.0.1:{port}/", "-o", "/dev/null"], check=False).returncode == 0:
            return port, process
        time.sleep(0.05)
    raise SystemExit((folder / "error.log").read_text())


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _fill(file: Path, size_bytes: int) -> None:
    with file.open("wb") as output:
        for _ in range(size_bytes >> 20):
            output.write(os.urandom(1 << 20))


def main() -> None:
    if sys.argv[1:2] == ["--client"]:
        folder, source, sha256, size = sys.argv[2:]
        asyncio.run(client(Path(folder), Path(source), Blob(sha256=sha256, size_bytes=int(size))))  # type: ignore[arg-type]
        return
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    options = arguments(__doc__)
    size_bytes = (128 if options.quick else 1024) << 20
    with tempfile.TemporaryDirectory(prefix="deskgrid-bench-") as folder:
        Path(folder).chmod(0o755)  # nginx's worker is another user
        figures = asyncio.run(measure(Path(folder), size_bytes, options.runs or (2 if options.quick else 5)))
    publish("transfer", figures, options)


if __name__ == "__main__":
    main()
