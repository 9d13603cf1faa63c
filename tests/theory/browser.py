"""Chromium without a window, spoken to over a pipe in its own protocol (DevTools): no package is needed for it."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

PATH = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
KEYS = {
    " ": ("Space", 32),
    "ArrowRight": ("ArrowRight", 39),
    "ArrowLeft": ("ArrowLeft", 37),
    "Home": ("Home", 36),
    "End": ("End", 35),
    "Tab": ("Tab", 9),
}


class Browser:
    """One page. ``ask`` evaluates JavaScript in it, ``press`` presses a key, ``picture`` is what it shows."""

    def __init__(self, folder):
        read, theirs_out = os.pipe()
        theirs_in, write = os.pipe()

        def ends():  # the protocol's are 3 and 4, which may be any of ours until now
            high = [fcntl.fcntl(end, fcntl.F_DUPFD, 100) for end in (theirs_in, theirs_out)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        options += ["--disable-dev-shm-usage", "--hide-scrollbars", f"--user-data-dir={folder}"]
        self.process = subprocess.Popen(
            [PATH, *options], preexec_fn=ends, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.write, self.answers, self.events, self.number = write, {}, [], 0
        self.session = None
        threading.Thread(target=self._listen, args=(read,), daemon=True).start()
        target = self.say("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.say("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.say(f"{domain}.enable")

    def _listen(self, read):
        kept = b""
        while chunk := os.read(read, 1 << 16):
            *messages, kept = (kept + chunk).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    self.answers[message["id"]] = message
                else:
                    self.events.append(message)

    def say(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        for _ in range(3000):
            if self.number in self.answers:
                answer = self.answers.pop(self.number)
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            time.sleep(0.01)
        raise TimeoutError(method)

    def open(self, path, width=1280, height=900, dark=False):
        self.say(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.say(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self.say("Page.navigate", url=Path(path).resolve().as_uri())
        for _ in range(600):
            if self.ask("document.documentElement?.dataset.ready === 'yes'"):
                return
            time.sleep(0.05)
        raise TimeoutError(f"the page did not become ready: {self.errors()}")

    def ask(self, expression):
        answer = self.say("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def press(self, key):
        code, number = KEYS.get(key, (f"Key{key.upper()}" if key.isalpha() else f"Digit{key}", ord(key.upper()[0])))
        text = {"text": key} if len(key) == 1 else {}
        self.say("Input.dispatchKeyEvent", type="keyDown", key=key, code=code, windowsVirtualKeyCode=number, **text)
        self.say("Input.dispatchKeyEvent", type="keyUp", key=key, code=code, windowsVirtualKeyCode=number)

    def picture(self, path, whole=False):
        data = self.say("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def errors(self):
        """What went wrong in the page: exceptions, and words on the console."""
        return [e for e in self.events if e["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled")]

    def requests(self):
        """What the page asked for, beside itself."""
        sent = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("file:", "data:", "blob:", "about:"))]

    def close(self):
        try:
            self.session = None
            self.say("Browser.close")
            self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()
