"""The configuration: what is read, what is refused, and what the refusal says."""

import random
from pathlib import Path

import pytest
import yaml

from flowrl.config import (
    VERL_HOMES,
    Config,
    cache_dir,
    config_keys,
    dump_config,
    is_megatron,
    load_config,
)

REQUIRED = ["model.path=some/model", "data.task=sums"]
GRPO, PPO = "algorithm.objective=grpo", "algorithm.objective=ppo"


def load(*overrides: str) -> Config:
    return load_config(None, [*REQUIRED, *overrides])


def read(config: Config, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# Reading


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.seed=7", 7),
        ("actor.optim.lr=1e-6", 1e-6),
        ("actor.optim.lr=.5", 0.5),
        ("actor.optim.betas=[0.8, 0.95]", (0.8, 0.95)),
        ('rollout.stop=["\\n", "a=b"]', ["\n", "a=b"]),
        ("rollout.temperature=2", 2.0),
        ("data.train_files=[a.parquet,b.jsonl]", ["a.parquet", "b.jsonl"]),
        ("data.task_options.low=1e-3", 1e-3),
        ("data.task_options={sizes: [1, 2], name: x}", {"sizes": [1, 2], "name": "x"}),
        ("trainer.val_before_train=false", False),
        ("trainer.default_local_dir=null", None),
        ("flow.clip_low=0", 0.0),
        ("+flow.weight_cap=3", 3.0),
        (" flow.beta = 1.5", 1.5),
        ("trainer.total_training_steps=1e3", 1000),
        ("trainer.experiment_name=2024-01-01", "2024-01-01"),
        ("trainer.experiment_name=1e5", "1e5"),
        ("trainer.experiment_name=007", "007"),
        ("trainer.experiment_name=on", "on"),
        ("trainer.experiment_name=a=b", "a=b"),
        ("trainer.experiment_name='quoted 1'", "quoted 1"),
        ("reward.function=file.py:score", "file.py:score"),
        ("trainer.logger=[]", []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_overrides_have_the_type_of_their_key(override: str, expected: object) -> None:
    key = override.partition("=")[0].strip(" +")
    if key == "data.task_options.low":
        assert load(override).data.task_options == {"low": expected}
    else:
        value = read(load(override), key)
        assert value == expected and type(value) is type(expected)


def test_overrides_beat_the_file_and_the_last_one_wins(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "model: {path: m}\ndata: {task: sums, train_batch_size: 128}\n"
        "actor: {optim: {lr: 1e-5, clip_grad: 3}}\n",
    )
    config = load_config(path, ["actor.optim.lr=1e-4", "actor.optim.lr=1e-3"])
    assert config.actor.optim.lr == 1e-3
    assert config.actor.optim.clip_grad == 3.0
    assert config.data.train_batch_size == 128
    assert load_config(path).actor.optim.lr == 1e-5


def test_defaults_of_an_empty_file_with_what_is_required(tmp_path: Path) -> None:
    path = written(tmp_path, "# nothing\n")
    assert load_config(path, REQUIRED) == load()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["rollout.stop=['\\n', ': yes', '\\u2028 #', \"'\"]", "trainer.experiment_name=1e5"],
        ["trainer.seed=" + "9" * 60, "actor.optim.lr=1e-300", "flow.beta=1e300"],
        ["data.task_options={a: [1, 2.5, null, true, {b: x}], c: 1e-7}"],
        ["flow.weighting=cispo", "flow.z_detach=true", "actor.optim.betas=[0, 0.999999999]"],
    ],
    ids=["defaults", "strings", "huge", "options", "flow"],
)
def test_a_dumped_configuration_reads_back_as_itself(tmp_path: Path, overrides: list[str]) -> None:
    config = load(*overrides)
    path = written(tmp_path, dump_config(config))
    assert load_config(path) == config
    assert dump_config(load_config(path)) == dump_config(config)


def test_keys_are_those_of_the_dump() -> None:
    def leaves(values: dict, prefix: str = "") -> list[str]:
        keys = []
        for name, value in values.items():
            is_section = isinstance(value, dict) and prefix + name != "data.task_options"
            keys += leaves(value, f"{prefix}{name}.") if is_section else [prefix + name]
        return keys

    assert config_keys() == leaves(yaml.safe_load(dump_config(load())))
    assert len(set(config_keys())) == len(config_keys()) > 60


def test_run_and_cache_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load("trainer.experiment_name=x").run_dir == Path("runs/x")
    assert load("trainer.default_local_dir=a/b").run_dir == Path("a/b")
    monkeypatch.setenv("FLOWRL_CACHE", "~/elsewhere")
    assert cache_dir() == Path.home() / "elsewhere"
    monkeypatch.delenv("FLOWRL_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "flowrl"


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().trainer.seed = 3


# Refusals


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.sed=1", "unknown key `trainer.sed`; did you mean trainer.seed"),
        ("actor.lr=1", "did you mean .*actor.optim.lr"),
        ("lr=1", "did you mean .*actor.optim.lr"),
        ("qqqq=1", "unknown key `qqqq`$"),
        ("actor.optim.lr.x=1", "actor.optim.lr"),
        ("actor_rollout_ref.rollout.n=4", "here it is rollout.n$"),
        ("actor_rollout_ref.actor.optim.lr=1e-6", "here it is actor.optim.lr$"),
        ("actor_rollout_ref.rollout.name=vllm", "here it is rollout.engine$"),
        ("rollout.name=vllm", "here it is rollout.engine$"),
        ("algorithm.adv_estimator=grpo", "here it is algorithm.objective$"),
        ("trainer.total_epochs=3", "here it is trainer.total_training_steps$"),
        ("actor_rollout_ref.actor.use_dynamic_bsz=True", "here it is actor.ppo_max_token_len_per"),
        ("custom_reward_function.path=x.py", "here it is reward.function$"),
    ],
    ids=lambda value: value.partition("=")[0],
)
def test_unknown_keys_name_their_home(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(override)


def test_every_key_of_a_foreign_section_is_named(tmp_path: Path) -> None:
    path = written(
        tmp_path, "actor_rollout_ref: {rollout: {n: 4, name: vllm}, model: {path: x, lora: 3}}"
    )
    with pytest.raises(ValueError) as caught:
        load_config(path, REQUIRED)
    for part in ("here it is rollout.n;", "here it is rollout.engine;", "here it is model.path;"):
        assert part in str(caught.value)
    assert "unknown key `actor_rollout_ref.model.lora`" in str(caught.value)


def test_foreign_names_lead_to_keys_that_exist() -> None:
    for foreign, home in VERL_HOMES.items():
        assert foreign not in config_keys()
        assert home in config_keys() or home.startswith("nothing: ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.seed=-1", "`trainer.seed` = -1: .*greater than or equal to 0"),
        ("trainer.seed=x", "`trainer.seed` = 'x': .*valid integer"),
        ("trainer.total_training_steps=0", "greater than 0"),
        ("trainer.total_training_steps=2.5", "`trainer.total_training_steps` = 2.5"),
        ("rollout.temperature=0", "`rollout.temperature` = 0: .*greater than 0"),
        ("rollout.temperature=.inf", "finite"),
        ("actor.optim.lr=.nan", "`actor.optim.lr` = nan"),
        ("rollout.top_p=1.5", "less than or equal to 1"),
        ("rollout.top_k=-2", "greater than or equal to -1"),
        ("actor.optim.betas=[0.9]", "betas"),
        ("actor.optim.betas=[0.9, 1.0]", "less than 1"),
        ("actor.drop_mass=1", "less than 1"),
        ("flow.preset=papr", "'paper', 'original', 'recipe' or 'cispo'"),
        ("trainer.logger=console", "`trainer.logger` = 'console': .*list"),
        ("trainer.logger=[mlflow]", "'console', 'jsonl', 'tensorboard' or 'wandb'"),
        ("trainer.seed=1e400", "finite"),
        ("trainer.seed=" + "9" * 5000, "not valid YAML"),
        ("data=3", "`data` = 3"),
        ("data=null", "`data` = None"),
        ("data.task.x=3", "`data.task.x`: `task` holds 'sums', not a section"),
        ("trainer.seed=[1", "not valid YAML"),
        ("trainer.seed=!!python/object:os.system x", "not valid YAML"),
        ("trainer.seed=!!int ''", "not valid YAML"),
        ("trainer.seed=!!timestamp x", "not valid YAML"),
        ("trainer.seed=!!bool x", "not valid YAML"),
        ("trainer.seed=2024-13-45", "not valid YAML"),
        ("trainer.seed=" + "[" * 1200, "not valid YAML"),
        ("trainer.seed", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("--trainer.seed=3", "unknown key `--trainer"),
    ],
    ids=lambda value: value[:30],
)
def test_bad_values_are_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.max_prompt_length=16000"],
            r"= 17024 exceeds actor.ppo_max_token_len_per_gpu \* parallel.context_parallel_size "
            r"= 16384 \* 1; .* raise one of the two or shorten the limits",
        ),
        (
            ["data.max_prompt_length=32000", "parallel.context_parallel_size=2"],
            r"= 33024 exceeds .* = 16384 \* 2; ",
        ),
        (["actor.ppo_mini_batch_size=48"], "64 is not a multiple of .* = 48"),
        (["actor.ppo_mini_batch_size=128"], "64 is not a multiple of .* = 128"),
        (["data.task=files"], "data.train_files is empty"),
        (["rollout.top_p=0.9"], "rollout.top_p = 0.9.*flow.old_logprobs=rollout"),
        (["rollout.top_k=50"], "rollout.top_k = 50.*flow.old_logprobs=rollout"),
        (["validation.n=300"], "max_num_seqs = 256 is below validation.n = 300"),
    ],
    ids=["length", "spread", "mini batch", "larger mini batch"]
    + ["no files", "top_p", "top_k", "samples"],
)
def test_settings_that_contradict_each_other_are_refused(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["actor.clip_ratio_high=0.28"], r"clip_ratio_high = 0.28.*needs algorithm.objective=grpo"),
        (["actor.clip_ratio_c=null"], r"clip_ratio_c = None has no effect here"),
        (["actor.loss_agg_mode=seq-mean-token-sum"], r"loss_agg_mode = seq-mean-token-sum has no"),
        ([GRPO, "actor.loss_scale_factor=9"], r"= 9.0.*loss_agg_mode=seq-mean-token-sum-norm"),
        ([GRPO, "actor.kl_loss_coef=0.1"], r"kl_loss_coef = 0.1.*needs actor.use_kl_loss=true"),
        ([GRPO, "algorithm.gamma=0.9"], r"gamma = 0.9.*needs algorithm.objective=ppo or reinforce"),
        ([PPO, "algorithm.norm_adv_by_std_in_grpo=false"], r"needs algorithm.objective=grpo"),
        ([PPO, "algorithm.kl_coef=0.1"], r"kl_coef = 0.1.*needs algorithm.use_kl_in_reward=true"),
        (["algorithm.lam=0.9"], r"lam = 0.9.*needs algorithm.objective=ppo"),
        (["flow.weighting=raw", "flow.clip_low=0.1"], r"clip_low = 0.1.*flow.weighting=clip or"),
        (["algorithm.filter_groups.max_num_gen_batches=3"], r"= 3.*filter_groups.enable=true"),
        (["reward.overlong_buffer.penalty_factor=0.5"], r"= 0.5.*overlong_buffer.enable=true"),
        (["algorithm.rollout_correction.rollout_rs_threshold=3"], r"= 3.0.*rollout_rs$"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_settings_that_nothing_reads_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(*overrides)


def test_one_key_of_the_critics_optimiser_leaves_its_learning_rate() -> None:
    assert load().critic.optim.lr == 1e-5
    assert load(PPO, "critic.optim.weight_decay=0").critic.optim.lr == 1e-5


def test_one_process_is_refused_where_many_were_started(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load("actor.strategy=torch")
    assert not is_megatron(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"torchrun started 2: start it without torchrun"):
        is_megatron(config)
    with pytest.raises(ValueError, match=r"strategy = torch.*`parallel` asks for 4"):
        load("actor.strategy=torch", "parallel.expert_model_parallel_size=4")


def test_settings_at_the_border_are_accepted() -> None:
    load("data.max_prompt_length=15360")  # + 1024 is the cap itself
    load("actor.ppo_mini_batch_size=16")
    load("rollout.top_p=0.9", "rollout.top_k=5", "flow.old_logprobs=rollout")
    load("data.task=files", "data.train_files=[x.parquet]")
    load("rollout.top_k=0")


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        load("trainer.seed=-1", "rollout.nn=3", "flow.beta=0")
    for part in ("`trainer.seed` = -1", "unknown key `rollout.nn`", "`flow.beta` = 0"):
        assert part in str(caught.value)


def test_a_missing_required_key_is_named() -> None:
    with pytest.raises(ValueError, match="`model` is required and has no value"):
        load_config(None, ["data.task=sums"])
    with pytest.raises(ValueError, match="`model.path` is required and has no value"):
        load_config(None, ["data.task=sums", "model.dtype=float32"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "is not valid YAML"),
        (b"- 1\n- 2\n", "holds list, not sections"),
        (b"text", "holds str, not sections"),
        (b"0", "holds int, not sections"),
        (b"[]", "holds list, not sections"),
        (b"\xff\xfe\xff", "config.yaml"),
        (b"1: 2\n", "1"),
        (b"a: 1\n---\nb: 2\n", "is not valid YAML"),
        (b"trainer:\n", "`trainer` = None"),
    ],
    ids=["broken", "list", "text", "zero", "empty list", "bytes", "number", "two", "no section"],
)
def test_bad_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_config(path, REQUIRED)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent.yaml: .*No such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match="directory"):
        load_config(tmp_path)


# Whatever is typed


def test_random_overrides_raise_nothing_but_value_errors() -> None:
    draw = random.Random(0)
    keys = [*config_keys(), *VERL_HOMES, "", ".", "a..b", "data.", "flow", "x.y.z.w.v.u.t", "+"]
    alphabet = "0123456789.-+eE_:[]{}!&*#|>%@`'\", \n\tanulltruefsi~<=\\\u00e9\u2028\x00\ud800"
    tags = ["!!int ", "!!float ", "!!bool ", "!!binary ", "!!set ", "!!omap ", "!!null ", "&a *a"]
    num_accepted = 0
    for _ in range(1500):
        key = draw.choice(keys)
        if draw.random() < 0.2:
            key += draw.choice(alphabet) * draw.randint(1, 3)
        text = "".join(draw.choice(alphabet) for _ in range(draw.randint(0, 12)))
        if draw.random() < 0.2:
            text = draw.choice(tags) + text
        try:
            load(f"{key}={text}")
            num_accepted += 1
        except ValueError as error:
            assert str(error)
    assert 20 < num_accepted < 1000


def test_random_files_raise_nothing_but_value_errors(tmp_path: Path) -> None:
    draw = random.Random(1)
    base = dump_config(load()).encode()
    num_refused = 0
    for _ in range(150):
        content = bytearray(base)
        for _ in range(draw.randint(1, 6)):
            place = draw.randrange(len(content))
            content[place : place + draw.randint(0, 5)] = draw.choice(
                [b"", b":", b"\n", b"- ", b"\xff", b"{", b"&a ", b"*a", b"\t", b"? ", b"1"]
            )
        path = tmp_path / "config.yaml"
        path.write_bytes(bytes(content))
        try:
            load_config(path)
        except ValueError as error:
            assert str(error)
            num_refused += 1
    assert num_refused > 50
