"""Numbers by token that grow at the end and are cut at both ends."""

from collections.abc import Callable

import torch

SPARE = 256  # tokens for which there is room beyond those that are held


class Rows:
    """A tensor [batch, tokens, …] to which tokens are added in place, so that a step does not copy the whole."""

    def __init__(self) -> None:
        self._room: torch.Tensor | None = None
        self._first = self._end = 0

    def __len__(self) -> int:
        return self._end - self._first

    @property
    def held(self) -> torch.Tensor:
        """All tokens, [batch, tokens, …]; a view."""
        assert self._room is not None
        return self._room[:, self._first : self._end]

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens that are held; there is room for SPARE more."""
        return 0 if self._room is None else self.held.numel() * self._room.element_size()

    def append(self, new: torch.Tensor) -> None:
        """Add tokens [batch, new tokens, …]; a batch of one stands for all sequences."""
        if self._room is not None and len(self._room) == 1 != len(new):
            self._room = self._room.expand(len(new), *self._room.shape[1:]).clone()
        sealed = self._room is not None and self._room.is_inference() and not torch.is_inference_mode_enabled()
        if self._room is None or sealed or self._end + new.shape[1] > self._room.shape[1]:
            self._move(len(new) if self._room is None else len(self._room), new)
        assert self._room is not None
        self._room[:, self._end : self._end + new.shape[1]] = new
        self._end += new.shape[1]

    def _move(self, batch: int, new: torch.Tensor) -> None:
        """To a place with room for what is held, these new tokens and SPARE more."""
        room = new.new_empty(batch, len(self) + new.shape[1] + SPARE, *new.shape[2:])
        if self._room is not None:
            room[:, : len(self)] = self.held
        self._room, self._first, self._end = room, 0, len(self)

    def keep_last(self, count: int) -> None:
        """Forget all but the last `count` tokens, and their memory where that is much."""
        self._first = max(self._first, self._end - count)
        if self._room is not None and self._room.shape[1] > 2 * (len(self) + SPARE):
            self._move(len(self._room), self._room[:, :0])

    def drop_last(self, count: int) -> None:
        """Forget the last `count` tokens, or all where there are fewer."""
        self._end = max(self._first, self._end - count)

    def choose(self, choice: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Exchange the sequences for others of them: a function of a tensor along its first dimension."""
        if self._room is not None:
            self._room = choice(self._room)
