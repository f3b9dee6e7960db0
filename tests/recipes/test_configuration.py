import dataclasses
import json
import shlex
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from small_runs import unflatten

from moekit.lm.configs import OF_METHOD
from moekit.recipes import train
from moekit.recipes.configuration import kept_warnings, parse, parse_settings, read_config
from moekit.recipes.derived import _EXCLUDING, _SOURCES, derived_names
from moekit.recipes.settings import TrainSettings
from moekit.recipes.settings_legacy import without_effect
from moekit.recipes.stored_settings import flat_settings, write_config

TRAIN_COMMAND = r"""
    --train-num-samples 1000000000 \
    --workers 2 \
    --dataset-manifest "s3://laion-west/rpj_tokenized_upsampled_eleutherai/manifest.jsonl" "s3://laion-west/2T_no_rpj_tokenized_upsampled_25k_shards/manifest.jsonl" \
    --train-data-mix-weights 0.725 0.275 \
    --precision amp_bfloat16 \
    --batch-size 8 \
    --log-every-n-steps 20 \
    --grad-clip-norm 1 \
    --lr 6e-4 \
    --warmup 200 \
    --model aphid_neox \
    --wd 0.01 \
    --beta2 0.95 \
    --epochs 4 \
    --report-to wandb \

    --wandb-project-name moe \
    --name test_moe \
    --logs /fsx/home-$USER/experiments/moe \
    --resume latest \
    --seed 124 \
    --data-key 'json' \
    --accum-freq 4 \
    --model-norm gain_only_layer_norm \
    --fsdp --fsdp-amp \
    --lr-cooldown-end 1e-5 \
    --no-skip-tokens \
    --accurate-total-tokens \
    --moe-freq 2 \
    --moe-num-experts 8 \
    --moe-top-k 2 \
    --moe-expert-model-parallelism --moe-weight-parallelism \
    --moe-capacity-factor 1.25 --moe-loss-weight 0.1 \
"""  # noqa: E501
EVALUATE_COMMAND = r"""
    --val-data "pipe:aws s3 cp s3://laion-west/lmdata/validation_data_tokenized/open_lm//shard_00000000.tar -" \
    --workers 6 \
    --precision amp_bfloat16 \
    --batch-size 8 \
    --log-every-n-steps 1 \
    --model open_lm_41m \
    --fsdp --fsdp-amp \
    --moe-num-experts 64 --moe-freq 2 \
    --data-key json \
    --train-num-samples 1000000000 \
    --model-norm gain_only_layer_norm \
    --name $RANDOM \
    --resume /fsx/home-suching/experiments/mix_wo/test8086/checkpoints/epoch_1.pt \
    --logs /fsx/home-$USER/experiments/eval
"""


def shell_words(command):
    """Split as a shell would that joins lines at every backslash; OpenLM's document has an empty line too many."""
    return shlex.split(command.strip().removesuffix("\\").replace("\\\n", " ").replace("\n", " "))


def changed(settings):
    """List the settings that are not as by default."""
    default = flat_settings(TrainSettings())
    return {name: value for name, value in flat_settings(settings).items() if value != default.get(name)}


# OpenLM's two commands.


def test_openlms_command_to_train():
    settings = parse_settings(shell_words(TRAIN_COMMAND))
    assert changed(settings) == {
        "train_num_samples": 1_000_000_000,
        "workers": 2,
        "dataset_manifest": [
            "s3://laion-west/rpj_tokenized_upsampled_eleutherai/manifest.jsonl",
            "s3://laion-west/2T_no_rpj_tokenized_upsampled_25k_shards/manifest.jsonl",
        ],
        "train_data_mix_weights": [0.725, 0.275],
        "precision": "amp_bfloat16",
        "batch_size": 8,
        "log_every_n_steps": 20,
        "lr": 6e-4,
        "warmup": 200,
        "model": "aphid_neox",
        "wd": 0.01,
        "epochs": 4,
        "report_to": "wandb",
        "wandb_project_name": "moe",
        "name": "test_moe",
        "logs": "/fsx/home-$USER/experiments/moe",
        "resume": "latest",
        "seed": 124,
        "data_key": "json",
        "accum_freq": 4,
        "fsdp": True,
        "fsdp_amp": True,
        "lr_cooldown_end": 1e-5,
        "no_skip_tokens": True,
        "accurate_total_tokens": True,
        "moe_top_k": 2,
        "moe_expert_model_parallelism": True,
        "moe_weight_parallelism": True,
        "moe_capacity_factor": 1.25,
        "moe_loss_weight": 0.1,
    }
    model, optimizer = settings.model, settings.optimizer
    assert (model.moe_freq, model.moe_num_experts, model.model_norm) == (2, 8, "gain_only_layer_norm")
    assert (optimizer.grad_clip_norm, optimizer.beta2, model.recipe) == (1.0, 0.95, "openlm")
    assert not settings.evaluates_only
    assert [line.split()[0] for line in without_effect(settings.legacy)] == [
        "--no-skip-tokens",
        "--accurate-total-tokens",
    ]


def test_openlms_command_to_evaluate():
    settings = parse_settings(shell_words(EVALUATE_COMMAND.replace("$RANDOM", "12345")))
    assert changed(settings) == {
        "val_data": ["pipe:aws s3 cp s3://laion-west/lmdata/validation_data_tokenized/open_lm//shard_00000000.tar -"],
        "workers": 6,
        "precision": "amp_bfloat16",
        "batch_size": 8,
        "log_every_n_steps": 1,
        "model": "open_lm_41m",
        "fsdp": True,
        "fsdp_amp": True,
        "moe_num_experts": 64,
        "data_key": "json",
        "train_num_samples": 1_000_000_000,
        "name": "12345",
        "resume": "/fsx/home-suching/experiments/mix_wo/test8086/checkpoints/epoch_1.pt",
        "logs": "/fsx/home-$USER/experiments/eval",
    }
    assert settings.evaluates_only
    assert settings.model.moe_freq == 2
    assert without_effect(settings.legacy) == []


# There and back.


def another(hint, default):
    """Return a valid value of a field's type that is not its default."""
    if get_origin(hint) in (Union, type(int | None)):
        [hint] = [each for each in get_args(hint) if each is not type(None)]
    if get_origin(hint) is Literal:
        return next(each for each in reversed(get_args(hint)) if each != default)
    if get_origin(hint) is tuple:
        return (0.5, 1.25e-7) if get_args(hint)[0] is float else ("a b.tar -", "it's/{0..3}.tar")
    return {bool: not default, int: 3, float: 0.0625, str: "x,y z", Path: Path("some folder/f")}[hint]


SPECIAL = {
    "val_data_key": ("txt",),
    "report_to": "wandb,tensorboard",
    "name": "name with spaces",
    "resume": "a checkpoint.pt",
    "accum_freq": 2,
    "lr_cooldown_end": 1e-5,
    "force_min_lr": 1e-5,
    "data_key": "json.gz",
}
NEEDS = {
    "epochs": ("data", {"train_num_samples": 1000}),
    "precision": ("optimizer", {"eps": 1e-4}),
    "fsdp_amp": ("parallel", {"fsdp": True}),
    "fsdp_pure_bf16": ("parallel", {"fsdp": True}),
    "fsdp_hybrid": ("parallel", {"fsdp": True}),
    "fsdp_hybrid_o2": ("parallel", {"fsdp": True}),
    "moe_expert_ranks": ("parallel", {"moe_expert_model_parallelism": True}),
    "moe_hidden_ranks": ("parallel", {"moe_expert_model_parallelism": True}),
    "moe_exchange": ("parallel", {"moe_expert_model_parallelism": True}),
    "moe_exchange_capacity_factor": ("parallel", {"moe_expert_model_parallelism": True, "moe_exchange": "static"}),
    "moe_exchange_chunks": ("parallel", {"moe_expert_model_parallelism": True}),
    "moe_hierarchical_exchange": ("parallel", {"moe_expert_model_parallelism": True}),
    "world_size": ("run", {"describe": True}),
    "val_data": ("run", {"resume": "a.pt"}),
    "val_manifest": ("run", {"resume": "a.pt"}),
    "val_data_key": ("data", {"val_data": ("a.tar",), "dataset_manifest": ("a.jsonl",)}),
}
REFUSED = {"train_data", "dataset_resampled", "dataset_type", "target_mask_left", "target_mask_individual"}
REFUSED |= {"averagers", "remote_sync"}
FIELDS = [
    (group.name, each.name)
    for group in dataclasses.fields(TrainSettings)
    for each in dataclasses.fields(getattr(TrainSettings(), group.name))
    if each.name not in REFUSED
]


def with_another(group, name):
    """Change one field of the defaults, and what it cannot do without."""
    settings = TrainSettings()
    if name in NEEDS:
        other, values = NEEDS[name]
        settings = dataclasses.replace(settings, **{other: dataclasses.replace(getattr(settings, other), **values)})
    old = getattr(settings, group)
    value = SPECIAL.get(name, another(get_type_hints(type(old))[name], getattr(old, name)))
    assert value != getattr(old, name)
    return dataclasses.replace(settings, **{group: dataclasses.replace(old, **{name: value})})


@pytest.mark.parametrize(("group", "name"), FIELDS)
def test_every_setting_survives_the_way_into_a_file_and_back(tmp_path, group, name):
    settings = with_another(group, name)
    flat = flat_settings(settings)
    assert list(flat) == sorted(flat)
    if name in ("resume", "config", "describe", "world_size") or (
        name.startswith("val_") and "resume" in NEEDS.get(name, ("", {}))[1]
    ):
        assert unflatten(json.loads(json.dumps(flat))) == settings
        return  # of one launch: not written
    path = write_config(tmp_path, settings)
    parsed = parse_settings(["--config", str(path)])
    assert dataclasses.replace(parsed, run=dataclasses.replace(parsed.run, config=None)) == settings


@hypothesis_settings(max_examples=25)
@given(
    lr=st.floats(1e-12, 10),
    weights=st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=3),
    seed=st.integers(-(10**9), 10**12),
    text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(
        lambda text: not text.startswith("-")
    ),
)
def test_numbers_and_texts_come_back_exactly(lr, weights, seed, text):
    old = TrainSettings()
    settings = dataclasses.replace(
        old,
        optimizer=dataclasses.replace(old.optimizer, lr=lr),
        data=dataclasses.replace(old.data, train_data_mix_weights=tuple(weights), dataset_manifest=(text, text)),
        run=dataclasses.replace(old.run, seed=seed, wandb_project_name=text),
    )
    assert unflatten(json.loads(json.dumps(flat_settings(settings)))) == settings


def test_listed_paths_may_begin_with_a_dash(tmp_path):
    path = write_config(tmp_path, parse_settings(["--dataset-manifest=-d/manifest.jsonl"]))
    assert parse_settings(["--config", str(path)]).data.dataset_manifest == ("./-d/manifest.jsonl",)


def test_a_name_may_begin_with_a_dash(tmp_path):
    path = write_config(tmp_path, parse_settings(["--name=-x", "--wandb-project-name=--y"]))
    settings = parse_settings(["--config", str(path)])
    assert (settings.run.name, settings.run.wandb_project_name) == ("-x", "--y")


def test_what_a_run_writes(tmp_path):
    settings = parse_settings(["--name", "a", "--resume", "latest", "--steps", "5", "--describe", "--no-skip-tokens"])
    path = write_config(tmp_path / "new" / "folder", settings)
    assert path == tmp_path / "new" / "folder" / "config.json"
    written = json.loads(path.read_text())
    assert not {"resume", "config", "describe"} & set(written)
    assert (written["name"], written["steps"], written["no_skip_tokens"]) == ("a", 5, True)
    lines = (path.parent / "params.txt").read_text().splitlines()
    assert lines == sorted(lines)
    assert {"resume: latest", "steps: 5", "moe_top_k: None"} <= set(lines)
    assert len(list(path.parent.iterdir())) == 2


def test_a_folder_that_cannot_be_made_names_the_flag():
    with pytest.raises(
        OSError, match=r"--logs: /proc/runs/a cannot be made or cleared \(.+\); expected a place that can be written"
    ):
        write_config(Path("/proc/runs/a"), parse_settings([]))


def test_flat_settings_are_sorted_plain_and_complete():
    arguments = ["--dataset-manifest", "a/m.jsonl", "--logs", "runs", "--moe-capacity-factor", "1.5"]
    flat = flat_settings(parse_settings(arguments))
    assert list(flat) == sorted(flat)
    assert json.loads(json.dumps(flat)) == flat
    assert flat["dataset_manifest"] == ["a/m.jsonl"]
    assert flat["logs"] == "runs"
    assert flat["moe_capacity_factor"] == 1.5
    groups = TrainSettings()
    sizes = [len(vars(group)) for group in (groups.model, groups.data, groups.optimizer, groups.parallel, groups.run)]
    assert len(flat) == sum(sizes)  # no group hides a name of another


# The file of --config.


@pytest.fixture
def config(tmp_path):
    def write(content, name="settings.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def test_flags_win_over_the_file(config):
    path = config({"steps": 100, "lr": 0.5, "train_data_mix_weights": [1, 2], "fsdp": True, "name": "a"})
    words = ["--steps", "7", "--no-fsdp", "--train-data-mix-weights", "3"]
    for arguments in ([*words, "--config", path], ["--config", path, *words], [f"--config={path}", *words]):
        settings = parse_settings(arguments)
        assert (settings.optimizer.steps, settings.optimizer.lr, settings.run.name) == (7, 0.5, "a")
        assert settings.data.train_data_mix_weights == (3.0,)
        assert settings.parallel.fsdp is False
        assert settings.run.config == Path(path)


def test_keys_may_have_dashes_or_underscores(config):
    dashes = {"moe-num-experts": 4, "no-skip-tokens": True, "log-data": False}
    underscores = {key.replace("-", "_"): value for key, value in dashes.items()}
    first, second = (parse_settings(["--config", config(each)]) for each in (dashes, underscores))
    assert first == second
    assert first.model.moe_num_experts == 4
    assert first.legacy.no_skip_tokens is True


@pytest.mark.parametrize("suffix", ["yaml", "yml"])
def test_a_file_may_be_yaml(config, suffix):
    text = "lr: 0.01  # a comment\nmodel: open_lm_41m\ndataset-manifest:\n- a\n- b\nfsdp: yes\nwarmup: null\n"
    settings = parse_settings(["--config", config(text, f"settings.{suffix}")])
    assert settings.optimizer.lr == 0.01
    assert settings.model.preset == "open_lm_41m"
    assert settings.data.dataset_manifest == ("a", "b")
    assert settings.parallel.fsdp is True
    assert settings.optimizer.warmup is None


def test_no_and_none_leave_the_default(config):
    path = config({"describe": False, "moe_top_k": None, "val_data": [], "multiple_data_passes": False})
    settings = parse_settings(["--config", path])
    assert dataclasses.replace(settings, run=TrainSettings().run) == TrainSettings()


def failing_words(capsys, arguments):
    with pytest.raises(SystemExit) as raised:
        parse_settings(arguments)
    assert raised.value.code == 2
    return " ".join("".join(c for c in capsys.readouterr().err if c not in "│╭╮╰╯─").split())


def test_an_unknown_key_gets_the_hint_of_a_flag(capsys, config):
    words = failing_words(capsys, ["--config", config({"moe_num_expert": 4})])
    assert "Unrecognized options: --moe-num-expert" in words
    assert "Perhaps you meant: --moe-num-experts " in words


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"steps": "many"}, "--steps"),
        ({"steps": 1.5}, "--steps"),
        ({"steps": [1, 2]}, ""),
        ({"steps": True}, "--steps"),
        ({"fsdp": "true"}, ""),
        ({"precision": "fp61"}, "--precision"),
        ({"train_data_mix_weights": [1, "x"]}, "--train-data-mix-weights"),
    ],
)
def test_values_of_the_file_are_checked_as_flags_are(capsys, config, values, flag):
    words = failing_words(capsys, ["--config", config(values)])
    assert flag in words
    assert "steps" in words or "true" in words or "fp61" in words or "x" in words


@pytest.mark.parametrize("content", ["[1, 2]", "3", '"steps"', "null"])
def test_a_file_that_is_no_object(config, content):
    with pytest.raises(ValueError, match=r"settings\.json: expected an object of flag names and values, such as"):
        parse_settings(["--config", config(content)])


@pytest.mark.parametrize("name", ["lr", "derived"])
def test_nested_aliases_of_yaml_are_refused_in_few_words(config, name):
    levels = [f"- &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 7)]  # a million words
    text = "\n".join([f"{name}:", f"- &a0 [{', '.join(['word'] * 10)}]", *levels])
    with pytest.raises(ValueError, match=f"{name} is .*; expected a number, a text, or a list of them") as raised:
        read_config(Path(config(text, "a.yaml")))
    assert len(str(raised.value)) < 1000


def test_a_long_list_that_names_nothing_is_shortened(config):
    with pytest.raises(ValueError, match=r"derived is \[0, 1, 2, 3, 4, 5, ...\]; expected a list of names"):
        read_config(Path(config(json.dumps({"derived": list(range(1000))}))))


def test_keys_of_yaml_that_are_no_names(config):
    with pytest.raises(ValueError, match="expected an object of flag names and values"):
        read_config(Path(config("1: 2", "a.yaml")))


@pytest.mark.parametrize("value", [{"a": 1}, [[1]]])
def test_values_are_plain(config, value):
    with pytest.raises(ValueError, match=r"steps is .*; expected a number, a text, or a list of them"):
        parse_settings(["--config", config({"steps": value})])


@pytest.mark.parametrize(
    ("name", "kind"), [("a.json", "JSON"), ("a.txt", "JSON"), ("a.yaml", "YAML"), ("a.yml", "YAML")]
)
def test_a_file_that_does_not_parse(config, name, kind):
    with pytest.raises(ValueError, match=rf"--config .*{name}: it is no {kind}: "):
        parse_settings(["--config", config('{"steps": ', name)])


def test_a_file_that_is_not_there(tmp_path):
    message = r"--config .*absent\.json: there is no such file. A run writes its settings as config\.json"
    with pytest.raises(FileNotFoundError, match=message):
        parse_settings(["--config", str(tmp_path / "absent.json")])


def test_a_config_without_its_path_is_an_error(capsys):
    assert "--config" in failing_words(capsys, ["--config"])


def test_of_two_files_the_last_counts(config):
    first, second = config({"steps": 3}, "a.json"), config({"steps": 4}, "b.json")
    settings = parse_settings(["--config", first, "--config", second])
    assert (settings.optimizer.steps, settings.run.config) == (4, Path(second))


# Of a run's file, what nobody gave, and what excludes a flag.

RUN = {"model": "moekit_tiny", "recipe": "openlm", "steps": 20, "lr": 5e-3, "global_batch_size": 4, "precision": "fp32"}
FILLED = {"warmup": 2, "lr_cooldown_end": 1e-4, "moe_top_k": 2, "moe_capacity_factor": 1.25, "moe_loss_weight": 0.1}
DERIVED = ["global_batch_size", "precision", *FILLED]


def settled(path, *flags):
    """List what of a run's file counts beside flags; None stands for what is derived anew."""
    flat = flat_settings(parse_settings(["--config", path, *flags]))
    return {name: flat[name] for name in (*RUN, *FILLED)}


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ([], {}),
        (["--batch-size", "8"], {"global_batch_size": None, "warmup": None}),
        (["--batch-size", "None", "--seed", "3"], {"warmup": None}),
        (["--global-batch-size=8"], {"global_batch_size": 8, "warmup": None}),
        (["--lr", "1e-5"], {"lr": 1e-5, "lr_cooldown_end": None}),
        (["--lr", "1e-5", "--lr-cooldown-end", "1e-6"], {"lr": 1e-5, "lr_cooldown_end": 1e-6}),
        (["--lr-scheduler", "const"], {"lr_cooldown_end": None}),
        (["--lr-scheduler=cosine"], {"lr_cooldown_end": None}),
        (["--steps", "400"], {"steps": 400, "warmup": None}),
        (["--steps", "400", "--warmup", "7"], {"steps": 400, "warmup": 7}),
        (["--train-num-samples", "1024"], {"steps": None, "warmup": None}),
        (["--moe_freq", "0"], dict.fromkeys(OF_METHOD)),
        (["--moe-freq", "1"], {}),
        (["--moe-num-experts", "1"], {"moe_top_k": None}),
        (["--moe-top-k", "4"], {"moe_top_k": 4}),
        (["--recipe", "switch"], {"recipe": "switch", **dict.fromkeys(OF_METHOD)}),
        (
            ["--recipe", "mixtral", "--moe-top-k", "3"],
            {"recipe": "mixtral", **dict.fromkeys(OF_METHOD), "moe_top_k": 3},
        ),
        (["--no-fsdp"], {}),
        (["--preset", "moekit_cpu"], {"model": "moekit_cpu", **dict.fromkeys(OF_METHOD), "warmup": None}),
    ],
)
def test_a_flag_wins_over_what_was_derived_and_what_excludes_it(config, flags, changed):
    path = config(RUN | FILLED | {"derived": DERIVED})
    assert settled(path, *flags) == RUN | FILLED | changed


@pytest.mark.parametrize(
    ("held", "flags", "dropped"),
    [
        ({"keep_checkpoints": 2}, ["--delete-previous-checkpoint"], ["keep_checkpoints"]),
        ({"delete_previous_checkpoint": True}, ["--keep-checkpoints", "2"], ["delete_previous_checkpoint"]),
        ({"fsdp": True, "fsdp_amp": True}, ["--fsdp-pure-bf16"], ["fsdp_amp"]),
        ({"fsdp": True, "fsdp_pure_bf16": True}, ["--fsdp-amp"], ["fsdp_pure_bf16"]),
        ({"fsdp": True, "fsdp_hybrid": True}, ["--fsdp-hybrid-o2"], ["fsdp_hybrid"]),
        ({"fsdp": True, "fsdp_hybrid_o2": True}, ["--fsdp-hybrid"], ["fsdp_hybrid_o2"]),
        ({"fsdp": True, "fsdp_amp": True, "fsdp_hybrid": True}, ["--no-fsdp"], ["fsdp", "fsdp_amp", "fsdp_hybrid"]),
        (
            {"moe_expert_model_parallelism": True, "moe_expert_ranks": 2, "moe_hierarchical_exchange": True},
            ["--no-moe-expert-model-parallelism"],
            ["moe_expert_model_parallelism", "moe_expert_ranks", "moe_hierarchical_exchange"],
        ),
    ],
)
def test_a_flag_wins_over_a_given_one_that_it_excludes(config, held, flags, dropped):
    parsed = flat_settings(parse_settings(["--config", config(held), *flags]))
    assert {name: parsed[name] for name in held if not parsed[name]}.keys() == set(dropped)


def test_what_follows_from_the_models_file_gives_way_to_another_model(config):
    path = config({"model": "moekit_tiny", "qk-norm": True, "derived": ["qk-norm"]})
    assert parse(["--config", path]).derived == ("qk_norm",)
    assert parse_settings(["--config", path]).model.qk_norm
    assert not parse_settings(["--config", path, "--model", "moekit_cpu"]).model.qk_norm


def test_what_was_given_and_is_left_out_of_a_file_was_not_derived():
    assert derived_names({"batch_size": 8, "warmup": None}, {"batch_size": None, "warmup": 7}) == ["warmup"]


def test_what_was_given_stays_given(config):
    path = config(RUN | FILLED | {"moe_top_k": 4, "derived": ["global_batch_size"]})
    assert settled(path, "--steps", "400", "--recipe", "olmoe") == RUN | FILLED | {
        "steps": 400,
        "recipe": "olmoe",
        "moe_top_k": 4,
    }


def test_a_file_from_before_there_were_derived_names_is_read(config):
    path = config(RUN | FILLED)
    assert settled(path) == RUN | FILLED
    assert settled(path, "--batch-size", "8") == RUN | FILLED | {"global_batch_size": None}
    assert settled(path, "--steps", "400") == RUN | FILLED | {"steps": 400}


WHOLE = RUN | FILLED | {"train_num_samples": None, "epochs": None, "batch_size": None, "moe_num_experts": 8}


@pytest.mark.parametrize("derived", [{}, {"derived": []}, {"derived": ["lr_cooldown_end"]}])
def test_the_end_of_a_cosine_that_an_older_constant_run_wrote_is_left_out(config, derived):
    path = config(WHOLE | {"lr_scheduler": "const"} | derived)
    assert settled(path) == RUN | FILLED | {"lr_cooldown_end": None}
    assert settled(path, "--lr-scheduler", "cosine", "--lr-cooldown-end", "1e-5") == RUN | FILLED | {
        "lr_cooldown_end": 1e-5
    }


def test_the_lower_limit_that_an_older_constant_run_was_given_is_left_out(config):
    constant = config(WHOLE | {"lr_scheduler": "const", "force_min_lr": 1e-5, "derived": DERIVED})
    assert parse_settings(["--config", constant]).optimizer.force_min_lr == 0
    cosine = config(WHOLE | {"force_min_lr": 1e-5, "derived": DERIVED})
    assert parse_settings(["--config", cosine, "--lr-scheduler", "const"]).optimizer.force_min_lr == 0
    assert parse_settings(["--config", cosine]).optimizer.force_min_lr == 1e-5


@pytest.mark.parametrize(
    ("name", "without"), [("lr_cooldown_end", "--lr-cooldown-end None"), ("force_min_lr", "--force-min-lr=0.0")]
)
def test_the_end_of_a_cosine_in_a_written_file_of_a_constant_rate_is_refused(config, capsys, name, without):
    with pytest.raises(SystemExit):
        parse_settings(["--config", config({"lr_scheduler": "const", name: 1e-4})])
    assert f"{without} leaves it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--recipe", "mixtral", "--moe-top-k", "2"], "--moe-capacity-factor 1.25, --moe-loss-weight 0.1"),
        (["--steps=400", "--lr", "1"], "--warmup 2, --lr-cooldown-end 0.0001"),
    ],
)
def test_what_an_older_runs_file_keeps_beside_flags_is_told(config, flags, kept):
    path = config(WHOLE)
    [warning] = kept_warnings(["--config", path, *flags])
    assert warning.startswith(f"warning: --config {path} is of a version that did not write which")
    assert f", so it keeps {kept}, which may follow from" in warning
    removed = [word.split()[0].removeprefix("--").replace("-", "_") for word in kept.split(", ")]
    path = config({name: value for name, value in WHOLE.items() if name not in removed})
    assert kept_warnings(["--config", path, *flags]) == []


@pytest.mark.parametrize(
    ("content", "flags"),
    [
        (WHOLE, ["--seed", "3"]),
        (WHOLE | {"warmup": None}, ["--steps", "400"]),
        (WHOLE | {"derived": []}, ["--steps", "400"]),
        (RUN | FILLED, ["--steps", "400"]),
    ],
)
def test_no_warning_where_nothing_was_derived_or_no_run_wrote_the_file(config, content, flags):
    assert kept_warnings(["--config", config(content), *flags]) == []


def test_a_runs_file_says_that_nothing_was_derived(tmp_path):
    assert read_config(write_config(tmp_path, TrainSettings()))["derived"] == []


def test_what_no_flag_touches_stays_derived(config):
    path = config(RUN | FILLED | {"derived": DERIVED})
    assert parse(["--config", path]).derived == tuple(DERIVED)
    left = parse(["--config", path, "--lr", "1e-5", "--moe-top-k", "4", "--batch-size", "8"]).derived
    assert left == ("precision", "moe_capacity_factor", "moe_loss_weight")


@pytest.mark.parametrize("value", ["warmup", 3, None, [1]])
def test_derived_names_are_a_list(config, value):
    with pytest.raises(ValueError, match=r"derived is .*; expected a list of names of settings that nobody gave"):
        parse_settings(["--config", config({"derived": value})])


def test_names_of_derived_settings_are_settings():
    known = set(flat_settings(TrainSettings()))
    named = {name for pair in _EXCLUDING for side in pair for name in side}
    assert named | set(_SOURCES) | {name for sources in _SOURCES.values() for name in sources} <= known


@pytest.mark.parametrize(
    ("held", "flags", "given", "without"),
    [
        ({"recipe": "mixtral", "moe_top_k": 2}, ["--recipe", "switch"], "--moe-top-k=2", "--moe-top-k None"),
        (
            {"moe_capacity_factor": 1.0}, ["--recipe", "mixtral"],
            "--moe-capacity-factor=1.0", "--moe-capacity-factor None",
        ),
        ({"moe_loss_weight": 0.5}, ["--recipe", "hash_layer"], "--moe-loss-weight=0.5", "--moe-loss-weight None"),
        (
            {"moe_exchange": "static", "moe_exchange_capacity_factor": 3.0}, ["--moe-exchange", "all_gather"],
            "--moe-exchange-capacity-factor=3.0", "--moe-exchange-capacity-factor=2.0",
        ),
        (
            {"moe_exchange_chunks": 2}, ["--moe-exchange", "static"],
            "--moe-exchange-chunks=2", "--moe-exchange-chunks=1",
        ),
        (
            {"moe_hierarchical_exchange": True}, ["--moe-exchange", "static"],
            "--moe-hierarchical-exchange", "--no-moe-hierarchical-exchange",
        ),
    ],
)  # fmt: skip
def test_how_to_leave_out_what_nobody_typed_is_told(config, capsys, held, flags, given, without):
    path = config({"model": "moekit_tiny", "moe_expert_model_parallelism": True, **held})
    words = ["--config", path, *flags, "--describe"]
    with pytest.raises(SystemExit) as raised:
        train.main(words)
    said = f"{raised.value}\n{capsys.readouterr().err}"
    assert f"\n({given} is of --config {path}; {without} leaves it out)\n" in f"{said}\n"
    assert said.count("leaves it out") == 1
    train.main([*words, *without.replace("=", " ").split()])


def test_what_was_typed_is_left_out_by_not_typing_it(config):
    path = config({"model": "moekit_tiny", "moe_top_k": 4})
    with pytest.raises(SystemExit, match=r"Leave the flag out, or choose another recipe\.$"):
        train.main(["--config", path, "--recipe", "switch", "--moe-top-k", "2", "--describe"])


def test_a_file_does_not_consent_to_its_own_commands(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"allow_pipe_commands": True, "val_data": ["pipe:cat a.tar"]}))
    words = ["--config", str(config), "--resume", "x.pt"]
    with pytest.raises(ValueError, match=r"'pipe:cat a\.tar' and allows itself .*give --allow-pipe-commands there"):
        parse_settings(words)
    assert parse_settings([*words, "--allow-pipe-commands"]).data.allow_pipe_commands
    assert parse_settings([*words, "--val-data", "pipe:cat b.tar"]).data.val_data == ("pipe:cat b.tar",)
    config.write_text(json.dumps({"allow_pipe_commands": True, "val_data": ["a.tar"]}))
    assert parse_settings(words).data.allow_pipe_commands


def test_code_that_a_file_names_is_told_before_it_runs(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("print('it runs')\nfrom moekit.recipes import mixtral as mine\n")
    config = tmp_path / "config.json"
    recipe = f"{tmp_path / 'mine.py'}:mine"
    config.write_text(json.dumps({"model": "moekit_tiny", "recipe": recipe}))
    train.main(["--config", str(config), "--describe"])
    told, runs, _ = capsys.readouterr().out.replace("\n", "").partition("it runs")
    assert runs
    assert told.replace(" ", "").endswith(f"names the recipe {recipe}, whose code runs".replace(" ", ""))
    train.main(["--config", str(config), "--describe", "--recipe", "mixtral"])
    assert "whose code runs" not in capsys.readouterr().out
