"""The notebooks in a real browser: JupyterLab on this machine, and Debian's chromium, driven by Playwright.

`make browser` runs them. Each leaves a picture in `.artifacts/browser` to be looked at. Where there is no chromium they
are skipped; with BHLIB_BROWSER=required, as in continuous integration, they fail.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from hashlib import sha256
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / ".artifacts" / "browser"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
EXPLORER = ROOT / "notebooks" / "05_alpha_sweeps.ipynb"
TOKEN = "browser-test"
SECOND = 1000  # Playwright counts milliseconds
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()

SETTINGS = {
    # All cells are in the page, also those out of sight; the kernel starts without being asked for.
    "notebook-extension/tracker": {"windowingMode": "none", "autoStartDefaultKernel": True},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
# What stands beside each code cell: [ ]: before it runs, [*]: while it runs, [3]: when it has run.
PROMPTS = """expected => [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")]
    .every(prompt => new RegExp(expected).test(prompt.textContent))"""
PICTURE_BYTES = "async image => [...new Uint8Array(await (await fetch(image.src)).arrayBuffer())]"


def missing(what):
    """Skip the test, or fail where it has to run."""
    reason = f"{what}; apt-get install chromium, and make browser, bring what these tests need"
    (pytest.fail if os.environ.get("BHLIB_BROWSER") == "required" else pytest.skip)(reason)


@pytest.fixture(scope="module")
def chromium():
    """Path of the browser."""
    path = shutil.which("chromium")
    if path is None:
        missing("there is no chromium on the PATH")
    return path


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A copy of what the notebooks read, so that running them changes nothing here."""
    folder = tmp_path_factory.mktemp("workspace")
    for name in ("notebooks", "figures"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(".*"))
    return folder


@pytest.fixture(scope="module")
def lab(chromium, workspace, tmp_path_factory):
    """Address of a JupyterLab that serves the workspace to this machine alone."""
    state = tmp_path_factory.mktemp("jupyter")
    for name, values in SETTINGS.items():
        path = state / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    options = {"ip": "127.0.0.1", "port": port, "port_retries": 0, "root_dir": workspace, "open_browser": False}
    options |= {"allow_root": True}
    command = [sys.executable, "-m", "jupyterlab", *(f"--ServerApp.{name}={value}" for name, value in options.items())]
    environment = os.environ | {
        "JUPYTER_TOKEN": TOKEN,
        "JUPYTER_CONFIG_DIR": str(state / "config"),
        "JUPYTER_RUNTIME_DIR": str(state / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(state / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(state / "workspaces"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    with open(state / "log", "w") as log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server:
        try:
            for _ in range(120):
                try:
                    urllib.request.urlopen(f"{address}/api", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.5)
            else:
                raise TimeoutError(f"JupyterLab did not answer:\n{(state / 'log').read_text()}")
            yield address
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def browser(chromium, tmp_path_factory):
    """The browser, with a profile of its own."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed")
    with sync_playwright() as playwright:
        profile = tmp_path_factory.mktemp("profile")
        window = {"width": 1280, "height": 1400}
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=chromium, args=ARGUMENTS, viewport=window
        )
        yield context
        context.close()


@pytest.fixture
def page(browser, lab):
    """A fresh page; at the end its kernel is shut down."""
    page = browser.new_page()
    page.set_default_timeout(60 * SECOND)
    yield page
    page.close()
    for kernel in browser.request.get(f"{lab}/api/kernels?token={TOKEN}").json():
        browser.request.delete(f"{lab}/api/kernels/{kernel['id']}?token={TOKEN}")


def run_all(page, lab, notebook):
    """Open a notebook as a reader would, choose Run All Cells from the menu, and find no error at the end."""
    page.goto(f"{lab}/lab/workspaces/{notebook.stem}/tree/notebooks/{notebook.name}?token={TOKEN}&reset")
    try:
        page.get_by_text("| Idle").wait_for()  # the kernel, in the line at the bottom
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
        choose(page, "Edit", "Clear Outputs of All Cells")
        page.wait_for_function(PROMPTS, arg=r"^\[ \]:$")
        choose(page, "Run", "Run All Cells")
        page.wait_for_function(PROMPTS, arg=r"^\[\d+\]:$", timeout=600 * SECOND)
    finally:
        save_picture(page, notebook.stem)
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    assert page.locator(".jp-CodeCell").count() == len(cells)
    meant_to_fail = [cell for cell in cells if "raises-exception" in cell.metadata.get("tags", [])]
    errors = page.locator('[data-mime-type="application/vnd.jupyter.error"]')
    assert errors.count() == len(meant_to_fail), errors.all_inner_texts()
    assert page.get_by_text("Error displaying widget").count() == 0


def choose(page, menu, item):
    """Choose an item of a menu."""
    page.get_by_role("menuitem", name=menu, exact=True).click()
    page.get_by_role("menuitem", name=item, exact=True).click()


def save_picture(target, name):
    """Keep a picture of a page or of an element of it."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    target.screenshot(path=PICTURES / f"{name}.png")


def picture(image):
    """A digest of the bytes that an image on the page shows."""
    return sha256(bytes(image.evaluate(PICTURE_BYTES))).hexdigest()


@pytest.mark.parametrize("notebook", [path for path in NOTEBOOKS if path != EXPLORER], ids=lambda path: path.stem)
def test_all_cells_run(page, lab, notebook):
    run_all(page, lab, notebook)


def test_explorer(page, lab):
    run_all(page, lab, EXPLORER)
    mean, charts, busy = (page.locator(f".bh-{name}") for name in ("mean", "charts", "busy"))
    explorer = page.locator(".bh-explorer")

    def shown():
        """The mean number of experts, and the picture, once the explorer has come to rest."""
        page.wait_for_timeout(SECOND)
        page.wait_for_function("() => !document.querySelector('.bh-busy').innerText.trim()")
        return float(re.match(r"[\d.]+", mean.inner_text())[0]), picture(charts)

    def drag(distance):
        """Drag the handle of alpha to a point this many pixels to the right of where it was at first."""
        box = handle.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(origin + distance, box["y"] + box["height"] / 2, steps=8)
        page.mouse.up()

    explorer.scroll_into_view_if_needed()
    handle = page.locator(".bh-alpha .noUi-handle")
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    origin = box["x"] + box["width"] / 2

    at_first = shown()
    drag(60)
    moved = shown()
    assert moved[0] > at_first[0] and moved[1] != at_first[1]
    save_picture(explorer, "explorer_alpha")
    drag(0)
    assert shown() == at_first

    page.locator(".bh-null select").select_option(label="the token's own Gaussian (no calibration)")
    other_null = shown()
    assert other_null[0] != at_first[0] and other_null[1] != at_first[1]
    page.locator(".bh-null select").select_option(label="Dirichlet (no calibration)")
    assert shown() == at_first

    why, loss = page.locator(".bh-why"), page.locator(".bh-loss")
    page.locator(".bh-layer select").select_option(label="4")
    page.wait_for_function("() => document.querySelector('.bh-why').innerText.includes('the kept ones make')")
    bars = why.locator("td span")
    assert bars.count() >= 8 and bars.first.bounding_box()["width"] > 1
    assert why.evaluate("element => element.scrollWidth <= element.clientWidth")  # the table fits the page
    save_picture(explorer, "explorer_token")
    page.locator(".bh-layer select").select_option(label="all")
    page.wait_for_function("() => document.querySelector('.bh-why').innerText.includes('Choose a layer above')")
    assert shown() == at_first

    page.locator(".bh-compensation select").select_option(label="their mean outputs")
    page.wait_for_function("() => document.querySelector('.bh-loss').innerText.includes('with nothing for them')")
    assert shown() == at_first and "their mean outputs for dropped ones" in loss.inner_text()
    page.locator(".bh-compensation select").select_option(label="nothing")
    page.wait_for_function("() => !document.querySelector('.bh-loss').innerText.includes('with nothing for them')")
    assert page.locator(".bh-compensation select").input_value() == "nothing"

    texts = page.locator(".bh-text"), page.locator(".bh-own-text")
    assert [text.inner_text().strip() for text in texts] == ["", ""]
    page.locator(".bh-generate").click()
    page.wait_for_function("() => document.querySelector('.bh-own-text').innerText.trim().length > 40")
    shown()
    assert all(len(text.inner_text()) > 40 for text in texts)
    assert "benjamini" in texts[0].inner_text() and "top-8" in texts[1].inner_text()
    assert busy.inner_text().strip() == ""
    save_picture(explorer, "explorer")
    if "BROWSER_SCREENSHOT" in os.environ:  # one for the README
        explorer.screenshot(path=os.environ["BROWSER_SCREENSHOT"])
