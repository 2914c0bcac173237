"""Imglists as both hosts read them; neither host is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sdood_plugin.errors import UsageError
from sdood_plugin.hosts.imglist import check_imglist, is_absent, listed_images


def test_every_line_of_a_list_is_looked_at(tmp_path):
    (tmp_path / "a.png").touch()
    good, path = "a.png 2\na.png -1\n", tmp_path / "list.txt"
    path.write_text(good)
    assert check_imglist(path, tmp_path, 3) == 2
    for line, expected in (
        ("a.png 3", "got label 3"),
        ("/a.png 1", "relative path"),
        ("a b.png 1", "without spaces"),
        ("a.png", "integer label"),
        ("a.png x", "integer label"),
        ("a.png \u00b2", "integer label"),
        ("a.png 007", "integer label"),
        ("b.png 1", "no file"),
        ("", "integer label"),
    ):
        path.write_text(f"{good}{line}\n")
        with pytest.raises(UsageError, match=expected) as caught:
            check_imglist(path, tmp_path, 3)
        assert "line 3" in str(caught.value)
    path.write_text(good)
    with pytest.raises(UsageError, match="line 2: got label -1; expected at most 2, and not below 0"):
        check_imglist(path, tmp_path, 3, ood_allowed=False)
    path.write_bytes(b"\xff\xfe a.png 1\n")
    with pytest.raises(UsageError, match="expected a text file"):
        check_imglist(path, tmp_path, 3)


def test_a_data_set_whose_list_came_without_its_images_is_absent(tmp_path):
    (tmp_path / "a.png").touch()
    for text, expected in (("b.png 1\n", True), ("b.png 1\na.png 1\n", False)):
        (tmp_path / "list.txt").write_text(text)
        assert is_absent(tmp_path / "list.txt", tmp_path) == expected
    assert is_absent(tmp_path / "none.txt", tmp_path)


def test_a_list_of_ood_images_has_labels_below_0_alone(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("a.png -1\nb.png -7\n")
    assert listed_images(path, 0) == [(1, "a.png"), (2, "b.png")]
    path.write_text("a.png -1\nb.png 0\n")
    with pytest.raises(UsageError, match="line 2: got label 0; expected one below 0 in a list of OOD images") as caught:
        listed_images(path, 0)
    assert "\n" not in str(caught.value)


def test_comments_are_passed_over_where_the_host_does_so(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("# a comment 3\n\na.png 1\n  \n")
    assert listed_images(path, 2, comments=True) == [(3, "a.png")]
    with pytest.raises(UsageError, match="line 1: got '# a comment'; expected a relative path without spaces"):
        listed_images(path, 4)


def test_it_imports_no_host():
    hosts = "{'openood', 'pytorch_ood', 'torch'}"
    code = f"import sys, sdood_plugin.hosts.imglist; assert not {hosts} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
