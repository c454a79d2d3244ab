"""A real JupyterLab on 127.0.0.1 with settings of its own, and a real Chromium that opens notebooks in it."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Browser, Locator, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = ROOT / "test-artifacts"
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
START_S = 120
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"  # the one thing a notebook shows from elsewhere
NO_PICTURE = '<svg xmlns="http://www.w3.org/2000/svg"/>'
RUN_MS = 300_000
# The toolbar says "idle" before there is a kernel: ask the session itself.
IS_IDLE = """() => {
    const session = window.jupyterapp?.shell?.currentWidget?.sessionContext, kernel = session?.session?.kernel;
    return !!(session?.isReady && kernel?.connectionStatus === "connected" && kernel?.status === "idle");
}"""
RUN_ALL = "async () => { await window.jupyterapp.commands.execute('notebook:run-all-cells'); }"
EXECUTE = """async (code) => {
    const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
    const future = kernel.requestExecute({ code, store_history: false });
    let printed = "";
    future.onIOPub = (message) => { if (message.header.msg_type === "stream") printed += message.content.text; };
    await future.done;
    return printed;
}"""
END_KERNEL = "async () => { await window.jupyterapp?.shell?.currentWidget?.sessionContext?.shutdown(); }"
SET_THEME = "async (theme) => { await window.jupyterapp.commands.execute('apputils:change-theme', { theme }); }"


@dataclass(frozen=True)
class Lab:
    """A server that is up: where it is, and the folder it serves."""

    url: str
    token: str
    folder: Path
    pid: int

    def peak_bytes(self) -> int:
        """The most memory that the server and each kernel it has now ever held, added up."""
        server = psutil.Process(self.pid)
        return sum(_peak_of(process.pid) for process in (server, *server.children(recursive=True)))

    def kernel_bytes(self) -> int:
        """What the kernels hold now."""
        return sum(process.memory_info().rss for process in psutil.Process(self.pid).children(recursive=True))


@dataclass
class Notebook:
    """A notebook open in the browser, and what the page complained about."""

    page: Page
    complaints: list[str] = field(default_factory=list)

    def run_all(self) -> None:
        self.page.wait_for_function(IS_IDLE, timeout=RUN_MS)
        self.page.evaluate(RUN_ALL)  # resolves when the last cell has run
        self.page.wait_for_function(IS_IDLE, timeout=RUN_MS)

    def set_theme(self, name: str) -> None:
        """JupyterLab Light or JupyterLab Dark."""
        self.page.evaluate(SET_THEME, name)
        light = "true" if name.endswith("Light") else "false"
        self.page.wait_for_selector(f"body[data-jp-theme-light='{light}']", state="attached", timeout=20_000)
        self.page.wait_for_timeout(400)  # the new style sheet is laid out

    def screenshot(self, name: str, part: str | Locator | None = None) -> Path:
        """Into test-artifacts/, of the page or of one part."""
        ARTIFACTS.mkdir(exist_ok=True)
        path = ARTIFACTS / f"{name}.png"
        shown = self.page.locator(part).first if isinstance(part, str) else part or self.page
        shown.screenshot(path=path)
        return path

    def execute(self, code: str) -> str:
        """Run code in the notebook's kernel, as a cell that is nowhere on the page; what it printed."""
        return str(self.page.evaluate(EXECUTE, code))

    def assert_no_complaint(self) -> None:
        assert self.tracebacks() == []
        assert self.complaints == []
        assert [words for words in self.page.locator(".mv-status").all_text_contents() if words] == []

    def tracebacks(self) -> list[str]:
        errors = self.page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]')
        return errors.all_inner_texts()


@pytest.fixture(scope="module")  # while it is open its event loop runs in this thread: other files want their own
def chromium() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Started on a free port with a random token; ended by its own process group."""
    home = tmp_path_factory.mktemp("lab")
    (home / "root").mkdir()
    _write_settings(home)
    token = secrets.token_hex(16)
    with (home / "lab.log").open("wb") as log:
        server = subprocess.Popen(
            _command(home, token), env=_environment(home), stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield Lab(_wait_until_up(server, home, token), token, home / "root", server.pid)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.fixture
def open_notebook(lab: Lab, chromium: Browser) -> Iterator[Callable[[Path], Notebook]]:
    """Open a copy of a notebook; the original stays as it is. Its kernel ends with the test."""
    pages: list[Page] = []

    def open_copy(path: Path) -> Notebook:
        shutil.copy(path, lab.folder / path.name)
        page = chromium.new_page(viewport={"width": 1200, "height": 1400})
        pages.append(page)
        notebook = Notebook(page)
        page.route(BADGE, lambda route: route.fulfill(content_type="image/svg+xml", body=NO_PICTURE))
        page.on("pageerror", lambda error: notebook.complaints.append(f"page error: {error}"))
        page.on(
            "console", lambda message: notebook.complaints.append(message.text) if message.type == "error" else None
        )
        page.goto(f"{lab.url}lab/tree/{path.name}?token={lab.token}&reset")
        page.wait_for_selector(".jp-NotebookPanel .jp-Notebook .jp-Cell", timeout=120_000)
        return notebook

    yield open_copy
    for page in pages:
        page.evaluate(END_KERNEL)
        page.close()


def _command(home: Path, token: str) -> list[str]:
    as_root = ["--allow-root"] if os.geteuid() == 0 else []
    return [
        str(ROOT / "binder" / "start"), sys.executable, "-m", "jupyterlab", "--no-browser",
        "--ip=127.0.0.1", "--port=0", *as_root,
        f"--ServerApp.root_dir={home / 'root'}", f"--IdentityProvider.token={token}",
        "--LabApp.expose_app_in_browser=True",
    ]  # fmt: skip


def _environment(home: Path) -> dict[str, str]:
    """Folders of its own, the learner of the stored outputs, and a CPU, as a Binder session has."""
    folders = {
        "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython",
    }  # fmt: skip
    own = {name: str(home / folder) for name, folder in folders.items()}
    return {**os.environ, **own, "MINIVLLM_LEARNER": "example", "CUDA_VISIBLE_DEVICES": ""}


def _peak_of(pid: int) -> int:
    """Bytes that a process held at its fullest."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _write_settings(home: Path) -> None:
    """No question about news, no look for updates."""
    folder = home / "settings" / "@jupyterlab" / "apputils-extension"
    folder.mkdir(parents=True)
    settings = {"fetchNews": "false", "checkForUpdates": False}
    (folder / "notification.jupyterlab-settings").write_text(json.dumps(settings))


def _wait_until_up(server: subprocess.Popen[bytes], home: Path, token: str) -> str:
    """The server's URL, once it answers."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        for path in (home / "runtime").glob("jpserver-*.json"):
            try:
                url = str(json.loads(path.read_text())["url"])
                urllib.request.urlopen(f"{url}api/status?token={token}", timeout=2).close()
            except (OSError, ValueError, urllib.error.URLError):
                continue
            return url
        time.sleep(0.1)
    raise RuntimeError("JupyterLab did not start:\n" + (home / "lab.log").read_text()[-3000:])
