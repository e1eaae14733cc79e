"""The input pipeline: batches of fixed shape from a source, with grain.

An epoch is a seeded permutation of all records. Global batch k is the k-th run of `batch_size` records in the endless
sequence of epochs, and process p loads its p-th slice. The global batches do not depend on the number of processes, and
every record occurs exactly once per epoch. The state of an iterator is a few integers, so a run can resume in the
middle of an epoch. With `data.buckets` the order is that of `bucket_order`, in which every batch is of one bucket.

Sources without stored records make batches from indices (`sources.MakesBatches`); others are read record by record in
threads.
"""

from collections.abc import Sequence
import dataclasses

from absl import flags
import grain
import numpy as np

from uae_jax.data.bad_records import BadRecords
from uae_jax.data.bucket_order import BucketOrder
from uae_jax.data.buckets import Buckets, assign, fit
from uae_jax.data.mixture import Mixture
from uae_jax.data.processing import Processor
from uae_jax.data.sources import CaptionsRecords, MakesBatches, Source
from uae_jax.draws import Draws
from uae_jax.options import DataOptions
from uae_jax.options.buckets import Size, name
from uae_jax.options.stages import CAPTIONS


def make_dataset(
  source: Source,
  data: DataOptions,
  processor: Processor,
  *,
  captions: str,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  shuffle: bool = True,
  num_threads: int = 1,
  num_workers: int = 0,
  prefetch_batches: int = 2,
  needs_captions: bool = False,
  bad_indices: set[int] | None = None,
  buckets: Buckets | None = None,
) -> grain.IterDataset:
  """An endless dataset of this process's slice of every batch.

  Args:
    source: records, from `sources.open_source`.
    data: `config.data`.
    processor: tokenizer and image sizes of the captioner.
    captions: "full", or "contrastive" for groups of slightly different images with full captions; a source that cannot
      vary its records gives groups of one. A source with a grammar also supports "partial" and "mixed".
    batch_size: global batch size, over all processes.
    seed: seed of the order, and of what captions omit.
    process_index: index of this process.
    process_count: number of processes.
    shuffle: False keeps the order of the source.
    num_threads: threads that prepare batches in advance; 0 prepares them on demand.
    num_workers: processes that read records in advance, for large photographs; unused if the source makes batches. The
      state of an iterator is valid only for the same number of workers.
    prefetch_batches: number of batches prepared in advance.
    needs_captions: whether a record without a caption counts as unreadable.
    bad_indices: receives the indices of unreadable records that were skipped, except those of worker processes.
    buckets: the buckets of the records, from `assign_buckets`; None finds them if `data.buckets` names some.

  Returns:
    Batches of b = batch_size / process_count rows; contrastive ones have a group axis after b.
      image: uint8[b, H, W, 3]; H, W are image_px or those of the batch's bucket.
      captioner_image: the same image, resized to sides that the captioner's cells divide; absent if these are H, W.
      tokens: int32[b, caption_tokens]: caption, closing `<|im_end|>`, padding. Longer captions are truncated and lack
        the closing token.
      length: int32[b], number of tokens without padding.
      index: int64[b], index of the record in its source.
      identity: int64[b], contrastive only: equal for images with the same content.
    Iterators have `get_state` and `set_state`; `grain.checkpoint` saves them.

  Raises:
    ValueError: a setting is invalid; the message names it.
  """
  if captions not in CAPTIONS:
    raise ValueError(f"captions = {captions!r}: expected one of {', '.join(CAPTIONS)}")
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(f"data.batch_size = {batch_size} does not divide by {process_count} processes")
  rows = batch_size // process_count
  bad = BadRecords(data.max_bad_fraction, len(source), process_count * max(1, num_workers), bad_indices)
  if data.buckets and buckets is None:
    buckets = assign_buckets(source, data, process_index, process_count, bad_indices)
  order_seed = seed if shuffle else None
  if buckets is None:
    order = endless_order(source, order_seed)
  else:
    order = BucketOrder(source, buckets, batch_size, order_seed)
  order = ProcessRows(order.map_with_index(with_position), rows, process_index, process_count)
  if isinstance(source, MakesBatches):
    if data.image_px != source.image_px:
      raise ValueError(f"data.image_px = {data.image_px}: images of data.source = {data.source} have {source.image_px}")
    batches = order.batch(rows, batch_fn=np.asarray).map(
      source.batch_maker(processor, data.caption_tokens, captions, seed)
    )
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch_batches))
  if isinstance(source, CaptionsRecords):
    caption = source.record_captioner(processor, data.caption_tokens, captions, seed)
  else:
    caption = CaptionRecords(data.source, processor, data.caption_tokens, captions)
  frames = tuple((size, processor.resized_size(*size)) for size in data.image_sizes)
  load = LoadRecord(source, frames, bad, needs_captions, seed, buckets)
  records = order.map(load if buckets is None else LoadReadable(load, buckets))
  options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch_batches * rows)
  records = records.to_iter_dataset(options)
  if num_workers:
    if not flags.FLAGS.is_parsed():
      # Grain's workers read absl's global flags, which a program that does not use absl never parses.
      flags.FLAGS.mark_as_parsed()
    # Workers take turns, so their number does not change the order of records.
    records = records.mp_prefetch(grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=rows))
  batches = records.batch(rows, drop_remainder=True, batch_fn=as_columns)
  return batches.map(caption)


def assign_buckets(
  source: Source,
  data: DataOptions,
  process_index: int = 0,
  process_count: int = 1,
  bad_indices: set[int] | None = None,
) -> Buckets:
  """Finds the bucket of every record; a record that no bucket takes is a bad one of the process with its turn.

  Raises:
    ValueError: more records than `data.max_bad_fraction` allows have no bucket, or the source makes its images itself.
  """
  bad = BadRecords(data.max_bad_fraction, len(source), process_count, bad_indices)

  def on_bad(index: int, error: Exception) -> None:
    if index % process_count == process_index:
      bad.bad(index, source.key(index), error)

  return assign(source, data, on_bad=on_bad)


# --- Order ------------------------------------------------------------------------------------------------------------


def endless_order(source: Source, seed: int | None) -> grain.MapDataset:
  """The indices of all records, epoch after epoch, each in its own order; in that of the source if `seed` is None."""
  # In grain, epoch e of seed s equals epoch 0 of seed s + e: spread the seeds, so that runs share no epoch.
  if isinstance(source, Mixture):
    return source.order(None if seed is None else Draws(seed).integers(2**32, source.num_sources).tolist())
  order = grain.MapDataset.range(len(source))
  return (order if seed is None else order.shuffle(seed=int(Draws(seed).integers(2**32)))).repeat()


def with_position(position: int, index: int) -> tuple[int, int]:
  """Pairs a record's index with its position in the endless order, which seeds what differs between epochs."""
  return position, index


class ProcessRows(grain.MapDataset):
  """This process's slice of every global batch of `rows * process_count` elements."""

  def __init__(self, parent: grain.MapDataset, rows: int, process_index: int, process_count: int):
    super().__init__(parent)
    self._rows, self._process_index, self._process_count = rows, process_index, process_count

  def __len__(self) -> int:
    return len(self._parent) // (self._rows * self._process_count) * self._rows

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    batch, row = divmod(index, self._rows)
    return self._parent[(batch * self._process_count + self._process_index) * self._rows + row]


def repartition(source: Source, states: Sequence[dict], process_count: int) -> dict:
  """The iterator state of every process after the number of processes has changed.

  Exact if no record was skipped. Otherwise the processes had reached different positions: all of them resume at the
  earliest one, and a few records are read twice in that epoch.

  Args:
    source: the source of the iterators.
    states: states of the iterators of all processes, without workers.
    process_count: the new number of processes.
  """
  place = min(state["next_index"] for state in states)
  # If the source makes batches, the iterator counts batches, otherwise rows of one process.
  return {"next_index": place if isinstance(source, MakesBatches) else place * len(states) // process_count}


# --- Transforms -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class LoadRecord:
  """Maps (position, index) to a record with an image of its bucket's size, or to None if it is unreadable.

  Attributes:
    source: the records.
    frames: of each bucket, (height, width) of the image and of the captioner's image.
    bad: counts unreadable records.
    needs_captions: whether a record without a caption counts as unreadable.
    seed: seed of the draws that differ between epochs.
    buckets: the buckets of the records; None if there is one for all.
  """

  source: Source
  frames: tuple[tuple[Size, Size], ...]
  bad: BadRecords
  needs_captions: bool = False
  seed: int = 0
  buckets: Buckets | None = None

  def __call__(self, row: tuple[int, int]) -> dict | None:
    position, index = row[0], row[1] % len(self.source)
    bucket = 0 if self.buckets is None else int(self.buckets.of[index])
    size, captioner_size = self.frames[bucket]
    try:
      record = self.source[index]
      captions = record.pop("captions", ())
      if captions:
        record["caption"] = captions[int(Draws(self.seed, position).integers(len(captions)))]
      if self.needs_captions and not record["caption"]:
        raise ValueError("no caption, which this stage trains on")
      image = record.setdefault("image", np.zeros((*size, 3), np.uint8))
      if self.buckets is not None:
        self.buckets.check(image.shape[:2], bucket)
      images = {"image": fit(image, size)}
      if captioner_size != size:
        images["captioner_image"] = fit(image, captioner_size, size)
    except Exception as error:  # A corrupt file can raise anything in an image decoder.
      self.bad.bad(index, self.source.key(index), error)
      return None
    self.bad.good()
    return {**record, **images, "position": position, "index": index}


@dataclasses.dataclass(frozen=True, eq=False)
class LoadReadable:
  """Maps (position, index) to a record; in place of an unreadable one, to the next of its bucket that can be read.

  No row is skipped, so that the rows of a batch remain of one bucket, and positions the same on every process.
  """

  load: LoadRecord
  buckets: Buckets

  def __call__(self, row: tuple[int, int]) -> dict:
    position, index = row
    for other in self.buckets.others(index):
      record = self.load((position, other))
      if record is not None:
        return record
    size = self.buckets.sizes[int(self.buckets.of[index])]
    raise ValueError(f"data.buckets: none of the records of {name(size)} can be read")


def as_columns(records: Sequence[dict]) -> dict:
  """Columns of the fields that all records have, as arrays or lists of text."""
  names = set.intersection(*(set(record) for record in records))
  columns = {name: [record[name] for record in records] for name in names}
  return {name: column if isinstance(column[0], str) else np.stack(column) for name, column in columns.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionRecords:
  """Makes a batch from columns of records with one caption each.

  Attributes:
    source: `data.source`, for messages.
    processor: tokenizes the captions.
    caption_tokens: L, number of tokens per row.
    captions: "full" or "contrastive".
  """

  source: str
  processor: Processor
  caption_tokens: int
  captions: str

  def __call__(self, columns: dict) -> dict[str, np.ndarray]:
    if self.captions not in ("full", "contrastive"):
      raise ValueError(
        f"captions = {self.captions!r}: records of data.source = {self.source!r} have full captions only"
      )
    index, image = columns["index"].astype(np.int64), columns["image"]
    tokens, length = self.processor.caption_rows(columns["caption"], self.caption_tokens)
    batch = {"image": image, "tokens": tokens, "length": length, "index": index}
    if "captioner_image" in columns:
      batch["captioner_image"] = columns["captioner_image"]
    if self.captions == "full":
      return batch
    groups = {name: batch[name][:, None] for name in ("image", "tokens", "length")}
    return {**groups, "index": index, "identity": index[:, None]}
