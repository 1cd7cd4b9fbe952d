"""Recipes: what loads, what is refused and in which words, and what the paper's recipes hold."""

import dataclasses
import importlib.resources
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_nft.config import (
    Config,
    DataConfig,
    DriftConfig,
    EvaluateConfig,
    Fp8Config,
    MemoryConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RuleConfig,
    SourceConfig,
    WatchdogConfig,
)
from megatron_nft.recipe import differences, load, save
from megatron_nft.validation import CHOICES, RANGES, leaves, validate

MINIMAL = """
run_dir: runs/x
model: {path: models/m}
data: {train: [{path: data/t.jsonl}]}
"""
RECIPES = importlib.resources.files("launch") / "recipes"
GOOD = Config(
    run_dir="runs/x",
    model=ModelConfig(path="models/m"),
    data=DataConfig(train=[SourceConfig(path="data/t.jsonl")]),
)


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ValueError, match=r".") as raised:
        load(path, overrides)
    return str(raised.value)


def test_a_minimal_recipe_is_the_defaults_and_its_own_values(tmp_path: Path) -> None:
    assert load(write(tmp_path, MINIMAL)) == GOOD


def test_scientific_notation_and_whole_numbers_are_floats(tmp_path: Path) -> None:
    config = load(
        write(tmp_path, MINIMAL + "optimizer: {lr: 1e-6, clip_norm: 2, betas: [0, 1e-1]}")
    )
    assert config.optimizer.lr == 1e-6
    assert config.optimizer.betas == (0.0, 0.1)
    assert type(config.optimizer.clip_norm) is float


def test_overrides_reach_sections_lists_and_whole_lists(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    config = load(
        path,
        [
            "rollout.answers=8",
            "optimizer.lr=5e-7",
            "data.train[0].path=a=b.jsonl",
            "evaluate.sets=[{path: e.jsonl, samples: 4}]",
            "evaluate.sets[0].samples=2",
            "run_dir=2024",
            "logging.wandb_project=",
            "parallel={tensor: 2, sequence: true}",
        ],
    )
    assert config.rollout.answers == 8
    assert config.optimizer.lr == 5e-7
    assert config.data.train == [SourceConfig(path="a=b.jsonl")]
    assert config.evaluate.sets == [SourceConfig(path="e.jsonl", samples=2)]
    assert config.run_dir == "2024"
    assert config.logging.wandb_project == ""
    assert (config.parallel.tensor, config.parallel.sequence) == (2, True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rolouts: 3", ["no key rolouts", "nearest is rollouts"]),
        ("rollout: {answer: 3}", ["no key rollout.answer;", "nearest is rollout.answers"]),
        ("lr: 3", ["no key lr;", "nearest is optimizer.lr"]),
        ("evaluate: {sets: [{path: a, sample: 3}]}", ["evaluate.sets[0].sample;", "[0].samples"]),
        ("verify: {zzz: 1}", ["verify.zzz", "verify.workers, verify.timeout_s"]),
        ("rollout: {answers: many}", ["rollout.answers was 'many' (str)", "a whole number"]),
        ("rollout: {answers: 1.5}", ["rollout.answers was 1.5 (float)"]),
        ("rollout: {answers: true}", ["rollout.answers was True (bool)"]),
        ("rollout: {answers: null}", ["rollout.answers was None"]),
        ("objective: {name: 3}", ["objective.name was 3 (int)", "a string"]),
        ("objective: {epsilon: '1'}", ["objective.epsilon was '1' (str)", "a number"]),
        ("checkpoint: {check_export: 1}", ["checkpoint.check_export was 1", "true or false"]),
        ("rollout:", ["rollout was None", "a section with the keys engine,"]),
        ("rollout: 3", ["rollout was 3 (int)", "a section"]),
        ("evaluate: {sets: a.jsonl}", ["evaluate.sets was 'a.jsonl'", "a list"]),
        ("evaluate: {sets: [a.jsonl]}", ["evaluate.sets[0] was 'a.jsonl'", "a section"]),
        ("evaluate: {sets: [{path: a, samples: q}]}", ["evaluate.sets[0].samples was 'q'"]),
        ("optimizer: {betas: [0.9]}", ["optimizer.betas was [0.9]", "a list of 2"]),
        ("optimizer: {betas: [0.9, x]}", ["optimizer.betas[1] was 'x'"]),
        (
            "data: {train: [{path: a, rule: {name: 3}}]}",
            ["data.train[0].rule.name was 3 (int)", "a string"],
        ),
        (
            "data: {train: [{path: a, rule: exact}]}",
            ["data.train[0].rule was 'exact'", "a section"],
        ),
        ("rollouts: ???", ["rollouts"]),
        ("model: {dtype: '${oc.env:NO_SUCH_VARIABLE}'}", ["NO_SUCH_VARIABLE"]),
        ("rollouts: 1\nrollouts: 2", ["duplicate key rollouts"]),
        ("a: [", ["not a readable recipe"]),
        ("base: 3", ["base was 3"]),
    ],
)
def test_a_wrong_recipe_names_file_key_value_and_remedy(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    path = write(tmp_path, text)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.answer=3", ["no key rollout.answer;", "nearest is rollout.answers"]),
        ("rollout.answers=x", ["rollout.answers was 'x'"]),
        ("rollout.answers.x=3", ["rollout.answers was {'x': 3}"]),
        ("data.train[3].path=x", ["list index out of range"]),
        ("data.train.path=x", ["data.train"]),
        ("rollout", ["key=value"]),
        ("=3", ["key=value"]),
        ("rollout.answers=[", ["override 'rollout.answers=['"]),
        ("base=x.yaml", ["no key base"]),
    ],
)
def test_a_wrong_override_is_quoted(tmp_path: Path, override: str, words: list[str]) -> None:
    message = refusal(write(tmp_path, MINIMAL), override)
    assert message.startswith(f"override {override!r}: ")
    for word in words:
        assert word in message


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    assert "there is no such file" in refusal(tmp_path / "absent.yaml")
    assert "held list" in refusal(write(tmp_path, "- 1"))
    (tmp_path / "latin.yaml").write_bytes(b"run_dir: caf\xe9")
    assert "not a readable recipe" in refusal(tmp_path / "latin.yaml")
    assert "model.path was ''" in refusal(write(tmp_path, ""))


def test_a_recipe_overlays_its_base(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, MINIMAL + "rollout: {answers: 4, questions: 64}")
    child = write(
        tmp_path,
        "base: ../recipe.yaml\nrollout: {answers: 8}\ndata: {train: [{path: b.jsonl}]}",
        "sub/child.yaml",
    )
    config = load(child)
    assert (config.rollout.answers, config.rollout.questions) == (8, 64)
    assert [source.path for source in config.data.train] == ["b.jsonl"]


def test_errors_in_a_base_name_the_base_and_circles_are_found(tmp_path: Path) -> None:
    base = write(tmp_path, "rolouts: 3", "base.yaml")
    child = write(tmp_path, "base: base.yaml")
    assert refusal(child).startswith(f"{base}: ")
    write(tmp_path, "base: recipe.yaml", "base.yaml")
    assert "leads back to itself" in refusal(child)


def test_environment_variables_are_filled_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NFT_TEST_DATA", "/mnt/data")
    path = write(
        tmp_path, MINIMAL + "evaluate: {sets: [{path: '${oc.env:NFT_TEST_DATA}/a.jsonl'}]}"
    )
    assert load(path).evaluate.sets[0].path == "/mnt/data/a.jsonl"


def test_save_and_load_give_the_same_configuration(tmp_path: Path) -> None:
    config = replace(
        GOOD,
        optimizer=OptimizerConfig(lr=1.5e-7, betas=(0.8, 0.95)),
        evaluate=EvaluateConfig(sets=[SourceConfig(path="é.jsonl", samples=3)]),
    )
    save(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config
    assert differences(load(tmp_path / "config.yaml"), config) == []


def test_differences_are_dotted_keys() -> None:
    other = replace(
        GOOD,
        seed=1,
        optimizer=OptimizerConfig(betas=(0.9, 0.99)),
        data=replace(GOOD.data, train=[SourceConfig(path="u.jsonl")]),
    )
    assert differences(GOOD, other) == ["seed", "data.train[0].path", "optimizer.betas[1]"]
    assert "data.train[0].path" in differences(GOOD, replace(GOOD, data=DataConfig()))


def changed(key: str, value: object) -> Config:
    """GOOD with one value changed under its dotted key, and what that needs."""
    section, _, name = key.rpartition(".")
    if key == "rollout.weight_transfer":
        return replace(GOOD, rollout=RolloutConfig(engine="remote", weight_transfer=value))
    if not section:
        return replace(GOOD, **{name: value})
    return replace(GOOD, **{section: replace(getattr(GOOD, section), **{name: value})})


@pytest.mark.parametrize("key", [key for key in CHOICES if "[]" not in key])
def test_every_choice_is_checked(key: str) -> None:
    for choice in CHOICES[key]:
        validate(changed(key, choice))
    expected = f"{key} was 'nope'; it may be {', '.join(CHOICES[key])}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        validate(changed(key, "nope"))


@pytest.mark.parametrize("key", [key for key in RANGES if "[]" not in key])
def test_every_number_is_checked(key: str) -> None:
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=re.escape(f"{key} was {wrong}; it may be ")):
            validate(changed(key, wrong))


def test_every_number_and_every_name_has_a_rule() -> None:
    config = replace(GOOD, evaluate=EvaluateConfig(sets=[SourceConfig()]))
    values = {re.sub(r"\[\d\]", "[]", key): value for key, value in leaves(config)}
    assert {key for key, value in values.items() if type(value) in (int, float)} == set(RANGES)
    strings = {key for key, value in values.items() if type(value) is str}
    free = {"run_dir", "model.path", "logging.wandb_project", "logging.wandb_name"}
    free |= {"checkpoint.best"}  # its choices depend on the evaluation sets
    sources = {key for key in strings if "[]" in key}
    assert strings - free - sources == {key for key in CHOICES if "[]" not in key}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (changed("rollout", RolloutConfig(questions=48)), "a divisor of rollout.questions = 48"),
        (changed("rollout", RolloutConfig(questions=16)), "questions_per_minibatch was 32"),
        (changed("rollout", RolloutConfig(answers=1)), "rollout.answers was 1; it may be at least"),
        (changed("rollout", RolloutConfig(questions_asked=32)), "times max_asks = 10"),
        (changed("rollout", RolloutConfig(temperature=0)), "rollout.temperature was 0; "),
        (changed("rollout", RolloutConfig(top_p=1.1)), "above 0 and at most 1"),
        (changed("rollout", RolloutConfig(memory_fraction=1.0)), "above 0 and below 1"),
        (changed("rollout", RolloutConfig(max_response_tokens=20000)), "tokens_per_microbatch was"),
        (changed("optimizer", OptimizerConfig(betas=(0.9, 1.0))), "optimizer.betas[1] was 1.0"),
        (changed("parallel", ParallelConfig(tensor=2, num_processes=3)), "a multiple of"),
        (changed("parallel", ParallelConfig(expert=2, num_processes=3)), "a multiple of 2: pipe"),
        (changed("parallel", ParallelConfig(sequence=True)), "parallel.sequence was True"),
        (changed("parallel.virtual_pipeline", 2), "parallel.virtual_pipeline was 2; it may be 1"),
        (changed("memory.recompute_modules", ["mpl"]), "it may be core_attn, mlp"),
        (changed("memory", MemoryConfig("selective", [])), "memory.recompute_modules was []"),
        (
            replace(changed("model.dtype", "float32"), memory=MemoryConfig(offload=True)),
            "memory.offload was True; it may be false with model.dtype=float32",
        ),
        (
            replace(changed("model.dtype", "float32"), fp8=Fp8Config("e4m3")),
            "model.dtype was 'float32'; it may be bfloat16 where fp8.format is e4m3",
        ),
        (
            replace(changed("model.layers", "torch"), fp8=Fp8Config("hybrid")),
            "model.layers was 'torch'; it may be auto or transformer_engine",
        ),
        (
            changed("fp8", Fp8Config("hybrid", "delayed", first_last_layers_bf16=True)),
            "fp8.first_last_layers_bf16 was True; it may be false with fp8.recipe=delayed",
        ),
        (
            changed("rollout", RolloutConfig(servers=["node1:8000"], engine="remote")),
            "rollout.servers[0] was 'node1:8000'; it may be http://HOST:PORT",
        ),
        (
            changed("rollout", RolloutConfig(servers=["http://a:1"] * 2, engine="remote")),
            "rollout.servers[1] was 'http://a:1'; it may be an address that is not there",
        ),
        (
            changed("rollout", RolloutConfig(servers=["http://a:1"])),
            "it may be given only where rollout.engine is remote",
        ),
        (
            changed("rollout", RolloutConfig(max_steps_off_policy=1)),
            "old_logp was 'trainer'; it may be rollout where rollout.max_steps_off_policy",
        ),
        (
            replace(
                changed("rollout", RolloutConfig(engine="remote", max_steps_off_policy=2)),
                old_logp="rollout",
            ),
            "rollout.max_steps_off_policy was 2; it may be 0 or 1, or needs",
        ),
        (
            changed("rollout", RolloutConfig(weight_transfer="gloo")),
            "rollout.weight_transfer was 'gloo'; it may be files where rollout.engine is colocated",
        ),
        (
            changed("rollout", RolloutConfig(engine="remote", in_flight_updates=True)),
            "rollout.in_flight_updates was True; it may be false where",
        ),
        (
            replace(changed("old_logp", "rollout"), drift=DriftConfig(importance_cap=2.0)),
            "drift.importance_cap was 2.0; it may be 0 where old_logp is rollout",
        ),
        (
            changed("drift", DriftConfig(warn=0.2, stop=0.1)),
            "drift.stop was 0.1; it may be at least drift.warn = 0.2",
        ),
        (
            replace(
                changed("rollout", RolloutConfig(engine="remote", start_timeout_s=1700.0)),
                watchdog=WatchdogConfig(1800.0),
            ),
            "watchdog.timeout_s was 1800.0; it may be 0, or above rollout.start_timeout_s + "
            "rollout.stall_timeout_s = 1820",
        ),
        (changed("data", DataConfig()), "data.train was []"),
        (changed("data", DataConfig(train=[SourceConfig()])), "data.train[0].path was ''"),
        (changed("run_dir", ""), "run_dir was ''"),
        (changed("evaluate.stop_at_accuracy", 0.5), "needs evaluate.sets"),
        (changed("evaluate.sets", [SourceConfig(path="a"), SourceConfig(path="b/a")]), "no other"),
        (
            changed(
                "evaluate",
                EvaluateConfig(temperature=0.0, sets=[SourceConfig(path="a", samples=2)]),
            ),
            "greedy",
        ),
    ],
)
def test_rules_between_keys(config: Config, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        validate(config)


@pytest.mark.parametrize("name", ["numeric", "a.b:is_right", "exact", "a.b", "a:b:c", ""])
def test_a_rule_has_a_known_name_or_is_the_path_of_a_function(name: str) -> None:
    source = SourceConfig(path="t.jsonl", rule=RuleConfig(name))
    config = replace(GOOD, data=replace(GOOD.data, train=[source]))
    if name in ("numeric", "a.b:is_right"):
        validate(config)
        return
    with pytest.raises(ValueError, match=r"data.train\[0\].rule.name was .* module:function"):
        validate(config)


def test_every_complaint_is_listed_at_once() -> None:
    config = replace(GOOD, rollouts=0, rollout=RolloutConfig(top_p=0.0))
    with pytest.raises(ValueError, match=r"rollouts was 0.*\n.*rollout.top_p was 0.0"):
        validate(config)


def test_sft_needs_no_engine_settings() -> None:
    rollout = RolloutConfig(answers=1, questions_asked=1, max_response_tokens=99999)
    validate(replace(GOOD, objective=ObjectiveConfig(name="sft"), rollout=rollout))


SHARED = {
    "rollouts": 320,
    "objective.name": "nft",
    "objective.epsilon": 1.0,
    "objective.omega": "dr_grpo",
    "objective.ratio": "token",
    "objective.negative_weight": 1.0,
    "rollout.questions": 512,
    "rollout.questions_asked": 0,
    "rollout.max_asks": 10,
    "rollout.answers": 16,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.tensor": 4,
    "optimizer.lr": 1e-6,
    "optimizer.betas[0]": 0.9,
    "optimizer.betas[1]": 0.999,
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_norm": 1.0,
    "optimizer.warmup_rollouts": 10,
    "optimizer.questions_per_minibatch": 32,
    "optimizer.epochs": 1,
    "evaluate.every": 2,
    "evaluate.top_p": 0.7,
    "checkpoint.every": 2,
}
SIZES = {
    "qwen2.5-math-7b": {
        "data.template": "qwen-math",
        "data.max_prompt_tokens": 512,
        "rollout.max_response_tokens": 3584,
        "rollout.memory_fraction": 0.7,
        "objective.constant": 32000.0,
        "evaluate.temperature": 1.0,
    },
    "qwen2.5-32b": {
        "data.template": "boxed",
        "data.max_prompt_tokens": 2048,
        "rollout.max_response_tokens": 14336,
        "rollout.memory_fraction": 0.59,  # officially 0.6, which no H100 has beside this layout
        "objective.constant": 16000.0,
        "evaluate.temperature": 0.6,
    },
}


@pytest.mark.parametrize("name", SIZES)
def test_recipes_hold_the_papers_values_and_write_them_out(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    config = load(path)
    held = dict(leaves(config))
    table = SHARED | SIZES[name]
    assert {key: held[key] for key in table} == table
    samples = {source.name: source.samples for source in config.evaluate.sets}
    assert samples == {
        "aime24": 32, "aime25": 32, "amc23": 32, "math500": 1, "olympiadbench": 1, "minerva": 1
    }  # fmt: skip
    text = path.read_text(encoding="utf-8")
    for key in table:
        leaf = key.rpartition(".")[2].partition("[")[0]
        assert f"{leaf}: " in text, f"{key} is a default, not written out"


@pytest.mark.parametrize(("name", "num_gpus"), [("qwen2.5-math-7b", 32), ("qwen2.5-32b", 128)])
def test_layouts_fit_the_hardware_the_recipes_name(name: str, num_gpus: int) -> None:
    config = load(RECIPES / f"{name}.yaml")
    key_value_heads = {"qwen2.5-math-7b": 4, "qwen2.5-32b": 8}[name]
    assert key_value_heads % config.parallel.tensor == 0
    assert num_gpus % config.parallel.tensor == 0
    sequences = config.optimizer.questions_per_minibatch * config.rollout.answers
    assert sequences % (num_gpus // config.parallel.tensor) == 0


BASELINES = {
    "rft": {"objective.name": "rft", "objective.omega": "uniform"},
    "grpo": {"objective.name": "grpo", "objective.clip_high": 0.2, "rollout.max_asks": 1},
    "dr_grpo": {"objective.name": "dr_grpo", "objective.denominator": "constant"},
    "dapo": {"objective.name": "dapo", "objective.clip_high": 0.28},
}


def test_an_overlong_buffer_is_for_objectives_with_rewards_of_groups() -> None:
    path = RECIPES / "qwen2.5-32b-dapo.yaml"
    assert load(path).objective.overlong_buffer == 4096
    with pytest.raises(ValueError, match=r"overlong_buffer was 4096; it may be 0 where .* nft"):
        load(path, ["objective.name=nft"])
    with pytest.raises(ValueError, match=r"was 14336; it may be below rollout.max_response_tok"):
        load(path, ["objective.overlong_buffer=14336"])


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_differs_from_the_recipe_in_its_objective_alone(model: str, name: str) -> None:
    config = load(RECIPES / f"{model}-{name}.yaml")
    held = dict(leaves(config))
    assert {key: held[key] for key in BASELINES[name]} == BASELINES[name]
    changed = differences(load(RECIPES / f"{model}.yaml"), config)
    may_change = ("run_dir", "objective.", *(["rollout."] if name == "grpo" else []))
    assert all(key.startswith(may_change) for key in changed), changed


def test_every_recipe_has_a_run_directory_of_its_own_and_says_what_it_needs() -> None:
    paths = [path for path in RECIPES.iterdir() if not path.name.startswith("demo")]
    assert len(paths) >= 13
    configs = [load(path) for path in paths]
    assert len({config.run_dir for config in configs}) == len(paths)
    for path in paths:
        comment = path.read_text(encoding="utf-8").partition("\nbase:")[0]
        assert "Published" in comment or "no result" in comment, path


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GOOD.seed = 1
