"""What the order of a training run needs to know of every pair: 46 bytes, in a file that ranks map into memory.

The table `prepared` holds the pairs; its index holds their token counts, what they share (:mod:`~mmedpo_ray.align.data.token_counts`),
their weights and where each image's pairs begin. It is built in one pass over the table, file by file (:func:`ensure_index`), and
never read whole: a rank maps it, the ranks of a node share the pages, and a step touches those of its own images.

Files in ``prepared/index/``: ``pairs.npy`` (N records of :data:`PAIR`), ``trees.npy`` (first row of every image, and N),
``images.npy`` (a hash of every image's id), and ``index.json`` (sums for the plan's summary, the table's files and their rows), which is written last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
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
    "image_id",
    "kind",
    "image_uri",
    "rejected_image_uri",
    "prompt",
    "chosen",
    "rejected",
    "image_position",
    "prompt_tokens",
    "chosen_tokens",
    "rejected_tokens",
    "answer_hash",
    "weight",
]
# Of the files; raised when what is in them changes.
_VERSION = 2
# Trees whose records are gathered at once when sums are taken.
_TREES_AT_ONCE = 1 << 18
_FOLDER = "index"
_PAIRS, _TREES, _IMAGES, _INFO = "pairs.npy", "trees.npy", "images.npy", "index.json"


@dataclass
class Totals:
    """Sums over all pairs.

    Attributes:
        pairs, weight, weight_squared: by kind, in the order of :data:`KINDS`; of the weights in `scored`.
        packed, packed_chosen: tokens of all trees; of both sides, and of the chosen sides that enter the likelihood.
        separate, separate_chosen: the same with every sequence on its own.

    Pairs without weight are counted in ``pairs`` alone: they are not computed.
    """

    pairs: list[int] = field(default_factory=lambda: [0, 0, 0])
    weight: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    weight_squared: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    packed: int = 0
    packed_chosen: int = 0
    separate: int = 0
    separate_chosen: int = 0

    def add(self, pairs: np.ndarray, starts: np.ndarray) -> None:
        """Adds whole trees: records of :data:`PAIR`, and the first of every tree."""
        for kind in range(len(KINDS)):
            weights = pairs["weight"][pairs["kind"] == kind]
            self.pairs[kind] += len(weights)
            self.weight[kind] += float(weights.sum())
            self.weight_squared[kind] += float((weights**2).sum())
        tree = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(pairs))))
        prompt, chosen, rejected = (pairs[name].astype(np.int64) for name in ("prompt", "chosen", "rejected"))
        computed, counted = np.flatnonzero(pairs["weight"] > 0), np.flatnonzero(pairs["counts_nll"])
        self.separate += int((2 * prompt + chosen + rejected - 2)[computed].sum())
        self.separate_chosen += int((prompt + chosen - 1)[counted].sum())
        self.packed += TokenCounts(pairs, tree, both_sides=True).total(computed)
        self.packed_chosen += TokenCounts(pairs, tree, both_sides=False).total(counted)

    def without(self, other: Totals) -> Totals:
        """The sums over all pairs but those of ``other``."""
        return Totals(
            pairs=[a - b for a, b in zip(self.pairs, other.pairs, strict=True)],
            weight=[a - b for a, b in zip(self.weight, other.weight, strict=True)],
            weight_squared=[a - b for a, b in zip(self.weight_squared, other.weight_squared, strict=True)],
            packed=self.packed - other.packed,
            packed_chosen=self.packed_chosen - other.packed_chosen,
            separate=self.separate - other.separate,
            separate_chosen=self.separate_chosen - other.separate_chosen,
        )


@dataclass(frozen=True)
class PairIndex:
    """The index of N pairs of G images.

    Attributes:
        pairs: (N,) records of :data:`PAIR`; a tree's stand together.
        trees: (G + 1,) int64, first row of every tree, and N.
        image_hashes: (G,) uint64, of the trees' image ids.
        totals: sums over the pairs of the selected trees.
        files: the table's files with their rows, in the order of the pairs.
        selected: numbers of the trees that take part, ascending; ``None``: all.
    """

    pairs: np.ndarray
    trees: np.ndarray
    image_hashes: np.ndarray
    totals: Totals
    files: Sequence[tuple[str, int]] = ()
    selected: np.ndarray | None = None

    @property
    def num_images(self) -> int:
        """Trees that take part."""
        return len(self.trees) - 1 if self.selected is None else len(self.selected)

    @property
    def num_pairs(self) -> int:
        """Pairs of these trees."""
        return sum(self.totals.pairs)

    def rows(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of some trees, one tree after the other, and the number of pairs of each.

        Args:
            images: (I,) numbers from 0 to ``num_images`` - 1.
        """
        numbers = images if self.selected is None else self.selected[images]
        starts = self.trees[numbers]
        sizes = self.trees[numbers + 1] - starts
        # Within a tree the row grows by one; where a tree begins it starts anew.
        shifts = np.repeat(starts - np.cumsum(sizes) + sizes, sizes)
        return shifts + np.arange(len(shifts)), sizes

    def split(self, images: np.ndarray) -> tuple[PairIndex, PairIndex]:
        """Two indexes: of all trees but some, and of these; the sums of the latter are taken anew.

        Args:
            images: (I,) distinct numbers from 0 to ``num_images`` - 1; few of them.
        """
        totals = Totals()
        for start in range(0, len(images), _TREES_AT_ONCE):
            rows, sizes = self.rows(images[start : start + _TREES_AT_ONCE])
            totals.add(self.pairs[rows], np.cumsum(sizes) - sizes)
        stays = np.ones(self.num_images, bool)
        stays[images] = False
        rest, apart = (
            numbers if self.selected is None else self.selected[numbers]
            for numbers in (np.flatnonzero(stays), np.flatnonzero(~stays))
        )
        return (
            replace(self, totals=self.totals.without(totals), selected=rest.astype(np.uint32)),
            replace(self, totals=totals, selected=apart.astype(np.uint32)),
        )

    def image_codes(self, seed: int) -> np.ndarray:
        """Pseudo-random numbers that depend on the seed and on the ids of the selected images alone; uint64."""
        hashes = self.image_hashes if self.selected is None else self.image_hashes[self.selected]
        return _mix(hashes ^ _mix(np.array([seed], np.uint64)))


def index_pairs(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Records of whole trees and the first row of each.

    An answer that several pairs of an image share enters the likelihood once: with the first text pair, else with the
    first visual one. The chosen answer of a reversed pair is wrong, so it never does, nor does that of a pair without weight.

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
    # The image stands once in the table's prompts and with all its tokens in the model's.
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
    """Fills in the place of every pair's sequences in their tree and what they share there.

    Args:
        pairs: (N,) records of whole trees, their images set.
        starts: the first record of every tree.
        prompts, chosen, rejected: token ids of each, four bytes each.
    """
    names = [f"{side}_{field}" for side in ("chosen", "rejected") for field in ("order", "shared")]
    images = np.concatenate([pairs["image"], pairs["rejected_image"]]).tolist()
    found: list[list[int]] = [[], [], [], []]
    for start, stop in pairwise([*starts.tolist(), len(pairs)]):
        rows = range(start, stop)
        # The last token is predicted and predicts nothing: it is no input.
        sequences = [prompts[row] + side[row][:-TOKEN_BYTES] for side in (chosen, rejected) for row in rows]
        shown = images[start:stop] + images[len(pairs) + start : len(pairs) + stop]
        orders, shared = order_sequences(shown, sequences)
        count = stop - start
        for column, values in zip(
            found, (orders[:count], shared[:count], orders[count:], shared[count:]), strict=True
        ):
            column += values
    for name, column in zip(names, found, strict=True):
        pairs[name] = column


def hash_images(image_ids: Iterable[str]) -> np.ndarray:
    """Hashes of image ids, uint64."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in image_ids)
    return np.frombuffer(digests, "<u8")


def ensure_index(folder: str, manifest: Manifest) -> None:
    """Builds the index of a finished `prepared` table unless it is there.

    Args:
        folder: of the table, a path that every node sees.
        manifest: of the table; the index is that of its key and content.

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
    return PairIndex(
        np.load(source / _PAIRS, mmap_mode="r"),
        np.load(source / _TREES, mmap_mode="r"),
        np.load(source / _IMAGES, mmap_mode="r"),
        Totals(**info["totals"]),
        [(storage.join(folder, name), rows) for name, rows in info["files"]],
    )


def _build(folder: str, target: Path, identity: list[Any]) -> None:
    paths = storage.list_files(folder, ".parquet")
    sizes = [footer_of(path).num_rows for path in paths]
    pairs = np.lib.format.open_memmap(target / _PAIRS, mode="w+", dtype=PAIR, shape=(sum(sizes),))
    totals, starts, hashes, done = Totals(), [], [], 0
    waiting: pa.Table | None = None
    for number, path in enumerate(paths):
        table = _read(path) if waiting is None else pa.concat_tables([waiting, _read(path)])
        # The last tree of a file may go on in the next one.
        cut = table.num_rows if number == len(paths) - 1 else _last_tree(table)
        waiting = table.slice(cut)
        found, first = index_pairs(table.slice(0, cut))
        pairs[done : done + cut] = found
        starts.append(first + done)
        hashes.append(hash_images(table["image_id"].take(pa.array(first)).to_pylist()))
        totals.add(found, first)
        done += cut
    pairs.flush()
    np.save(target / _TREES, np.concatenate([*starts, [done]]).astype(np.int64))
    np.save(target / _IMAGES, np.concatenate(hashes))
    files = [(Path(path).name, size) for path, size in zip(paths, sizes, strict=True)]
    content = {"identity": identity, "totals": asdict(totals), "files": files}
    storage.write_bytes(str(target / _INFO), json.dumps(content).encode())


def _mix(values: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers that scatters them (the finaliser of SplitMix64; Steele et al., 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _read(path: str) -> pa.Table:
    return storage.read_parquet(path, _COLUMNS)


def _array(table: pa.Table, name: str) -> pa.Array:
    return table[name].combine_chunks()


def _last_tree(table: pa.Table) -> int:
    """Where the last tree begins."""
    if not table.num_rows:
        return 0
    images = table["image_id"]
    return pc.index(images, images[-1]).as_py()


def _token_bytes(table: pa.Table, name: str) -> list[bytes]:
    """Every list of a column of token ids as bytes, four an id."""
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
