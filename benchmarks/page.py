"""How busy is the page while texts are written after a long prompt?

    python benchmarks/page.py --words 600 --tokens 100

starts the app with the bundled checkpoints, lets a headless Chromium generate, and reports as JSON for how much of the
time from the click to the last text the page's main thread worked, and in what: a page that is busy all the time cannot
be scrolled or stopped. Chromium counts a task's time by the clock, so other work on the machine makes it longer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time

from playwright.sync_api import CDPSession, Page, sync_playwright

from benchmarks.load import serve

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
PARTS = {"all": "TaskDuration", "script": "ScriptDuration", "style": "RecalcStyleDuration", "layout": "LayoutDuration"}
WORDS = (
    "the a and of to in he she was had it that Mary John said came went house sea night old man upon with his her "
    "long road door light hand looked never could again where there stood ship letter captain"
)


def prompt_of(words: int) -> str:
    """So many common words, in an order that is always the same."""
    draw = random.Random(0)
    return " ".join(draw.choice(WORDS.split()) for _ in range(words)) + " and then"


def seconds(session: CDPSession) -> dict[str, float]:
    """Seconds that the main thread has worked since it started, by kind of work."""
    metrics = {each["name"]: each["value"] for each in session.send("Performance.getMetrics")["metrics"]}
    return {part: metrics[name] for part, name in PARTS.items()}


def generate(page: Page, words: int, tokens: int) -> dict[str, object]:
    """One run of all the models on the page."""
    page.get_by_label("Prompt").fill(prompt_of(words))
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    before, start = seconds(session), time.monotonic()
    page.get_by_role("button", name="Generate", exact=True).click()
    columns = page.locator("#generate-columns section")
    columns.filter(has_text="…").first.wait_for(timeout=120_000)  # writing has begun
    page.wait_for_function(
        "() => { const all = [...document.querySelectorAll('#generate-columns .status')].map((s) => s.textContent);"
        " return all.length && all.every((text) => !text.includes('…') && !/waiting|loading/.test(text)); }",
        timeout=300_000,
    )
    wall, after = time.monotonic() - start, seconds(session)
    busy = {part: round(after[part] - before[part], 2) for part in PARTS}
    return {
        "words": words,
        "tokens": tokens,
        "status": columns.locator(".status").all_text_contents(),
        "seconds": round(wall, 2),
        "busy_seconds": busy,
        "busy_share": round(busy["all"] / wall, 3),
    }


def main() -> int:
    """Runs the measurement and prints the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--words", type=int, default=600, help="length of the prompt")
    parser.add_argument("--tokens", type=int, default=100, help="new tokens")
    options = parser.parse_args()
    process, url = serve()
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUMS)), None)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.goto(url)
            page.locator("#generate-columns .token").first.wait_for(timeout=120_000)
            page.get_by_role("button", name="Sampling").click()
            field = page.get_by_role("spinbutton", name="number input for Length")
            page.wait_for_timeout(500)
            field.fill(str(options.tokens))
            field.press("Tab")
            print(json.dumps(generate(page, options.words, options.tokens), indent=2))
            browser.close()
    finally:
        process.terminate()
        process.wait(30)
    return 0


if __name__ == "__main__":
    sys.exit(main())
