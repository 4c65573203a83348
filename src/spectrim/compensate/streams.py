"""Forward passes that stop before every unit, so that any model can be walked block by block.

A pass runs in a thread of its own. Where it comes to a unit it hands over what the unit was called with, and waits for
the output. So the model's own code does all that lies between blocks (masks, connectors, features that skip layers),
no block has to be known by family, and a pass holds what the model itself would hold at that point and no more. Where
all passes together hold too much, what flows from block to block waits in a file. Only one thread runs at a time:
results do not depend on scheduling.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Semaphore, Thread
from typing import Any

import torch
from torch import nn

from spectrim.disk.overflow import Overflow
from spectrim.forwards import forwards


@dataclass(frozen=True)
class Call:
    """What a unit was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _CloseError(BaseException):
    """Ends a pass that nobody waits for any more; no error handler of the model's may catch it."""


class Pass:
    """One forward pass, suspended at ``unit``, which was called with ``call``; both are None after its end.

    While it is suspended, its boundary activations rest in `overflow`: what units read first and what they gave, as
    long as anything holds it. So the tensors of ``call`` are there inside `awake` alone.
    """

    def __init__(self, forward: Callable[[], object], device: str, overflow: Overflow) -> None:
        self.unit: str | None = None
        self.call: Call | None = None
        self._forward, self._device, self._overflow = forward, device, overflow
        self._seen: list[weakref.ref[torch.Tensor]] = []
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
        self._overflow.wake(self)
        self._see(output if isinstance(output, list | tuple) else (output,))
        self._output = output
        del output
        self._go.release()
        self._wait()

    def wake(self) -> Call:
        """What the unit was called with, which is there from now on until the pass goes on; of a suspended pass."""
        assert self.call is not None
        self._overflow.wake(self)
        return self.call

    @contextmanager
    def awake(self) -> Iterator[Call]:
        """What the unit was called with, which may be read inside the block; of a suspended pass."""
        assert self.call is not None
        with self._overflow.awake(self):
            yield self.call

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
        if self.call is not None:
            self._see((*self.call.args, *self.call.kwargs.values())[:1])
            self._seen = [seen for seen in self._seen if seen() is not None]
            self._overflow.rest(self, (x for seen in self._seen if (x := seen()) is not None))

    def _see(self, values: Sequence[Any]) -> None:
        self._seen += [weakref.ref(x) for x in values if isinstance(x, torch.Tensor)]

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
