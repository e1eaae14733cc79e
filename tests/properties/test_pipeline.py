"""Every record once per epoch for any process count, order by seed, exact resume, bad records, fixed shapes."""

import base64
import dataclasses
import io
import json
import pickle
import tarfile

import grain
import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.processors import processor_of
from uae_jax.data import pipeline
from uae_jax.data.bad_records import BadRecords
from uae_jax.data.pipeline import make_dataset
from uae_jax.data.sources import open_source
from uae_jax.draws import Draws
from uae_jax.options import DataOptions
from uae_jax.small_world import phrases, processor, render, scenes
from uae_jax.small_world.source import SceneCaptions

TOKENIZER = processor.make_tokenizer()
PROCESSOR = processor_of(TOKENIZER)
PLAIN = DataOptions(image_px=32, caption_tokens=26)
GRAYS = 23  # records of the small files, identified by their gray level


def dataset(data=PLAIN, processor=PROCESSOR, split="train", **options):
  defaults = dict(captions="full", batch_size=8, seed=0, num_threads=0)
  return make_dataset(open_source(data, split), data, processor, **(defaults | options))


def take(batches, count):
  iterator = iter(batches)
  return [next(iterator) for _ in range(count)]


def png(gray: int) -> bytes:
  file = io.BytesIO()
  Image.new("RGB", (40, 30), (gray, gray, gray)).save(file, "PNG")
  return file.getvalue()


@pytest.fixture(params=("jsonl", "jsonl_base64", "arrayrecord", "folder", "parquet", "webdataset"))
def small_source(request, tmp_path):
  """(DataOptions of 23 gray images, function that makes the records of given indices unreadable)."""
  kind = request.param
  captions = [f"gray background ; large {scenes.COLORS[i % 6]} circle ;" for i in range(GRAYS)]
  if kind in ("jsonl", "folder"):
    for i in range(GRAYS):
      (tmp_path / f"{i:03d}.png").write_bytes(png(i * 5))
      if kind == "folder":
        (tmp_path / f"{i:03d}.txt").write_text(captions[i] + "\n")
  lines = []
  for i in range(GRAYS):
    image = {"image": f"{i:03d}.png"} if kind == "jsonl" else {"image_base64": base64.b64encode(png(i * 5)).decode()}
    lines.append(json.dumps(image | {"caption": captions[i]}).encode())

  def write(lines):
    if kind.startswith("jsonl"):
      (tmp_path / "train.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    elif kind == "arrayrecord":
      from array_record.python.array_record_module import ArrayRecordWriter

      writer = ArrayRecordWriter(str(tmp_path / "train-0.array_record"), "group_size:1")
      for line in lines:
        writer.write(line)
      writer.close()
    elif kind == "parquet":
      rows = [json.loads(line) for line in lines]
      for row in rows:
        row["image"] = {"bytes": base64.b64decode(row.pop("image_base64", "")), "path": None}
      pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-0.parquet", row_group_size=5)
    elif kind == "webdataset":
      with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for i, record in enumerate(map(json.loads, lines)):
          image = base64.b64decode(record.get("image_base64", ""))
          for suffix, data in (("png", image), ("txt", record["caption"].encode())):
            member = tarfile.TarInfo(f"{i:03d}.{suffix}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))

  def break_records(*indices):
    if kind in ("jsonl", "folder"):
      for i in indices:
        (tmp_path / f"{i:03d}.png").write_bytes(png(i * 5)[:40])
    else:
      write([b'{"caption": "no image"}' if i in indices else line for i, line in enumerate(lines)])

  write(lines)
  name = {"jsonl": "jsonl:{split}.jsonl", "jsonl_base64": "jsonl:train.jsonl"}.get(kind, f"{kind}:")
  suffix = {"arrayrecord": "array_record", "parquet": "parquet", "webdataset": "tar"}.get(kind)
  name = f"{kind}:{{split}}-*.{suffix}" if suffix else name
  name = f"folder:{tmp_path}" if kind == "folder" else name
  return dataclasses.replace(PLAIN, source=name, data_dir=str(tmp_path), image_px=16), break_records


# --- Shapes and tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("captions", ("full", "partial", "mixed"))
def test_batches_have_fixed_shapes(captions):
  for batch in take(dataset(captions=captions), 3):
    assert {name: (x.dtype.name, x.shape) for name, x in batch.items()} == {
      "image": ("uint8", (8, 32, 32, 3)),
      "tokens": ("int32", (8, 26)),
      "length": ("int32", (8,)),
      "index": ("int64", (8,)),
    }


@pytest.mark.parametrize("variant, length", (("plain", 26), ("shifted", 32), ("dense", 34)))
@pytest.mark.parametrize("captions", ("full", "partial", "mixed"))
def test_the_word_table_equals_the_tokenizer(variant, length, captions):
  config = scenes.variant(variant)
  batch = scenes.scenes(np.arange(100), "train", config)
  draws = [Draws(np.arange(100)) for _ in range(2)]
  rows, lengths = SceneCaptions.of(config, PROCESSOR, length, captions, 0).to_tokens(batch, captions, draws[0])
  expected_rows, expected_lengths = PROCESSOR.caption_rows(phrases.captions_text(batch, captions, draws[1]), length)
  np.testing.assert_array_equal(rows, expected_rows)
  np.testing.assert_array_equal(lengths, expected_lengths)


def test_rows_are_caption_end_padding():
  batch = take(dataset(), 1)[0]
  for row, length, index in zip(batch["tokens"], batch["length"], batch["index"], strict=True):
    caption = phrases.full_caption(scenes.scene(int(index)))
    assert TOKENIZER.decode(row[: length - 1]) == caption
    assert TOKENIZER.decode(row, skip_special_tokens=True) == caption
    assert TOKENIZER.convert_ids_to_tokens(int(row[length - 1])) == "<|im_end|>"
    assert set(TOKENIZER.convert_ids_to_tokens(row[length:].tolist())) <= {"<|endoftext|>"}


def test_a_tokenizer_of_pieces_works_too():
  """Real tokenizers have no token per word: captions are tokenized by the tokenizer itself."""
  from tokenizers import Tokenizer, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  letters = {letter: i for i, letter in enumerate(["<pad>", "<end>", *"abcdefghijklmnopqrstuvwxyz;-"])}
  model = Tokenizer(models.BPE(letters, []))
  model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  pieces = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<end>")
  assert processor.word_ids(pieces) is None
  batch = take(dataset(dataclasses.replace(PLAIN, caption_tokens=200), processor_of(pieces)), 1)[0]
  text = phrases.full_caption(scenes.scene(int(batch["index"][0]))).replace(" ", "")
  assert pieces.decode(batch["tokens"][0, : batch["length"][0] - 1]).replace(" ", "") == text


def test_contrastive_groups():
  batch = take(dataset(captions="contrastive"), 1)[0]
  assert batch["image"].shape == (8, 4, 32, 32, 3) and batch["tokens"].shape == (8, 4, 26)
  assert batch["identity"].shape == (8, 4) and batch["identity"].dtype == np.int64
  objects, background = render.detect(batch["image"].reshape(32, 32, 32, 3))
  shown = scenes.Scene.from_array(np.concatenate([background[:, None], objects], 1), scenes.variant("plain"))
  for row, caption in zip(batch["tokens"].reshape(32, -1), phrases.captions_text(shown, "full"), strict=True):
    assert TOKENIZER.decode(row, skip_special_tokens=True) == caption
  np.testing.assert_array_equal(shown.identity(), batch["identity"].ravel())
  np.testing.assert_array_equal(batch["image"][:, 0], render.render_batch(scenes.scenes(batch["index"], "train")))


# --- Order ------------------------------------------------------------------------------------------------------------


def test_batches_made_whole_equal_records_one_by_one():
  source = open_source(PLAIN, "held_out")
  batch = take(dataset(split="held_out"), 1)[0]
  for row, index in enumerate(batch["index"]):
    record = source[int(index)]
    np.testing.assert_array_equal(record["image"], batch["image"][row])
    assert TOKENIZER.decode(batch["tokens"][row], skip_special_tokens=True) == record["caption"]


def test_the_order_is_that_of_the_seed():
  first, again, other = (take(dataset(captions="mixed", seed=seed), 4) for seed in (3, 3, 4))
  for a, b, c in zip(first, again, other, strict=True):
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])
    assert not set(a["index"]) & set(c["index"])
  ordered = take(dataset(shuffle=False), 2)
  np.testing.assert_array_equal(np.concatenate([batch["index"] for batch in ordered]), np.arange(16))


def test_threads_do_not_change_the_batches():
  for a, b in zip(take(dataset(captions="mixed"), 6), take(dataset(captions="mixed", num_threads=3), 6), strict=True):
    np.testing.assert_array_equal(a["image"], b["image"])
    np.testing.assert_array_equal(a["tokens"], b["tokens"])


@pytest.mark.parametrize("process_count", (1, 2, 3, 4))
def test_every_record_once_an_epoch(small_source, process_count):
  """With 12 rows per step and 23 records, each 23 consecutive rows are one epoch in its own order."""
  data, _ = small_source
  parts = [
    take(dataset(data, batch_size=12, process_index=p, process_count=process_count), 4) for p in range(process_count)
  ]
  rows = [part[step]["index"] for step in range(4) for part in parts]
  assert {len(row) for row in rows} == {12 // process_count}
  order = np.concatenate(rows)
  assert sorted(order[:GRAYS]) == sorted(order[GRAYS : 2 * GRAYS]) == list(range(GRAYS))
  assert list(order[:GRAYS]) != list(order[GRAYS : 2 * GRAYS])
  # The global batches do not depend on the number of processes.
  np.testing.assert_array_equal(order, np.concatenate([b["index"] for b in take(dataset(data, batch_size=12), 4)]))


@pytest.mark.parametrize("captions", ("mixed", "contrastive"))
@pytest.mark.parametrize("process_count", (1, 2, 3, 4))
def test_processes_share_the_procedural_batches(process_count, captions):
  whole = take(dataset(captions=captions, batch_size=12), 2)
  parts = [
    take(dataset(captions=captions, batch_size=12, process_index=p, process_count=process_count), 2)
    for p in range(process_count)
  ]
  for step in range(2):
    for name in whole[step]:
      np.testing.assert_array_equal(whole[step][name], np.concatenate([part[step][name] for part in parts]))


@pytest.mark.parametrize("num_threads", (0, 2))
@pytest.mark.parametrize("captions", ("mixed", "contrastive"))
def test_resume_in_the_middle_of_an_epoch(captions, num_threads):
  batches = dataset(captions=captions, num_threads=num_threads)
  iterator = iter(batches)
  for _ in range(3):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = [next(iterator) for _ in range(3)]
  resumed = iter(dataset(captions=captions, num_threads=num_threads))
  resumed.set_state(state)
  for batch in expected:
    found = next(resumed)
    for name in batch:
      np.testing.assert_array_equal(found[name], batch[name])


def test_resume_of_files_with_bad_records(small_source):
  data, break_records = small_source
  break_records(3, 7)
  data = dataclasses.replace(data, max_bad_fraction=0.2)
  batches = dataset(data, batch_size=5, num_threads=2)
  iterator = iter(batches)
  for _ in range(6):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = [next(iterator)["index"] for _ in range(6)]
  resumed = iter(dataset(data, batch_size=5))
  resumed.set_state(state)
  np.testing.assert_array_equal([next(resumed)["index"] for _ in range(6)], expected)


@pytest.mark.parametrize("process_count", (2, 4))
def test_resume_of_one_process_among_several(small_source, process_count):
  """Every process continues at its own position, which bad records have shifted."""
  data, break_records = small_source
  break_records(3, 7)
  data = dataclasses.replace(data, max_bad_fraction=0.5)
  for index in range(process_count):
    part = dict(batch_size=4, process_index=index, process_count=process_count)
    iterator = iter(dataset(data, **part))
    for _ in range(9):
      next(iterator)
    resumed = iter(dataset(data, **part))
    resumed.set_state(json.loads(json.dumps(iterator.get_state())))
    np.testing.assert_array_equal(next(resumed)["index"], next(iterator)["index"])


@pytest.mark.parametrize("process_count", (1, 2))
def test_resume_at_random_moments(small_source, process_count):
  """As after kill -9: the source is opened again, and everything in the batches is the same."""
  data, break_records = small_source
  break_records(3)
  data = dataclasses.replace(data, max_bad_fraction=0.2)
  for index in range(process_count):
    part = dict(batch_size=4, process_index=index, process_count=process_count)
    iterator = iter(dataset(data, **part, num_threads=2))
    states, batches = [], []
    for _ in range(24):
      states.append(json.dumps(iterator.get_state()))
      batches.append(next(iterator))
    for moment in np.random.default_rng(index).permutation(20)[:5].tolist():
      resumed = iter(dataset(data, **part))
      resumed.set_state(json.loads(states[moment]))
      for expected in batches[moment : moment + 3]:
        found = next(resumed)
        for name in expected:
          np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize("source", ("scenes", "folder"))
@pytest.mark.parametrize("before, after", ((4, 2), (2, 4), (4, 1), (1, 3)))
def test_resume_with_another_number_of_processes(source, before, after, tmp_path):
  """The global batches continue as if the number had not changed."""
  for i in range(GRAYS if source == "folder" else 0):
    (tmp_path / f"{i:03d}.png").write_bytes(png(i * 5))
  data = PLAIN if source == "scenes" else dataclasses.replace(PLAIN, source=f"folder:{tmp_path}", image_px=16)

  def iterators(process_count):
    return [
      iter(dataset(data, batch_size=12, process_index=p, process_count=process_count)) for p in range(process_count)
    ]

  def global_batch(parts):
    return np.concatenate([next(part)["index"] for part in parts])

  old, new, whole = iterators(before), iterators(after), iterators(1)
  for _ in range(3):
    np.testing.assert_array_equal(global_batch(old), global_batch(whole))
  state = pipeline.repartition(open_source(data, "train"), [part.get_state() for part in old], after)
  for part in new:
    part.set_state(state)
  for _ in range(3):
    np.testing.assert_array_equal(global_batch(new), global_batch(whole))


def test_grain_checkpoints_hold_the_iterator(tmp_path):
  import orbax.checkpoint as ocp

  iterator = iter(dataset(captions="partial"))
  next(iterator)
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
    manager.wait_until_finished()
    expected = next(iterator)
    resumed = iter(dataset(captions="partial"))
    manager.restore(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed)))
    np.testing.assert_array_equal(next(resumed)["tokens"], expected["tokens"])


# --- Files ------------------------------------------------------------------------------------------------------------


def test_files_keep_image_and_caption_together(small_source):
  data, _ = small_source
  for batch in take(dataset(data), 3):
    assert batch["image"].shape == (8, 16, 16, 3)
    for row, index in enumerate(batch["index"]):
      assert np.all(batch["image"][row] == index * 5)
      caption = f"gray background ; large {scenes.COLORS[index % 6]} circle ;"
      assert TOKENIZER.decode(batch["tokens"][row], skip_special_tokens=True) == caption


def test_bad_records_are_logged_and_skipped(small_source, caplog):
  data, break_records = small_source
  break_records(7)
  data = dataclasses.replace(data, max_bad_fraction=0.05)
  bad = set()
  seen = np.concatenate([batch["index"] for batch in take(dataset(data, batch_size=11, bad_indices=bad), 4)])
  # Reported once, although it occurs in two epochs.
  assert bad == {7}
  assert sorted(seen[:22]) == sorted(seen[22:]) == [i for i in range(GRAYS) if i != 7]
  assert "skipped record" in caplog.text
  assert open_source(data, "train").key(7) in caplog.text


def test_many_bad_records_are_one_error(small_source):
  data, break_records = small_source
  break_records(1, 2, 3)
  data = dataclasses.replace(data, max_bad_fraction=0.1)
  with pytest.raises(ValueError, match=r"3 of 23 records are unreadable, more than data\.max_bad_fraction = 0\.1"):
    take(dataset(data, batch_size=20, num_threads=1), 2)


def test_a_source_without_one_good_record_ends():
  bad = BadRecords(1.0, 3)
  for index in (0, 1, 1):
    bad.bad(index, f"record {index}", OSError("torn"))
  with pytest.raises(ValueError, match="3 of 3 .* record 2 "):
    bad.bad(2, "record 2", OSError("torn"))


def test_contrastive_files_are_groups_of_one(small_source):
  batch = take(dataset(small_source[0], captions="contrastive"), 1)[0]
  assert batch["image"].shape == (8, 1, 16, 16, 3) and batch["tokens"].shape == (8, 1, 26)
  np.testing.assert_array_equal(batch["identity"][:, 0], batch["index"])


def test_long_captions_are_cut_and_not_closed(small_source):
  data = dataclasses.replace(small_source[0], caption_tokens=4)
  batch = take(dataset(data), 1)[0]
  assert np.all(batch["length"] == 4)
  assert TOKENIZER.eos_token_id not in batch["tokens"]


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "data, options, message",
  [
    ({}, dict(batch_size=10, process_count=4), r"data\.batch_size = 10 does not divide by 4"),
    ({}, dict(batch_size=0), r"data\.batch_size = 0"),
    ({}, dict(captions="short"), "captions = 'short'"),
    ({}, dict(split="test"), "split 'test'"),
    (dict(source="imagenet"), {}, r"data\.source = 'imagenet'"),
    (dict(source="jsonl:nowhere.jsonl"), {}, "nowhere.jsonl does not exist"),
    (dict(source="arrayrecord:nowhere-*"), {}, "nowhere"),
    (dict(source="folder:nowhere"), {}, "nowhere: no such folder"),
    (dict(source="jsonl:train.jsonl"), dict(split="held_out"), "no split held_out"),
    (dict(variant="huge"), {}, r"data\.variant = 'huge'"),
    (dict(image_px=64), {}, r"data\.image_px = 64"),
  ],
)
def test_impossible_settings_are_one_clear_error(data, options, message):
  with pytest.raises(ValueError, match=message):
    dataset(dataclasses.replace(PLAIN, **data), **options)


def test_captions_that_do_not_fit_are_an_error():
  with pytest.raises(ValueError, match=r"data\.caption_tokens = 26: captions of this data\.variant need 32"):
    take(dataset(dataclasses.replace(PLAIN, variant="shifted")), 1)


def test_partial_captions_of_photographs_are_an_error(small_source):
  with pytest.raises(ValueError, match="captions = 'partial'"):
    take(dataset(small_source[0], captions="partial"), 1)


# --- Processor --------------------------------------------------------------------------------------------------------


def test_the_written_processor_is_read_by_transformers(tmp_path):
  from transformers import AutoTokenizer, GenerationConfig

  processor.write_processor(tmp_path)
  tokenizer = AutoTokenizer.from_pretrained(tmp_path)
  ids = np.arange(len(tokenizer))
  assert tokenizer.convert_ids_to_tokens(ids.tolist()) == TOKENIZER.convert_ids_to_tokens(ids.tolist())
  assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
  question = [
    {"role": "user", "content": [{"type": "text", "text": "Describe this image, please."}, {"type": "image"}]}
  ]
  rendered = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
  assert tokenizer.tokenize(rendered) == (
    ["<|im_start|>", "user", "describe", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|im_end|>"]
    + ["assistant"]
  )
  caption = phrases.full_caption(scenes.scene(1))
  for content in (caption, [{"type": "text", "text": caption}]):
    rendered = tokenizer.apply_chat_template(
      [{"role": "generate", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.tokenize(rendered) == ["<|im_start|>", "generate", *caption.split(), "<|im_end|>"]
  generation = GenerationConfig.from_pretrained(tmp_path)
  assert generation.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
  image = json.loads((tmp_path / "preprocessor_config.json").read_text())
  assert (image["patch_size"], image["merge_size"]) == (4, 2)


def test_transforms_travel_to_worker_processes():
  make = open_source(PLAIN, "train").batch_maker(PROCESSOR, 26, "mixed", 0)
  rows = np.array([[0, 5], [1, 6]])
  np.testing.assert_array_equal(pickle.loads(pickle.dumps(make))(rows)["tokens"], make(rows)["tokens"])
  assert pickle.loads(pickle.dumps(BadRecords(0.1, 5)))._num_records == 5
