"""The console in real Chromium, on a served model with keys: what a person does with it, by mouse, keyboard and phone.

Screenshots lie in `build/screenshots` afterwards.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect, sync_playwright

from elasticrec.artifact.bundle import write_bundle
from elasticrec.artifact.registry import Registry
from elasticrec.cli.local_cluster import LocalClusterConfig, local_cluster
from elasticrec.cli.service import deploy
from elasticrec.data.sequences import Sequences, write_store
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.serving.auth import create_key

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "build" / "screenshots"
TITLES = [
    f"The {adjective} {noun} ({year})"
    for (adjective, noun), year in zip(
        itertools.product(
            ("Quiet", "Silver", "Distant", "Crimson", "Paper", "Northern"),
            ("Harbour", "Orchard", "Signal", "Voyage", "Garden", "Letter", "Bridge", "Station", "Winter", "Mirror"),
        ),
        itertools.cycle(range(1950, 2000)),
        strict=False,
    )
]
USERS, EVENTS = 30, 12


@dataclass(frozen=True)
class Served:
    """Where the service is, and its keys."""

    url: str
    shop: str  # read, events
    operator: str  # admin, too

    def client(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.operator}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, trust_env=False)

    def events_of(self, user: str) -> list[str]:
        """Titles, newest first."""
        with self.client() as client:
            events = client.get(f"/v1/users/{user}").json()["events"]
        return [event["title"] for event in reversed(events)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Production and another version in a registry, a data set of users, and keys."""
    folder = tmp_path_factory.mktemp("console")
    index = np.arange(1, len(TITLES) + 1)
    columns = {"item_index": index, "item_id": [f"i{number}" for number in index], "title": TITLES}
    items = pa.table(columns | {"categories": [["drama"]] * len(TITLES), "count": index[::-1]})
    registry = Registry(folder / "registry")
    for seed in range(2):
        torch.manual_seed(seed)
        network = Network(NetworkConfig(encoder=EncoderConfig(width=16, blocks=1, max_length=10)), len(TITLES))
        registry.publish(write_bundle(folder / f"{seed}", network, items, name="tiny", version="0"), "films")
    registry.set_label("films", "production", "1")
    sequences = Sequences(
        item_E=np.random.default_rng(0).integers(1, len(TITLES) + 1, USERS * EVENTS).astype(np.int32),
        offset_U1=np.arange(0, USERS * EVENTS + 1, EVENTS, dtype=np.int64),
        time_E=np.tile(1_700_000_000 + 86_400 * np.arange(EVENTS, dtype=np.int64), USERS),
    )
    users = pa.table({"user_index": np.arange(USERS), "user_id": [f"user {number}" for number in range(USERS)]})
    write_store(folder / "data", sequences, users, items, command="test")
    keys = folder / "keys.json"
    shop, operator = create_key(keys, "shop"), create_key(keys, "ops", ("read", "events", "admin"))
    with local_cluster(LocalClusterConfig(num_cpus=2, train_slots=0)) as cluster:
        arguments = {"bundle": f"{folder}/registry#films@production", "seed": str(folder / "data")}
        url = deploy(cluster, arguments | {"events": str(folder / "events.sqlite"), "keys": str(keys)})
        yield Served(url, shop, operator)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    assert program is not None, "chromium is missing; run deploy/system.sh test"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    opened = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    opened.set_default_timeout(10_000)
    yield opened
    opened.close()


@pytest.fixture
def page(context: BrowserContext, served: Served) -> Iterator[Page]:
    """The console with the shop's key; whatever a script or the policy complains of fails the test."""
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda told: complaints.append(told.text) if told.type == "error" else None)
    opened.add_init_script(
        f"sessionStorage.getItem('elasticrec.key') ?? sessionStorage.setItem('elasticrec.key', '{served.shop}')"
    )
    opened.goto(f"{served.url}/console")
    yield opened
    assert [told for told in complaints if not re.search("status of (40[139]|504)", told)] == []


def show(page: Page, user: str) -> None:
    page.get_by_role("combobox", name="User id").fill(user)
    page.get_by_role("button", name="Show", exact=True).click()
    expect(page.locator("#items button")).to_have_count(10)


def titles(page: Page) -> list[str]:
    return page.locator("#items .title").all_inner_texts()


def shot(page: Page, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True, animations="disabled")


def test_the_page_opens_without_a_key_and_asks_for_one(context: BrowserContext, served: Served) -> None:
    page = context.new_page()
    answer = page.goto(f"{served.url}/console")
    assert answer is not None
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    expect(page.locator("#health")).to_have_text("ready")
    page.get_by_role("combobox", name="User id").fill("user 1")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("no API key")
    page.get_by_label("API key", exact=True).fill(served.shop)
    page.get_by_role("button", name="Use it").first.click()
    expect(page.locator("#items button")).to_have_count(10)
    expect(page.get_by_role("alert")).to_be_hidden()
    assert page.evaluate("Object.keys(localStorage).length") == 0  # the key is in this tab alone


def test_a_click_is_an_event_and_the_list_follows(page: Page, served: Served) -> None:
    show(page, "user 2")
    shot(page, "light")
    before, known = titles(page), served.events_of("user 2")
    assert page.locator("#items .reason").first.inner_text().removeprefix("because you took ") in known
    page.locator("#items button").nth(2).click()
    expect(page.locator("#history li").first).to_contain_text(before[2])
    after = titles(page)
    assert before[2] not in after
    assert len(after) == 10
    assert served.events_of("user 2") == [before[2], *known]
    expect(page.locator("#said")).to_have_text(f"{before[2]} was taken; 10 new recommendations")
    expect(page.locator("#history-total")).to_have_text(f"({EVENTS + 1})")
    assert page.locator("#items button.new").count() == len(set(after) - set(before)) > 0
    assert float(page.locator("#total").inner_text().removesuffix(" ms")) > 0
    assert {"history", "encode", "retrieve"} <= set(page.locator("#stages th").all_inner_texts())


def test_search_answers_while_one_types_and_asks_seldom(page: Page, served: Served) -> None:
    show(page, "user 3")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/v1/search" in request.url else None)
    page.get_by_role("searchbox", name="Title or category").press_sequentially("harbor", delay=20)  # one letter off
    found = page.locator("#found button")
    expect(found.first).to_contain_text("Harbour")
    assert len(asked) == 1
    assert "user_id=user%203" in asked[0]
    shot(page, "search")
    wanted = found.first.locator("span").first.inner_text()
    found.first.click()
    expect(page.locator("#history li").first).to_contain_text(wanted)
    assert served.events_of("user 3")[0] == wanted
    page.get_by_role("searchbox").fill("zzzzzzzz")
    expect(page.locator("#found")).to_have_text("nothing found")


def test_dark_is_the_systems_wish_until_somebody_says_otherwise(page: Page) -> None:
    def brightness() -> float:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    assert brightness() > 200
    page.emulate_media(color_scheme="dark")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    assert brightness() < 60
    expect(page.get_by_role("button", name="Dark")).to_have_attribute("aria-pressed", "true")
    show(page, "user 4")
    shot(page, "dark")
    page.get_by_role("button", name="Dark").click()
    assert brightness() > 200
    page.reload()
    assert brightness() > 200  # remembered, against the system


def test_it_fits_a_phone(page: Page) -> None:
    page.set_viewport_size({"width": 375, "height": 740})
    show(page, "user 5")
    page.get_by_role("searchbox").fill("winter")
    expect(page.locator("#found button").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    heights = page.locator("#items button").evaluate_all("all => all.map(one => one.getBoundingClientRect().height)")
    assert min(heights) >= 44  # for a thumb
    shot(page, "phone")


def test_keys_alone_are_enough(page: Page, served: Served) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the recommendations")).to_be_focused()
    for _ in range(10):
        if page.evaluate("document.activeElement.id") == "user":
            break
        page.keyboard.press("Tab")
    page.keyboard.type("user 6")
    page.keyboard.press("Enter")
    expect(page.locator("#items button")).to_have_count(10)
    for _ in range(30):
        if page.evaluate("document.activeElement.closest('#items') !== null"):
            break
        page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    wanted = titles(page)[1]
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    page.keyboard.press("Enter")
    expect(page.locator("#history li").first).to_contain_text(wanted)
    expect(page.locator("#items button").nth(1)).to_be_focused()  # of the new list
    assert outline != "none"
    assert served.events_of("user 6")[0] == wanted


def test_every_control_has_a_name_and_a_heading_leads_each_part(page: Page) -> None:
    nameless = """() => [...document.querySelectorAll("input, select, button")].filter((one) => {
        const labels = [...(one.labels ?? [])].map((label) => label.textContent.trim());
        return ![one.textContent.trim(), one.getAttribute("aria-label"), ...labels].some(Boolean);
    }).map((one) => one.outerHTML)"""
    assert page.evaluate(nameless) == []
    assert page.locator("h1").count() == 1
    assert page.locator("main section").count() == page.locator("main section > h2").count() >= 5
    assert page.locator("html").get_attribute("lang") == "en"


def test_versions_move_with_an_admin_key_and_not_without(page: Page, served: Served) -> None:
    page.on("dialog", lambda dialog: dialog.accept())
    show(page, "user 7")
    page.get_by_label("Action").select_option("rollback")
    page.get_by_role("button", name="Do it").click()
    expect(page.locator("#moved")).to_contain_text("refused: this API key has not the scope 'admin'")
    with served.client() as client:
        assert client.get("/v1/admin/versions").json()["labels"] == {"production": "1"}
    page.get_by_label("Admin key").fill(served.operator)
    page.locator("#admin-form button").click()
    expect(page.locator("#users-known button").first).to_be_visible()  # an operator may look users up
    page.get_by_label("Action").select_option("canary")
    page.get_by_label("version", exact=True).select_option("2")
    page.get_by_label("share of the users in %").fill("100")
    page.get_by_role("button", name="Do it").click()
    expect(page.locator("#moved")).to_contain_text("canary takes 100 %", timeout=40_000)
    show(page, "user 7")
    expect(page.locator("#version")).to_have_text("films:2")
    page.get_by_role("button", name="Compare production and canary").click()
    sides = page.locator("#sides > div")
    expect(sides).to_have_count(2)
    expect(sides.first).to_contain_text("films:1")
    expect(sides.nth(1)).to_contain_text("of 10 as in production")
    assert sides.nth(1).locator("li").count() == 10
    shot(page, "versions")
    page.get_by_label("Action").select_option("promote")
    page.get_by_label("version", exact=True).select_option("2")
    page.get_by_role("button", name="Do it").click()
    expect(page.locator("#moved")).to_contain_text("version 2; every replica", timeout=40_000)
    with served.client() as client:
        assert client.get("/v1/admin/versions").json()["labels"]["production"] == "2"
    page.get_by_label("Action").select_option("rollback")
    page.get_by_role("button", name="Do it").click()
    expect(page.locator("#moved")).to_contain_text("version 1; every replica", timeout=40_000)
    with served.client() as client:  # the wish of the page once more, as a proxy may send it
        again = client.post("/v1/admin/versions", json={"action": "rollback", "leaving": "2"})
        assert (again.status_code, again.json()["detail"].split(":")[0]) == (
            409,
            "'production' of 'films' is at version 1, not 2",
        )


def test_an_earlier_lookup_is_given_up_and_a_later_one_is_shown(page: Page, served: Served) -> None:
    held: list[Route] = []

    def hold(route: Route) -> None:  # the store is slow; Playwright takes no method of a list
        held.append(route)

    page.evaluate(f"sessionStorage.setItem('elasticrec.admin', '{served.operator}')")
    page.reload()
    expect(page.locator("#users-known button").first).to_be_visible()
    page.route(re.compile(r"admin/users.*prefix=user%201$"), hold)
    field = page.get_by_role("combobox", name="User id")
    with page.expect_request_finished(lambda request: request.url.endswith("prefix=user%2022")):
        with page.expect_event("requestfailed") as failed:
            field.fill("user 1")
            page.wait_for_timeout(400)
            field.fill("user 22")
        assert failed.value.url.endswith("prefix=user%201")
    expect(page.locator("#users option")).to_have_count(1)
    expect(page.locator("#admin-form")).to_be_hidden()


def test_a_second_move_is_told_that_one_goes_on(page: Page, served: Served) -> None:
    def answer(status: int, detail: str) -> Callable[[Route], None]:
        def fulfil(route: Route) -> None:
            if route.request.method == "POST":
                route.fulfill(status=status, json={"detail": detail})
            else:
                route.continue_()

        return fulfil

    page.on("dialog", lambda dialog: dialog.accept())
    page.evaluate(f"sessionStorage.setItem('elasticrec.admin', '{served.operator}')")
    page.get_by_label("Action").select_option("rollback")
    page.route("**/v1/admin/versions", answer(409, "another move goes on in this replica"))
    page.get_by_role("button", name="Do it").click()
    expect(page.locator("#moved")).to_have_text("refused: another move goes on in this replica")
    page.unroute("**/v1/admin/versions")
    page.route("**/v1/admin/versions", answer(504, "the time that the request allowed is over"))
    page.get_by_role("button", name="Do it").click()
    expect(page.locator("#moved")).to_contain_text("goes on; look at the labels")


def test_a_wheel_has_the_page(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "platform", tmp_path / "platform", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__")
    )
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-c", "import setuptools.build_meta as b; print(b.build_wheel('.'))"]
    done = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as wheel:
        names = wheel.namelist()
    assert {f"elasticrec/serving/console/console.{kind}" for kind in ("html", "css", "js")} <= set(names)
