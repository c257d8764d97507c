"""A notebook in a browser page: run cells, use the panel, and take pictures."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

START_SECONDS = 60  # until a kernel has started
# What the page itself complains of, with or without the panel.
HARMLESS = ("favicon", "ResizeObserver", "404 (Not Found)")

# Waits in the page itself for the bar to change after a key press, so that no message to this process is counted.
TIME_A_KEY = """() => {
  const bar = document.querySelector('.ftk-track').parentElement.parentElement;
  window.barTimes = window.barTimes || [];
  let pressed = 0;
  document.addEventListener('keydown', () => { pressed = performance.now(); }, true);
  new MutationObserver(() => {
    if (pressed) { window.barTimes.push(performance.now() - pressed); pressed = 0; }
  }).observe(bar, {childList: true, subtree: true, characterData: true});
}"""


class Notebook:
    """The page of one open notebook. Cells are named by the code that stands in them."""

    def __init__(self, page: Any, address: str, pictures: Path) -> None:
        self.page, self.pictures, self.errors, self.fetched = page, pictures, [], []
        host = address.split("/")[2]
        page.route(lambda url: url.startswith("http") and url.split("/")[2] != host, self._stand_in)
        page.on("console", lambda message: self._note(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self._note(str(error)))
        page.goto(address)
        page.locator(".jp-CodeCell .cm-content").first.wait_for(timeout=60_000)
        self.panel = page.locator(".ftk-panel")
        self._timing = False

    def _stand_in(self, route: Any) -> None:
        """Whatever lies elsewhere (the badges in the first cell) is an empty picture here, with or without a network."""
        self.fetched.append(route.request.url)
        route.fulfill(content_type="image/svg+xml", body='<svg xmlns="http://www.w3.org/2000/svg"/>')

    def _note(self, text: str) -> None:
        if not any(word in text for word in HARMLESS):
            self.errors.append(text)

    # ------------------------------------------------------------------------------------------------ cells

    def cell(self, code: str) -> Any:
        return self.page.locator(".jp-CodeCell").filter(has=self.page.locator(".jp-InputArea", has_text=code)).first

    def start(self, code: str) -> Any:
        """Run a cell and return it as soon as the kernel has it. The first press may come before the kernel is there."""
        cell = self.cell(code)
        prompt = cell.locator(".jp-InputPrompt")
        before, end = prompt.inner_text(), time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            cell.locator(".cm-content").click()
            self.page.keyboard.press("Control+Enter")
            for _ in range(10):
                if prompt.inner_text() != before:
                    return cell
                time.sleep(0.1)
        raise AssertionError(f"the cell {code!r} did not start")

    def wait_until_done(self, cell: Any, seconds: float = 60) -> None:
        prompt, end = cell.locator(".jp-InputPrompt"), time.monotonic() + seconds
        while not re.fullmatch(r"\[\d+\]:?", prompt.inner_text().strip()):
            assert time.monotonic() < end, f"still running after {seconds} s:\n{cell.inner_text()[-1500:]}"
            time.sleep(0.1)

    def run(self, code: str, seconds: float = 60) -> Any:
        cell = self.start(code)
        self.wait_until_done(cell, seconds)
        assert "Traceback" not in cell.inner_text(), cell.inner_text()
        return cell

    def interrupt(self) -> None:
        self.page.locator('[data-command="notebook:interrupt-kernel"], [title*="Interrupt"]').first.click()

    def wait_for_redraws(self, cell: Any, count: int, seconds: float = 90) -> None:
        """The one chart of a cell must show `count` different pictures while the cell runs."""
        seen, end = set(), time.monotonic() + seconds
        while len(seen) < count:
            assert time.monotonic() < end, (
                f"the chart was drawn {len(seen)} times in {seconds} s:\n{cell.inner_text()[-1500:]}"
            )
            images = cell.locator(".jp-OutputArea-output img")
            if images.count():
                assert images.count() == 1, "the chart must redraw in place"
                seen.add(images.first.get_attribute("src"))
            time.sleep(0.1)

    # ------------------------------------------------------------------------------------------------ the panel

    def section(self, name: str) -> None:
        self.panel.locator(".ftk-sections button", has_text=name).click()

    def choose(self, label: str, value: str) -> None:
        """Pick from the menu with this label the first line that contains `value`."""
        rows = self.panel.locator(".widget-dropdown").filter(has=self.page.get_by_text(label, exact=True))
        menu = rows.locator("select")
        menu.locator("option", has_text=value).first.wait_for(state="attached", timeout=10_000)
        lines = [text.replace("\u00a0", " ") for text in menu.locator("option").all_inner_texts()]
        menu.select_option(index=next(number for number, text in enumerate(lines) if value in text))

    def slider(self, label: str) -> Any:
        """The handle of a slider, once its section is open (which is the kernel's to say)."""
        row = self.panel.locator(".widget-inline-hbox").filter(has=self.page.get_by_text(label, exact=True))
        row.wait_for(state="visible", timeout=10_000)
        return row.locator(".noUi-handle")

    def press(self, label: str, key: str, times: int = 1) -> None:
        self.slider(label).focus()
        for _ in range(times):
            self.page.keyboard.press(key)

    def time_keys(self, label: str, keys: list[str]) -> list[float]:
        """Seconds from each key press on a slider to the redrawn bar."""
        if not self._timing:
            self.page.evaluate(TIME_A_KEY)
            self._timing = True
        self.page.evaluate("window.barTimes.length = 0")
        self.slider(label).focus()
        for number, key in enumerate(keys, start=1):
            self.page.keyboard.press(key)
            self.page.wait_for_function(f"window.barTimes.length >= {number}", timeout=10_000, polling=20)
            time.sleep(0.05)
        return [milliseconds / 1000 for milliseconds in self.page.evaluate("window.barTimes")]

    def bar(self) -> str:
        return self.panel.locator(".ftk-legend").inner_text()

    def wait_for_other_bar(self, before: str, seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while self.bar() == before:
            assert time.monotonic() < end, "the bar did not change"
            time.sleep(0.05)

    def wait_for_plan(self, text: str, seconds: float = 20) -> None:
        self.panel.locator(".ftk-plan, .ftk-problem").filter(has_text=text).first.wait_for(timeout=1000 * seconds)

    # ------------------------------------------------------------------------------------------------ pictures

    def picture(self, name: str, of: Any = None) -> None:
        """Save what the panel (or `of`) looks like now."""
        place = of or (self.panel if self.panel.count() else self.page)
        if place is not self.page:  # what lies under the edge of the scrolled notebook would be grey
            place.evaluate("element => element.scrollIntoView({block: 'start'})")
        place.screenshot(path=self.pictures / f"{name.replace(' ', '-')}.png")

    def looks(self, sections: tuple[str, ...]) -> None:
        """Every section in the light and in the dark theme, wide and on a page of 360 pixels."""
        usual = self.page.viewport_size
        for theme in ("Dark", "Light"):
            self.theme(theme)
            for width in (1200, 360):
                self.page.set_viewport_size({"width": width, "height": 1800})
                for name in sections:
                    self.section(name)
                    time.sleep(0.5)
                    self.picture(f"{theme.lower()} {width} {name.lower()}")
                    assert self.panel.evaluate("panel => panel.scrollWidth <= panel.clientWidth + 1"), (
                        f"{name} is cut at {width} px"
                    )
            self.page.set_viewport_size(usual)

    def theme(self, name: str) -> None:
        self.page.locator(".lm-MenuBar-itemLabel", has_text="Settings").click()
        self.page.locator(".lm-Menu-itemLabel", has_text="Theme").first.click()
        self.page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^JupyterLab {name}$")).click()
        self.page.locator(f'body[data-jp-theme-name="JupyterLab {name}"]').wait_for(state="attached", timeout=10_000)
