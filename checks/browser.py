#!/usr/bin/env python3
"""Serves a folder, opens its page in a headless Chromium, and prints what the page reports.

The page posts a JSON object to `report`. If it has a field `error`, this script fails."""

import argparse
import functools
import http.server
import json
import subprocess
import sys
import tempfile
import threading
import time

# SwiftShader, a part of Chromium, runs WebGPU on the CPU.
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--enable-logging=stderr",
]


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()
        # The first report counts. A page that failed may send more.
        if not self.server.reported.is_set():
            self.server.report = json.loads(body)
            self.server.reported.set()

    def log_message(self, *_):
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--browser", default="chromium")
    parser.add_argument("--query", default="", help="query of the page's address")
    parser.add_argument("--timeout", type=float, default=600, help="limit in seconds")
    options = parser.parse_args()

    handler = functools.partial(Handler, directory=options.folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.reported = threading.Event()
    address = f"http://localhost:{server.server_port}/"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, tempfile.TemporaryFile("w+") as log:
        page = f"{address}?report&{options.query}"
        browser = subprocess.Popen(
            [options.browser, *FLAGS, f"--user-data-dir={profile}", page], stderr=log
        )
        ends = time.monotonic() + options.timeout
        while not server.reported.wait(1) and browser.poll() is None and time.monotonic() < ends:
            pass
        came = server.reported.is_set()
        browser.terminate()
        try:
            browser.wait(10)
        except subprocess.TimeoutExpired:
            browser.kill()
        if not came:
            log.seek(0)
            sys.exit(f"{log.read()}\nthe page reported nothing")
        log.seek(0)
        if "error" in server.report:
            print(log.read(), file=sys.stderr)
    print(json.dumps(server.report, indent=2))
    sys.exit("error" in server.report)


if __name__ == "__main__":
    main()
