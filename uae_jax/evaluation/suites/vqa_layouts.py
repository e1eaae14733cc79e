"""Readers of question files: our own JSON lines, and the layouts of POPE, GQA and MMT-Bench.

own         .jsonl of image (a path from the file's folder), question, answer, and maybe choices, category, id
POPE        .json or .jsonl of question_id, image, text, label, one object per line (RUCAIBox/POPE)
GQA         .json, id -> imageId, question, answer, types; the image is images/<imageId>.jpg beside the file
MMT-Bench   .tsv of index, image (base64), question, A, B, ..., answer, category, as VLMEvalKit stores it
"""

import base64
import binascii
from collections.abc import Iterator, Mapping
import csv
import json
from pathlib import Path
import string
import sys
from typing import Any, TypedDict

from uae_jax import files
from uae_jax.evaluation.suites.spec import SuiteError, field, json_lines, read_json


class Question(TypedDict):
  """One question. With choices, `answer` is a letter; `image` is a path or the content of a file."""

  key: str
  image: Path | bytes
  question: str
  choices: list[str]
  answer: str
  category: str


def read(path: Path) -> list[Question]:
  """Reads a file of questions.

  Raises:
    SuiteError: it has no question, two questions have one key, or a record is not understood.
  """
  if path.is_dir():
    raise SuiteError(f"{path}: a folder, expected a file of questions")
  reader = _mmt_bench if path.suffix == ".tsv" else _gqa if _is_one_object(path) else _lines
  questions: dict[str, Question] = {}
  for place, question in reader(path):
    key = question["key"]
    if key in questions:
      raise SuiteError(f"{place}: a second question with id {key!r}")
    if not question["question"].strip() or not question["answer"].strip():
      raise SuiteError(f"{place}: the question or its answer is empty")
    questions[key] = question
  if not questions:
    raise SuiteError(f"{path}: no question in it")
  return list(questions.values())


def _is_one_object(file: Path) -> bool:
  """Whether a file is one JSON object of objects, as GQA's, and not one object per line, as POPE's .json files."""
  try:
    record = json.loads(files.read_text(file))
  except ValueError:
    return False
  return isinstance(record, dict) and all(isinstance(value, dict) for value in record.values())


def _lines(file: Path) -> Iterator[tuple[str, Question]]:
  for number, (place, record) in enumerate(json_lines(file)):
    is_pope = "label" in record and "text" in record
    names = ("text", "label") if is_pope else ("question", "answer")
    question, answer = (field(place, record, name, str).strip() for name in names)
    choices = field(place, record, "choices", list) if "choices" in record else []
    if not all(isinstance(choice, str) for choice in choices) or len(choices) == 1 or len(choices) > 26:
      raise SuiteError(f"{place}: choices: expected a list of 2 to 26 texts, found {choices!r:.80}")
    key = str(record.get("question_id" if is_pope else "id", number))
    category = file.stem if is_pope else record.get("category", "")
    if not isinstance(category, str):
      raise SuiteError(f"{place}: category: expected a text, found {category!r:.80}")
    picture = file.parent / field(place, record, "image", str)
    answer = right_letter(place, answer, choices) if choices else answer
    yield place, Question(key=key, image=picture, question=question, choices=choices, answer=answer, category=category)


def _gqa(file: Path) -> Iterator[tuple[str, Question]]:
  records = read_json(file)
  if not isinstance(records, dict):
    raise SuiteError(f"{file}: expected an object of questions by id, as GQA has: is it the file of another benchmark?")
  for key, value in records.items():
    place, record = f"{file}, question {key}", value if isinstance(value, dict) else {}
    types: Any = record.get("types")
    yield (
      place,
      Question(
        key=key,
        image=file.parent / "images" / f"{field(place, record, 'imageId', str)}.jpg",
        question=field(place, record, "question", str),
        choices=[],
        answer=field(place, record, "answer", str),
        category=str(types.get("semantic", "")) if isinstance(types, Mapping) else "",
      ),
    )


def _mmt_bench(file: Path) -> Iterator[tuple[str, Question]]:
  csv.field_size_limit(sys.maxsize)  # an image is one field
  rows = csv.DictReader(files.read_text(file).splitlines(keepends=True), delimiter="\t")
  pictures: dict[str, bytes] = {}
  for row in rows:
    place = f"{file}, index {row.get('index')}"
    index, content = field(place, row, "index", str), field(place, row, "image", str)
    choices = [row[name].strip() for name in string.ascii_uppercase if (row.get(name) or "").strip()]
    # A short image is the index of the row that has it.
    if content in pictures:
      picture = pictures[content]
    else:
      try:
        picture = base64.b64decode(content, validate=True)
      except (binascii.Error, ValueError) as error:
        raise SuiteError(f"{place}: image: not base64 ({error})") from error
    pictures[index] = picture
    answer = field(place, row, "answer", str).strip()
    yield (
      place,
      Question(
        key=index,
        image=picture,
        question=field(place, row, "question", str).strip(),
        choices=choices,
        answer=right_letter(place, answer, choices) if choices else answer,
        category=row.get("category") or "",
      ),
    )


def right_letter(place: str, answer: str, choices: list[str]) -> str:
  """The letter of the right choice, given as letter or as the text of the choice.

  Raises:
    SuiteError: it is neither.
  """
  known = string.ascii_uppercase[: len(choices)]
  if answer in choices:
    return known[choices.index(answer)]
  if len(answer) == 1 and answer.upper() in known:
    return answer.upper()
  raise SuiteError(
    f"{place}: answer {answer!r:.80} is neither a letter nor the text of one of the {len(choices)} choices"
  )
