"""The page in Chromium: loads without a complaint, its filters work, also by keyboard, and it fits a phone."""

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_explain.report.page import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")


class Browser:
    """A headless Chromium, spoken to in the WebDriver protocol."""

    def __init__(self, port: int, profile: Path) -> None:
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        self._root = f"http://127.0.0.1:{port}/session"
        quiet = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
        arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-sync",
            *quiet,
            f"--user-data-dir={profile}",
        ]
        options = {"binary": CHROMIUM, "args": arguments}
        wanted = {"goog:loggingPrefs": {"browser": "ALL"}, "goog:chromeOptions": options}
        self._root += "/" + self._send("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def _send(self, path: str, body: dict[str, Any] | None, method: str = "POST") -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._root + path, data, {"Content-Type": "application/json"}, method=method)
        with self._open(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def visit(self, page: Path, width: int = 1200) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self._send("/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})
        self._send("/url", {"url": page.absolute().as_uri()})

    def show_as(self, media: str, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        media_and_scheme = {"media": media, "features": features}
        self._send("/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": media_and_scheme})

    def ask(self, script: str) -> Any:
        return self._send("/execute/sync", {"script": f"return {script}", "args": []})

    def press(self, key: str) -> None:
        keys = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self._send("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": keys}]})

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self._send("/se/log", {"type": "browser"})]

    def close(self) -> None:
        self._send("", None, "DELETE")


@pytest.fixture(scope="module")
def driver() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([str(DRIVER), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield port
    process.terminate()
    process.wait(10)


@pytest.fixture(scope="module")
def browser(driver, tmp_path_factory) -> Iterator[Browser]:
    browser = Browser(driver, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(report, tmp_path) -> Path:
    return Path(write_report(report(), str(tmp_path)))


SHOWN = "[...document.querySelectorAll('.card')].filter(card => card.offsetParent !== null)"


def choose(browser: Browser, name: str, value: str) -> None:
    browser.ask(f"document.querySelector('input[name={name}][value=\"{value}\"]').click()")


def test_the_page_loads_without_a_complaint(browser, page) -> None:
    browser.visit(page)
    assert browser.complaints() == []
    assert browser.ask("performance.getEntriesByType('resource').length") == 0


def test_a_dozen_examples_are_shown_and_more_on_request(browser, page) -> None:
    browser.visit(page)
    assert browser.ask(f"{SHOWN}.length") == 12
    browser.ask("document.getElementById('more').click()")
    assert browser.ask(f"{SHOWN}.length") == 24
    assert browser.ask("document.activeElement === document.querySelectorAll('.card')[12]")
    assert browser.ask("document.getElementById('more').hidden")


def test_filters_show_what_they_say(browser, page) -> None:
    browser.visit(page)
    for name, value in (("task", "features"), ("who", "cross"), ("verdict", "wrong")):
        choose(browser, name, value)
        assert set(browser.ask(f"{SHOWN}.map(card => card.dataset.{name})")) == {value}
    assert browser.ask("document.getElementById('shown').textContent") == "2 of 2"


def test_filters_work_with_the_keyboard(browser, page) -> None:
    browser.visit(page)
    browser.ask("document.querySelector('input[name=task]').focus()")
    browser.press("\ue014")  # arrow right
    assert browser.ask("new FormData(document.getElementById('filters')).get('task')") == "patching"
    assert set(browser.ask(f"{SHOWN}.map(card => card.dataset.task)")) == {"patching"}


@pytest.mark.parametrize("width", [420, 800, 1600])
def test_the_page_is_never_wider_than_the_screen(browser, page, width) -> None:
    browser.visit(page, width)
    assert browser.ask("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


def test_print_unfolds_what_is_folded(browser, page) -> None:
    browser.visit(page)
    browser.ask("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.ask("document.querySelectorAll('details:not([open])').length") == 0
    browser.ask("window.dispatchEvent(new Event('afterprint'))")
    assert browser.ask("document.querySelectorAll('details[open]').length") == 0


# Texts that stand out from what is behind them by less than WCAG asks for: 4.5, large ones 3.
FAINT = """(() => {
  const paint = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d');
  const parts = text => {  // of any way to write a color
    paint.clearRect(0, 0, 1, 1);
    paint.fillStyle = text;
    paint.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = paint.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const linear = c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
  const over = ([r, g, b, a = 1], under) => [r, g, b].map((c, i) => c * a + under[i] * (1 - a));
  const behind = node => {
    if (!node) return [255, 255, 255];
    const color = parts(getComputedStyle(node).backgroundColor);
    return color[3] === 1 ? color : over(color, behind(node.parentElement));
  };
  const faint = [];
  for (const node of document.querySelectorAll('body *:not(svg *):not(script):not(style)')) {
    const own = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.checkVisibility()) continue;
    const style = getComputedStyle(node), ground = behind(node), ink = over(parts(style.color), ground);
    const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x), large = parseFloat(style.fontSize) >= 24;
    const stands = (a + .05) / (b + .05) >= (large ? 3 : 4.5);
    if (!stands) faint.push(node.tagName + '.' + node.className + ': ' + node.textContent.trim().slice(0, 30));
  }
  return faint;
})()"""


@pytest.mark.parametrize(
    "media, scheme, is_light", [("screen", "light", True), ("screen", "dark", False), ("print", "dark", True)]
)
def test_texts_stand_out_by_day_and_by_night_and_on_paper(browser, page, media, scheme, is_light) -> None:
    browser.show_as(media, scheme)
    try:
        browser.visit(page)
        ground = browser.ask("getComputedStyle(document.body).backgroundColor").removeprefix("rgb(").split(",")[0]
        assert (int(ground) > 200) is is_light and (int(ground) < 60) is not is_light
        assert browser.ask(FAINT) == []
    finally:
        browser.show_as("screen", "light")
