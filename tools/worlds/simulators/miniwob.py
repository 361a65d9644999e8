"""The hosting side of MiniWoB++: one Chromium, and a page in a context of its own for each live episode."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import miniwob
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import Locator, sync_playwright

from tools.worlds.simulators.live import Frame, RawCall, Settings
from tools.worlds.simulators.miniwob_expert import next_action

PAGES = Path(miniwob.__file__).parent / "html" / "miniwob"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --mute-audio --js-flags=--max-old-space-size=128"
).split()
ACTION_TIMEOUT_MS = 2000
"""How long an element may take until it can be clicked."""
SETTLING_MS = 1500
"""How far the page's clock is moved on after an action: what moves has then come to rest."""
SHARES = {"train": (0, 70), "validation": (70, 80), "heldout": (80, 100)}
"""Of all that a page can ask, in percent; a digest of what it asks says where it belongs, so that no split holds
another's task."""
MAX_DRAWS = 300
"""Seeds that are tried for a task."""
_START = """seed => {
  core.EPISODE_MAX_TIME = 1e9;  // the agent's thinking is not timed
  Math.seedrandom(seed);
  core.startEpisodeReal();
  core.hideDisplay();
  const asked = core.getUtterance();
  return [asked.utterance || asked, document.body.innerText];
}"""


def _percent(asked: Sequence[str]) -> int:
    return int.from_bytes(hashlib.sha256(repr(asked).encode()).digest()[:4], "big") % 100


class _Page:
    """One task on one page."""

    def __init__(self, browser: Any, settings: Settings, seed: str) -> None:
        self._name = settings["page"]
        self._context = browser.new_context(
            viewport={"width": 640, "height": 640}, locale="en-US", timezone_id="UTC", reduced_motion="reduce"
        )
        self._context.set_default_timeout(ACTION_TIMEOUT_MS)
        self._page = self._context.new_page()
        # Its clock stands still but for what we move it on: animations end, and nothing depends on how fast we are.
        self._page.clock.install(time=0)
        self._page.goto((PAGES / f"{self._name}.html").as_uri(), timeout=20_000)
        self._page.clock.pause_at(60_000)
        self._done: list[RawCall] = []
        self.percent = self.start(seed)
        self._observe()

    def start(self, seed: str) -> int:
        """Set the task of a seed up, and say where it belongs."""
        asked = self._page.evaluate(_START, seed)
        self._utterance: str = asked[0]
        return _percent(asked)

    def do(self, name: str, arguments: Mapping[str, Any]) -> None:
        self._done.append((name, arguments))
        element = self._page.locator(f"aria-ref={arguments['ref']}")
        try:
            if element.count() == 0:
                problem = f"Error: there is no element {arguments['ref']} on the page."
            else:
                problem = self._act(element, name, arguments)
        except PlaywrightError:
            problem = f"Error: that cannot be done with {arguments['ref']}."
        self._observe(problem)

    def _act(self, element: Locator, name: str, arguments: Mapping[str, Any]) -> str:
        if name == "click":
            element.click()
        elif element.evaluate("element => element.tagName") == "SELECT":
            element.select_option(label=arguments["text"])
        else:
            element.fill(arguments["text"])
        return ""

    def _observe(self, problem: str = "") -> None:
        self._page.clock.run_for(SETTLING_MS)
        is_done, reward = self._page.evaluate("[WOB_DONE_GLOBAL, WOB_RAW_REWARD_GLOBAL]")
        self._snapshot = "" if is_done else self._page.locator("body").aria_snapshot(mode="ai")
        text = f"The episode is over: reward {reward:g}." if is_done else self._snapshot
        text = f"{problem}\n{text}".strip()
        if not self._done:
            text = f"{self._utterance}\n\n{text}"
        state = hashlib.sha256(f"{is_done} {reward} {self._snapshot}".encode()).hexdigest()[:16]
        self.frame = Frame(text, bool(is_done), min(1.0, max(0.0, float(reward))) if is_done else 0.0, state)

    def expert(self) -> RawCall | None:
        return next_action(self._name, self._utterance, self._snapshot, self._done)

    def close(self) -> None:
        self._context.close()


class MiniWobHost:
    """The browser."""

    def __init__(self) -> None:
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(
            executable_path=shutil.which("chromium"), headless=True, args=list(FLAGS)
        )

        self._seeds: dict[str, str] = {}

    def open(self, settings: Settings) -> _Page:
        key = repr(sorted(settings.items()))
        if key in self._seeds:
            return _Page(self._browser, settings, self._seeds[key])
        first, last = SHARES[settings["split"]]
        seeds = (f"{settings['index']}/{number}" for number in range(MAX_DRAWS))
        seed: str | None = next(seeds)
        page = _Page(self._browser, settings, seed)
        while not first <= page.percent < last:
            # To try seeds on a page that was used is quick, but it may then ask other things: a fresh one counts.
            seed = next((seed for seed in seeds if first <= page.start(seed) < last), None)
            if seed is None:
                raise RuntimeError(f"{settings['page']} has too few tasks for the split {settings['split']}")
            page.close()
            page = _Page(self._browser, settings, seed)
        self._seeds[key] = seed
        return page
