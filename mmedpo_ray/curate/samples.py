"""The train rows of `samples`, which pairs are made of."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.tables import joins, schemas
from mmedpo_ray.tables.run_folder import RunFolder


def train_samples(config: Config, columns: Sequence[str] = tuple(schemas.SAMPLES.names)) -> pa.Table:
    """The train rows of `samples`, all questions of an image together.

    Args:
        config: all settings.
        columns: columns to read.

    Raises:
        UserError: the table is missing or has no train row.
    """
    folder = RunFolder(config.run.folder).samples
    wanted = dict.fromkeys(("image_id", "sample_id", *columns))
    train = storage.dataset(folder).to_table(columns=list(wanted), filter=pc.field("split") == "train")
    if train.num_rows == 0:
        check_train_split(folder)
    return train.sort_by([("image_id", "ascending"), ("sample_id", "ascending")]).combine_chunks()


def check_train_split(folder: str) -> None:
    """Raises a UserError if no row of `samples` is in the train split."""
    if joins.num_rows(folder, split="train") == 0:
        raise UserError(
            f"none of the {joins.num_rows(folder):,} samples is in the train split, so there is nothing to "
            "make pairs from. Lower data.test_share or check data.train_file."
        )
