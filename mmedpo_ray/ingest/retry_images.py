"""Whether ingesting again could keep more rows: reads only the images for which rows were dropped."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import ray

from mmedpo_ray.config.tree import Config
from mmedpo_ray.datasets.unusable import UnusableError
from mmedpo_ray.ingest.image_checker import IMAGE_REASONS, UNREADABLE, ImageChecker
from mmedpo_ray.ingest.settings import DataConfig
from mmedpo_ray.io import storage
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.merge import DROPPED
from mmedpo_ray.tables.run_folder import RunFolder

_IMAGES_PER_TASK = 64


def could_retry_succeed(config: Config) -> bool:
    """Whether an image of a dropped row of `samples` can be used now, or fails for another reason.

    Ray tasks read each image once, until one has changed. Rows whose image lies in the data itself (Parquet)
    name no image: their data cannot change without being ingested again.
    """
    folder = storage.join(RunFolder(config.run.folder).samples, DROPPED)
    rows = storage.dataset(folder).to_table(
        columns=["image_uri", schemas.DROP_REASON],
        filter=pc.field(schemas.DROP_REASON).isin(list(IMAGE_REASONS)) & pc.field("image_uri").is_valid(),
    )
    images = rows.group_by(["image_uri", schemas.DROP_REASON], use_threads=False).aggregate([])
    task = ray.remote(any_changed).options(num_cpus=config.ray.data_cpus)
    pending = [
        task.remote(images.slice(start, _IMAGES_PER_TASK), config.data)
        for start in range(0, images.num_rows, _IMAGES_PER_TASK)
    ]
    while pending:
        [finished], pending = ray.wait(pending)
        if ray.get(finished):
            for reference in pending:
                ray.cancel(reference)
            return True
    return False


def any_changed(images: pa.Table, data: DataConfig) -> bool:
    """Whether any of these images can be used now, or fails for another reason.

    Storage that fails says nothing of an image: else an outage would make another table, and later stages run
    again.
    """
    checker = ImageChecker(data)
    for row in images.to_pylist():
        try:
            checker.sha256(row["image_uri"])
        except UnusableError as error:
            if error.reason in (row[schemas.DROP_REASON], UNREADABLE):
                continue
        return True
    return False
