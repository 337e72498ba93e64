"""The TFDS builder of STGR, configs cot (stage one) and rl (stage two), stored as ArrayRecord. Needs no TensorFlow.

Read it with `tfds.builder_from_directory(OUT + "/stgr/cot/1.0.0").as_data_source("train")`, in the order of json_data/.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import dataset_builder, example_serializer

from openo3_jax import tasks
from openo3_jax.data import files

SPLIT = "train"
CONFIGS: dict[tasks.Stage, str] = {"sft": "cot", "rl": "rl"}


class Part(NamedTuple):
    """A finished ArrayRecord file."""

    path: str
    num_examples: int


@dataclasses.dataclass(kw_only=True)
class StgrConfig(tfds.core.BuilderConfig):
    """One of the two stages."""

    stage: tasks.Stage = "sft"


def make_features() -> tfds.features.FeaturesDict:
    """`record`: JSON. `pictures`: the frames of a clip, then its key frames; or the picture. JPEG, or raw RGB bytes.

    `shape_hw`: of every picture in px, after the resize. `source_hw`: before it. `times_s` and `duration_s`: of the
    frames and the clip; empty and 0 for a picture.
    """
    return tfds.features.FeaturesDict(
        {
            "record": tfds.features.Text(),
            "pictures": tfds.features.Sequence(tfds.features.Scalar(dtype=np.object_)),
            "shape_hw": tfds.features.Tensor(shape=(2,), dtype=np.int64),
            "source_hw": tfds.features.Tensor(shape=(2,), dtype=np.int64),
            "times_s": tfds.features.Tensor(shape=(None,), dtype=np.float64),
            "duration_s": tfds.features.Scalar(dtype=np.float64),
        }
    )


class Stgr(dataset_builder.FileReaderBuilder):
    """Takes over files that are written already (`PartWriter`), so that an interrupted preparation can go on."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 - as TFDS wants it
        StgrConfig(name=name, stage=stage, description=f"the {stage} stage") for stage, name in CONFIGS.items()
    ]

    def __init__(self, *, parts: Sequence[Part] = (), **settings: Any):
        self._parts = parts
        super().__init__(file_format="array_record", **settings)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="STGR: questions about videos with evidence in space and time.",
            features=make_features(),
            disable_shuffling=True,
        )

    def _log_download_bytes(self) -> None:
        """Nothing is downloaded; and stdout belongs to the caller."""

    def _log_download_done(self) -> None:
        """Likewise."""

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        """The parts under the names that TFDS gives to shards, as hard links where the disk has them."""
        template = self._get_filename_template(split_name=SPLIT)
        self.data_path.mkdir(parents=True, exist_ok=True)
        for number, part in enumerate(self._parts):
            shard = template.sharded_filepath(shard_index=number, num_shards=len(self._parts))
            files.link_or_copy(part.path, shard)
        split = tfds.core.SplitInfo(
            name=SPLIT,
            shard_lengths=[part.num_examples for part in self._parts],
            num_bytes=sum(os.path.getsize(part.path) for part in self._parts),
            filename_template=template,
        )
        self.info.set_splits(tfds.core.splits.SplitDict([split]))


class PartWriter:
    """Writes examples into one ArrayRecord file. A context manager; the file is whole when it is left."""

    def __init__(self, path: str):
        self._features = make_features()
        self._serializer = example_serializer.ExampleSerializer(self._features.get_serialized_info())
        self._writer = array_record_module.ArrayRecordWriter(path, "group_size:1")

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, example: dict[str, Any]) -> None:
        self._writer.write(self._serializer.serialize_example(self._features.encode_example(example)))
