"""The annotation pages in a real browser, by mouse, keyboard and touch. Skipped without Playwright and Chromium."""

import json
import re
import shutil
import threading
import time

import cv2
import numpy as np
import pytest
import uvicorn

from richhf_data import schema
from richhf_data.annotate import export, server, store

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
PROMPT = "a yellow cat, on a table"
HEIGHT, WIDTH = 90, 160
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield one
        one.close()


class Site:
    """A project that is served, and pages of its annotators."""

    def __init__(self, folder, browser, items=3, **given):
        self.browser, self.store, self.errors = browser, store.Store(folder, {"wanted": 2} | given), []
        pair = self.store.settings.kind == "side_by_side"
        new = []
        for number in range(items):
            files = [f"{side}-cat{number}.png" for side in "ab"[: 1 + pair]]
            for shade, file in enumerate(files):
                image = np.full((HEIGHT, WIDTH, 3), 60 + 40 * number + 20 * shade, np.uint8)
                (folder / store.PICTURES / file).write_bytes(cv2.imencode(".png", image)[1])
            new.append(store.New(f"cat{number}", PROMPT, tuple(files), ("before", "after") if pair else ()))
        self.store.add(new)
        self.port = 0
        self.start()

    def start(self):
        bound = server.listen("127.0.0.1", self.port, True)
        self.port = bound.getsockname()[1]
        config = uvicorn.Config(server.app(self.store, True), log_level="error", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [bound]})
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self):
        self.server.should_exit = True
        self.thread.join()

    def page(self, name="ada", wait="#item:not([hidden])", **options):
        context = self.browser.new_context(**{"viewport": {"width": 1200, "height": 760}} | options)
        page = context.new_page()
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(f"http://127.0.0.1:{self.port}/enter/{self.store.key(self.store.invite(name))}")
        page.get_by_role("link", name="Begin").click()
        page.wait_for_selector(wait)
        loaded(page)
        return page

    def answers(self, name="ada"):
        return [json.loads(row["answer"] or "null") for row in self.store.work() if row["name"] == name and row["answer"]]


@pytest.fixture
def site(tmp_path, browser):
    made = []

    def make(**given):
        made.append(Site(tmp_path, browser, **given))
        return made[-1]

    yield make
    for one in made:
        one.stop()
        one.store.close()
        assert not one.errors


def place(page, x, y):
    """Where a point of the picture is on the page, before zooming: it fits the canvas and is in its middle."""
    box = page.locator("#canvas").bounding_box()
    scale = min(box["width"] / WIDTH, box["height"] / HEIGHT)
    left, top = (box["width"] - scale * WIDTH) / 2, (box["height"] - scale * HEIGHT) / 2
    return box["x"] + left + x * scale * WIDTH, box["y"] + top + y * scale * HEIGHT


def submitted(page, count):
    sync_api.expect(page.locator("#progress")).to_have_text(re.compile(f"^{count} done"))
    loaded(page)


def loaded(page):
    page.wait_for_selector("#item[aria-busy=false], #item[hidden]", state="attached")


def near(found, expected):
    np.testing.assert_allclose(found, expected, atol=0.004)


def press(page, keys):
    for key in keys.split():
        page.keyboard.press(key)


def test_rich_by_mouse(site):
    """Marks, moves, removes, undoes; words; scores; an answer that is not complete is not sent."""
    one = site()
    page = one.page()
    page.mouse.click(*place(page, 0.25, 0.5))
    page.mouse.click(*place(page, 0.75, 0.25))
    page.mouse.move(*place(page, 0.75, 0.25))
    page.mouse.down()
    page.mouse.move(*place(page, 0.8, 0.4), steps=4)
    page.mouse.move(*place(page, 0.9, 0.5), steps=4)
    page.mouse.up()
    page.mouse.click(*place(page, 0.5, 0.9))
    page.mouse.click(*place(page, 0.5, 0.9), button="right")
    page.locator(".mark.misalignment, .misalignment .mark").click()
    page.mouse.click(*place(page, 0.1, 0.1))
    page.get_by_role("button", name="Undo").click()
    page.get_by_role("button", name="Redo").click()
    page.get_by_role("button", name="yellow", exact=True).click()
    page.get_by_role("button", name="cat", exact=True).click()
    page.get_by_role("button", name="cat", exact=True).click()
    for name, value in (("plausibility", 2), ("alignment", 3), ("aesthetics", 4)):
        page.locator(f"[data-score={name}] label", has_text=str(value)).click()
    page.get_by_role("button", name="Submit").click()
    assert page.locator("#problem").text_content() == "Still to answer: overall."
    page.locator("[data-score=overall] label", has_text="5").click()
    page.get_by_role("button", name="Submit").click()
    submitted(page, 1)
    (answer,) = one.answers()
    near(answer["points"]["implausibility"], [[0.25, 0.5], [0.9, 0.5]])
    near(answer["points"]["misalignment"], [[0.1, 0.1]])
    assert answer["words"] == [1] and answer["nothing"] == []
    assert answer["scores"] == dict(zip(schema.SCORES, (2, 3, 4, 5), strict=True))
    export.export(one.store, one.store.folder / "export")
    assert json.loads((one.store.folder / "export/annotations.jsonl").read_text())["misaligned"] == [1]


def test_rich_by_keyboard_alone(site):
    one = site()
    page = one.page()
    press(page, "p ArrowRight ArrowRight Shift+ArrowUp Space")  # from the middle: 0.52, 0.4
    press(page, "Shift+ArrowLeft Space Delete u r Tab Shift+ArrowDown Space Delete")  # both later points are removed
    press(page, "w ArrowRight ArrowRight Space ArrowLeft Space Space")
    press(page, "1 2 Backspace 3 4 5 Enter")
    submitted(page, 1)
    press(page, "n Tab n 5 5 5 5 Enter")
    submitted(page, 2)
    first, second = one.answers()
    near(first["points"]["implausibility"], [[0.52, 0.4]])
    assert first["points"]["misalignment"] == [] and first["words"] == [2]
    assert first["scores"] == dict(zip(schema.SCORES, (1, 3, 4, 5), strict=True))
    assert second["nothing"] == ["implausibility", "misalignment"]
    press(page, "ArrowLeft")
    page.wait_for_selector("text=your answer 2 of 2")
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("text=your answer 1 of 2")
    loaded(page)
    press(page, "Backspace 1 Enter")  # back, and edited
    submitted(page, 2)
    assert one.answers()[0]["scores"]["overall"] == 1 and len(one.answers()) == 2
    press(page, "s 2")
    page.wait_for_selector("#empty:not([hidden])")
    assert [row["reason"] for row in one.store.work()] == [None, None, "broken"]
    for key, dialog in (("?", "#keys-dialog"), ("g", "#guidelines-dialog")):
        page.keyboard.press(key)
        assert page.locator(dialog).is_visible()
        page.keyboard.press("Escape")
        assert page.locator(dialog).is_hidden()


def test_the_other_keys(site):
    """k, zoom in, out and fit, undo and redo with control, the score that was taken back."""
    one = site()
    page = one.page()
    press(page, "p k + + Shift+ArrowRight Space - - 0")  # a step is as much shorter as the zoom is larger
    press(page, "Space Control+z Control+z Control+y Control+z Control+Shift+z k n")
    press(page, "5 Backspace 1 2 3 4 Enter")
    submitted(page, 1)
    (answer,) = one.answers()
    near(answer["points"]["misalignment"], [[0.5 + 0.1 / 1.5**2, 0.5]])
    assert answer["nothing"] == ["implausibility"] and list(answer["scores"].values()) == [1, 2, 3, 4]


def test_zoomed_points_land_on_the_right_pixel(site):
    one = site()
    page = one.page()
    about = np.array(place(page, 0.7, 0.3))
    size = np.array(place(page, 1, 1)) - place(page, 0, 0)  # of the picture on the page
    page.mouse.move(*about)
    page.mouse.wheel(0, -500)  # what is under the pointer stays there
    page.mouse.click(*about)
    page.keyboard.down("Alt")
    page.mouse.move(*about + 60)
    page.mouse.down()
    page.mouse.move(*about + (20, 40), steps=5)
    page.mouse.up()
    page.keyboard.up("Alt")
    page.mouse.click(*about + (50, -90))
    page.get_by_role("button", name="Fit").click()
    page.mouse.click(*place(page, 0.2, 0.8))
    page.get_by_role("button", name="Nothing is misaligned").click()
    press(page, "1 1 1 1 Enter")
    submitted(page, 1)
    panned = (0.7, 0.3) + (np.array((50, -90)) - (-40, -20)) / (size * np.exp(500 / 400))
    near(one.answers()[0]["points"]["implausibility"], [[0.7, 0.3], panned, [0.2, 0.8]])


def test_a_draft_survives_a_reload_and_a_second_window(site):
    one = site()
    page = one.page()
    page.mouse.click(*place(page, 0.25, 0.5))
    press(page, "4")
    page.wait_for_selector("text=saved")
    page.reload()
    page.wait_for_selector("text=your draft is back")
    assert page.locator("input[name=plausibility]:checked").get_attribute("value") == "4"
    other = page.context.new_page()
    other.goto(page.url)
    other.wait_for_selector("text=your draft is back")
    other.get_by_role("button", name="Nothing is misaligned").click()
    press(other, "3 3 3 Enter")
    submitted(other, 1)
    submitted(page, 1)  # the first window follows
    (answer,) = one.answers()
    near(answer["points"]["implausibility"], [[0.25, 0.5]])
    assert [row["state"] for row in one.store.work()] == ["done", "leased"]


def test_a_draft_stays_with_its_picture(site):
    """Back at once after a mark, and the arrow after a click on a score."""
    one = site()
    page = one.page()
    press(page, "n Tab n 2 2 2 2 Enter")
    submitted(page, 1)
    page.mouse.click(*place(page, 0.25, 0.5))
    page.locator("[data-score=plausibility] label", has_text="4").click()
    press(page, "ArrowLeft")
    page.wait_for_selector("text=your answer 1 of 1")
    page.wait_for_timeout(700)
    first, second = one.store.work()
    assert first["draft"] is None and json.loads(first["answer"])["nothing"] == ["implausibility", "misalignment"]
    draft = json.loads(second["draft"])["answer"]
    assert draft["scores"] == {"plausibility": 4} and len(draft["points"]["implausibility"]) == 1
    press(page, "ArrowRight")
    page.wait_for_selector("text=your draft is back")


def test_nothing_is_answered_before_the_picture_is_there(site):
    one = site(kind="binary")
    page = one.page()
    page.keyboard.press("1")
    submitted(page, 1)
    waiting = []
    page.route("**/picture/**", lambda route: waiting.append(route))
    page.keyboard.press("1")
    page.wait_for_selector("text=2 done")
    while not waiting:
        page.wait_for_timeout(50)
    press(page, "2 2")  # what is on the screen is not there yet
    assert not page.locator("#left").evaluate("image => image.complete && image.naturalWidth")
    page.wait_for_timeout(300)
    assert len(one.answers()) == 2
    waiting[-1].continue_()
    loaded(page)
    page.keyboard.press("2")
    page.wait_for_selector("#empty:not([hidden])")
    assert one.answers()[2] == {"right": False}


def test_a_lost_connection_loses_nothing(site):
    one = site()
    page = one.page()
    one.stop()
    press(page, "n Tab n 2 2 2 2")
    page.wait_for_selector("text=The server does not answer. Your work is kept in this browser.")
    page.keyboard.press("Enter")
    one.start()
    submitted(page, 1)
    assert page.locator("#offline").is_hidden()
    assert one.answers() == [
        {"points": {"implausibility": [], "misalignment": []}, "nothing": ["implausibility", "misalignment"], "words": [],
         "scores": dict.fromkeys(schema.SCORES, 2)}
    ]  # fmt: skip


def test_a_narrow_screen_and_touch(site):
    one = site()
    page = one.page(viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.touchscreen.tap(*place(page, 0.3, 0.6))
    page.locator(".misalignment .nothing").tap()
    for box in page.locator(".score").all():
        box.locator("label").nth(2).tap()
    page.get_by_role("button", name="Submit").tap()
    submitted(page, 1)
    near(one.answers()[0]["points"]["implausibility"], [[0.3, 0.6]])


def test_only_what_is_configured_is_asked(site):
    one = site(questions=("words", "overall"))
    page = one.page()
    assert page.locator(".score").count() == 1 and page.locator(".mark").count() == 0
    press(page, "n 5 Enter")
    submitted(page, 1)
    assert one.answers() == [{"points": {}, "nothing": ["misalignment"], "scores": {"overall": 5}, "words": []}]


def test_binary_by_key_and_mouse(site):
    one = site(kind="binary")
    page = one.page()
    page.keyboard.press("1")
    submitted(page, 1)
    page.get_by_role("button", name="Wrong").click()
    submitted(page, 2)
    press(page, "ArrowLeft")
    page.wait_for_selector("text=your answer 2 of 2")
    loaded(page)
    assert page.locator(".choice.chosen").text_content().split()[-1] == "Wrong"
    page.keyboard.press("y")
    submitted(page, 2)
    assert one.answers() == [{"right": True}, {"right": True}]


def test_side_by_side_by_key_and_mouse(site):
    one = site(kind="side_by_side", question="Which one is nicer?")
    page = one.page()
    assert page.get_by_text("Which one is nicer?", exact=True).is_visible() and page.locator("#pictures img").count() == 2
    page.keyboard.press("4")
    submitted(page, 1)
    page.get_by_role("button", name="about the same").click()
    submitted(page, 2)
    assert [answer["response"] for answer in one.answers()] == ["right slightly better", "about the same"]
    assert "before" not in page.content()


def test_the_administrators_pages(site):
    one = site()
    page = one.page()
    press(page, "n Tab n 2 2 2 2 Enter")
    submitted(page, 1)
    one.store.invite("boss", administrator=True)
    boss = one.page("boss")
    boss.get_by_role("link", name="administer").click()
    boss.get_by_role("button", name="Pause").click()
    boss.wait_for_selector("text=paused")
    boss.locator("input[name=name]").fill("<b>zoe</b>")
    boss.get_by_role("button", name="Make a link").click()
    boss.wait_for_selector("text=<b>zoe</b>")
    boss.get_by_role("link", name="cat0").click()
    boss.get_by_role("button", name="Ask for another opinion").click()
    boss.wait_for_selector("text=1 of 3 answers")
    assert one.store.paused
