"""Forward passes that stop before every unit, so that any model can be walked block by block.

A pass runs in a thread of its own. Where it comes to a unit it hands over what the unit was called with, and waits for
the output. So the model's own code does all that lies between blocks (masks, connectors, features that skip layers),
no block has to be known by family, and a pass holds what the model itself would hold at that point and no more. Only
one thread runs at a time: results do not depend on scheduling.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Semaphore, Thread
from typing import Any

import torch
from torch import nn

from spectrim.forwards import forwards


@dataclass(frozen=True)
class Call:
    """What a unit was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _CloseError(BaseException):
    """Ends a pass that nobody waits for any more; no error handler of the model's may catch it."""


class Pass:
    """One forward pass, suspended at ``unit`` with ``call``; both are None after its end."""

    def __init__(self, forward: Callable[[], object], device: str) -> None:
        self.unit: str | None = None
        self.call: Call | None = None
        self._forward, self._device = forward, device
        self._output: Any = None
        self._error: BaseException | None = None
        self._closing = False
        self._go, self._stopped = Semaphore(0), Semaphore(0)
        self._thread = Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Run to the first unit; raises what the model raises."""
        self._thread.start()
        self._wait()

    def answer(self, output: Any) -> None:
        """Go on with the output of the unit, to the next one or to the end; raises what the model raises."""
        self._output = output
        self._go.release()
        self._wait()

    def close(self) -> None:
        """End the pass where it stands."""
        if self.unit is not None:
            self._closing = True
            self._go.release()
            self._stopped.acquire()
        if self._thread.ident is not None:
            self._thread.join()

    def stop_at(self, unit: str, call: Call) -> Any:
        """Called by the pass itself at a unit: wait for its output."""
        self.unit, self.call = unit, call
        del call
        self._stopped.release()
        self._go.acquire()
        if self._closing:
            raise _CloseError
        output, self._output = self._output, None
        return output

    def _wait(self) -> None:
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        _running.set(self)  # a thread has a context of its own
        try:
            # Both are properties of a thread.
            with torch.no_grad(), torch.autocast(self._device, enabled=False):
                self._forward()
        except _CloseError:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.unit = self.call = None
            self._stopped.release()


_running: ContextVar[Pass] = ContextVar("pass")


@contextmanager
def stopping_at(units: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside the block, passes stop at these modules in place of running their ``forward``; hooks on them still run."""

    def stop(name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: _running.get().stop_at(name, Call(args, kwargs))

    with forwards({module: stop(name) for name, module in units.items()}):
        yield
