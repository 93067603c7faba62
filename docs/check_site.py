"""Looks at every page of the built site in headless Chromium, on a phone and on a screen: ``make check-site``.

It fails where a page is wider than the window, a table hides columns on a screen, a formula or a picture is not shown,
the console has an error, something outside of the site is asked for, or a link within the site leads nowhere.
Screenshots of all pages lie in ``build/screenshots``, for people to look at. Chromium is driven by its DevTools
protocol over a pipe, so nothing but the browser must be installed.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import functools
import http.server
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

WIDTHS = {"phone": 390, "screen": 1440}
TALLEST = 4000  # pixels of a screenshot
PATIENCE = 60  # seconds for an answer of the browser

LOOK = """
(async () => {
  await document.fonts.ready;
  await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  const all = (selector) => [...document.querySelectorAll(selector)];
  const words = (node) => node.textContent.trim().replace(/\\s+/g, " ").slice(0, 60);
  const text = all("article p, article li, article td, article h1, article h2, article h3").map((node) => {
    const copy = node.cloneNode(true);
    copy.querySelectorAll("code, pre, math").forEach((code) => code.remove());
    return copy.textContent;
  });
  return {
    width: document.documentElement.scrollWidth,
    height: document.documentElement.scrollHeight,
    narrow: all(".md-typeset__scrollwrap, .md-typeset__table").filter((node) => node.scrollWidth > node.clientWidth + 1)
      .map(words),
    formulas: all("math").length,
    raw: [...all(".arithmatex").map(words), ...all("math").map(words).filter((line) => line.includes("\\\\")),
      ...text.filter((line) => /\\\\[([]|\\$\\$|\\$\\\\/.test(line))],
    flat: all("math").filter((node) => node.checkVisibility() && node.getBoundingClientRect().height < 2).map(words),
    pictures: all("article img").filter((image) => !image.complete || !image.naturalWidth).map((image) => image.src),
    links: all("a[href]").map((link) => link.href),
    ids: all("[id]").map((node) => node.id),
  };
})()
"""


class Browser:
    """One tab of a headless Chromium."""

    def __init__(self, program: str, profile: str) -> None:
        (theirs, out), (back, ours) = os.pipe(), os.pipe()
        theirs, ours = (fcntl.fcntl(number, fcntl.F_DUPFD, 10) for number in (theirs, ours))
        flags = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--hide-scrollbars"]
        flags += ["--disable-gpu", "--no-first-run", "--disable-background-networking"]
        flags += ["--no-sandbox"] if os.geteuid() == 0 else []
        self._process = subprocess.Popen(
            [program, *flags],
            preexec_fn=lambda: (os.dup2(theirs, 3), os.dup2(ours, 4)),  # where Chromium reads and writes
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(ours)
        self._out, self._back, self._unread, self._number = out, back, b"", 0
        self.events: list[dict[str, Any]] = []
        self._session: dict[str, str] = {}
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command; events that come before it are kept."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._out, json.dumps(command).encode() + b"\0")
        while (message := self._read()).get("id") != self._number:
            self.events.append(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']['message']}")
        result: dict[str, Any] = message["result"]
        return result

    def wait_for(self, method: str) -> None:
        """Keep events until one of a kind has come."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            if not select.select([self._back], [], [], PATIENCE)[0]:
                raise RuntimeError(f"the browser has not answered for {PATIENCE} s")
            if not (part := os.read(self._back, 1 << 20)):
                raise RuntimeError("the browser has ended: start it by hand to see why")
            self._unread += part
        message, self._unread = self._unread.split(b"\0", 1)
        decoded: dict[str, Any] = json.loads(message)
        return decoded

    def close(self) -> None:
        """End the browser."""
        self._session = {}
        self.ask("Browser.close")
        self._process.wait(PATIENCE)


def look(browser: Browser, address: str, width: int, picture: Path) -> tuple[dict[str, Any], list[str]]:
    """What a page holds at a width, and what its loading complained of; a screenshot is written."""
    browser.events.clear()
    browser.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    browser.ask("Page.navigate", url=address)
    browser.wait_for("Page.loadEventFired")
    answer = browser.ask("Runtime.evaluate", expression=LOOK, awaitPromise=True, returnByValue=True)
    if "exceptionDetails" in answer:
        raise RuntimeError(f"{address}: {answer['exceptionDetails']}")
    found: dict[str, Any] = answer["result"]["value"]
    clip = {"x": 0, "y": 0, "width": width, "height": min(found["height"], TALLEST), "scale": 1}
    shot = browser.ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(base64.b64decode(shot["data"]))

    # What the console and the network said.
    complaints = []
    site = "/".join(address.split("/", 3)[:3])
    for event in browser.events:
        parameters = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                asked = parameters["request"]["url"]
                if not asked.startswith((f"{site}/", "data:", "blob:")):
                    complaints.append(f"asks for {asked}")
            case "Log.entryAdded" if parameters["entry"]["level"] == "error":
                complaints.append(f"console: {parameters['entry']['text']} {parameters['entry'].get('url', '')}")
            case "Runtime.exceptionThrown":
                complaints.append(f"console: {parameters['exceptionDetails']['text']}")
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "assert"):
                complaints.append(f"console: {parameters['args']}")
    return found, complaints


def judge(found: dict[str, Any], width: int) -> list[str]:
    """What is wrong with a page at a width, links apart."""
    wrong = [f"formula not rendered: {words}" for words in found["raw"]]
    wrong += [f"formula without height: {words}" for words in found["flat"]]
    wrong += [f"picture not shown: {source}" for source in found["pictures"]]
    if found["width"] > width:
        wrong.append(f"is {found['width']} pixels wide")
    if width >= 1000:
        wrong += [f"hides columns of a table: {words}" for words in found["narrow"]]
    return wrong


def broken(pages: dict[str, dict[str, Any]], site: Path, home: str) -> list[str]:
    """Links within the site whose page, file or place on a page does not exist."""
    wrong = []
    for address, found in pages.items():
        for link in dict.fromkeys(found["links"]):
            target, place = urldefrag(link)
            if not target.startswith(home):
                continue
            if target in pages:
                if place and unquote(place) not in pages[target]["ids"]:
                    wrong.append(f"{address}: no such place: {link}")
            elif not (site / unquote(target.removeprefix(home))).is_file():
                wrong.append(f"{address}: no such page: {link}")
    return wrong


def main() -> None:
    """Check the site, and exit with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description="Check the built site in headless Chromium.")
    parser.add_argument("site", nargs="?", type=Path, default=Path("site"), help="its folder")
    parser.add_argument("--screenshots", type=Path, default=Path("build/screenshots"), help="a folder for them")
    options = parser.parse_args()
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        sys.exit("no browser: install Chromium, on Debian and Ubuntu by 'apt-get install chromium'")
    if not (options.site / "index.html").is_file():
        sys.exit(f"{options.site} holds no site: 'make docs' builds it")

    # The site is served as a web server would, on this machine alone.
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    handler = functools.partial(Handler, directory=options.site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, tempfile.TemporaryDirectory() as profile:
        browser, wrong = Browser(program, profile), []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = f"http://127.0.0.1:{server.server_port}/"
        pages: dict[str, dict[str, Any]] = {}
        for path in sorted(options.site.rglob("index.html")):
            name = path.parent.relative_to(options.site).as_posix()
            address = home if name == "." else f"{home}{name}/"
            for kind, width in WIDTHS.items():
                picture = options.screenshots / kind / f"{'home' if name == '.' else name.replace('/', '-')}.png"
                pages[address], complaints = look(browser, address, width, picture)
                wrong += [f"{address} at {width}: {line}" for line in complaints + judge(pages[address], width)]
        wrong += broken(pages, options.site, home)
        browser.close()
        server.shutdown()

    # The verdict.
    formulas = sum(found["formulas"] for found in pages.values())
    if not formulas:
        wrong.append("the site has no formula at all")
    print(*(line.replace(home, "/") for line in wrong), sep="\n", end="\n" if wrong else "")
    print(f"{len(pages)} pages, {formulas} formulas; screenshots in {options.screenshots}; {len(wrong)} things wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
