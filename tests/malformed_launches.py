"""Malformed launches for `malformations`: flags, files that flags name, and checkpoints to go on from."""

import io
import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from malformations import MANIFEST, SHARDS, Maker, Trial, cut, flipped, garbage, in_place, nothing
from small_runs import write_state

from moekit.lm.checkpoint_checksums import file_checksums, write_checksums

Harm = Callable[[random.Random, bytes], bytes] | str
_FLAGS = ("--moe-num-experts", "--moe-top-k", "--batch-size", "--dataset-manifest", "--lr-scheduler", "--recipe")
_FILES = (".metadata", "__0_0.distcp", "state.json", "checksums.json")


def given(*choices: str) -> Maker:
    """Give one of some texts of flags, of which the first word is at fault; a message names it or its value."""

    def make(rng: random.Random, root: Path) -> Trial:
        flags = rng.choice(choices).replace("ROOT", str(root)).split(" ")
        named = [flags[0], flags[0].strip("-").replace("-", "_"), *(word for word in flags[1:2] if word)]
        return Trial(flags, [*named, MANIFEST] if flags[0] in ("--steps", "--batch-size") else named)

    return make


def typo(rng: random.Random, root: Path) -> Trial:
    """Misspell a flag."""
    flag = rng.choice(_FLAGS)
    at = rng.randrange(3, len(flag) - 1)
    spelled = rng.choice(
        [flag[:at] + flag[at + 1 :], flag[:at] + "q" + flag[at:], flag[:at] + flag[at:].upper(), flag + "s"]
    )
    return Trial([spelled, "2"], [spelled])


def written(flag: str, name: str, *contents: str | bytes, more: tuple[str, ...] = (), suffix: str = "") -> Maker:
    """Let a flag name a file with one of some contents."""

    def make(rng: random.Random, root: Path) -> Trial:
        content = rng.choice(contents)
        path = root / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return Trial([flag, f"{path}{suffix}", *more], [name])

    return make


def config(*values: dict[str, Any]) -> Maker:
    """Give a file of settings with values that make no sense; the message names the file or the first setting."""

    def make(rng: random.Random, root: Path) -> Trial:
        path, chosen = root / "settings.json", rng.choice(values)
        path.write_text(json.dumps(chosen))
        key = next(iter(chosen))
        return Trial(["--config", str(path)], ["settings.json", key, "--" + key.replace("_", "-")])

    return make


def preset(*changes: dict[str, Any]) -> Maker:
    """Give a model of which one key is bad."""

    def make(rng: random.Random, root: Path) -> Trial:
        change = rng.choice(changes)
        path = root / "model.json"
        good = {"hidden_dim": 64, "n_layers": 1, "n_heads": 2, "seq_len": 64, "vocab_size": 512}
        path.write_text(json.dumps({**good, "post_embed_norm": False, "weight_tying": False, **change}))
        return Trial(["--model", str(path)], ["model.json", *SHARDS])  # or the data that it does not fit

    return make


SHAPES = ("00000000.tar", "00000001.tar", "00000002.tar")  # data that a model does not fit are named instead

_ROUTER = """
from moekit.recipes import mixtral
def broken(logits, **options):
    {body}
def recipe():
    return mixtral()._replace(route=broken)
"""
_HARMS: tuple[Harm, ...] = (
    *(flipped, cut, nothing, garbage),
    *("missing", "folder", "loop"),
)
LAUNCHES: tuple[Maker, ...] = (
    typo,
    given("--nonsense 3", "--stepz 3", "--=3", "---steps 3", "--no-lr 3", "--tokens=3"),
    given("--steps many", "--steps 1.5", "--lr fast", "--batch-size 0x10", "--seed x", "--workers -"),
    given("--steps 0", "--steps -3", "--batch-size 0", "--lr -1", "--beta1 1", "--beta2 -0.1", "--wd -1", "--eps 0"),
    given("--lr nan", "--lr inf", "--wd nan", "--moe-loss-weight nan", "--eps inf", "--beta1 nan", "--warmup -1"),
    given("--moe-num-experts 0", "--moe-num-experts -2", "--moe-freq -1", "--moe-top-k 0", "--moe-top-k 99"),
    given("--moe-num-experts 1" + "0" * 12, "--moe-num-experts 1" + "0" * 30, "--moe-top-k 1" + "0" * 30),
    given("--moe-capacity-factor -1", "--moe-capacity-factor nan", "--moe-capacity-factor inf"),
    given("--data-lanes 0", "--data-lanes 1" + "0" * 15, "--data-lanes 1" + "0" * 30, "--accum-freq 7"),
    given("--seed 1" + "0" * 30, "--seed -1" + "0" * 30, f"--seed {2**64}"),
    given("--steps 1" + "0" * 30, "--batch-size 1" + "0" * 30, "--steps 1" + "0" * 5000),
    given("--train-num-samples 999", "--global-batch-size 12", "--epochs 2", "--keep-checkpoints 0"),
    given("--fsdp-amp --steps 1", "--fsdp-pure-bf16", "--precision fp61", "--precision ", "--on-bad-data stop"),
    given("--train-data-mix-weights nan", "--train-data-mix-weights 1 2", "--train-data-mix-weights -1"),
    given("--name ", "--name a/b", "--name ..", "--name .a", "--name " + "n" * 300),
    given(
        "--name a\0b", "--model a\0b", "--recipe a\0b:c", "--resume a\0b", "--dataset-manifest a\0b", "--val-data a\0b"
    ),
    given(
        "--name a\udc80", "--logs ROOT/a\ud800", "--resume a\udcff", "--dataset-manifest \ud800", "--val-data \udc80"
    ),
    given("--logs ROOT/data/manifest.jsonl", "--logs /dev/null", "--logs ROOT/data/manifest.jsonl/a"),
    given("--model ", "--model moekit_tinny", "--model ROOT/absent.json", "--model ROOT/data", "--model /.json"),
    given("--recipe ", "--recipe mixtrall", "--recipe absent.py:x", "--recipe :", "--recipe ROOT:x", "--recipe a.py"),
    given("--dataset-manifest ", "--dataset-manifest ROOT/data/absent", "--dataset-manifest /dev/zero"),
    given("--report-to tensorbord", "--data-key csv", "--tokenizer nonsense", "--tokenizer ROOT/absent.json"),
    given("--val-data ", "--val-data ROOT/absent.tar", "--val-data ROOT", "--val-manifest ROOT", "--val-manifest "),
    given(
        "--val-data v_{0..",
        "--val-data v_{3..1}.tar",
        "--val-data {{a}}",
        "--val-data v_{0..99999999}",
        "--val-data {}",
    ),
    given("--val-data pipe:cat", "--val-data pipe:", "--val-data pipe:aws", "--dataset-manifest pipe:false"),
    given("--val-data nope://a/b.tar", "--dataset-manifest nope://a/b", "--val-manifest zip://ROOT::x"),
    given("--dataset-manifest s3://bucket/m.jsonl"),  # where nobody listens
    given(
        "--resume ",
        "--resume ROOT/absent",
        "--resume ROOT/data",
        "--resume /",
        "--resume ROOT/epoch_1.pt",
        "--resume /dev/null",
    ),
    given("--resume " + "r" * 300, "--resume ROOT/data/manifest.jsonl", "--resume epoch_" + "9" * 5000),
    given(
        "--config ROOT/absent", "--config ROOT", "--config ", "--config ROOT/data/00000000.tar", "--config /dev/zero"
    ),
    written(
        "--config",
        "settings.json",
        "",
        "{",
        "[]",
        "3",
        "null",
        b"\xff\xfe{",
        b"\xef\xbb\xbf{}",
        "[" * 100_000,
        '{"steps": }',
    ),
    written("--config", "settings.yaml", "a: [", "\t", "1: 2", "- 3", b"\xff", "!!python/object:os.system {}"),
    config({"stepz": 3}, {"": 3}, {"help": True}, {"h": 1}, {"-": 1}, {"tyro_print_completion": "bash"}, {"a b": 1}),
    config({"steps": "many"}, {"steps": [1, 2]}, {"steps": True}, {"steps": {"a": 1}}, {"lr": None, "steps": "--help"}),
    config({"wd": float("nan")}, {"eps": float("inf")}, {"seed": 10**30}, {"moe_num_experts": "8.0"}, {"fsdp": "true"}),
    config({"config": "other.json"}, {"report_to": "a\0"}, {"tokenizer": "a\ud800"}, {"wandb_project_name": "\udc80"}),
    written(
        "--recipe",
        "raising.py",
        "1 / 0",
        "raise KeyError('a')",
        "import absent_package",
        "raise RuntimeError",
        suffix=":x",
    ),
    written(
        "--recipe",
        "raising.py",
        "def x(:",
        b"\xff\0",
        "import sys; sys.exit(0)",
        "def f(): f()\nf()",
        "assert 0",
        suffix=":x",
    ),
    written(
        "--recipe",
        "making.py",
        "x = 3",
        "",
        "def x(): return 3",
        "def x(a): return a",
        "def x(): return 1 / 0",
        suffix=":x",
    ),
    written(
        "--recipe",
        "routing.py",
        *(_ROUTER.format(body=body) for body in ("1 / 0", "raise KeyError(1)", "return 3")),
        suffix=":recipe",
    ),
    written(
        "--model", "model.json", "", "{", "[]", "null", b"\xff", "[" * 100_000, '{"hidden_dim": 64}', b"\xff\xfe{\0}\0"
    ),
    preset({"hidden_dim": "64"}, {"hidden_dim": 64.0}, {"n_heads": True}, {"seq_len": None}, {"vocab_size": [512]}),
    preset({"hidden_dim": -64}, {"n_heads": 0}, {"n_heads": 7}, {"n_layers": 0}, {"vocab_size": 8}, {"seq_len": 65}),
    preset(
        {"hidden_dim": 2**40}, {"vocab_size": 10**30}, {"hidden_dim": 10**30, "n_heads": 10**30}, {"vocab_size": 2**50}
    ),
    preset(
        {"moe_capacity_factor": float("nan")},
        {"moe_loss_weight": float("inf")},
        {"moe_top_k": 0},
        {"alias": "moekit_tiny"},
    ),
    preset(
        {"model_norm": "nrom"}, {"ffn_type": 3}, {"positional_embedding_type": ""}, {"dim": 64}, {"moe_num_experts": -1}
    ),
)


# Checkpoints. ROOT/logs/a is a run with those of steps 1 and 2.


def newest(root: Path) -> Path:
    """Name the newest checkpoint of the prepared run."""
    return root / "logs" / "a" / "checkpoints" / "step_00000002"


def damaged(damage: Callable[[random.Random, Path], object], *, resume: str = "") -> Maker:
    """Damage the newest checkpoint, and go on from it or from the latest."""

    def make(rng: random.Random, root: Path) -> Trial:
        damage(rng, newest(root))
        named = resume or rng.choice(["latest", "latest", str(newest(root)), str(root / "logs" / "a")])
        named = str(newest(root)) if named == "path" else named
        return Trial(["--resume", named], ["step_00000002", "logs/a/checkpoints"], "checkpoint")

    return make


def _files(change: Harm) -> Callable[[random.Random, Path], None]:
    def apply(rng: random.Random, folder: Path) -> None:
        path = folder / rng.choice(_FILES)
        if change == "missing":
            path.unlink()
        elif isinstance(change, str):
            in_place(path, change)
        else:
            path.write_bytes(change(rng, path.read_bytes()))

    return apply


def _swapped(rng: random.Random, folder: Path) -> None:
    name = rng.choice(_FILES)
    shutil.copy(folder.with_name("step_00000001") / name, folder / name)


def _both(rng: random.Random, folder: Path) -> None:
    for each in (folder, folder.with_name("step_00000001")):
        _files(rng.choice(_HARMS))(rng, each)


def _signed(change: Callable[[random.Random, Path], object]) -> Maker:
    """Change a checkpoint, with checksums that fit, as somebody who edits it would."""

    def make(rng: random.Random, root: Path) -> Trial:
        folder = newest(root)
        change(rng, folder)
        write_checksums(folder, file_checksums(folder))
        return Trial(["--resume", str(folder)], ["step_00000002"])

    return make


def _state(*places: str, values: tuple[Any, ...] = (None, "x", [], {}, -1, 2.5, True, 10**30)) -> Maker:
    """Put another value, or none at all, at a place of state.json."""

    def change(rng: random.Random, folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        *parents, key = rng.choice(places).split("/")
        at = state
        for parent in parents:
            at = at[int(parent) if isinstance(at, list) else parent]
        key_ = int(key) if isinstance(at, list) else key
        if rng.random() < 0.3:
            del at[key_]
        else:
            at[key_] = rng.choice(
                [
                    value
                    for value in values
                    if type(value) is not type(at[key_]) or value in (-1, 10**30) or value != value
                ]
            )
        write_state(folder, state)

    return _signed(change)


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise KeyboardInterrupt('a stranger ran code')",))


def _stranger(rng: random.Random, folder: Path) -> None:
    contents = [_Code(), {"a": 1}, None, [_Code()], json.loads, torch.nn.Linear(1, 1), Path("a")]
    (folder / ".metadata").write_bytes(
        rng.choice([pickle.dumps(rng.choice(contents)), b"\x80\x04.", b"(" * 10_000 + b"."])
    )


def _text(*contents: str) -> Maker:
    return _signed(lambda rng, folder: (folder / "state.json").write_text(rng.choice(contents)))


def _torn(rng: random.Random, folder: Path) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(rng.choice([flipped, cut, garbage, nothing])(rng, path.read_bytes()))


def _shortened(rng: random.Random, folder: Path) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(rng.choice([cut, garbage, nothing])(rng, path.read_bytes()))


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _weights(name: str, *contents: Any, harmed: bool = False) -> Maker:
    """Go on from a file of another program."""

    def make(rng: random.Random, root: Path) -> Trial:
        chosen = rng.choice(contents)
        content = chosen if isinstance(chosen, bytes) else _saved(chosen)
        path = root / name
        path.write_bytes(rng.choice([flipped, cut])(rng, content) if harmed else content)
        return Trial(["--resume", str(path), "--name", "b"], [name], "either" if harmed else "refused")

    return make


_LINEAR = {"tok_embeddings.weight": torch.zeros(512, 64)}
_SAFE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
CHECKPOINTS: tuple[Maker, ...] = (
    *(damaged(_files(change)) for change in _HARMS),
    *(damaged(_files(change), resume="latest") for change in _HARMS[:4]),
    *(damaged(_torn, resume=resume) for resume in ("latest", "path")),
    damaged(_swapped),
    damaged(_both, resume="latest"),
    _state("seconds", "skipped_steps", values=(None, "x", [], {}, -1, float("nan"))),
    _state("step", values=(None, "2", -1, 10**30, [2], {}, True, 2.5)),
    _state("skipped_data", values=(None, "x", [], [1], {"broken shard": "x"}, {"broken shard": None}, 3)),
    _state("stream", "stream/origin", "stream/position", "stream/origin/seed"),
    _state("stream/position/taken", "stream/position/sources", "stream/position/taken/0"),
    _state("stream/position/sources/0", "stream/position/sources/0/pass", "stream/position/sources/0/claimed"),
    _state(
        "stream/position/sources/0/lanes", "stream/position/sources/0/lanes/0", "stream/position/sources/0/lanes/0/1"
    ),
    _text("", "{", "[]", "null", "NaN", "3", "{}", "[" * 100_000, '{"step": 2}', "\ufeff{}"),
    _signed(_stranger),
    damaged(_stranger, resume="path"),
    _signed(_shortened),
    _weights("epoch_1.pt", b"", b"x", b"PK\x03\x04", [1], {}, {"state_dict": {}}, {"epoch": 1, "state_dict": [1]}),
    _weights("epoch_1.pt", pickle.dumps(_Code()), {"a": 1}, _LINEAR, {"state_dict": _LINEAR, "epoch": "one"}, "text"),
    _weights("epoch_1.pt", {"state_dict": _LINEAR, "epoch": 1}, harmed=True),
    _weights("model.safetensors", b"", b"x" * 7, b"\xff" * 8, bytes(8), len(_SAFE).to_bytes(8, "little") + _SAFE),
    _weights("model.safetensors", len(_SAFE).to_bytes(8, "little") + _SAFE + bytes(4), harmed=True),
    _weights("notes.txt", b"", b"notes\n", b"\0" * 600),
)
