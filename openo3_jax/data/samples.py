"""Records and their media -> encoded samples, read side by side in processes that can be killed."""

import collections
import dataclasses
import os
import threading
from collections.abc import Sequence

from openo3_jax import tasks
from openo3_jax.config import GSPOConfig, SFTConfig, VideoConfig
from openo3_jax.data import annotations, images, packing, plan, prompts, store, tokens, transforms, video, workers
from openo3_jax.data.bad_records import BadRecords
from openo3_jax.errors import InputError
from openo3_jax.types import Sample

CACHE_BYTES = 4 * 1024**3  # of encoded samples kept between epochs
NOTHING = packing.Size(0, 0, ())


def check(
    records: Sequence[annotations.Record], root: str | os.PathLike, stage: tasks.Stage, config: SFTConfig | GSPOConfig
) -> None:
    """What can be known before a model is loaded, and before media are read.

    Raises: InputError for no records, weights that do not fit them, and a set that was prepared with other settings.
    """
    if not records:
        raise InputError(f"{root}: its {annotations.STAGE_FILES[stage]} holds no records; expected at least one")
    plan.record_weights(records, config.weights)
    if store.is_prepared(root):
        store.fitting_manifest(root, stage, config.video)


@dataclasses.dataclass(frozen=True)
class Example:
    """A record as rewards need it, and its sample."""

    record: annotations.Record
    sample: Sample


class Samples:
    """Index of a record -> its example; and, before any pixel is decoded, the room it takes.

    Examples are kept between epochs while there is room. Any number of threads may read. A context manager: leaving it
    ends the decoding processes.
    """

    def __init__(
        self,
        records: Sequence[annotations.Record],
        root: str | os.PathLike,
        stage: tasks.Stage,
        processor: tokens.Processor,
        wording: prompts.Prompts,
        bad: BadRecords,
        *,
        config: VideoConfig,
        loss_on: packing.LossOn,
        num_workers: int,
    ):
        self.bad = bad
        self._records = records
        self._root = root
        self._stage = stage
        self._processor = processor
        self._wording = wording
        self._config = config
        self._loss_on = loss_on
        self._decoders = workers.Decoders(num_workers)
        self._stored = store.Stored(root, stage, config) if store.is_prepared(root) else None
        self._sizes: dict[int, packing.Size] = {}
        self._kept: dict[int, Example] = {}
        self._kept_bytes = 0
        self._lock = threading.Lock()

    def __enter__(self) -> "Samples":
        return self

    def __exit__(self, *_: object) -> None:
        self._decoders.close()

    @property
    def num_workers(self) -> int:
        return len(self._decoders)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def data_hash(self) -> str:
        """Of the records and of everything else that their sizes depend on."""
        settings = {name: value for name, value in dataclasses.asdict(self._config).items() if name not in store.LIMITS}
        wording = {task: dataclasses.asdict(said) for task, said in self._wording.by_stage[self._stage].items()}
        tokenizer = self._processor.tokenizer
        text = [len(tokenizer), self._processor.chat_template or tokenizer.chat_template]
        return plan.data_hash(self._records, settings, wording, text, self._loss_on)

    def sizes(self, indices: Sequence[int]) -> list[packing.Size]:
        """The room that each sample takes; none for a record that cannot be used, which counts as bad."""
        unknown = [index for index in dict.fromkeys(indices) if index not in self._sizes]
        if unknown:
            self._sizes |= zip(unknown, self._decoders.map(self._measure, unknown), strict=True)
        return [self._sizes[index] for index in indices]

    def read(self, index: int) -> Example | None:
        """None for a record that cannot be used, which counts as bad.

        Raises: InputError if too many are.
        """
        kept = self._kept.get(index)
        if kept is not None or index in self.bad.reasons:
            return kept
        try:
            example = self._example(index)
            self._check_size(index, example)
        except InputError as error:
            self.bad.add(index, str(error))
            return None
        with self._lock:
            if self._kept_bytes + example.sample.patches.nbytes <= CACHE_BYTES:
                self._kept[index] = example
                self._kept_bytes += example.sample.patches.nbytes
        return example

    def _example(self, index: int) -> Example:
        record = self._records[index]
        if self._stored is not None:
            return self._encode(record, self._stored.media(record))
        with self._decoders.borrow() as decoder:
            media = transforms.Files(self._root, self._stage, self._config, decoder.read, decoder.picture)
            return self._encode(record, media)

    def _measure(self, decoder: video.Decoder, index: int) -> packing.Size:
        record = self._records[index]
        files = transforms.Files(self._root, self._stage, self._config, decoder.probe, images.probe_picture)
        try:
            media = files if self._stored is None else self._stored.hollow(record)
            return self._size(self._encode(record, media, hollow=True))
        except InputError as error:
            self.bad.add(index, str(error))
            return NOTHING

    def _encode(self, record: annotations.Record, media: transforms.Media, *, hollow: bool = False) -> Example:
        prepared = transforms.assemble(record, media, self._stage, config=self._config, wording=self._wording)
        return Example(prepared.reward_record, self._processor.encode(prepared.messages, hollow=hollow))

    def _size(self, example: Example) -> packing.Size:
        return packing.size_of(example.sample, self._loss_on, self._processor.config.image_token_id)

    def _check_size(self, index: int, example: Example) -> None:
        """Raises: InputError for a clip that holds other frames than its file promised: they may not fit its place.

        Fewer frames do.
        """
        size, promised = self._size(example), self._sizes.get(index)
        if promised is None or size == promised:
            return
        fits = size.tokens <= promised.tokens and size.targets <= promised.targets
        if not fits or collections.Counter(size.grids) - collections.Counter(promised.grids):
            record = self._records[index]
            raise InputError(
                f"{record.get('video_path') or record.get('image_path')}: decodes to {len(size.grids)} frames where "
                f"the file promises {len(promised.grids)}, of other sizes or at other times; re-encode it"
            )
