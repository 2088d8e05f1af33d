"""A limit of time and size for what a Hub sends.

Its library retries for minutes, waits as long as a server tells it to, and believes no announced
size. watched() gives up after stated times instead.
"""

import inspect
import queue
import resource
import threading
import time
from collections.abc import Callable
from typing import Any

ANSWER = 60.0  # seconds until something comes …
PART = 300.0  # … and then until the next 10 MB of a file
MEMORY = 2**30  # bytes that an answer may take that is not a file
SLACK = 2**22  # bytes beyond what was announced: counters of compressed parts are not exact
TICK = 0.1


class GivenUp(Exception):
    """The Hub is too slow or sends too much. ckpt.hub.explained() makes it a UserError."""


class Watch:
    """When something last came, and how long the next may take."""

    def __init__(self) -> None:
        self.limit, self.has_begun = ANSWER, False
        self.last = time.monotonic()
        self.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def tick(self) -> None:
        """Something of a file came."""
        self.limit, self.has_begun = PART, True
        self.last = time.monotonic()

    def check(self) -> None:
        """Raise GivenUp if it is time to."""
        if time.monotonic() - self.last > self.limit:
            raise GivenUp(f"the Hub sent nothing for {self.limit:.0f} seconds")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.memory
        if not self.has_begun and grown * 1024 > MEMORY:
            raise GivenUp("the answer of the Hub has no end")

    def bar(self) -> type:
        """The Hub's progress bar, which keeps this watch and refuses more than was announced."""
        from huggingface_hub.utils import tqdm

        watch = self

        class Bar(tqdm):
            def __init__(self, *args: Any, **how: Any):
                super().__init__(*args, **how)
                # tqdm's own counters rest when it is not shown.
                self.came, self.of_bytes = how.get("initial") or 0, how.get("unit") == "B"
                watch.tick()

            def update(self, n: float | None = 1) -> bool | None:
                watch.tick()
                self.came += n or 0
                if self.of_bytes and self.total and self.came > self.total + SLACK:
                    raise GivenUp(f"the Hub sends more than the {self.total:,} bytes it announced")
                return super().update(n)

        return Bar


def watched(call: Callable, *args: Any, **how: Any) -> Any:
    """call(*args, **how) of the Hub's library, in a thread that is left behind when the Hub is
    given up."""
    watch, done = Watch(), queue.SimpleQueue()
    if "tqdm_class" in inspect.signature(call).parameters:
        how["tqdm_class"] = watch.bar()

    def work() -> None:
        try:
            done.put((call(*args, **how), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    while True:
        try:
            value, error = done.get(timeout=TICK)
        except queue.Empty:
            watch.check()
            continue
        if error is not None:
            raise error
        return value
