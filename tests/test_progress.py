"""Which process speaks, and bars in a log."""

from __future__ import annotations

import pytest

from sdood_plugin.progress import progress_bar, speaks


@pytest.mark.parametrize(
    ("rank", "size", "expected"),
    [(None, None, True), ("0", "2", True), ("1", "2", False), ("3", None, True), ("3", "1", True)],
)
def test_one_of_a_launchers_processes_speaks(monkeypatch, capsys, rank, size, expected):
    for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert speaks() == expected
    with progress_bar("sampling", 3, "image") as bar:
        bar.update(3)
    assert ("sampling: 100%" in capsys.readouterr().err) == expected


def test_work_that_is_soon_done_has_no_bar(capsys):
    with progress_bar("reading", 3, "image", delay=60.0) as bar:
        bar.update(2)
    assert "reading" not in capsys.readouterr().err
