"""Killing a training in the middle, and what must then be true of it."""

from __future__ import annotations

import torch

from sdood_plugin.training import Job


class Killed(Exception):
    """What a test ends a training with."""


class Dying:
    """An accelerator whose backward pass fails the n-th time."""

    def __init__(self, accelerator, at: int) -> None:
        self._accelerator, self._left = accelerator, at

    def __getattr__(self, name):
        return getattr(self._accelerator, name)

    def backward(self, loss):
        self._left -= 1
        if not self._left:
            raise Killed
        self._accelerator.backward(loss)


def assert_same(first, second):
    """Equal to the last bit, through dicts, lists and tensors."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            assert_same(first[name], second[name])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same(a, b)
    else:
        assert first == second


def assert_resumes(train, folder, accelerator, *, die_at):
    """`train(job)` ends alike whether it was killed or not.

    A checkpoint of another key must not be used: the result then is that of a training from the start.
    """
    import pytest

    whole = train(Job(accelerator, folder / "whole", key="k"))
    assert not (folder / "whole" / "checkpoint.pt").exists()
    for key, resumed in (("k", True), ("other", False)):
        where = folder / key
        with pytest.raises(Killed):
            train(Job(Dying(accelerator, die_at), where, key="k", checkpoint_seconds=0.0))
        saved = torch.load(where / "checkpoint.pt", weights_only=True)
        assert saved["step"] == die_at - 1 and saved["key"] == "k"
        counting = Dying(accelerator, 10**9)
        assert_same(train(Job(counting, where, key=key)), whole)
        steps = 10**9 - counting._left
        assert steps == len(whole[1]["loss"]) - (die_at - 1 if resumed else 0)  # it went on, or began again
