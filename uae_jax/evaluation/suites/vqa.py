"""Questions about images: multiple choice by letter and by log-probability, free answers by exact match.

Free answers are compared after the normalization of the VQA challenge, without its number words: lower case, no
punctuation, no articles. Yes-or-no questions are judged by the first yes or no of the answer, as POPE does.
"""

from collections.abc import Sequence
import dataclasses
from pathlib import Path
import re
from typing import Any

from PIL import Image

from uae_jax.data.images import image_from_bytes, read_image
from uae_jax.evaluation.suites import vqa_layouts
from uae_jax.evaluation.suites.spec import Prompt, Scores
from uae_jax.evaluation.suites.task import Rows, Run, Task, summarize

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
YES_NO = ("yes", "no")
# The instructions with which VLMEvalKit and lmms-eval ask.
ASK_LETTER = "Answer with the option's letter from the given choices directly."
ASK_WORD = "Answer the question using a single word or phrase."
# "A" before a word may be the article.
ALONE = re.compile(r"\W*([A-Z])(?:[.):,]|\W*$)")
NAMED = re.compile(r"(?:answer|option|choice)\s*(?:is|:)?\s*\W?([A-Z])\b", re.IGNORECASE)


def read_prompts(path: Path) -> list[Prompt]:
  """Reads questions in any of the layouts of `vqa_layouts`."""
  return [
    Prompt(question["key"], index, text(question), question["category"], question)
    for index, question in enumerate(vqa_layouts.read(path))
  ]


def text(question: vqa_layouts.Question) -> str:
  """The text that the model is asked."""
  if question["choices"]:
    choices = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question["choices"], strict=False)]
    return "\n".join([question["question"], *choices, ASK_LETTER])
  return f"{question['question']}\n{ASK_WORD}"


def image(question: Any) -> Image.Image:
  content = question["image"]
  return read_image(content) if isinstance(content, Path) else image_from_bytes(content, "the picture of a question")


def work(run: Run, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
  """Rows with the `answer`, and `log_probs` by choice where the answers are known beforehand."""
  pictures, texts = [image(prompt.record) for prompt in prompts], [prompt.text for prompt in prompts]
  indices = [prompt.index for prompt in prompts]
  answers = run.uae.answer(pictures, texts, seed=run.seed, indices=indices, **run.captions)
  rows: list[dict[str, Any]] = [{"answer": answer} for answer in answers]
  closed = [place for place, prompt in enumerate(prompts) if candidates(prompt)]
  if closed:
    found = run.uae.choice_log_probs(
      [pictures[place] for place in closed],
      [texts[place] for place in closed],
      [candidates(prompts[place]) for place in closed],
      batch_size=run.captions["batch_size"],
    )
    for place, values in zip(closed, found, strict=True):
      rows[place]["log_probs"] = dict(zip(candidates(prompts[place]), map(float, values), strict=True))
  return rows


def candidates(prompt: Prompt) -> list[str]:
  """The answers that can be compared by log-probability: letters, Yes and No, or none."""
  if prompt.record["choices"]:
    return list(LETTERS[: len(prompt.record["choices"])])
  return [word.capitalize() for word in YES_NO] if prompt.record["answer"].lower() in YES_NO else []


def score(run: Run, prompts: Sequence[Prompt], rows: Rows) -> Scores:
  """Accuracy by generation, and as a further metric by log-probability."""
  generated, likely = {}, {}
  for prompt in prompts:
    if prompt.key not in rows:
      continue
    row, right = rows[prompt.key], prompt.record["answer"]
    generated[prompt.key] = float(is_right(row["answer"], prompt.record))
    if log_probs := row.get("log_probs"):
      # Equally likely answers, such as letters that a tokenizer does not know, are no answer.
      best = [name.lower() for name, value in log_probs.items() if value == max(log_probs.values())]
      likely[prompt.key] = float(best == [right.lower()])
  scores = summarize(generated, prompts)
  closed = [prompt for prompt in prompts if candidates(prompt)]
  metrics = {"by log-probability": summarize(likely, closed)} if likely else {}
  notes = list(scores.notes)
  if run.uae and run.uae.processor.ignores_questions:
    notes.append("the chat template of this model has a question of its own, so it was not asked these questions")
  return dataclasses.replace(scores, notes=tuple(notes), metrics=metrics)


def is_right(answer: str, question: Any) -> bool:
  """Whether a generated answer is the right one; an answer that is not understood is wrong."""
  right = question["answer"]
  if question["choices"]:
    return letter(answer, question["choices"]) == right
  if right.lower() in YES_NO:
    return next((word for word in normalize(answer).split() if word in YES_NO), "") == right.lower()
  return normalize(answer) == normalize(right)


def letter(answer: str, choices: Sequence[str]) -> str:
  """The letter that an answer chooses by the text of one choice, alone at its start, or named as the answer; or ""."""
  known = LETTERS[: len(choices)]
  same = [name for name, choice in zip(known, choices, strict=True) if normalize(choice) == normalize(answer)]
  if len(same) == 1:
    return same[0]
  for pattern in (ALONE.match, NAMED.search):
    if (match := pattern(answer.strip())) and match[1].upper() in known:
      return match[1].upper()
  return ""


def normalize(answer: str) -> str:
  """Lower case, without punctuation and articles, single spaces."""
  words = re.sub(r"[^\w\s]", " ", answer.lower().replace("'", "")).split()
  return " ".join(word for word in words if word not in ("a", "an", "the"))


SUITE = Task(
  name="vqa",
  prompts_file="JSON lines of image, question, answer, maybe choices and category; or a file of POPE, GQA or MMT-Bench",
  read_prompts=read_prompts,
  work=work,
  score=score,
  makes=("captions",),
  temperature=0.0,
  max_new_tokens=32,
  scale=100.0,
)
