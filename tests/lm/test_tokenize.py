import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from stored_rows import stored_rows

from moekit.lm import folder_locks, tokenize_parts
from moekit.lm.documents import find_files, read_pieces
from moekit.lm.folder_locks import FolderLock
from moekit.lm.shards import pack, write_shards
from moekit.lm.tokenize import Command, main, tokenize
from moekit.lm.tokenizers import ByteTokenizer, load_tokenizer, save_tokenizer, train_bpe

BYTES = ByteTokenizer()
LINES = [f"{i} line of words, über alles " * (1 + i % 7) for i in range(60)]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def json_lines(texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))


@pytest.fixture
def corpus(tmp_path):
    """Write four files that hold every kind of input."""
    folder = tmp_path / "corpus"
    (folder / "below").mkdir(parents=True)
    (folder / "a.jsonl").write_text(json_lines(LINES[:40]) + "\n")
    (folder / "b.txt").write_text("one document\r\nof two lines\n")
    (folder / "below" / "c.json.gz").write_bytes(gzip.compress(json_lines(LINES[40:]).encode()))
    (folder / "d.md.gz").write_bytes(gzip.compress("packed text é".encode()))
    (folder / ".hidden").write_bytes(b"\xff")
    return folder


TEXTS = [*LINES[:40], "one document\r\nof two lines\n", *LINES[40:], "packed text é"]  # in the order of the paths


def command(corpus, output, **changes):
    defaults = {"tokenizer": "byte", "seq_len": 63, "sequences_per_shard": 20, "piece_bytes": 1500}
    return Command(input=(str(corpus),), output=output, **{**defaults, **changes})


def run(settings, *, threads=2):
    with ThreadPoolExecutor(threads) as executor:
        return tokenize(settings, executor, most=threads, progress=lambda *_: None)


def rows_of(output):
    return stored_rows(output / "manifest.jsonl")


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def documents_of(stream, end_of_text):
    found, current = [], []
    for token in stream:
        current.append(token)
        if token == end_of_text:
            found.append(tuple(current))
            current = []
    return found + ([tuple(current)] if current else [])


def test_every_token_is_written_once(corpus, tmp_path):
    summary = run(command(corpus, tmp_path / "out"))
    rows = rows_of(tmp_path / "out")
    expected = Counter(token for text in TEXTS for token in [*BYTES.encode(text), 0])
    written = Counter(token for row in rows for token in row)
    assert written.pop(-1) == summary.padding < 64
    assert written == expected
    assert {len(row) for row in rows} == {64}
    assert summary.tally == (len(TEXTS), expected.total(), 0, {})
    assert (summary.sequences, summary.shards) == (len(rows), -(-len(rows) // 20))
    assert sum(-1 in row for row in rows) == 1


def test_one_piece_in_order_is_pack_with_padding(corpus, tmp_path):
    run(command(corpus, tmp_path / "out", piece_bytes=10**6, shuffle=False))
    packed = pack([BYTES.encode(text) for text in _in_file_order(corpus)], seq_len=63, end_of_text=0).tolist()
    rows = rows_of(tmp_path / "out")
    kept = [token for token in rows[-1] if token != -1]
    assert rows[:-1] == packed[:-1]
    assert kept == packed[-1][: len(kept)]
    assert 0 < len(kept) < 64
    write_shards(tmp_path / "packed", rows, sequences_per_shard=20)
    written = content(tmp_path / "out")
    assert content(tmp_path / "packed").items() <= written.items()
    assert written.keys() - content(tmp_path / "packed").keys() == {"tokenizer.json", "tokenize.json"}


def _in_file_order(corpus):
    return [
        text
        for file in find_files([str(corpus)])
        for text in {"a.jsonl": LINES[:40], "c.json.gz": LINES[40:]}.get(
            file.name, [TEXTS[40]] if file.name == "b.txt" else [TEXTS[-1]]
        )
    ]


def test_documents_are_whole_within_the_order_of_the_input(corpus, tmp_path):
    run(command(corpus, tmp_path / "out", shuffle=False, seq_len=15))
    stream = [token for row in rows_of(tmp_path / "out") for token in row]
    wanted = {(*BYTES.encode(text), 0) for text in TEXTS}
    assert len(wanted & set(documents_of(stream, 0))) > 0.7 * len(wanted)  # the others are cut at the end of a piece


def test_order_depends_on_the_seed_alone(corpus, tmp_path):
    for name, threads, changes in [("a", 1, {}), ("b", 3, {}), ("c", 2, {"seed": 1}), ("d", 2, {"shuffle": False})]:
        run(command(corpus, tmp_path / name, **changes), threads=threads)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    a, c, d = (rows_of(tmp_path / name) for name in "acd")
    assert sorted(a) == sorted(c) == sorted(d)
    assert a != c
    assert d not in (a, c)
    places = [d.index(row) for row in a[:20]]  # the first shard draws from everywhere
    assert max(places) - min(places) > len(d) / 2


def test_pieces_depend_on_the_files_alone(corpus):
    files = find_files([str(corpus)])
    pieces = list(read_pieces(files, piece_bytes=1500))
    assert len(pieces) > 5
    assert [piece.number for piece in pieces] == list(range(len(pieces)))
    assert pieces == list(read_pieces(files, piece_bytes=1500))
    sizes = [sum(len(line) for block in piece.blocks for line in block.lines) for piece in pieces]
    assert all(1500 <= size < 3500 for size in sizes[:-1])
    assert pieces[-1].position == sum(file.stat().st_size for file in files)


def test_find_files_expands_and_sorts(corpus):
    names = [path.name for path in find_files([f"{corpus}/*.txt", str(corpus), f"{corpus}/**/*.gz"])]
    assert names == ["a.jsonl", "b.txt", "c.json.gz", "d.md.gz"]
    (corpus / "x[1].txt").write_text("brackets")
    assert [path.name for path in find_files([f"{corpus}/x[1].txt"])] == ["x[1].txt"]


def test_linked_folders_are_followed_once(corpus, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "e.txt").write_text("linked")
    (corpus / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(corpus)
    (corpus / ".hidden_link").symlink_to(tmp_path)
    found = find_files([str(corpus)])
    assert [path.name for path in found] == ["a.jsonl", "b.txt", "c.json.gz", "d.md.gz", "e.txt"]
    assert found == find_files([str(corpus / "link"), str(corpus)])
    (corpus / "one").symlink_to(corpus / "other")
    (corpus / "other").symlink_to(corpus / "one")
    (corpus / "nowhere").symlink_to(tmp_path / "absent")
    assert found == find_files([str(corpus)]) == find_files([f"{corpus}/*"])


def test_the_suffix_of_a_link_says_how_its_file_is_read(tmp_path):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "5c1").write_text(json_lines(LINES[:3]))
    (blobs / "5c2").write_bytes(gzip.compress(json_lines(LINES[3:5]).encode()))
    for name, blob in [("train.jsonl", "5c1"), ("again.jsonl", "5c1"), ("more.json.gz", "5c2")]:
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    for number, (given, documents) in enumerate(
        [(snapshot / "train.jsonl", 3), (snapshot, 5), (tmp_path / "hub", 5), (snapshot / "more.json.gz", 2)]
    ):
        assert run(command(given, tmp_path / f"out{number}")).tally.documents == documents
    assert find_files([str(tmp_path / "hub")]) == [snapshot / "again.jsonl", snapshot / "more.json.gz"]
    (snapshot / "table.parquet").symlink_to("../../blobs/5c1")
    with pytest.raises(ValueError, match=r"snapshots/main/table\.parquet is \.parquet; expected text or JSON lines"):
        find_files([str(snapshot)])


def test_a_link_whose_file_has_more_telling_suffixes_is_read_as_that(tmp_path):
    (tmp_path / "5c1").write_text(json_lines(LINES[:3]))
    (tmp_path / "train.jsonl").symlink_to("5c1")
    (tmp_path / "train.v2").symlink_to("train.jsonl")
    (tmp_path / "latest").symlink_to("train.v2")
    (tmp_path / "notes.gz").symlink_to("note.json.gz")
    (tmp_path / "note.json.gz").write_bytes(b"")
    given = [f"{tmp_path}/latest", f"{tmp_path}/notes.gz"]
    assert find_files(given) == [tmp_path / "note.json.gz", tmp_path / "train.jsonl"]
    out = tmp_path / "out"
    out.mkdir()
    (out / "inside").write_text("a text")
    (tmp_path / "link.jsonl").symlink_to("out/inside")
    with pytest.raises(ValueError, match=r"link\.jsonl lies in the output"):
        run(command(tmp_path / "link.jsonl", out))


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".TAR.Gz", ".tgz", ".parquet.gz", ".zst.gz"])
def test_other_formats_are_refused_compressed_ones_too(tmp_path, suffix):
    (tmp_path / f"docs.1{suffix}").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"docs\.1{suffix} is {suffix}; expected text or JSON lines, plain or \.gz"):
        find_files([str(tmp_path)])


def test_suffixes_may_be_in_capitals(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.JSONL").write_text(json_lines(LINES[:3]))
    (folder / "b.Json.GZ").write_bytes(gzip.compress(json_lines(LINES[3:5]).encode()))
    assert run(command(folder, tmp_path / "out")).tally.documents == 5
    record = tmp_path / "out" / "tokenize.json"
    record.write_text(record.read_text().replace('"suffixes": "in capitals, too"', '"other": 1'))
    with pytest.raises(ValueError, match="suffixes was None and is 'in capitals, too'"):  # shards of an older version
        run(command(folder, tmp_path / "out"))
    (folder / "c.txt.ZST").write_bytes(b"")
    with pytest.raises(ValueError, match=r"c\.txt\.ZST is \.ZST; expected text or JSON lines"):
        run(command(folder, tmp_path / "out"))


def test_a_bpe_and_its_copy(corpus, tmp_path):
    save_tokenizer(train_bpe(TEXTS, vocab_size=300), tmp_path / "bpe.json")
    run(command(corpus, tmp_path / "out", tokenizer=str(tmp_path / "bpe.json")))
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer.json")
    written = Counter(token for row in rows_of(tmp_path / "out") for token in row if token != -1)
    assert written == Counter(token for text in TEXTS for token in [*tokenizer.encode(text), 0])


def test_a_foreign_end_of_text(corpus, tmp_path):
    import tokenizers

    save_tokenizer(train_bpe(TEXTS, vocab_size=300), tmp_path / "bpe.json")
    foreign = tokenizers.Tokenizer.from_file(str(tmp_path / "bpe.json"))
    foreign.add_special_tokens(["</s>"])
    foreign.save(str(tmp_path / "foreign.json"))
    (corpus / "e.txt").write_text("a</s>b")
    summary = run(command(corpus, tmp_path / "out", tokenizer=str(tmp_path / "foreign.json"), end_of_text="</s>"))
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer.json")
    written = Counter(token for row in rows_of(tmp_path / "out") for token in row if token != -1)
    assert tokenizer.end_of_text == 300
    assert written[300] == summary.tally.documents == len(TEXTS) + 1
    assert written == Counter(token for text in [*TEXTS, "a</s>b"] for token in [*tokenizer.encode(text), 300])


KILLER = """
import itertools, os, shutil, signal, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from moekit.lm.tokenize import Command, tokenize

def run(output, threads, moment):
    pid = os.fork()
    if pid == 0:
        steps = itertools.count()
        def counted(function):
            def step(*arguments, **named):
                if next(steps) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **named)
            return step
        os.replace, os.unlink, os.rmdir = map(counted, (os.replace, os.unlink, os.rmdir))
        with ThreadPoolExecutor(threads) as executor:
            settings = {"seq_len": 63, "sequences_per_shard": 20, "piece_bytes": 1500}
            command = Command((sys.argv[1],), Path(output), "byte", **settings)
            tokenize(command, executor, most=threads, progress=lambda *_: None)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

work = Path(sys.argv[2])
assert run(work / "unbroken", 1, -1) == 0
wanted = content(work / "unbroken")
for moment in itertools.count():
    output = work / "killed"
    code = run(output, 1, moment)
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    run(output, 2, 3)                     # killed once more, soon after
    assert run(output, 3, -1) == 0, moment
    assert content(output) == wanted, moment
    assert not (output / ".parts").exists(), moment
    shutil.rmtree(output)
print(moment)
"""


def test_killed_at_every_moment_and_gone_on_with(corpus, tmp_path):
    words = [sys.executable, "-c", KILLER, str(corpus), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40  # each is before a file gets or loses its name


def start(corpus, output, *more):
    words = [sys.executable, "-m", "moekit.lm.tokenize", "--input", str(corpus), "--output", str(output)]
    words += ["--tokenizer", "byte", "--seq-len", "63", "--sequences-per-shard", "200", "--piece-bytes", "2000", *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        words, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT, start_new_session=True, preexec_fn=hears_ctrl_c
    )


def hears_ctrl_c():
    """Undo what a shell does to programs in the background, and these to their children: Ctrl-C is ignored there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


def group_is_gone(process):
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_processes_killed_interrupted_and_gone_on_with(tmp_path):
    corpus, output = tmp_path / "corpus", tmp_path / "out"
    corpus.mkdir()
    (corpus / "a.jsonl").write_text(json_lines(LINES * 160))  # some seconds of work to be stopped in
    parts = output / ".parts"
    first = start(corpus, output, "--workers", "2")
    wait_for(lambda: (parts / "00000001.part").exists())
    first.kill()
    assert first.wait(timeout=20) == -signal.SIGKILL
    assert not (parts / "index.json").exists(), "the run was over before it was killed"
    try:
        wait_for(lambda: group_is_gone(first), 20)  # workers do not outlive it
    except AssertionError:
        os.killpg(first.pid, signal.SIGKILL)
        raise
    first.communicate()
    for part in sorted(parts.glob("*.part"))[3:]:  # so that the next has work left on a busy machine, too
        part.unlink()
    number = len(list(parts.glob("*.part")))
    second = start(corpus, output, "--workers", "1")
    wait_for(lambda: len(list(parts.glob("*.part"))) > number)
    os.killpg(second.pid, signal.SIGINT)  # as the terminal does, to every process
    out, err = second.communicate(timeout=30)
    assert second.returncode == 130, err
    assert (
        err == "python -m moekit.lm.tokenize: stopped. The same command goes on where this one stopped: give it again\n"
    )
    assert not list(output.glob("*.tar"))
    third = start(corpus, output, "--workers", "2")
    out, err = third.communicate(timeout=60)
    assert (third.returncode, err) == (0, "")
    assert re.search(r"tokenizing 100%.*writing shards 100%.*manifest.jsonl is done", out, re.DOTALL)
    assert re.search(
        r"9,600 documents, [\d,]+ tokens, [\d,]+ sequences of 64, \d+ shards\npadding \d+ tokens, 0.\d+%; ", out
    )
    run(command(corpus, tmp_path / "unbroken", sequences_per_shard=200, piece_bytes=2000))
    assert content(output) == content(tmp_path / "unbroken")


def test_done_is_done(corpus, tmp_path):
    settings = command(corpus, tmp_path / "out")
    first = run(settings)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run(settings) == first._replace(new_tokens=0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_another_command_is_refused(corpus, tmp_path):
    settings = command(corpus, tmp_path / "out")
    run(settings)
    before = content(tmp_path / "out")
    for change, words in [
        ({"seq_len": 31}, "seq_len was 63 and is 31"),
        ({"seed": 5, "text_key": "body"}, "seed was 0 and is 5; text_key was 'text' and is 'body'"),
        ({"shuffle": False}, "seed was 0 and is 'no shuffle'"),
        ({"input": (f"{corpus}/*.jsonl",)}, r"input .*b.txt is missing, and 2 more"),
    ]:
        with pytest.raises(ValueError, match=rf"begun by another command: {words}\. Give another --output, or remove"):
            run(replace(settings, **change))
    (corpus / "b.txt").write_text("changed")
    with pytest.raises(ValueError, match=r"input \S*b.txt has changed\. "):
        run(settings)
    assert content(tmp_path / "out") == before


def test_another_command_is_refused_half_way(corpus, tmp_path):
    (corpus / "z.jsonl").write_text("no json\n")
    settings = command(corpus, tmp_path / "out")
    with pytest.raises(ValueError, match=r"z.jsonl line 1 is no JSON object"):
        run(settings)
    save_tokenizer(train_bpe(TEXTS, vocab_size=300), tmp_path / "bpe.json")
    with pytest.raises(ValueError, match=r"tokenizer was 'byte .*' and is 'bpe-300 "):
        run(replace(settings, tokenizer=str(tmp_path / "bpe.json")))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".parts"]
    assert run(replace(settings, on_bad_document="skip")).tally.bad == {"no JSON object": 1}
    with pytest.raises(ValueError, match="on_bad_document was 'skip' and is 'raise'"):
        run(settings)


BAD = [
    (b"{'a'}", "no JSON object", "line 2 is no JSON object"),
    (b'["text"]', "no JSON object", r"""line 2 is '\["text"\]\\n'; expected a JSON object"""),
    (b'{"body": "x"}', "no text under the key", r"line 2 has no text under 'text'; its keys are \['body'\]"),
    (b'{"text": 5}', "no text under the key", "line 2 has no text under 'text'"),
    (b'{"text": "\xff"}', "no UTF-8", "line 2 is no UTF-8"),
    (b'{"text": "\\ud800"}', "no UTF-8", "line 2 has a lone surrogate"),
]


@pytest.mark.parametrize(("line", "reason", "words"), BAD)
def test_bad_lines_are_named_or_counted(tmp_path, line, reason, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} {words}"):
        run(command(path, tmp_path / "out"))
    summary = run(command(path, tmp_path / "skip", on_bad_document="skip"))
    assert summary.tally == (2, 10, 0, {reason: 1})
    [row] = rows_of(tmp_path / "skip")
    assert [token for token in row if token != -1] == [*BYTES.encode("good"), 0, *BYTES.encode("fine"), 0]


def test_a_bad_line_far_down_a_file_has_its_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json_lines(LINES) + "[]\n")
    with pytest.raises(ValueError, match=rf"a.jsonl line {len(LINES) + 1} is '\[\]\\n'; expected a JSON object"):
        run(command(path, tmp_path / "out"))


def test_a_text_that_is_no_utf8_is_named_or_skipped(corpus, tmp_path):
    (corpus / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"bad.txt is no UTF-8: .* byte 0xff in position 0"):
        run(command(corpus, tmp_path / "out"))
    assert run(command(corpus, tmp_path / "skip", on_bad_document="skip")).tally[2:] == (0, {"no UTF-8": 1})


def test_empty_documents_are_left_out_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n\n{"text": "a"}\n')
    summary = run(command(path, tmp_path / "out"))
    assert summary.tally == (1, 2, 1, {})
    assert summary.lines(length=64, seconds=2.0) == [
        "1 documents, 2 tokens, 1 sequences of 64, 1 shards",
        "padding 62 tokens, 96.88%; 2.0 s, 1 tokens/s",
        "left out: 1 empty",
    ]
    path.write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="there is no text to tokenize: 1 empty and 0 bad documents, no other"):
        run(command(path, tmp_path / "none"))
    assert content(tmp_path / "none") == {}


def test_impossible_settings_are_refused(corpus, tmp_path):
    for changes, words in [
        ({"seq_len": 0}, "seq_len is 0; expected at least 1"),
        ({"sequences_per_shard": 0}, "sequences_per_shard is 0"),
        ({"seed": -1}, "seed is -1; expected 0 to"),
        ({"tokenizer": "gpt"}, r"the tokenizer is 'gpt'; expected 'byte' or the path of a tokenizer.json"),
        (
            {"tokenizer": str(corpus / "a.jsonl")},
            r"^--tokenizer .*a\.jsonl: .* is no tokenizer that save_tokenizer wrote",
        ),
        ({"end_of_text": "</s>"}, "leave --end-of-text out"),
        ({"input": ()}, "--input names nothing"),
        ({"input": (str(corpus / "absent*"),)}, "absent.*matches no file"),
        ({"input": ("s3://bucket/a.jsonl",)}, "is a URL; expected local files"),
        ({"output": Path("s3://bucket/out")}, "is a URL; expected a local folder"),
        ({"output": corpus}, "lies in the output"),
        ({"output": corpus / "b.txt" / "out"}, r"^the output .*out: .*/b\.txt is a file; expected a folder, or a new"),
        ({"output": corpus / "b.txt"}, r"^the output .*/b\.txt is a file; expected a folder, or a new name"),
        (
            {"seq_len": 13_421_772},
            "seq_len is 13421772, whose .* expected at most 13421771, for 64 MiB is the most",
        ),
    ]:
        with pytest.raises((ValueError, OSError), match=words):
            run(replace(command(corpus, tmp_path / "out"), **changes))
    assert not (tmp_path / "out").exists()
    (corpus / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"x.parquet is .parquet; expected text or JSON lines"):
        run(command(corpus, tmp_path / "out"))


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"plan": {}, "summary": [3, 2, 1, 0]}'])
def test_damaged_notes_of_an_earlier_run_are_named(corpus, tmp_path, damage):
    run(command(corpus, tmp_path / "out"))
    (tmp_path / "out" / "tokenize.json").write_text(damage)
    with pytest.raises(ValueError, match=r"out/tokenize\.json is damaged.*Give another --output, or remove the folder"):
        run(command(corpus, tmp_path / "out"))
    (tmp_path / "half" / ".parts").mkdir(parents=True)
    (tmp_path / "half" / ".parts" / "plan.json").write_text(damage)
    with pytest.raises(ValueError, match=r"\.parts/plan\.json is damaged|half was begun by another command"):
        run(command(corpus, tmp_path / "half"))


@pytest.mark.parametrize("change", [lambda path: path.write_text("other"), os.utime, Path.unlink])
def test_an_input_that_changes_while_it_is_read_is_named(corpus, tmp_path, monkeypatch, change):
    def pieces(*arguments, **options):
        yield from read_pieces(*arguments, **options)
        change(corpus / "b.txt")

    monkeypatch.setattr("moekit.lm.tokenize.read_pieces", pieces)
    with pytest.raises((ValueError, FileNotFoundError), match=r"b\.txt( has changed while it was read.*remove the|'$)"):
        run(command(corpus, tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".parts"]


@pytest.fixture
def stopped(corpus, tmp_path, monkeypatch):
    """Leave a run stopped between its second and its third shard."""
    make = tokenize_parts.make_shard

    def stops(places, *, target, **options):
        if target.name == "00000002.tar":
            raise InterruptedError
        return make(places, target=target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tokenize_parts, "make_shard", stops)
        with pytest.raises(InterruptedError):
            run(command(corpus, tmp_path / "out"), threads=1)
    assert {path.name for path in (tmp_path / "out").glob("*.tar")} == {"00000000.tar", "00000001.tar"}
    return tmp_path / "out"


def cut(size):
    return lambda path: path.write_bytes(path.read_bytes()[:size])


DAMAGES = [
    (".parts/00000001.part", cut(-4)),
    (".parts/00000001.part", cut(0)),
    (".parts/00000001.part", Path.unlink),
    (".parts/00000001.part", lambda path: path.write_bytes(path.with_stem("00000002").read_bytes()[:1024])),
    (".parts/index.json", cut(10)),
    (".parts/index.json", lambda path: path.write_text("{}")),
    ("00000001.tar", cut(1000)),
    ("00000001.tar", cut(0)),
    ("00000001.tar", cut(4 * 1024)),  # between two members
    ("00000001.tar", lambda path: path.write_bytes(bytes(512))),
    ("00000001.tar", lambda path: path.write_bytes(path.read_bytes().rstrip(b"\0"))),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_what_was_damaged_while_a_run_stood_still_is_named_with_its_remedy(corpus, tmp_path, stopped, name, damage):
    damage(stopped / name)
    with pytest.raises(
        ValueError, match=rf"{re.escape(name)} is (damaged|missing).*\. Remove .* the same comm"
    ) as error:
        run(command(corpus, stopped))
    assert not (stopped / "manifest.jsonl").exists()
    for path in re.search(r"Remove (.*) and give", str(error.value))[1].split(" and "):
        (stopped / name if path == "it" else Path(path)).unlink()
    run(command(corpus, stopped))
    run(command(corpus, tmp_path / "unbroken"))
    assert content(stopped) == content(tmp_path / "unbroken")


def test_a_part_that_is_damaged_before_the_index_is_written_takes_nothing_away(corpus, tmp_path, stopped):
    parts = stopped / ".parts"
    (parts / "index.json").unlink()
    cut(600)(parts / "00000001.part")
    with pytest.raises(ValueError, match=r"00000001\.part is damaged.* Remove \S*/00000001\.part and give the same"):
        run(command(corpus, stopped))
    (parts / "00000001.part").unlink()
    run(command(corpus, stopped))
    run(command(corpus, tmp_path / "unbroken"))
    assert content(stopped) == content(tmp_path / "unbroken")


def test_a_part_that_is_damaged_while_shards_are_written_is_named(tmp_path):
    part = tokenize_parts.part_path(tmp_path, 0)
    part.write_bytes(bytes(512 + 4 * 7))
    with pytest.raises(ValueError, match=r"00000000\.part is damaged"):
        tokenize_parts.make_shard([(0, 1)], parts=tmp_path, target=tmp_path / "0.tar", length=4, first=0)


def test_a_damaged_gzip_is_named(corpus, tmp_path):
    path = corpus / "d.md.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"d.md.gz is no gzip file, or is damaged"):
        run(command(corpus, tmp_path / "out"))


def test_shards_of_others_are_left_alone(corpus, tmp_path):
    write_shards(tmp_path / "out", [[1, 2, 3]])
    before = content(tmp_path / "out")
    for name in ("manifest.jsonl", "00000000.tar"):
        with pytest.raises(FileExistsError, match=f"holds {name}, which this command did not write"):
            run(command(corpus, tmp_path / "out"))
        assert content(tmp_path / "out") == before
        (tmp_path / "out" / "manifest.jsonl").unlink(missing_ok=True)
        before.pop("manifest.jsonl", None)


def test_a_second_process_is_kept_out(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_locks, "PATIENCE", 0)
    with FolderLock(tmp_path / "out", flag="--output"):
        with pytest.raises(BlockingIOError, match=r"/out: .* works in this folder; .*or choose another --output"):
            run(command(corpus, tmp_path / "out"))
        assert not content(tmp_path / "out")
    run(command(corpus, tmp_path / "out"))


def test_a_second_process_sees_that_the_first_has_done_it_all(corpus, tmp_path, monkeypatch):
    take, first = FolderLock.take, []

    def late(lock):
        monkeypatch.setattr(FolderLock, "take", take)
        first.append(run(command(corpus, tmp_path / "out")))
        take(lock)

    monkeypatch.setattr(FolderLock, "take", late)
    assert run(command(corpus, tmp_path / "out")) == first[0]._replace(new_tokens=0)


def test_a_full_disk_leaves_no_half_of_a_shard(corpus, tmp_path, monkeypatch):
    def full(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.name.startswith(".00000002.tar"):
            os.truncate(path, 100)
            raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)  # where what a disk has no room for comes to light at the latest
        with pytest.raises(OSError, match="No space left on device"):
            run(command(corpus, tmp_path / "out"), threads=1)
    assert sorted(path.name for path in (tmp_path / "out").glob("*")) == [".parts", "00000000.tar", "00000001.tar"]
    made = (tmp_path / "out" / "00000001.tar").stat().st_ino
    assert run(command(corpus, tmp_path / "out")).new_tokens == 0
    assert (tmp_path / "out" / "00000001.tar").stat().st_ino == made  # what is done is not done again
    run(command(corpus, tmp_path / "unbroken"))
    assert content(tmp_path / "out") == content(tmp_path / "unbroken")


def test_the_command_line_says_what_is_wrong(corpus, tmp_path, capsys):
    words = ["--input", str(corpus), "--output", str(tmp_path / "out"), "--tokenizer"]
    for more, message in [
        (["absent.json"], "moekit tokenize: the tokenizer is 'absent.json'; expected 'byte'"),
        (["byte", "--workers", "0"], "moekit tokenize: workers is 0; expected at least 1"),
        (
            ["byte", "--text-key", "body", "--workers", "1"],
            "moekit tokenize: .*a.jsonl line 1 has no text under 'body'",
        ),
    ]:
        with pytest.raises(SystemExit, match=message) as stopped:
            main([*words, *more], prog="moekit tokenize")
        assert isinstance(stopped.value.code, str)  # a message, so status 1
        assert "Traceback" not in capsys.readouterr().err
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SystemExit, match=r"moekit tokenize: .*/file is a file; expected a folder, or a new name"):
        main(
            ["--input", str(corpus), "--output", str(tmp_path / "file" / "out"), "--tokenizer", "byte"],
            prog="moekit tokenize",
        )
