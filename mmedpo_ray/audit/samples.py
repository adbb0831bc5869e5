"""The samples table behind the pairs that are audited: their truth, their split, their images.

Pairs find their sample by its id; those of a JSON, which has none, by the image's file name and the question.
Whether a split holds out their image is asked of the image itself: an id tells the split that its sample had
when the pair was made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmedpo_ray.audit.hashing import hashes, normalised
from mmedpo_ray.datasets.pair_table import open_parquet, parquet_fingerprint
from mmedpo_ray.errors import UserError

# Splits that no pair should show an image of.
HELD_OUT = ("test", "validate")


@dataclass(frozen=True)
class Index:
    """Rows by the hash of a key; keys that several different rows share are left out."""

    hashes: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, values: np.ndarray | None = None) -> Index:
        """Indexes rows by their keys, int64, 0 for none.

        Args:
            keys: (rows,) int64.
            values: (rows,) int64, what rows of one key must share for the first to stand for them; None: the
                first does.
        """
        order = np.argsort(keys, kind="stable")
        order = order[keys[order] != 0]
        found, first, group = np.unique(keys[order], return_index=True, return_inverse=True)
        rows = order[first]
        if values is not None and len(order):
            mixed = np.zeros(len(found), bool)
            mixed[group[values[order] != values[rows][group]]] = True
            found, rows = found[~mixed], rows[~mixed]
        return cls(found, rows)

    def only(self, rows: np.ndarray) -> Index:
        """The keys of some rows, (rows,) bool."""
        kept = rows[self.rows]
        return Index(self.hashes[kept], self.rows[kept])

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Row of each key, -1 where there is none."""
        if not len(self.hashes):
            return np.full(len(keys), -1, np.int64)
        place = np.minimum(np.searchsorted(self.hashes, keys), len(self.hashes) - 1)
        return np.where(self.hashes[place] == keys, self.rows[place], -1)


@dataclass(frozen=True)
class SplitImages:
    """The images of a split, found by whatever names them; eight bytes a name.

    Attributes:
        of_rows: (rows,) bool, samples whose image (by content, id or address) is one of the split.
        ids: image ids of these samples.
        uris: addresses of their images.
        names: the last part, and the last two parts, of these addresses, as far as no other sample's image
            has them; None where the pairs name their sample.
    """

    of_rows: np.ndarray
    ids: Index
    uris: Index
    names: tuple[Index, Index] | None

    def with_id(self, image_ids: pa.Array) -> np.ndarray:
        """(N,) bool, the split has an image of this id; False for an empty one."""
        return _each(image_ids, lambda strings: self.ids.find(_keys(strings)) >= 0)

    def at(self, image_uris: pa.Array) -> np.ndarray:
        """(N,) bool, the split has this image, by its whole address or the end of it."""
        return _each(image_uris, self._at)

    def _at(self, uris: pa.Array) -> np.ndarray:
        found = self.uris.find(_keys(uris)) >= 0
        if self.names is not None:
            found |= _by_ending(self.names, uris) >= 0
        return found


@dataclass(frozen=True)
class Samples:
    """What the audit needs of the samples table.

    Attributes:
        path: where it is.
        fingerprint: changes with the content.
        table: columns sample_id, split, answer, image_sha256, image_id, image_uri, mask_uri and, where asked
            for, question, as far as they are there.
        in_test: (rows,) bool, the sample is of split test.
        held_out: the images of split test and of split validate, as far as there are rows of it.
        by_id: rows by their id.
        by_question: rows by the question and the last part, and the last two parts, of the image's address;
            None where the questions were not asked for.
    """

    path: str
    fingerprint: str
    table: pa.Table
    in_test: np.ndarray
    held_out: Mapping[str, SplitImages]
    by_id: Index
    by_question: tuple[Index, Index] | None = None

    def for_tasks(self) -> Samples:
        """The same without the columns that only the driver looks at."""
        return replace(self, table=self.table.select(["answer"]))

    def rows_of(self, sample_ids: pa.Array) -> np.ndarray:
        """Row of each sample id, -1 where the table has no such sample."""
        return self.by_id.find(hashes(sample_ids))

    def rows_asking(self, image_uris: pa.Array, questions: pa.Array) -> np.ndarray:
        """Row with the image and the question, -1 where there is none or several with different answers.

        An image with a folder ("xmlab1/source.jpg") needs that folder in the sample's address too, one
        without its name only.

        Args:
            image_uris: addresses, or paths inside the data set.
            questions: normalised.
        """
        assert self.by_question is not None
        return _by_ending(self.by_question, image_uris, questions)


def _by_ending(indices: tuple[Index, Index], image_uris: pa.Array, *more: pa.Array) -> np.ndarray:
    """Row by the last part or last two parts of an image's address and other keys; -1 if unknown."""
    alone, in_folder = (_ending_keys(image_uris, parts, *more) for parts in (1, 2))
    by_name, by_folder = indices
    return np.where(in_folder != 0, by_folder.find(in_folder), by_name.find(alone))


def _ending_keys(image_uris: pa.Array, parts: int, *more: pa.Array) -> np.ndarray:
    """Hash of the last parts of an image's address and other strings; 0 where there is no address."""
    pattern = r"(?P<name>[^/]+)$" if parts == 1 else r"(?P<name>[^/]+/[^/]+)$"
    names = pc.fill_null(pc.struct_field(pc.extract_regex(image_uris, pattern), [0]), "")
    return _keys(names, *more)


def _keys(strings: pa.Array, *more: pa.Array) -> np.ndarray:
    """Hash of each text and more; 0 where the first is empty."""
    return np.where(pc.equal(strings, "").to_numpy(zero_copy_only=False), 0, hashes(strings, *more))


def _each(strings: pa.Array, ask: Callable[[pa.Array], np.ndarray]) -> np.ndarray:
    """What ``ask`` says of each text, asked once for each different one."""
    coded = pc.dictionary_encode(strings)
    return ask(coded.dictionary)[coded.indices.to_numpy(zero_copy_only=False)]


def open_samples(path: str, *, with_questions: bool = False) -> Samples:
    """Reads a samples table.

    Args:
        path: a folder of Parquet files, or one.
        with_questions: whether the questions are read too, for pairs that name no sample.

    Raises:
        UserError: it is missing, or lacks sample_id or answer.
    """
    source = open_parquet(path, "samples", ("sample_id", "answer"))
    try:
        wanted = ["sample_id", "split", "answer", "image_sha256", "image_id", "image_uri", "mask_uri"]
        wanted += ["question"] if with_questions else []
        table = source.to_table(columns=[name for name in wanted if name in source.schema.names])
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"cannot read {path} as Parquet: {type(error).__name__}. Run `mmedpo ingest` again."
        ) from error
    table = pa.table({name: table[name].cast(pa.string()) for name in table.column_names}).combine_chunks()
    of_split = {name: _of_split(table, name) for name in HELD_OUT}
    return Samples(
        path,
        parquet_fingerprint(path),
        table,
        of_split["test"],
        {
            name: _split_images(table, rows, by_ending=with_questions)
            for name, rows in of_split.items()
            if rows.any()
        },
        Index.of(hashes(_filled(table, "sample_id"))),
        _by_question(table) if with_questions else None,
    )


def _of_split(table: pa.Table, split: str) -> np.ndarray:
    """(rows,) bool."""
    if "split" not in table.column_names:
        return np.zeros(table.num_rows, bool)
    return pc.fill_null(pc.equal(table["split"], split), False).to_numpy()


def _split_images(table: pa.Table, of_split: np.ndarray, *, by_ending: bool) -> SplitImages:
    """The images of some rows, and of all rows that show the same."""
    shared = of_split.copy()
    for name in ("image_sha256", "image_id", "image_uri"):
        if name in table.column_names:
            theirs = table[name].filter(pa.array(of_split)).drop_null()
            shared |= pc.is_in(table[name], value_set=theirs.combine_chunks()).to_numpy()
    ids, uris = (_keys(_filled(table, name)) for name in ("image_id", "image_uri"))
    names = None
    if by_ending:
        endings = (_ending_keys(_filled(table, "image_uri"), parts) for parts in (1, 2))
        one, two = (Index.of(keys, shared.astype(np.int64)).only(shared) for keys in endings)
        names = (one, two)
    return SplitImages(shared, Index.of(ids[shared]), Index.of(uris[shared]), names)


def _by_question(table: pa.Table) -> tuple[Index, Index]:
    uris, questions = _filled(table, "image_uri"), normalised(_filled(table, "question"))
    answers = hashes(normalised(_filled(table, "answer")))
    one, two = (Index.of(_ending_keys(uris, parts, questions), answers) for parts in (1, 2))
    return one, two


def _filled(table: pa.Table, name: str) -> pa.Array:
    """A text column as one array, null read as empty; empty strings where there is no such column."""
    if name not in table.column_names or not table.num_rows:
        return pa.array([""] * table.num_rows, pa.string())
    return pc.fill_null(table[name], "").combine_chunks()
