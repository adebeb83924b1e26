"""report.html as a browser shows it: in headless Chromium (Debian's package `chromium`), checked by axe-core."""

import functools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, Page, sync_playwright

from g4trainer import report
from trainer.made_up_run import make
from trainer.test_report_content import samples

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LABELS = ("Abyssinian", "Bengal", "Birman", "Bombay", "Egyptian Mau", "Maine Coon", "Persian", "Ragdoll", "Siamese")
SCREENS = [(width, scheme) for width in (1440, 390) for scheme in ("light", "dark")]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


@dataclass
class Opened:
    """The report in one browser window, and what it said and asked for."""

    page: Page
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    made = make(folder, samples(LABELS, 200, width=120, height=90), LABELS, mistakes=0.2)
    report.write_report(made.run, made.results, made.test)
    return made.run.report.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@functools.cache
def _open(browser: Browser, address: str, width: int, scheme: str) -> Opened:
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()  # type: ignore[arg-type]
    opened = Opened(page)
    page.on("console", lambda message: opened.messages.append(message.text))
    page.on("pageerror", lambda error: opened.messages.append(str(error)))
    page.on("request", lambda request: opened.requests.append(request.url))
    page.goto(address)
    return opened


@pytest.fixture(params=SCREENS, ids=lambda screen: f"{screen[0]}-{screen[1]}")
def opened(request: pytest.FixtureRequest, browser: Browser, address: str) -> Opened:
    return _open(browser, address, *request.param)


@pytest.fixture
def desk(browser: Browser, address: str) -> Page:
    return _open(browser, address, 1440, "light").page


def test_nothing_is_asked_for_and_nothing_goes_wrong(opened: Opened, address: str) -> None:
    assert [url for url in opened.requests if not url.startswith("data:")] == [address]
    assert opened.messages == []


def test_every_image_shows(opened: Opened) -> None:
    opened.page.mouse.wheel(0, 20_000)
    shown = opened.page.eval_on_selector_all("main img", "all => all.map(i => i.complete && i.naturalWidth > 0)")
    assert len(shown) > 20
    assert all(shown)


def test_the_page_is_as_wide_as_the_window(opened: Opened) -> None:
    assert opened.page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0


def test_it_is_accessible(opened: Opened) -> None:
    found = Axe().run(opened.page).response
    assert len(found["passes"]) > 25, "axe-core looked at the page"
    assert [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found["violations"]] == []


def test_plots_take_the_colours_of_the_scheme(browser: Browser, address: str) -> None:
    stroke = "getComputedStyle(document.querySelectorAll('figure svg path[clip-path]')[1]).stroke"
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = (_open(browser, address, 1440, scheme).page for scheme in ("light", "dark"))
    assert (light.evaluate(ground), dark.evaluate(ground)) == ("rgb(246, 246, 243)", "rgb(15, 18, 21)")
    strokes = {page.evaluate(stroke) for page in (light, dark)}
    assert strokes <= {"rgb(11, 110, 105)", "rgb(86, 207, 194)", "rgb(227, 227, 221)", "rgb(43, 49, 56)"}
    assert len(strokes) == 2


def test_the_table_sorts_by_mouse_and_keyboard(desk: Page) -> None:
    f1 = desk.get_by_role("button", name="F1")
    f1.click()
    values = column(desk, 5)
    assert len(values) == len(LABELS)
    assert values == sorted(values, reverse=True) != column(desk, 1)
    assert heading(desk, 5) == "descending"
    assert desk.get_by_role("status").inner_text() == "Sorted by F1, descending."
    f1.focus()
    desk.keyboard.press("Enter")
    assert column(desk, 5) == sorted(values)
    assert heading(desk, 5) == "ascending"
    desk.get_by_role("button", name="class").click()
    assert column(desk, 0) == sorted(LABELS)
    assert (heading(desk, 0), heading(desk, 5)) == ("ascending", "none")


def column(page: Page, index: int) -> list[str]:
    cells = f"rows => rows.map(row => row.cells[{index}].textContent.trim())"
    values: list[str] = page.eval_on_selector_all("#class-table tbody tr", cells)
    return values


def heading(page: Page, index: int) -> str | None:
    return page.locator("#class-table thead th").nth(index).get_attribute("aria-sort")


def test_the_keyboard_reaches_the_results_first(browser: Browser, address: str) -> None:
    page = _open(browser, address, 390, "light").page
    page.evaluate("window.scrollTo(0, 0); document.activeElement.blur()")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_paper_is_light_and_has_no_navigation(browser: Browser, address: str, tmp_path: Path) -> None:
    page = _open(browser, address, 390, "dark").page
    page.emulate_media(media="print")
    assert page.locator("nav").is_hidden()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.pdf(format="A4").startswith(b"%PDF-")
    page.emulate_media(media="screen")
