import errno
import os

import pytest

from openo3_jax.data import files
from openo3_jax.errors import InputError


def test_a_line_ends_at_a_newline_only(tmp_path):
    """Texts that JSON leaves as they are may hold U+2028, U+0085 and form feeds, at which str.splitlines cuts."""
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"a": "x\u2028y\u0085z"}\r\n\n  \n[1]'.encode())
    assert files.read_jsonl(path) == [(1, {"a": "x\u2028y\u0085z"}), (4, [1])]


BAD = {  # what the file holds: what is said
    b'{"a": 1}\n{"a"': "a.jsonl:2: is not JSON",
    b"[" * 100_000: "a.jsonl:1: is not JSON",
    b'{"a": "\xe9"}': "a.jsonl: cannot be read ('utf-8' codec can't decode byte 0xe9",
}


@pytest.mark.parametrize("content", BAD, ids=range(len(BAD)))
def test_what_is_no_jsonl(content, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(InputError) as caught:
        files.read_jsonl(tmp_path / "a.jsonl")
    assert BAD[content] in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"a.jsonl: cannot be read \(No such file or directory\); expected JSON lines"):
        files.read_jsonl(tmp_path / "a.jsonl")


def no_links(source, target):
    raise OSError(errno.EPERM, "this disk has no hard links")


def test_a_disk_without_links_gets_copies(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("a")
    (tmp_path / "link").symlink_to("a")
    files.link_or_copy(tmp_path / "link", tmp_path / "b")
    assert (tmp_path / "b").samefile(tmp_path / "a")
    monkeypatch.setattr(os, "link", no_links)
    files.link_or_copy(tmp_path / "link", tmp_path / "c")
    assert (tmp_path / "c").read_text() == "a" and not (tmp_path / "c").samefile(tmp_path / "a")
