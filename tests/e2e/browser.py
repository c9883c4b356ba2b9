"""Chromium without a window, through its protocol: https://chromedevtools.github.io/devtools-protocol/."""

import asyncio
import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.support.waiting import BOUND_S, result_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--remote-debugging-pipe", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--no-default-browser-check", "--disable-background-networking", "--disable-component-update"),
    *("--disable-extensions", "--hide-scrollbars"),
    "--no-sandbox",  # root in a container has no other way
)
LARGEST = 2**26
"""Bytes of a message; screenshots are the largest."""
KEYS = {"Escape": 27, "Enter": 13, "Tab": 9, "ArrowDown": 40, "ArrowUp": 38, "End": 35, " ": 32}
CTRL = 2


class Page:
    """A tab: what it shows, what is typed into it, and what it complains about."""

    def __init__(self, reader: asyncio.StreamReader, pipe: int) -> None:
        self._reader = reader
        self._pipe = pipe
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._session: dict[str, str] = {}
        self.complaints: list[str] = []
        """Errors in the console of the browser."""

    async def listen(self) -> None:
        while True:
            try:
                message = json.loads((await self._reader.readuntil(b"\0"))[:-1])
            except asyncio.IncompleteReadError:
                return
            if "id" in message:
                self._answers.pop(message["id"]).set_result(message)
                continue
            reported = message["params"]
            match message["method"]:
                case "Runtime.exceptionThrown":
                    self.complaints.append(str(reported["exceptionDetails"]))
                case "Runtime.consoleAPICalled" if reported["type"] in ("error", "warning"):
                    self.complaints.append(str(reported["args"]))
                case "Log.entryAdded" if reported["entry"]["level"] in ("error", "warning"):
                    self.complaints.append(f"{reported['entry']['text']} ({reported['entry'].get('url')})")

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(_NUMBERS)
        self._answers[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": params} | self._session
        os.write(self._pipe, json.dumps(message).encode() + b"\0")
        answer = await result_of(self._answers[number], f"an answer to {method}")
        assert "error" not in answer, (method, answer)
        return dict(answer["result"])

    async def attach(self) -> None:
        target = (await self.call("Target.createTarget", url="about:blank"))["targetId"]
        attached = await self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Accessibility"):
            await self.call(f"{domain}.enable")

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def eval(self, script: str) -> Any:
        """Return the value of an expression; promises are awaited."""
        options = {"returnByValue": True, "awaitPromise": True}
        answer = await self.call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in answer, (script, answer)
        return answer["result"].get("value")

    async def until(self, script: str) -> None:
        ends = time.monotonic() + BOUND_S
        while not await self.eval(f"Boolean({script})"):
            if time.monotonic() > ends:
                printed = await self.eval("document.body.innerText")
                raise AssertionError(f"never true: {script}\n{printed}\n{self.complaints}")
            await asyncio.sleep(0.02)

    async def text(self, selector: str) -> str:
        return str(await self.eval(f"document.querySelector({json.dumps(selector)}).textContent"))

    async def texts(self, selector: str) -> list[str]:
        found = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return list(await self.eval(f"{found}.map((each) => each.textContent)"))

    async def click(self, selector: str) -> None:
        await self.eval(f"document.querySelector({json.dumps(selector)}).click()")

    async def type(self, selector: str, text: str) -> None:
        field = f"document.querySelector({json.dumps(selector)})"
        assert await self.eval(f"{field}.focus(), {field}.select(), document.activeElement === {field}")
        await self.call("Input.insertText", text=text)

    async def press(self, key: str, modifiers: int = 0) -> None:
        code = {"key": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": modifiers}
        text = {" ": " ", "Enter": "\r"}.get(key) if not modifiers else None
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        await self.call("Input.dispatchKeyEvent", **down, **code)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    async def appear(self, width: int, height: int, scheme: str = "light") -> None:
        """Be a screen of a size in CSS pixels, that likes light or dark pages; below 500 it is a phone."""
        phone = width < 500
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        await self.call("Emulation.setDeviceMetricsOverride", **size)
        await self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        await self.call(
            "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
        )

    async def photograph(self, path: Path) -> None:
        """Save the whole page as a PNG."""
        shot = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(shot["data"]))


_NUMBERS = itertools.count(1)


@asynccontextmanager
async def browser(profile: Path) -> AsyncIterator[Page]:
    """Run Chromium with a new profile; yields its tab."""
    assert CHROMIUM
    received, hers = os.pipe()
    his, reported = os.pipe()
    # It hears on descriptor 3 and tells on 4.
    launch = f'exec "$@" 3<&{his} 4>&{hers}'
    command = ["bash", "-c", launch, "-", CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
    with (profile.parent / f"{profile.name}.log").open("wb") as log:
        process = subprocess.Popen(command, pass_fds=(his, hers), stderr=log, stdout=log)
    os.close(his)
    os.close(hers)
    reader = asyncio.StreamReader(limit=LARGEST)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(received, "rb")
    )
    page = Page(reader, reported)
    listening = asyncio.create_task(page.listen())
    try:
        await page.attach()
        yield page
    finally:
        os.close(reported)  # Chromium ends with its pipe
        try:
            await asyncio.to_thread(process.wait, BOUND_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        await listening
        transport.close()
