"""Merging, typing and saving a configuration: what the key's annotation says is what gets in."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from perilune.pretrain import config as cfg
from perilune.pretrain import presets, rules
from perilune.pretrain.errors import InputError
from perilune.pretrain.schema import Config, Data, Model, Train

BASE = Config()


def resolve(*overrides: str, yaml_file: Path | None = None) -> Config:
    return cfg.resolve("tiny", overrides, yaml_file, base=BASE)


def error(*overrides: str, yaml_file: Path | None = None) -> str:
    with pytest.raises(InputError) as caught:
        resolve(*overrides, yaml_file=yaml_file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Written out by hand from the schema's annotations, so that the walk over the dataclasses has something to be held to.
def test_keys_are_the_contract() -> None:
    assert cfg.keys()["train.steps"] is int
    assert cfg.keys()["model.q_lora_rank"] == int | None
    assert cfg.keys()["schedule.milestones"] == tuple[float, ...]
    assert cfg.keys()["preset"] is str
    sections = [f for f in dataclasses.fields(Config) if f.name not in ("preset", "stage")]
    leaves = sum(len(dataclasses.fields(typing.get_type_hints(Config)[f.name])) for f in sections)
    assert len(cfg.keys()) == leaves + 2
    assert not {"model", "train"} & set(cfg.keys())


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("train.steps=4", 4),
        ("train.steps=-4", -4),
        ("train.tokens=1_000_000", 1_000_000),
        ("optim.lr=1e-4", 1e-4),
        ("optim.lr=3", 3.0),
        ("optim.lr=.5", 0.5),
        ("optim.lr=1.e-4", 1e-4),
        ("data.document_mask=false", False),
        ("model.q_lora_rank=none", None),
        ("model.q_lora_rank=null", None),
        ("model.q_lora_rank=8", 8),
        ("data.path=null", None),
        ("data.path=a=b, [c]", "a=b, [c]"),
        ("data.path=1e-4", "1e-4"),
        ("precision.fp8=off", "off"),
        ("schedule.milestones=[0.5, 1]", (0.5, 1.0)),
        ("recompute.modules=[core_attn, moe]", ("core_attn", "moe")),
        ("data.blend={a: 1.0, 'b c': 2}", {"a": 1.0, "b c": 2.0}),
        ("data.blend={a: {0: 1, 1000: 0.5}, b: 2}", {"a": {0: 1.0, 1000: 0.5}, "b": 2.0}),
    ],
)
def test_a_value_on_the_command_line(word: str, value: Any) -> None:
    key = word.partition("=")[0]
    section, name = key.split(".")
    got = getattr(getattr(resolve(word), section), name)
    assert got == value
    assert type(got) is type(value)
    if isinstance(value, tuple):
        assert [type(v) for v in got] == [type(v) for v in value]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("train.steps=four", ["train.steps=four", "a whole number, as in train.steps=0"]),
        ("train.steps=4.0", ["a whole number", "write 4"]),
        ("train.tokens=1e9", ["train.tokens=1e9", "write 1000000000"]),
        ("train.steps=true", ["a whole number"]),
        ("train.steps=null", ["a whole number"]),
        ("train.steps=" + "9" * 5000, ["a whole number"]),
        ("optim.lr=true", ["a number"]),
        ("optim.lr=nan", ["a number"]),
        ("optim.lr=.nan", ["a number"]),
        ("optim.lr=.inf", ["a number"]),
        ("optim.lr='1'", ["a number"]),
        ("parallel.zero1=1", ["true or false"]),
        ("parallel.zero1=no", ["true or false"]),
        ("precision.fp8=false", ["one of off, emulated, blockwise, current, mxfp8"]),
        ("model.q_lora_rank=x", ["a whole number or null"]),
        ("schedule.milestones=0.5", ["a list of numbers"]),
        ("schedule.milestones=[a]", ["a list of numbers"]),
        ("recompute.modules=core_attn", ["a list of texts"]),
        ("data.blend={1: 2}", ["a mapping of texts to numbers"]),
        ("data.blend={a: {x: 2}}", ["mappings of whole numbers to numbers"]),
        ("data.blend={a: 1, a: 2}", ["a mapping of texts to numbers"]),
        ("data.blend={a: !!python/object:os.system 1}", ["a mapping of texts to numbers"]),
        ("data.blend=[1", ["a mapping of texts to numbers"]),
        ("model.num_layer=4", ["unknown key 'model.num_layer'", "model.num_layers"]),
        ("num_layers=4", ["unknown key", "model.num_layers"]),
        ("lr=1", ["optim.lr", "schedule.lr"]),
        ("optimizer.weight_decay=1", ["optim.weight_decay"]),
        ("--train.steps=4", ["train.steps"]),
        ("zzzzzz=4", ["unknown key 'zzzzzz'", "model, vision, contrastive, train, valid, data"]),
        ("data.blend.a=1", ["unknown key 'data.blend.a'"]),
        ("model=4", ["is a section", "model.num_layers", "model.hidden_size"]),
        ("train.steps", ["is not key=value"]),
        ("train.steps=", ["has no value"]),
        ("data.path=", ["has no value", "null clears it"]),
        ("=4", ["unknown key ''"]),
        ("preset=demo", ["first argument"]),
    ],
)
def test_a_bad_word_is_one_clear_line(word: str, says: list[str]) -> None:
    message = error(word)
    for part in says:
        assert part in message


def test_a_key_given_twice_names_both() -> None:
    message = error("train.steps=1", "optim.lr=1", "train.steps=2")
    assert "'train.steps=1'" in message
    assert "'train.steps=2'" in message


def test_order_of_precedence(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "# mine\ntrain:\n  steps: 7\n  seed: 8\n  # keep: 1\noptim:\nmodel.num_layers: 9\n", encoding="utf-8"
    )
    got = resolve("train.seed=10", yaml_file=file)
    expected = dataclasses.replace(
        BASE,
        train=dataclasses.replace(BASE.train, steps=7, seed=10),
        model=dataclasses.replace(BASE.model, num_layers=9),
    )
    assert got == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {steps: '4'}", ["train.steps='4'", "run.yaml", "a whole number"]),
        ("train: {steps: true}", ["train.steps=True", "a whole number"]),
        ("train: {steps: 4.0}", ["write 4"]),
        ("train: {steps: 010}", ["train.steps=10.0", "write 10"]),
        ("optim: {lr: '1e-4'}", ["optim.lr='1e-4'", "a number"]),
        ("train: {step: 4}", ["unknown key 'train.step'", "train.steps"]),
        ("train: 4", ["train", "not a section"]),
        ("- 4", ["not a section"]),
        ("train: {steps: 1, steps: 2}", ["given twice"]),
        ("train: {steps: 1}\ntrain.steps: 2", ["train.steps is given twice"]),
        ("train: [", ["is not YAML"]),
        ("preset: demo", ["'demo'", "'tiny'"]),
        ("data: {path: 2024-01-01T}\nvalid: {path: 5}", ["valid.path=5", "text or null"]),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, text: str, says: list[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    message = error(yaml_file=file)
    for part in says:
        assert part in message


def test_a_missing_file(tmp_path: Path) -> None:
    assert "none.yaml" in error(yaml_file=tmp_path / "none.yaml")


def test_yaml_is_of_version_1_2(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("precision: {fp8: off}\noptim: {lr: 1e-4}\ndata: {path: 2024-01-01}\n", encoding="utf-8")
    got = resolve(yaml_file=file)
    assert (got.precision.fp8, got.optim.lr, got.data.path) == ("off", 1e-4, "2024-01-01")


@pytest.mark.parametrize(
    ("name", "stage"), [(name, stage) for name in presets.names() for stage in ("", *presets.stages(name))]
)
def test_presets_resolve_and_survive_saving(name: str, stage: str, tmp_path: Path) -> None:
    config = cfg.resolve(name, [f"stage={stage}"] if stage else [])
    assert config.preset == name
    assert config.stage == (stage or config.stage) and bool(config.stage) == bool(presets.stages(name))
    cfg.save(config, tmp_path / "config.yaml")
    assert cfg.load(tmp_path / "config.yaml") == config
    assert cfg.resolve(name, yaml_file=tmp_path / "config.yaml") == config
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(("name", "world"), [("demo_vlm", 2), ("kimi_vl_a3b", 512)])
def test_every_stage_fits_where_it_is_meant_to_run(name: str, world: int) -> None:
    for stage in presets.stages(name):
        rules.check_fits(cfg.resolve(name, [f"stage={stage}"]), world)
    with pytest.raises(InputError, match=f"no such stage; its stages are {', '.join(presets.stages(name))}"):
        cfg.resolve(name, ["stage=jonit"])
    with pytest.raises(InputError, match="several have: demo_vlm, kimi_vl_a3b"):
        cfg.resolve("tiny", ["stage=align"])


def test_a_file_may_name_the_stage_and_the_command_another(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("preset: demo_vlm\nstage: align\n", encoding="utf-8")
    assert cfg.resolve("demo_vlm", yaml_file=file) == presets.get("demo_vlm", "align")
    assert cfg.resolve("demo_vlm", ["stage=text"], yaml_file=file) == presets.get("demo_vlm", "text")


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(InputError, match="deepseek_v3"):
        cfg.resolve("deepseek-v3")


# Text of all kinds, and above all text that some YAML reads as something else.
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    st.sampled_from(
        ["off", "no", "null", "~", "1e-4", "1_0", "0x1", "1:30", "2024-01-01", "=", "<<", ".inf", "- a", "#"]
    ),
)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    by_type: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(),
        float: FLOATS,
        bool: st.booleans(),
        str: TEXTS,
        int | None: st.none() | st.integers(),
        str | None: st.none() | TEXTS,
        tuple[float, ...]: st.lists(FLOATS, max_size=4).map(tuple),
        tuple[str, ...]: st.lists(TEXTS, max_size=4).map(tuple),
        dict[str, float | dict[int, float]]: st.dictionaries(
            TEXTS, FLOATS | st.dictionaries(st.integers(0, 10**17), FLOATS, max_size=3), max_size=4
        ),
    }
    return by_type[hint] if hint in by_type else st.sampled_from(typing.get_args(hint))


@st.composite
def configs(draw: st.DrawFn) -> Config:
    sections: dict[str, Any] = {}
    for section, cls in typing.get_type_hints(Config).items():
        if section not in ("preset", "stage"):
            hints = typing.get_type_hints(cls)
            chosen = draw(st.sets(st.sampled_from(sorted(hints)), max_size=5))
            sections[section] = cls(**{name: draw(values_of(hints[name])) for name in sorted(chosen)})
    return Config(preset=draw(TEXTS), stage=draw(TEXTS), **sections)


@given(configs())
def test_saving_and_loading_changes_nothing(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    cfg.save(config, path)
    again = cfg.load(path)
    assert again == config
    assert repr(again) == repr(config)  # 1 == 1.0 == True, but not to us
    assert cfg.from_dict(json.loads(json.dumps(cfg.to_dict(config)))) == config
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["precision"] == dataclasses.asdict(config.precision)


@given(configs(), configs())
def test_a_difference_names_what_differs(a: Config, b: Config) -> None:
    changed = cfg.diff(a, b)
    assert cfg.diff(a, a) == {}
    assert (changed == {}) == (a == b)
    for key, (old, new) in changed.items():
        holder_a, holder_b = a, b
        for part in key.split("."):
            holder_a, holder_b = getattr(holder_a, part), getattr(holder_b, part)
        assert (holder_a, holder_b) == (old, new)


def test_loading_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    tree = cfg.to_dict(BASE)
    tree["train"]["stepz"] = 1
    with pytest.raises(InputError, match=r"train\.steps"):
        cfg.from_dict(tree)
    del tree["train"]["stepz"], tree["train"]["keep"]
    assert cfg.from_dict(tree) == BASE  # saved before the key existed


def test_resume_may_change_only_the_allow_list() -> None:
    harmless = cfg.resolve(
        "tiny",
        [
            "train.steps=9",
            "train.tokens=9",
            "train.save_every=9",
            "train.log_every=9",
            "train.keep=9",
            "train.threads=9",
        ]
        + ["valid.every=9", "parallel.tp=9", "parallel.layout=t", "data.workers=9", "recompute.granularity=full"]
        + ["kernels.router=transformer_engine"],
        base=BASE,
    )
    cfg.check_resume(BASE, harmless)
    changed = dataclasses.replace(
        harmless,
        train=Train(steps=9, seed=5),
        model=Model(num_layers=6),
        data=Data(path="elsewhere", seq_len=8),
    )
    with pytest.raises(InputError) as caught:
        cfg.check_resume(BASE, changed)
    message = str(caught.value)
    for part in ("train.seed (1 -> 5)", "model.num_layers (4 -> 6)", "data.seq_len ("):
        assert part in message
    assert "train.steps (" not in message
    assert "data.path (" not in message  # the checkpoint's fingerprint says whether the content is the same
    assert "parallel.tp (" not in message


def test_the_datasets_of_a_blend_may_have_moved_but_keep_their_weights() -> None:
    def blend(**weights: float | dict[int, float]) -> Config:
        return dataclasses.replace(BASE, data=Data(blend=weights))

    cfg.check_resume(blend(a=0.5, b={0: 0.25}), blend(c=0.5, b={0: 0.25}))
    for other in (blend(a=0.5, b={0: 0.75}), blend(b={0: 0.25}, c=0.5), blend(a=0.5), Data(path="a")):
        config = dataclasses.replace(BASE, data=other) if isinstance(other, Data) else other
        with pytest.raises(InputError, match=r"data\.blend \("):
            cfg.check_resume(blend(a=0.5, b={0: 0.25}), config)
