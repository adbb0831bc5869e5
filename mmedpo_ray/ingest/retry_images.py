"""Whether ingesting again would change anything: a look at the images for which rows were dropped, and at nothing else."""

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

# Images that a task looks at.
_IMAGES_PER_TASK = 64


def any_mended(config: Config) -> bool:
    """Whether an image of a dropped row of `samples` fares otherwise now: it has come, was mended, or fails otherwise.

    Each is read once by a Ray task, until one has changed. Rows whose image lies in the data itself (Parquet) are not
    looked at: their data cannot change without being read anew.
    """
    folder = storage.join(RunFolder(config.run.folder).samples, DROPPED)
    rows = storage.dataset(folder).to_table(
        columns=["image_uri", schemas.DROP_REASON],
        filter=pc.field(schemas.DROP_REASON).isin(list(IMAGE_REASONS)) & pc.field("image_uri").is_valid(),
    )
    images = rows.group_by(["image_uri", schemas.DROP_REASON], use_threads=False).aggregate([])
    look = ray.remote(differs).options(num_cpus=config.ray.data_cpus)
    pending = [
        look.remote(images.slice(start, _IMAGES_PER_TASK), config.data)
        for start in range(0, images.num_rows, _IMAGES_PER_TASK)
    ]
    while pending:
        [found], pending = ray.wait(pending)
        if ray.get(found):
            for reference in pending:
                ray.cancel(reference)
            return True
    return False


def differs(images: pa.Table, data: DataConfig) -> bool:
    """Whether any of these images (columns ``image_uri`` and ``drop_reason``) fares otherwise than its reason says.

    Storage that fails says nothing of an image: else an outage would make another table, and the stages after it run again.
    """
    checker = ImageChecker(data)
    return any(
        _reason(checker, row["image_uri"]) not in (row[schemas.DROP_REASON], UNREADABLE)
        for row in images.to_pylist()
    )


def _reason(checker: ImageChecker, uri: str) -> str | None:
    try:
        checker.sha256(uri)
    except UnusableError as error:
        return error.reason
    return None
