"""Settings of `ingest`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmedpo_ray.config.base import Section, Share


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

    format: Literal[
        "phantom",
        "mmedpo_json",
        "llava_json",
        "slake",
        "vqa_rad",
        "r2gen",
        "hf_parquet",
        "trl",
        "llama_factory",
        "swift",
    ] = "phantom"
    name: str | None = Field(None, description="name of the data set in the tables; null: the format's own")
    root: str | None = Field(None, description="folder of the data set (path, s3://, gs://)")
    train_file: str | None = Field(
        None,
        description="annotation file under root for making pairs; null: the format's own (slake: train.json, …)",
    )
    test_file: str | None = Field(None, description="annotation file under root for evaluation")
    image_folder: str | None = Field(
        None, description="folder of the images under root; null: the format's own"
    )
    test_share: Share = Field(
        0.2, description="share of images held out for evaluation where the data has no test part"
    )
    language: Literal["en", "zh", "all"] = Field("en", description="slake: rows of this language")
    views: Literal["first", "side_by_side"] = Field(
        "first", description="r2gen: which image of a study with several; side_by_side writes a new one"
    )
    report_instruction: str = Field(
        "Write a radiology report of this image.", description="r2gen: the question that a report answers"
    )
    frames: Literal["refuse", "first", "middle", "all"] = Field(
        "refuse",
        description="image files of several frames (DICOM, TIFF pages, animations): dropped, or which frame is meant; all: a "
        "sample each, with the frame's number in its id",
    )
    columns: ParquetColumnsConfig = ParquetColumnsConfig()
    max_pixels: int = Field(100_000_000, ge=1, description="larger images are dropped undecoded")
    max_image_bytes: int = Field(1_000_000_000, ge=1, description="larger image files are dropped unread")
    phantom: PhantomDataConfig = PhantomDataConfig()
