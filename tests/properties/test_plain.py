"""Plain values: dataclasses survive JSON, and every wrong field is named."""

import dataclasses
import json
from typing import Annotated, Any, Literal

import ml_collections
import pytest

from uae_jax.models.uae import UAEConfig
from uae_jax.plain import ByKind, from_plain, to_plain

pytestmark = pytest.mark.fast


@dataclasses.dataclass(frozen=True)
class Inner:
  rate: float = 0.1
  count: int = 1
  is_on: bool = False


@dataclasses.dataclass(frozen=True)
class Outer:
  name: str
  inner: Inner = Inner()
  maybe: Inner | None = None
  sides: tuple[int, ...] = ()
  pair: tuple[float, str] = (1.0, "a")
  layers: tuple[Inner, ...] = ()
  grid: tuple[tuple[int, ...], ...] = ()
  mode: Literal["fast", "slow"] = "fast"
  amount: float | int | str = 0
  table: dict[str, float] = dataclasses.field(default_factory=dict)
  extra: Any = None


FULL = Outer(
  "x",
  Inner(2.0, 3, True),
  Inner(),
  (1, 2),
  (0.5, "b"),
  (Inner(), Inner(9.0)),
  ((1, 2), (3,)),
  "slow",
  "much",
  {"a": 1.0},
  ((1, 2), "z"),
)


@pytest.mark.parametrize("value", [FULL, Outer("y")])
def test_a_dataclass_survives_json(value):
  assert from_plain(Outer, json.loads(json.dumps(to_plain(value)))) == value


def test_the_sizes_of_a_model_survive_json():
  config = UAEConfig.uae_3b_sd35_large(16, 32.0)
  assert from_plain(UAEConfig, json.loads(json.dumps(to_plain(config)))) == config


@dataclasses.dataclass(frozen=True)
class Other:
  rate: float = 0.1


@dataclasses.dataclass(frozen=True)
class Chosen:
  part: Annotated[Any, ByKind({"inner": Inner, "other": Other}, default="inner")]


@pytest.mark.parametrize(
  ("value", "plain"),
  [
    (Chosen(Inner(count=3)), {"part": {"rate": 0.1, "count": 3, "is_on": False}}),
    (Chosen(Other(0.5)), {"part": {"kind": "other", "rate": 0.5}}),
  ],
)
def test_a_kind_chooses_the_class(value, plain):
  assert to_plain(value) == plain and from_plain(Chosen, json.loads(json.dumps(plain))) == value
  assert from_plain(Chosen, {"part": value.part}) == value


def test_a_class_without_a_kind_is_refused():
  with pytest.raises(TypeError, match="Outer has no kind: expected one of inner, other"):
    to_plain(Chosen(Outer("x")))


@pytest.mark.parametrize(
  ("part", "message"),
  [
    ({"kind": "othr"}, r"config\.part\.kind = 'othr': expected one of inner, other"),
    ({"kind": 3}, r"config\.part\.kind = 3: expected str, found int"),
    ({"kind": "other", "count": 1}, r"config\.part has no field 'count': expected one of rate"),
    (None, r"config\.part = None: expected the fields of Inner"),
  ],
)
def test_what_is_wrong_in_a_kind_is_named(part, message):
  with pytest.raises(ValueError, match=message):
    from_plain(Chosen, {"part": part}, "config")


def test_a_captioner_of_the_default_kind_is_stored_without_it():
  config = UAEConfig.uae_3b_sd35_large()
  plain = to_plain(config)
  assert list(plain["captioner"]) == ["vision", "language", "image_token_id"]
  assert from_plain(UAEConfig, plain | {"captioner": {"kind": "qwen25_vl"} | plain["captioner"]}) == config


def test_absent_fields_take_their_default():
  assert from_plain(Outer, {"name": "x", "inner": {"count": 2}}) == Outer("x", Inner(count=2))


def test_a_config_dict_is_read():
  config = ml_collections.ConfigDict({"name": "x", "inner": {"rate": 2}, "sides": (1, 2)})
  assert from_plain(Outer, config, "config") == Outer("x", Inner(2.0), sides=(1, 2))


def test_an_int_for_a_float_becomes_one():
  rate = from_plain(Inner, {"rate": 3}).rate
  assert rate == 3.0 and isinstance(rate, float)


def test_a_union_keeps_the_exact_type():
  amounts = [from_plain(Outer, {"name": "x", "amount": amount}).amount for amount in (3, 3.5, "3")]
  assert [type(amount) for amount in amounts] == [int, float, str]


@pytest.mark.parametrize(
  ("plain", "message"),
  [
    ({"name": "x", "inner": {"cuont": 1}}, r"config\.inner has no field 'cuont': did you mean 'count'\?"),
    ({"name": "x", "inner": {"zzzzzz": 1}}, r"config\.inner has no field 'zzzzzz': expected one of rate, count, is_on"),
    ({}, r"config lacks field 'name'"),
    ({"name": 3}, r"config\.name = 3: expected str, found int"),
    ({"name": "x", "inner": {"rate": "3"}}, r"config\.inner\.rate = '3': expected float, found str"),
    ({"name": "x", "inner": {"rate": True}}, r"config\.inner\.rate = True: expected float, found bool"),
    ({"name": "x", "inner": {"count": True}}, r"config\.inner\.count = True: expected int, found bool"),
    ({"name": "x", "inner": {"count": 1.5}}, r"config\.inner\.count = 1\.5: expected int, found float"),
    ({"name": "x", "inner": {"is_on": 1}}, r"config\.inner\.is_on = 1: expected bool, found int"),
    ({"name": "x", "inner": None}, r"config\.inner = None: expected the fields of Inner"),
    ({"name": "x", "sides": 3}, r"config\.sides = 3: expected a list, found int"),
    ({"name": "x", "sides": [1, "a"]}, r"config\.sides\[1\] = 'a': expected int, found str"),
    ({"name": "x", "pair": [1.0]}, r"config\.pair = \[1\.0\]: expected 2 values, found 1"),
    ({"name": "x", "layers": [{"rat": 1}]}, r"config\.layers\[0\] has no field 'rat': did you mean 'rate'\?"),
    ({"name": "x", "mode": "fats"}, r"config\.mode = 'fats': expected one of 'fast', 'slow'"),
    ({"name": "x", "table": {"a": "b"}}, r"config\.table\.a = 'b': expected float"),
    ({"name": "x", "amount": True}, r"config\.amount = True: expected float or int or str, found bool"),
  ],
)
def test_what_is_wrong_is_named(plain, message):
  with pytest.raises(ValueError, match=message):
    from_plain(Outer, plain, "config")


def test_what_json_lacks_is_refused():
  with pytest.raises(TypeError, match="set"):
    to_plain({"a": {1}})
