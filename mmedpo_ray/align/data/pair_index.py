"""The index of the `prepared` table: 46 bytes per pair, in files that ranks map into memory.

It holds what the plan of a training run needs of every pair: token counts, what pairs share
(:mod:`~mmedpo_ray.align.data.token_counts`), weights, and where each image's pairs begin. It is built in one
pass over the table, file by file (:func:`ensure_index`), and never read whole: ranks map it, the ranks of a
node share the pages, and a step touches those of its own images.

Files in ``prepared/index/``: ``pairs.npy`` (N records of :data:`PAIR`), ``trees.npy`` (first row of every
image, and N), ``images.npy`` (a hash of every image's id), and ``index.json`` (sums for the plan's summary,
the table's files and their rows), which is written last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmedpo_ray.align.data.token_counts import TOKEN_BYTES, TokenCounts, order_sequences
from mmedpo_ray.io import storage
from mmedpo_ray.tables.manifest import Manifest
from mmedpo_ray.tables.slices import footer_of

TEXT, VISUAL, REVERSED = "text", "visual", "reversed"
KINDS = (TEXT, VISUAL, REVERSED)

# A record is read whole from one place, so its fields are kept together rather than in columns.
PAIR = np.dtype(
    [
        ("weight", "<f8"),  # of `scored`, without the coefficient of its kind
        ("prompt", "<u4"),  # tokens, image tokens included
        ("chosen", "<u4"),
        ("rejected", "<u4"),
        ("image", "<u4"),  # images are numbered such that equal numbers in a tree are equal images
        ("rejected_image", "<u4"),
        ("chosen_order", "<u4"),  # place of prompt and answer among the sorted sequences of the tree
        ("rejected_order", "<u4"),
        ("chosen_shared", "<u4"),  # tokens in common with the sequence at the place before
        ("rejected_shared", "<u4"),
        ("kind", "u1"),  # place in KINDS
        ("counts_nll", "?"),  # its chosen answer enters the likelihood term
    ]
)

_COLUMNS = [
    *("image_id", "kind", "image_uri", "rejected_image_uri", "image_position", "answer_hash", "weight"),
    *("prompt", "chosen", "rejected", "prompt_tokens", "chosen_tokens", "rejected_tokens"),
]
# Raised when the content of the files changes.
_VERSION = 3
# Trees whose records are gathered at once for sums.
_TREES_AT_ONCE = 1 << 18
_FOLDER = "index"
_PAIRS, _TREES, _IMAGES, _INFO = "pairs.npy", "trees.npy", "images.npy", "index.json"

Sums = dict[str, np.ndarray]
"""Sums over pairs: ``pairs``, ``weight``, ``weight_squared`` (3,), by kind in the order of :data:`KINDS`, of
the weights in `scored`; ``packed``, tokens of all trees, and ``separate``, the same with every sequence on
its own, (2,): for both sides of all pairs, and for the chosen sides that enter the likelihood. Pairs without
weight are only in ``pairs``: they are not computed."""


def sum_pairs(pairs: np.ndarray, starts: np.ndarray) -> Sums:
    """Sums over whole trees.

    Args:
        pairs: records of :data:`PAIR`.
        starts: the first record of every tree.
    """
    of_kind = pairs["kind"] == np.arange(len(KINDS))[:, None]
    weights = [pairs["weight"][found] for found in of_kind]
    tree = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(pairs))))
    prompt, chosen, rejected = (pairs[name].astype(np.int64) for name in ("prompt", "chosen", "rejected"))
    computed, counted = np.flatnonzero(pairs["weight"] > 0), np.flatnonzero(pairs["counts_nll"])
    both = TokenCounts(pairs, tree, both_sides=True).total(computed)
    one = TokenCounts(pairs, tree, both_sides=False).total(counted)
    separate = (2 * prompt + chosen + rejected - 2)[computed].sum(), (prompt + chosen - 1)[counted].sum()
    return {
        "pairs": of_kind.sum(axis=1),
        "weight": np.array([found.sum() for found in weights]),
        "weight_squared": np.array([(found**2).sum() for found in weights]),
        "packed": np.array([both, one]),
        "separate": np.array(separate),
    }


def _total(parts: Sequence[Sums]) -> Sums:
    return {name: np.sum([part[name] for part in parts], axis=0) for name in parts[0]}


@dataclass(frozen=True)
class PairIndex:
    """The index of N pairs of G images.

    Attributes:
        pairs: (N,) records of :data:`PAIR`, those of a tree together.
        trees: (G + 1,) int64, first row of every tree, and N.
        image_hashes: (G,) uint64, of the trees' image ids.
        sums: over the pairs of the selected trees.
        files: the table's files with their rows, in the order of the pairs.
        selected: numbers of the trees that take part, ascending; ``None``: all.
    """

    pairs: np.ndarray
    trees: np.ndarray
    image_hashes: np.ndarray
    sums: Sums
    files: Sequence[tuple[str, int]] = ()
    selected: np.ndarray | None = None

    @property
    def num_images(self) -> int:
        """Trees that take part."""
        return len(self.trees) - 1 if self.selected is None else len(self.selected)

    @property
    def num_pairs(self) -> int:
        """Pairs of these trees."""
        return int(self.sums["pairs"].sum())

    def rows(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of some trees, tree by tree, and the number of pairs of each.

        Args:
            images: (I,) numbers from 0 to ``num_images`` - 1.
        """
        numbers = images if self.selected is None else self.selected[images]
        starts = self.trees[numbers]
        sizes = self.trees[numbers + 1] - starts
        # Row numbers are consecutive within a tree.
        shifts = np.repeat(starts - np.cumsum(sizes) + sizes, sizes)
        return shifts + np.arange(len(shifts)), sizes

    def split(self, images: np.ndarray) -> tuple[PairIndex, PairIndex]:
        """Two indexes: of the other trees, and of these.

        Args:
            images: (I,) distinct numbers from 0 to ``num_images`` - 1; few of them.
        """
        parts = []
        for start in range(0, len(images), _TREES_AT_ONCE):
            rows, sizes = self.rows(images[start : start + _TREES_AT_ONCE])
            parts.append(sum_pairs(self.pairs[rows], np.cumsum(sizes) - sizes))
        sums = _total(parts)
        others = {name: value - sums[name] for name, value in self.sums.items()}
        numbers = np.arange(len(self.trees) - 1) if self.selected is None else self.selected
        stays = np.ones(len(numbers), bool)
        stays[images] = False
        return (
            replace(self, sums=others, selected=numbers[stays].astype(np.uint32)),
            replace(self, sums=sums, selected=numbers[~stays].astype(np.uint32)),
        )

    def image_codes(self, seed: int) -> np.ndarray:
        """Pseudo-random numbers that depend only on the seed and the ids of the selected images; uint64."""
        hashes = self.image_hashes if self.selected is None else self.image_hashes[self.selected]
        return _mix(hashes ^ _mix(np.array([seed], np.uint64)))


def index_pairs(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Records of whole trees, and the first row of each tree.

    An answer that several pairs of an image share enters the likelihood once: with the first text pair, or
    else with the first visual one. That of a reversed pair never does, because it is wrong, nor does that of
    a pair without weight.

    Args:
        table: rows of `prepared` in its order.
    """
    pairs = np.zeros(table.num_rows, PAIR)
    if not table.num_rows:
        return pairs, np.zeros(0, np.int64)
    images = _array(table, "image_id")
    is_first = np.append(True, np.asarray(pc.not_equal(images[1:], images[:-1])))
    uris = pa.concat_arrays([_array(table, "image_uri"), _array(table, "rejected_image_uri")])
    codes = np.asarray(uris.dictionary_encode().indices)
    pairs["weight"] = np.asarray(_array(table, "weight"))
    for name in ("prompt", "chosen", "rejected"):
        pairs[name] = np.asarray(_array(table, f"{name}_tokens"))
    pairs["image"], pairs["rejected_image"] = codes[: len(pairs)], codes[len(pairs) :]
    pairs["kind"] = np.asarray(pc.index_in(_array(table, "kind"), value_set=pa.array(KINDS)))
    pairs["counts_nll"] = _first_answers(np.cumsum(is_first), np.asarray(_array(table, "answer_hash")), pairs)
    starts = np.flatnonzero(is_first)
    prompts = _token_bytes(table, "prompt")
    set_orders(pairs, starts, prompts, _token_bytes(table, "chosen"), _token_bytes(table, "rejected"))
    # The image is one token in the table's prompts, and all its tokens in the model's.
    repeated = pairs["prompt"] - np.array([len(prompt) // TOKEN_BYTES for prompt in prompts], np.uint32)
    for name in ("chosen_shared", "rejected_shared"):
        has_image = pairs[name] > np.asarray(_array(table, "image_position"))
        pairs[name] += np.where(has_image, repeated, 0).astype(np.uint32)
    return pairs, starts


def set_orders(
    pairs: np.ndarray,
    starts: np.ndarray,
    prompts: Sequence[bytes],
    chosen: Sequence[bytes],
    rejected: Sequence[bytes],
) -> None:
    """Fills in the place of every pair's sequences in the order of their tree, and what they share there.

    Args:
        pairs: (N,) records of whole trees, their images set.
        starts: the first record of every tree.
        prompts, chosen, rejected: token ids of each, four bytes each.
    """
    images = np.concatenate([pairs["image"], pairs["rejected_image"]]).tolist()
    for start, stop in pairwise([*starts.tolist(), len(pairs)]):
        rows = range(start, stop)
        # The last token is predicted and predicts nothing: it is no input.
        sequences = [prompts[row] + side[row][:-TOKEN_BYTES] for side in (chosen, rejected) for row in rows]
        shown = images[start:stop] + images[len(pairs) + start : len(pairs) + stop]
        for name, values in zip(("order", "shared"), order_sequences(shown, sequences), strict=True):
            pairs[f"chosen_{name}"][start:stop] = values[: len(rows)]
            pairs[f"rejected_{name}"][start:stop] = values[len(rows) :]


def hash_images(image_ids: Iterable[str]) -> np.ndarray:
    """Hashes of image ids, uint64."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in image_ids)
    return np.frombuffer(digests, "<u8")


def ensure_index(folder: str, manifest: Manifest) -> None:
    """Builds the index of a finished `prepared` table unless it exists.

    Args:
        folder: of the table, on a file system that all nodes share.
        manifest: of the table; the index belongs to its key and content.

    Raises:
        UserError: the folder is a cloud address.
    """
    target = storage.local_path(folder, "training") / _FOLDER
    identity = [_VERSION, manifest.key, manifest.content]
    info = target / _INFO
    if info.is_file() and json.loads(info.read_text())["identity"] == identity:
        return
    storage.remove(str(target))
    target.mkdir(parents=True)
    _build(folder, target, identity)


def load_index(folder: str) -> PairIndex:
    """Maps the index of a `prepared` table into memory.

    Raises:
        FileNotFoundError: there is none; :func:`ensure_index` builds it.
    """
    source = storage.local_path(folder, "training") / _FOLDER
    info = json.loads((source / _INFO).read_text())
    pairs, trees, images = (np.load(source / name, mmap_mode="r") for name in (_PAIRS, _TREES, _IMAGES))
    return PairIndex(
        pairs,
        trees,
        images,
        {name: np.array(values) for name, values in info["sums"].items()},
        [(storage.join(folder, name), rows) for name, rows in info["files"]],
    )


def _build(folder: str, target: Path, identity: list[Any]) -> None:
    paths = storage.list_files(folder, ".parquet")
    sizes = [footer_of(path).num_rows for path in paths]
    pairs = np.lib.format.open_memmap(target / _PAIRS, mode="w+", dtype=PAIR, shape=(sum(sizes),))
    starts, hashes, sums, done = [], [], [], 0
    waiting: pa.Table | None = None
    for number, path in enumerate(paths):
        table = storage.read_parquet(path, _COLUMNS)
        table = table if waiting is None else pa.concat_tables([waiting, table])
        # The last tree of a file may continue in the next one.
        images = table["image_id"]
        is_last = number == len(paths) - 1 or not table.num_rows
        cut = table.num_rows if is_last else pc.index(images, images[-1]).as_py()
        waiting = table.slice(cut)
        found, first = index_pairs(table.slice(0, cut))
        pairs[done : done + cut] = found
        starts.append(first + done)
        hashes.append(hash_images(images.take(pa.array(first)).to_pylist()))
        sums.append(sum_pairs(found, first))
        done += cut
    pairs.flush()
    np.save(target / _TREES, np.concatenate([*starts, [done]]).astype(np.int64))
    np.save(target / _IMAGES, np.concatenate(hashes))
    files = [(Path(path).name, size) for path, size in zip(paths, sizes, strict=True)]
    totals = {name: values.tolist() for name, values in _total(sums).items()}
    content = {"identity": identity, "sums": totals, "files": files}
    storage.write_bytes(str(target / _INFO), json.dumps(content).encode())


def _mix(values: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers that scatters them (the finaliser of SplitMix64; Steele et al., 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _array(table: pa.Table, name: str) -> pa.Array:
    return table[name].combine_chunks()


def _token_bytes(table: pa.Table, name: str) -> list[bytes]:
    """Every list of a column of token ids as bytes, four per id."""
    lists = _array(table, name)
    ends = (TOKEN_BYTES * np.asarray(lists.offsets)).tolist()
    content = np.asarray(lists.values).tobytes()
    return [content[start:end] for start, end in pairwise(ends)]


def _first_answers(tree: np.ndarray, answer: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Which pairs are the first of their tree with their answer, text pairs before the others."""
    kind = pairs["kind"]
    candidates = np.flatnonzero((kind != KINDS.index(REVERSED)) & (pairs["weight"] > 0))
    # Stable: within the same answer and kind the table's order remains.
    order = candidates[np.lexsort((kind[candidates] != 0, answer[candidates], tree[candidates]))]
    new = np.ones(len(order), bool)
    new[1:] = (tree[order][1:] != tree[order][:-1]) | (answer[order][1:] != answer[order][:-1])
    found = np.zeros(len(kind), bool)
    found[order[new]] = True
    return found
