"""What is asked of every page that the package writes."""

from __future__ import annotations

import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
_VOID = {"meta", "br", "wbr"}


class Reader(HTMLParser):
    """Checks that every element is closed and that nothing is loaded; keeps links and names within the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.names: list[str] = []
        self.feed(text)
        assert self.open == []
        assert "@import" not in text
        assert set(re.findall(r"url\((.)", text)) <= {"#"}

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attributes)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe", "image")
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]
        self.names += [value or "" for name, value in attributes if name == "id"]
        assert all((value or "").startswith("#") for name, value in attributes if name == "xlink:href")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def assert_fits_a_phone_and_a_screen(path: Path, folder: Path) -> None:
    """
    In a real browser: nothing is wider than its window, and something is drawn.

    :param path: of the page
    :param folder: for what the browser needs
    """
    page = escape(path.read_text())
    frames = "".join(f'<iframe srcdoc="{page}" width="{width}" height="3000"></iframe>' for width in (390, 1100))
    measure = "document.title = Array.from(window, frame => frame.document.documentElement.scrollWidth)"
    (folder / "both.html").write_text(f"<title></title>{frames}<script>onload = () => {{ {measure} }}</script>")
    picture = folder / "picture.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1600,3000"]
    options += [f"--user-data-dir={folder / 'browser'}", f"--screenshot={picture}", "--dump-dom"]
    arguments = [str(BROWSER), *options, (folder / "both.html").as_uri()]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True)
    widths = re.search(r"<title>(\d+),(\d+)</title>", done.stdout)
    assert widths is not None
    assert (int(widths[1]), int(widths[2])) == (390, 1100)
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    for half in (pixels[:, 20:380], pixels[:, 420:1500]):
        assert len(np.unique(half.reshape(-1, 3), axis=0)) > 50
