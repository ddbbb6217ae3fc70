"""The training tab in a browser: facts, curves, samples, a history that does not mean well."""

import json
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

HOSTILE = "<img src=x onerror=alert(1)> ${alert(2)} {{alert(3)}}"


@pytest.fixture
def history(store) -> Path:
    """A history in the variant's folder, its strings hostile."""
    path = store.get("masks").entry.folder / "training.jsonl"
    rows = [{"kind": "junk"}]
    for step in range(0, 101, 10):
        mechanisms = [{HOSTILE: [0.5 + step / 200] * 2, "last(0)": [0.5, 0.4]} for _ in range(2)]
        text = {"prompt": HOSTILE, "base": f"base {HOSTILE}", "variant": f"step {step} {HOSTILE}"}
        rows += [
            {"kind": "train", "step": step, "stage": HOSTILE, "loss": 2 - step / 100, "lr": 1e-3, "seconds": step},
            {"kind": "eval", "step": step, "kl": 1 - step / 200, "perplexity": 30, "mechanisms": mechanisms},
            {"kind": "samples", "step": step, "texts": [text]},
        ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    yield path
    path.unlink()


def test_a_history_is_shown(page: Page, history: Path):
    page.get_by_role("tab", name="Training").click()
    expect(page.locator("#training-facts")).to_contain_text("KL, validation0.5 nats/token")
    curves = page.locator("#training-curves .chart")
    expect(curves).to_have_count(4)
    expect(curves.first).to_contain_text(HOSTILE)
    drawing = curves.filter(has_text="KL to the base").locator("svg")
    drawing.press("ArrowRight")
    expect(curves.filter(has_text="KL to the base").locator(".keys")).to_contain_text("KL1 nats")
    learned = page.locator("#training-learned .chart")
    expect(learned).to_have_count(2)
    expect(learned.first.locator("path.series")).to_have_count(2)
    assert page.locator("#training-tab img, #training-learned img, #training-curves img").count() == 0


def test_the_checkpoint_is_in_the_address(page: Page, url: str, history: Path):
    page.get_by_role("tab", name="Training").click()
    page.locator("#training-model").get_by_role("radio", name="base").check()
    page.wait_for_url("**training_model=base**")
    page.reload()
    expect(page.locator("#training-model").get_by_role("radio", name="base")).to_be_checked()
    page.goto(f"{url}?tab=training&training_model=gone")
    expect(page.locator("#training-said")).to_contain_text("'gone'")


def test_samples_by_step(page: Page, history: Path):
    page.get_by_role("tab", name="Training").click()
    samples = page.locator("#training-samples")
    expect(samples).to_contain_text(f"step 100 {HOSTILE}")
    expect(samples).to_contain_text(f"base {HOSTILE}")
    slider = samples.get_by_label("Step of training")
    slider.focus()
    slider.press("ArrowLeft")
    expect(samples).to_contain_text(f"step 90 {HOSTILE}")
    slider.press("Home")
    expect(samples).to_contain_text(f"step 0 {HOSTILE}")
    assert samples.locator("img").count() == 0


@pytest.fixture
def card(store) -> Path:
    """A card in the variant's folder with slices, a name among them hostile."""
    path = store.get("masks").entry.folder / "README.md"
    before = path.read_bytes() if path.exists() else None
    lines = ["| tokens that are | KL |", "| --- | --- |", f"| {HOSTILE} | 0.5 |"]
    table = "\n".join(lines)
    path.write_text(f"# masks\n\n## Measured further\n\n### Context 512\n\n{table}\n", encoding="utf-8")
    yield path
    path.unlink() if before is None else path.write_bytes(before)


def test_what_must_be_looked_up(page: Page, card: Path):
    page.get_by_role("tab", name="Training").click()
    slices = page.locator("#training-slices")
    expect(slices.get_by_role("columnheader")).to_have_text(["tokens", "context", "KL"])
    expect(slices.get_by_role("cell")).to_have_text(["512", "0.5"])
    expect(slices.get_by_role("rowheader")).to_have_text(HOSTILE)
    assert slices.locator("img").count() == 0
    page.locator("#training-model").get_by_role("radio", name="base").check()
    expect(slices).to_contain_text("Its card has no such figures")


def test_a_checkpoint_without_a_history(page: Page):
    page.get_by_role("tab", name="Training").click()
    page.locator("#training-model").get_by_role("radio", name="base").check()
    expect(page.locator("#training-facts")).to_contain_text("softmax")
    for part in ("curves", "samples", "learned"):  # no empty frames
        expect(page.locator(f"#training-{part}")).to_have_count(0)
    expect(page.get_by_text("What it wrote on the way")).to_have_count(0)
