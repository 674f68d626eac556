#!/usr/bin/env python3
"""Serves the example, or with --browser opens it headless and prints what it reports."""

import argparse
import functools
import http.server
import json
import pathlib
import subprocess
import sys
import tempfile
import threading

FOLDER = pathlib.Path(__file__).parent
# WebGPU on the processor: Chromium brings SwiftShader along.
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
        self.server.report = json.loads(body)
        self.send_response(204)
        self.end_headers()
        self.server.reported.set()

    def log_message(self, *_):
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--browser", help="a Chromium to run it in")
    parser.add_argument("--query", default="epochs=20&width=128")
    parser.add_argument("--timeout", type=float, default=600, help="seconds")
    options = parser.parse_args()

    port = 0 if options.browser else options.port
    handler = functools.partial(Handler, directory=FOLDER)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.reported = threading.Event()
    address = f"http://localhost:{server.server_port}/"
    if not options.browser:
        print(address)
        return server.serve_forever()

    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as profile, tempfile.TemporaryFile("w+") as log:
        page = f"{address}?report&{options.query}"
        browser = subprocess.Popen(
            [options.browser, *FLAGS, f"--user-data-dir={profile}", page], stderr=log
        )
        came = server.reported.wait(options.timeout)
        browser.terminate()
        browser.wait()
        if not came:
            log.seek(0)
            sys.exit(f"{log.read()}\nnothing was reported in {options.timeout} s")
        log.seek(0)
        if "error" in server.report:
            print(log.read(), file=sys.stderr)
    print(json.dumps(server.report, indent=2))
    sys.exit("error" in server.report)


if __name__ == "__main__":
    main()
