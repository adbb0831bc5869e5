"""`mmedpo convert-pairs`: preference pairs as TRL, LLaMA-Factory and ms-swift read them.

Every picture is one that their decoders read as training here does: plain PNG and JPEG files are named as
they are, DICOM, 16-bit files and the like are written as PNG beside the output. Visual pairs (the same answer
beside a noised image) can be said in ms-swift's format alone; for the others they are counted and left out.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from mmedpo_ray.console import console
from mmedpo_ray.datasets.pair_table import open_parquet
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.io.image_error import ImageError
from mmedpo_ray.io.images import file_and_frame
from mmedpo_ray.io.plain_images import plain_bytes

Row = dict[str, Any]

_COLUMNS = ("pair_id", "kind", "image_uri", "rejected_image_uri", "question", "chosen", "rejected")
_NUMBERS = ("weight", "score")
_ROWS = 256
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
# What the Hub's `datasets` reads, so that images come as pictures.
_FEATURES = {
    "id": {"dtype": "string", "_type": "Value"},
    **{
        key: {
            "feature": {
                "role": {"dtype": "string", "_type": "Value"},
                "content": {"dtype": "string", "_type": "Value"},
            },
            "_type": "List",
        }
        for key in ("prompt", "chosen", "rejected")
    },
    "images": {"feature": {"_type": "Image"}, "_type": "List"},
    **{key: {"dtype": "float64", "_type": "Value"} for key in _NUMBERS},
}
_TRL_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        *((name, pa.list_(_MESSAGE)) for name in ("prompt", "chosen", "rejected")),
        ("images", pa.list_(_IMAGE)),
        *((name, pa.float64()) for name in _NUMBERS),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)


def _trl(pair: Row, image: Any, _: Any) -> Row:
    return {
        "prompt": [{"role": "user", "content": pair["question"]}],
        "chosen": [{"role": "assistant", "content": pair["chosen"]}],
        "rejected": [{"role": "assistant", "content": pair["rejected"]}],
        "images": [image],
    }


def _llama_factory(pair: Row, image: Any, _: Any) -> Row:
    return {
        "conversations": [{"from": "human", "value": f"<image>{pair['question']}"}],
        "chosen": {"from": "gpt", "value": pair["chosen"]},
        "rejected": {"from": "gpt", "value": pair["rejected"]},
        "images": [image],
    }


def _swift(pair: Row, image: Any, rejected_image: Any) -> Row:
    talk = [
        {"role": "user", "content": f"<image>{pair['question']}"},
        {"role": "assistant", "content": pair["chosen"]},
    ]
    row = {"messages": talk, "images": [image]}
    if rejected_image is None:
        return row | {"rejected_response": pair["rejected"]}
    # In every row of a file or in none: ms-swift 4.6 deletes rows that lack a `rejected_response` which
    # others have.
    other = [talk[0], {"role": "assistant", "content": pair["rejected"]}]
    return row | {"rejected_messages": other, "rejected_images": [rejected_image]}


_WRITERS: dict[str, Callable[[Row, Any, Any], Row]] = {
    "trl": _trl,
    "llama-factory": _llama_factory,
    "swift": _swift,
}
TARGETS = tuple(_WRITERS)


def convert_pairs(table: str, target: str, out: Path) -> dict[str, int]:
    """Writes a table of pairs (`pairs`, `scored`, or a cleaned one) for another project.

    Args:
        table: folder of Parquet files, or one.
        target: trl, llama-factory or swift.
        out: file to write: ``.jsonl``, ``.json``, or, for trl, ``.parquet`` with the pictures in it. Pictures
            that had to be made are in the folder ``<stem>_images`` beside it; for llama-factory,
            ``dataset_info.json`` beside it names the file.

    Returns:
        How many pairs were ``written``, and how many were left out by reason.

    Raises:
        UserError: the table is missing or no table of pairs, the output is there already, or of no known
            kind.
    """
    _check_out(out, target)
    pairs = _open(table)
    pictures = _Pictures(out, embed=out.suffix == ".parquet")
    counts: Counter[str] = Counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own until it is whole.
    unfinished = out.with_name(f".{out.name}.part")
    rows = _rows(pairs, target, pictures, counts)
    if out.suffix == ".parquet":
        _write_parquet(unfinished, rows)
    else:
        with unfinished.open("w", encoding="utf-8") as file:
            _write_json(file, rows, as_list=out.suffix == ".json")
    if not counts["written"]:
        unfinished.unlink()
        raise UserError(f"none of the pairs of {table} can be written for {target}: {_in_words(counts)}.")
    unfinished.rename(out)
    if target == "llama-factory":
        _name_dataset(out)
    return dict(counts)


def convert_pairs_command(table: str, target: str, out: Path) -> int:
    """Converts, and says what was written and what comes next; the exit status."""
    counts = convert_pairs(table, target, out)
    left_out = Counter({reason: count for reason, count in counts.items() if reason != "written"})
    console.print(f"{counts['written']:,} pairs written to {out}", soft_wrap=True)
    if left_out:
        console.print(f"left out: {_in_words(left_out)}", soft_wrap=True)
    console.print(
        f"[dim]next: {_NEXT[target].format(out=out, name=out.stem, folder=out.parent)}[/dim]", soft_wrap=True
    )
    return 0


_NEXT = {
    "trl": "datasets.load_dataset(..., data_files='{out}') and trl.DPOTrainer",
    "llama-factory": "llamafactory-cli train with stage: dpo, dataset: {name}, dataset_dir: {folder}",
    "swift": "swift rlhf --rlhf_type dpo --dataset {out}",
}


def _check_out(out: Path, target: str) -> None:
    known = (".jsonl", ".json", ".parquet") if target == "trl" else (".jsonl", ".json")
    if out.suffix not in known:
        raise UserError(f"--out {out} must end in {', '.join(known)} for {target}.")
    if out.exists():
        raise UserError(f"{out} is there already; name another --out, or remove it.")


def _open(table: str) -> pads.Dataset:
    return open_parquet(storage.absolute(table), "pairs", _COLUMNS)


def _rows(source: pads.Dataset, target: str, pictures: _Pictures, counts: Counter[str]) -> Iterator[Row]:
    columns = [*_COLUMNS, *(name for name in _NUMBERS if name in source.schema.names)]
    both_images = target == "swift" and source.count_rows(filter=pc.field("kind") == "visual") > 0
    for batch in source.to_batches(columns=columns, batch_size=_ROWS):
        for pair in batch.to_pylist():
            is_visual = pair["kind"] == "visual"
            if is_visual and target != "swift":
                counts["visual_pair"] += 1
                continue
            try:
                image = pictures.of(pair["image_uri"])
                other = pictures.of(pair["rejected_image_uri"]) if both_images else None
            except (ImageError, OSError) as error:
                counts[getattr(error, "reason", "image_unreadable")] += 1
                continue
            counts["written"] += 1
            numbers = {name: pair[name] for name in _NUMBERS if pair.get(name) is not None}
            yield {"id": pair["pair_id"], **_WRITERS[target](pair, image, other), **numbers}


class _Pictures:
    """The pictures of an output: names of files, or bytes."""

    def __init__(self, out: Path, embed: bool) -> None:
        self._folder = out.parent / f"{out.stem}_images"
        self._embed = embed
        self._named: dict[str, str] = {}

    def of(self, uri: str) -> Any:
        """The picture of an address: its file's path, or what ``datasets`` takes for a picture."""
        if self._embed:
            return {"bytes": plain_bytes(uri, None)[0], "path": None}
        if uri not in self._named:
            self._named[uri] = self._path(uri)
        return self._named[uri]

    def _path(self, uri: str) -> str:
        data, kind = plain_bytes(uri, None)
        file, frame = file_and_frame(uri)
        local = Path(file)
        if "://" not in file and frame is None and local.is_file() and local.read_bytes() == data:
            return str(local.resolve())
        self._folder.mkdir(parents=True, exist_ok=True)
        made = self._folder / f"{hashlib.sha256(data).hexdigest()[:32]}.{kind.removeprefix('image/')}"
        if not made.exists():
            made.write_bytes(data)
        return str(made.resolve())


def _write_json(file: IO[str], rows: Iterator[Row], *, as_list: bool) -> None:
    first = True
    for row in rows:
        text = json.dumps(row, ensure_ascii=False)
        file.write((("[" if first else ",") + "\n" + text) if as_list else text + "\n")
        first = False
    if as_list:
        file.write("\n]\n" if not first else "[]\n")


def _write_parquet(path: Path, rows: Iterator[Row]) -> None:
    """Small row groups, since each holds its pictures."""
    with pq.ParquetWriter(path, _TRL_SCHEMA) as writer:
        block: list[Row] = []
        for row in rows:
            block.append(row)
            if len(block) == _ROWS:
                writer.write_table(pa.Table.from_pylist(block, _TRL_SCHEMA))
                block = []
        if block:
            writer.write_table(pa.Table.from_pylist(block, _TRL_SCHEMA))


def _name_dataset(out: Path) -> None:
    """Adds the file to LLaMA-Factory's list of data sets, beside whatever is named there."""
    info = out.parent / "dataset_info.json"
    try:
        known = json.loads(info.read_text(encoding="utf-8")) if info.exists() else {}
    except ValueError as error:
        raise UserError(
            f"{info} is no JSON, so {out.name} could not be named in it; repair it and add it."
        ) from error
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"}
    known[out.stem] = {"file_name": out.name, "formatting": "sharegpt", "ranking": True, "columns": columns}
    info.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _in_words(counts: Counter[str]) -> str:
    names = {"visual_pair": "visual pairs, which this format cannot express"}
    return ", ".join(
        f"{count:,} {names.get(reason, reason)}" for reason, count in counts.items() if reason != "written"
    )
