"""A headless Chromium that talks to nobody but the page, and pictures of the page.

python tests/demo_ui/chromium.py http://127.0.0.1:7860/ docs/images/demo-ui.png [--user 4] [--width 1180] [--dark]
"""

from __future__ import annotations

import argparse
import base64
import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

PROGRAM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--hide-scrollbars",
)  # fmt: skip


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A browser with a profile of its own; both are gone afterwards."""
    options = webdriver.ChromeOptions()
    options.binary_location = PROGRAM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
            options.add_argument(argument)
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))  # given a path, it looks for none online
        try:
            yield driver
        finally:
            driver.quit()


def set_screen(driver: webdriver.Chrome, width: int, dark: bool = False, scale: float = 1) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": scale, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def wait(driver: webdriver.Chrome, condition, seconds: float = 20):
    return WebDriverWait(driver, seconds, poll_frequency=0.05).until(condition)


def open_page(driver: webdriver.Chrome, url: str) -> None:
    """The page, when it knows its run."""
    driver.get(url)
    wait(driver, lambda d: d.find_element(By.ID, "about").text.strip())


def recommend(driver: webdriver.Chrome) -> list:
    """Press the button and wait for the answer: the rows of the list."""
    driver.execute_script("document.getElementById('status').textContent = ''")
    driver.find_element(By.CSS_SELECTOR, "button.go").click()
    wait(driver, lambda d: " ms" in d.find_element(By.ID, "status").text)
    return driver.find_elements(By.CSS_SELECTOR, "#rows > li")


def picture(driver: webdriver.Chrome) -> bytes:
    """The whole page as PNG, of 256 colours to be small."""
    answer = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    small = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(answer["data"]))).convert("RGB")
    image.quantize(256, kmeans=2, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("out", type=Path)
    parser.add_argument("--user")
    parser.add_argument("--titles", nargs="*", default=[], help="parts of titles, typed instead of a user")
    parser.add_argument("--width", type=int, default=1180)
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    with chromium() as driver:
        set_screen(driver, arguments.width, arguments.dark)
        open_page(driver, arguments.url)
        if arguments.user:
            driver.find_element(By.ID, "user").send_keys(arguments.user, Keys.ESCAPE)
        else:
            type_titles(driver, arguments.titles)
        recommend(driver)
        driver.execute_script("document.activeElement.blur()")
        arguments.out.write_bytes(picture(driver))


def type_titles(driver: webdriver.Chrome, titles: list[str]) -> None:
    """Choose for each the first title of the list that opens."""
    driver.find_element(By.CSS_SELECTOR, "[name=who][value=items]").click()
    field = driver.find_element(By.ID, "item")
    for number, title in enumerate(titles, 1):
        field.send_keys(title)
        wait(driver, lambda d: d.find_elements(By.CSS_SELECTOR, "#item-options li[aria-selected=true]"))
        field.send_keys(Keys.ENTER)
        wait(driver, lambda d, n=number: len(d.find_elements(By.CSS_SELECTOR, "#chosen > li")) == n)


if __name__ == "__main__":
    main()
