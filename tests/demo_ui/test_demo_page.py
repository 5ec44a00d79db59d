"""The page as a person uses it, in a headless Chromium."""

import time

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser")

import chromium as browser  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (browser.PROGRAM and browser.DRIVER), reason="needs chromium and chromedriver on PATH"
)


@pytest.fixture(scope="module")
def driver():
    with browser.chromium() as driver:
        yield driver


@pytest.fixture
def page(driver, server):
    """The page, freshly opened on a wide screen. Afterwards: nothing went wrong in it unseen."""
    browser.set_screen(driver, 1180)
    browser.open_page(driver, server.url)
    driver.get_log("browser")
    yield driver
    complaints = [entry["message"] for entry in driver.get_log("browser") if "status of 400" not in entry["message"]]
    assert complaints == []


def one(driver, selector):
    return driver.find_element(By.CSS_SELECTOR, selector)


def texts(driver, selector):
    """In one go, so that no element goes away meanwhile."""
    script = "return [...document.querySelectorAll(arguments[0])].map((element) => element.textContent)"
    return driver.execute_script(script, selector)


def choose_user(driver, user):
    one(driver, "#user").send_keys(Keys.CONTROL, "a")
    one(driver, "#user").send_keys(user, Keys.ESCAPE)


def test_type_a_title_choose_it_and_see_ten(page, demo):
    title = demo.catalogue.titles[5]
    browser.type_titles(page, [title[2:].upper()])
    assert one(page, "#chosen > li span").text == title
    rows = browser.recommend(page)
    assert len(rows) == 10
    expected = demo.catalogue.item_ids[5]
    for row in rows:
        path = row.find_element(By.CSS_SELECTOR, ".path")
        index = demo._titles.index(row.find_element(By.CSS_SELECTOR, ".title").text.casefold())
        codes = [str(code) for code in demo.run.model.codes[index].tolist()]
        assert path.get_attribute("data-codes") == " › ".join(codes)
        assert [chip.text for chip in path.find_elements(By.CSS_SELECTOR, "b")] == codes
        assert demo.catalogue.item_ids[index] != expected
    assert one(page, "#status").text.startswith(f"10 of {demo.catalogue.size} items in ")
    assert not one(page, "#past").is_displayed()


def test_a_recommendation_can_join_the_history(page, demo):
    browser.type_titles(page, [demo.catalogue.titles[5]])
    first = browser.recommend(page)[0]
    title = first.find_element(By.CSS_SELECTOR, ".title").text
    first.find_element(By.TAG_NAME, "button").click()
    browser.wait(page, lambda d: title not in texts(d, "#rows .title"))
    assert texts(page, "#chosen > li > div > span") == [demo.catalogue.titles[5], title]
    one(page, f'[aria-label="Remove {demo.catalogue.titles[5]}"]').click()
    assert len(page.find_elements(By.CSS_SELECTOR, "#chosen > li")) == 1


def test_a_user_from_the_list_with_the_keyboard_alone(page, demo):
    field = one(page, "#user")
    field.send_keys("3")
    browser.wait(page, lambda d: texts(d, "#user-options span")[:1] == ["3"])
    field.send_keys(Keys.ARROW_DOWN)
    active = field.get_attribute("aria-activedescendant")
    assert page.find_element(By.ID, active).get_attribute("aria-selected") == "true"
    field.send_keys(Keys.ENTER)
    assert field.get_attribute("value") == "3"
    assert field.get_attribute("aria-expanded") == "false"
    field.send_keys(Keys.ENTER)  # now it sends the form
    browser.wait(page, lambda d: len(d.find_elements(By.CSS_SELECTOR, "#rows > li")) == 10)
    lengths = dict(
        zip(demo.sequences.user_ids, demo.sequences.cu_events[1:] - demo.sequences.cu_events[:-1], strict=True)
    )
    assert len(page.find_elements(By.CSS_SELECTOR, "#events > li")) == lengths["3"] - 1, "the last event is hidden"
    assert one(page, "#found").text.startswith("Came next: ")


def test_the_hidden_event_is_marked_where_it_is_found(page, recommend, demo):
    answers = {user: recommend(user=user, hide_last=True, top_k=50) for user in demo.sequences.user_ids}
    user, answer = next(entry for entry in answers.items() if any(row["hit"] for row in entry[1]["results"]))
    choose_user(page, user)
    one(page, "#top_k option[value='50']").click()
    browser.recommend(page)
    place, title = answer["held_out"]["place"], answer["held_out"]["title"]
    assert f"found, at place {place}" in one(page, "#found").text
    assert one(page, "#rows > li.hit .place").text == str(place)
    assert one(page, "#rows > li.hit .title").text == title
    one(page, "#hide_last").click()
    browser.wait(page, lambda d: not one(d, "#found").is_displayed())
    assert page.find_elements(By.CSS_SELECTOR, "#rows > li.hit") == []


def test_equal_beginnings_have_equal_colours(page, recommend):
    answer = recommend(user="3", hide_last=True)
    choose_user(page, "3")
    hues = {}
    for row, shown in zip(answer["results"], browser.recommend(page), strict=True):
        hue = shown.find_element(By.CSS_SELECTOR, ".code").get_attribute("style")
        assert hues.setdefault(row["codes"][0], hue) == hue
    coloured = [hue for hue in hues.values() if hue]
    assert len(set(coloured)) == len(coloured) > 0
    nodes = {tuple(row["codes"][: level + 1]) for row in answer["results"] for level in range(3)}
    assert len(page.find_elements(By.CSS_SELECTOR, "#drawing rect")) == 1 + len(nodes)


def test_settings_ask_again_by_themselves(page):
    choose_user(page, "3")
    browser.recommend(page)
    one(page, "#mode option[value=items]").click()
    assert not one(page, "#beams").is_enabled()
    assert not one(page, "#alpha").is_enabled()
    one(page, "#top_k option[value='5']").click()
    browser.wait(page, lambda d: len(d.find_elements(By.CSS_SELECTOR, "#rows > li")) == 5)
    assert one(page, "#status").text.startswith("5 of ")


def test_an_html_title_is_text(page, html_title):
    browser.type_titles(page, ["onerror"])
    assert one(page, "#chosen > li span").text == html_title
    one(page, "#include_seen").click()
    one(page, "#top_k option[value='50']").click()
    browser.recommend(page)
    for user in ("2", "3", "4"):
        one(page, "[name=who][value=user]").click()
        choose_user(page, user)
        browser.recommend(page)
    time.sleep(0.2)  # a picture that is not there fails a little later
    assert page.execute_script("return document.body.dataset.broken") is None
    assert page.find_elements(By.CSS_SELECTOR, "main img, main script") == []


def test_what_is_wrong_is_said(page):
    one(page, "button.go").click()
    browser.wait(page, lambda d: one(d, "#error").text == "Choose a user first.")
    choose_user(page, "nobody")
    one(page, "button.go").click()
    browser.wait(page, lambda d: "user 'nobody' is not in the log" in one(d, "#error").text)
    choose_user(page, "3")
    browser.recommend(page)
    assert not one(page, "#error").is_displayed()
    one(page, "[name=who][value=items]").click()
    one(page, "button.go").click()
    browser.wait(page, lambda d: one(d, "#error").text == "Choose at least one title first.")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 400, 800])
def test_fits_small_screens(page, width, dark):
    browser.set_screen(page, width, dark)
    choose_user(page, "3")
    browser.recommend(page)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    background = one(page, "body").value_of_css_property("background-color")
    assert ("16, 19, 23" in background) == dark
    browser.wait(page, lambda d: one(d, "#results").rect["y"] < d.execute_script("return scrollY + innerHeight"))
