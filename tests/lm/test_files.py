import errno
import os
import threading

import pytest

from moekit.lm.files import read_object, sync_folder, write_whole


@pytest.mark.parametrize(("content", "expected"), [("häß\n", "häß\n".encode()), (b"\x00\xff", b"\x00\xff"), ("", b"")])
def test_text_is_utf8_and_bytes_are_bytes(tmp_path, content, expected):
    path = tmp_path / "a.txt"
    assert write_whole(path, content) == path
    assert path.read_bytes() == expected
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_may_be_text(tmp_path):
    assert write_whole(f"{tmp_path}/a", "x") == tmp_path / "a"


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"1" * 5000, b"\xff", b"[]"])
def test_what_is_no_object_is_named(tmp_path, content):
    with pytest.raises(ValueError, match=r"plan\.json is damaged.*, expected a plan\. Make it again"):
        read_object(write_whole(tmp_path / "plan.json", content), expected="a plan", mend=". Make it again")


def test_what_was_there_is_replaced(tmp_path):
    path = tmp_path / "a"
    path.write_text("a long old text")
    write_whole(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    path, link = tmp_path / "below" / "a", tmp_path / "link"
    path.parent.mkdir()
    path.write_text("old")
    link.symlink_to(tmp_path / "other")
    (tmp_path / "other").symlink_to("below/a")
    assert write_whole(link, "new") == link
    assert path.read_text() == "new"
    assert link.is_symlink()
    assert (tmp_path / "other").is_symlink()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a" * 252 + ".pt", "é" * 127, "a" + "é" * 127])
def test_a_name_may_be_as_long_as_any(tmp_path, name):
    assert write_whole(tmp_path / name, "new").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_reader_of_the_old_file_keeps_it(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with path.open() as reader:
        write_whole(path, "new")
        assert reader.read() == "old"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch, error):
    path = tmp_path / "a"
    path.write_text("old")

    def fail(*names):
        assert (tmp_path / os.path.basename(names[0])).read_text() == "new"  # written whole before it is moved
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(error)):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_folder_must_be_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "absent" / "a", "x")


def test_a_folder_in_its_place_is_an_error_and_stays(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_whole(tmp_path / "a", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(os.name == "nt", reason="there are no named pipes in folders")
def test_a_pipe_in_its_place_is_an_error_and_stays(tmp_path):
    os.mkfifo(tmp_path / "a")
    with pytest.raises(OSError, match=r"Not an ordinary file, .*a'$"):
        write_whole(tmp_path / "a", "new")
    assert (tmp_path / "a").is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_content_is_on_the_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    synced, sync, replace = [], os.fsync, os.replace

    def fsync(descriptor):
        synced.append((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        sync(descriptor)

    def move(source, target):
        assert synced == [(os.stat(source).st_ino, len("content"))]
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", move)
    assert write_whole(tmp_path / "a", "content").read_text() == "content"


def test_threads_that_write_one_file_at_once_each_write_it_whole(tmp_path, monkeypatch):
    both, replace = threading.Barrier(2, timeout=30), os.replace
    path, failures = tmp_path / "a", []

    def move(source, target):
        both.wait()  # each has written its own
        replace(source, target)

    def write(content):
        try:
            write_whole(path, content)
        except Exception as error:
            failures.append(error)

    monkeypatch.setattr(os, "replace", move)
    contents = ["x" * 1000, "y" * 2000]
    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert path.read_text() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_content_that_does_not_reach_the_disk_replaces_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match=rf"Input/output error: '{path}'$"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    sync_folder(tmp_path)
    assert synced == [tmp_path.stat().st_ino]


def test_a_file_system_that_cannot_sync_folders_is_not_waited_for_but_a_broken_disk_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)


def failing(number):
    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    return fail


def test_folders_of_windows_are_not_opened(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    folder = str(tmp_path)
    with monkeypatch.context() as patch:  # no longer than this: paths are made by the system's name
        patch.setattr(os, "name", "nt")
        patch.setattr(os, "open", refuse)
        sync_folder(folder)
