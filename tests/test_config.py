"""Configuration files: what is right is read, what is wrong is named."""

import pickle
from typing import Literal

import pytest
from pydantic import Field, field_validator

from metagpen.config import Config
from metagpen.errors import ConfigError


class Optimiser(Config):
    rate: float = 1e-3
    kind: Literal["adam", "sgd"] = "adam"


class Data(Config):
    root: str
    size: int = Field(default=128, ge=8)


class Training(Config):
    total_iters: int = 100
    seed: int = 0
    optimiser: Optimiser = Optimiser()
    data: Data | None = None
    stages: list[Optimiser] = []
    generator: Optimiser = Field(default=Optimiser(), alias="network_g")

    @field_validator("seed")
    @classmethod
    def not_negative(cls, seed: int) -> int:
        if seed < 0:
            raise ValueError("Seeds start at 0")
        return seed


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "training.yml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def failure(*args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        Training.from_yaml(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_key_with_a_line_break_is_named_in_one_line(write):
    assert r"unknown key 'a\nb'" in failure(write('"a\\nb": 1'))


def test_file_and_defaults(write):
    config = Training.from_yaml(write("total_iters: 7\noptimiser: {rate: 1e-2}\ndata: {root: photos}\n"))
    assert config.total_iters == 7
    assert config.optimiser.rate == 0.01 and config.optimiser.kind == "adam"
    assert config.data.root == "photos" and config.data.size == 128


def test_empty_file_and_no_file_give_the_defaults(write):
    assert Training.from_yaml(write("# nothing\n")) == Training() == Training.from_yaml()


def test_a_field_answers_to_its_alias_and_its_name(write):
    assert Training.from_yaml(write("network_g: {rate: 2}")).generator.rate == 2
    assert Training.from_yaml(write("generator: {rate: 2}")).generator.rate == 2


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimiser.rate=1e-4", "total_iters=5", "data.root=faces", "stages=[{kind: sgd}]"],
        {"optimiser": {"rate": 1e-4}, "total_iters": 5, "data.root": "faces", "stages": [{"kind": "sgd"}]},
    ],
)
def test_overrides_win_and_leave_the_rest(write, overrides):
    config = Training.from_yaml(write("optimiser: {rate: 1, kind: sgd}\nseed: 3\n"), overrides)
    assert config.optimiser.rate == 1e-4 and config.optimiser.kind == "sgd"
    assert (config.total_iters, config.seed, config.data.root, config.stages[0].kind) == (
        5,
        3,
        "faces",
        "sgd",
    )


def test_an_override_changes_one_of_two_sections_that_a_file_writes_once(write):
    config = Training.from_yaml(write("network_g: &one {rate: 1}\noptimiser: *one\n"), ["optimiser.rate=2"])
    assert (config.generator.rate, config.optimiser.rate) == (1, 2)


def test_the_last_override_wins():
    assert Training.from_yaml(overrides=["seed=1", "seed=2"]).seed == 2


def test_a_misspelt_key_names_key_file_and_neighbour(write):
    path = write("totl_iters: 7\n")
    assert failure(path) == f"{path}: unknown key 'totl_iters'; did you mean 'total_iters'?"


@pytest.mark.parametrize(
    "text, key, neighbour",
    [
        ("optimiser: {rte: 1}", "optimiser.rte", "optimiser.rate"),
        ("data: {root: a, sise: 9}", "data.sise", "data.size"),
        ("stages: [{}, {kin: sgd}]", "stages.1.kin", "stages.1.kind"),
        ("network_g: {rat: 1}", "network_g.rat", "network_g.rate"),
        ("network_d: {}", "network_d", "network_g"),
    ],
)
def test_misspelt_keys_in_sections(write, text, key, neighbour):
    assert f"unknown key '{key}'; did you mean '{neighbour}'?" in failure(write(text))


def test_a_key_like_no_other_lists_what_there_is(write):
    assert "unknown key 'optimiser.zzz'; known here: kind, rate" in failure(write("optimiser: {zzz: 1}"))


def test_a_misspelt_override_blames_the_override(write):
    message = failure(write("seed: 1"), ["optimiser.rte=3"])
    assert message == "override: unknown key 'optimiser.rte'; did you mean 'optimiser.rate'?"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("total_iters: many", "'total_iters': input should be a valid integer"),
        ("optimiser: {kind: adamw}", "'optimiser.kind': input should be 'adam' or 'sgd', not 'adamw'"),
        ("data: {root: a, size: 4}", "'data.size': input should be greater than or equal to 8, not 4"),
        ("data: {size: 16}", "key 'data.root' is required"),
        ("seed: -1", "'seed': seeds start at 0, not -1"),
        ("optimiser: 3", "'optimiser': "),
    ],
)
def test_wrong_values_in_one_line(write, text, expected):
    path = write(text)
    message = failure(path)
    assert message.startswith(str(path)) and expected in message


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"total_iters": "many"}, "Training: 'total_iters': input should be a valid integer"),
        ({"seed": -1}, "Training: 'seed': seeds start at 0, not -1"),
        ({"optimiser": {"rate": float("nan")}}, "Training: 'optimiser.rate': input should be a finite number, not nan"),
        ({"stages": [{}, {"kin": "sgd"}]}, "Training: unknown key 'stages.1.kin'; did you mean 'stages.1.kind'?"),
    ],
)
def test_a_configuration_made_in_python_explains_itself_alike(given, expected):
    with pytest.raises(ConfigError) as caught:
        Training(**given)
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)


def test_a_section_made_in_python_is_taken_as_it_is_and_survives_pickling():
    config = Training(optimiser=Optimiser(rate=2), seed=3)
    assert config.optimiser.rate == 2 and pickle.loads(pickle.dumps(config)) == config
    assert config == Training.model_validate(config.model_dump()) == Training(seed=3).model_copy(
        update={"optimiser": Optimiser(rate=2)})


def test_every_mistake_is_told_at_once(write):
    message = failure(write("totl_iters: 7\nseed: x\n"))
    assert "totl_iters" in message and "'seed'" in message


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a: [1, 2", "not valid YAML"),
        ("- 1\n- 2\n", "found a list"),
        ("seed: 1\nseed: 2\n", "key 'seed' given twice"),
        ('data: {root: "a\\0b"}', "a text with a NUL in it"),
        ("optimiser: {rate: .nan}", "'optimiser.rate': input should be a finite number"),
        ("optimiser: {rate: .inf}", "'optimiser.rate': input should be a finite number"),
    ],
)
def test_what_is_no_configuration(write, text, expected):
    assert expected in failure(write(text))


def test_missing_file_folder_and_bytes(tmp_path):
    assert failure(tmp_path / "none.yml") == f"{tmp_path / 'none.yml'}: no such configuration file"
    assert "cannot be read" in failure(tmp_path)
    (tmp_path / "bytes.yml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in failure(tmp_path / "bytes.yml")


@pytest.mark.parametrize(
    "override, expected",
    [
        ("seed", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("a..b=3", "expected KEY=VALUE"),
        ("seed=[1", "not valid YAML"),
        ("optimiser={rate: 1, rate: 2}", "key 'rate' given twice"),
        ('data.root="a\\0b"', "a text with a NUL in it"),
        ("seed.deep=1", "'seed' holds a value, not a section"),
    ],
)
def test_malformed_overrides(write, override, expected):
    assert expected in failure(write("seed: 1"), [override])
