"""Settings of `ingest`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from mmedpo_ray.config.base import Section, Share
from mmedpo_ray.ingest.formats import BUILTIN, FORMATS


class PhantomDataConfig(Section):
    """The embedded synthetic radiograph world."""

    images: int = Field(
        700, ge=1, description="images to make pairs from (disjoint from the pre-training images)"
    )
    test_images: int = Field(200, ge=1, description="images of the test set, which has no text priors")
    prior: Literal["biased", "uniform"] = Field(
        "uniform", description="text priors of the images to align on"
    )


class ParquetColumnsConfig(Section):
    """Column names of a Hugging Face style Parquet data set (``format: hf_parquet``)."""

    image: str = Field(
        "image", description="struct<bytes, path>, bytes, or the path of an image file under root"
    )
    question: str = "question"
    answer: str = "answer"
    sample_id: str | None = Field(None, description="unique id of a row; null: the row's position")
    image_id: str | None = Field(None, description="id of the image; null: the hash of its bytes")
    answer_type: str | None = Field(None, description="closed, open or report; null: found out")
    mask: str | None = Field(
        None, description="lesion mask, as the image: struct, bytes or path; null: there is none"
    )


class DataConfig(Section):
    """Raw data into `samples`."""

    format: Annotated[str, AfterValidator(FORMATS.check)] = Field(
        "phantom",
        description=f"layout of the raw data: {', '.join(BUILTIN)}, or the name of another package's format",
    )
    name: str | None = Field(None, description="name of the data set in the tables; null: the format's own")
    root: str | None = Field(None, description="folder of the data set (path, s3://, gs://)")
    train_file: str | None = Field(
        None,
        description="annotation file under root for making pairs; null: the format's own (slake: "
        "train.json, …)",
    )
    test_file: str | None = Field(None, description="annotation file under root for evaluation")
    image_folder: str | None = Field(
        None, description="folder of the images under root; null: the format's own"
    )
    test_share: Share = Field(
        0.2, description="share of images held out for evaluation where the data has no test part"
    )
    language: Literal["en", "zh", "all"] = Field("en", description="slake: rows of this language")
    rotate_options: bool = Field(
        False,
        description="omnimedvqa: every question once for each rotation of its options, so that the right one "
        "stands in every place",
    )
    views: Literal["first", "side_by_side"] = Field(
        "first", description="r2gen: which image of a study with several; side_by_side writes a new one"
    )
    report_instruction: str = Field(
        "Write a radiology report of this image.", description="r2gen: the question that a report answers"
    )
    frames: Literal["refuse", "first", "middle", "all"] = Field(
        "refuse",
        description="image files of several frames (DICOM, TIFF pages, animations): dropped, or which frame "
        "is meant; all: a sample each, with the frame's number in its id",
    )
    columns: ParquetColumnsConfig = ParquetColumnsConfig()
    max_pixels: int = Field(100_000_000, ge=1, description="larger images are dropped undecoded")
    max_image_bytes: int = Field(1_000_000_000, ge=1, description="larger image files are dropped unread")
    phantom: PhantomDataConfig = PhantomDataConfig()

    def check_format(self, *, needs_pairs: bool) -> None:
        """Compares the settings with what the reader of ``format`` says that it needs.

        Args:
            needs_pairs: whether curation takes over the pairs of the data.

        Raises:
            ValueError: a required setting is missing, would be ignored, or the data bring no pairs.
        """
        reader = FORMATS[self.format]
        if reader.needs_root and self.root is None:
            raise ValueError(f"data.root is required with data.format={self.format}")
        if not reader.needs_root and self.root is not None:
            others = ", ".join(name for name in FORMATS if name != self.format)
            raise ValueError(
                f"data.root={self.root} would be ignored with data.format={self.format}, which makes its own "
                f"images: set data.format (--format) to that of your data ({others}), or data.root=null"
            )
        if reader.needs_train_file and self.train_file is None:
            raise ValueError(f"data.train_file is required with data.format={self.format}")
        if needs_pairs and not reader.brings_pairs:
            raise ValueError(
                "curate.text.method=released needs data that bring pairs: data.format=mmedpo_json, trl, "
                f"llama_factory or swift, not {self.format}"
            )
