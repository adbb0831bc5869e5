"""Whether what a run folder holds still belongs together.

A manifest names the tables that its own was made of, directly or not, by their identities
(:attr:`~mmedpo_ray.tables.manifest.Manifest.identity`). A table is stale when one of these has been made anew since with another
outcome. A stage refuses stale inputs, and the report marks them. A table whose folder is gone, as where room was needed,
makes nothing stale: those before it are named as well.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass

from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.tables.manifest import Manifest, read_manifest

# First part of a folder's name in the run → the verb that makes it.
_VERBS = {
    "samples": "ingest",
    "released": "ingest",
    "candidates": "curate",
    "choices": "curate",
    "rewrites": "curate",
    "visual": "curate",
    "pairs": "curate",
    "scored": "score",
    "prepared": "align",
    "align": "align",
    "model": "export",
    "evaluate": "evaluate",
}


@dataclass(frozen=True)
class Stale:
    """A table that no longer belongs to the one that it was made of.

    Attributes:
        folder: of the stale table.
        made_of: name of the other in the run.
        unfinished: whether the other one is being made anew, rather than made.
        verb: makes the stale table again, or finishes the other one.
    """

    folder: str
    made_of: str
    unfinished: bool
    verb: str

    def __str__(self) -> str:
        if self.unfinished:
            return (
                f"{self.folder} was made from {self.made_of}/, which is being made anew and is not finished"
            )
        return f"{self.folder} was made from another {self.made_of}/ than the present one"


def find_stale(root: str, folder: str) -> Stale | None:
    """The stale table closest to the raw data among those that a table was made of, itself included.

    Args:
        root: folder of the run.
        folder: of the table.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    present: dict[str, Manifest | None] = {}

    def read(name: str) -> Manifest | None:
        if name not in present:
            present[name] = read_manifest(storage.join(root, name))
        return present[name]

    present[name_of(root, folder)] = manifest
    for name in [*manifest.inputs, name_of(root, folder)]:
        made = read(name)
        for made_of, identity in (made.inputs if made is not None else {}).items():
            now = read(made_of)
            unfinished = now is None and bool(storage.list_files(storage.join(root, made_of)))
            if unfinished or (now is not None and now.identity != identity):
                verb = verb_of(made_of if unfinished else name)
                return Stale(storage.join(root, name), made_of, unfinished, verb)
    return None


def check(stage: str, root: str, folders: Sequence[str]) -> dict[str, str]:
    """The tables that something made of these is made of, as its manifest keeps them.

    Args:
        stage: its name, for messages.
        root: folder of the run.
        folders: of the tables that it reads.

    Raises:
        UserError: one is missing, unfinished or stale.
    """
    found: dict[str, str] = {}
    for folder in folders:
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(
                f"{stage} needs {folder}, which is missing or unfinished. Run the stage that writes it first "
                "(`mmedpo run` runs all in order)."
            )
        refuse_stale(stage, root, folder)
        found |= manifest.inputs
        found[name_of(root, folder)] = manifest.identity
    return found


def refuse_stale(stage: str, root: str, folder: str) -> None:
    """Raises a ``UserError`` that names what to run first where a table, if it is there, is stale."""
    if (stale := find_stale(root, folder)) is not None:
        raise UserError(
            f"{stage}: {stale}. Run `mmedpo {stale.verb}` first (`mmedpo run` runs all in order)."
        )


def identities(root: str, folders: Sequence[str]) -> dict[str, str]:
    """Name in the run → identity, of those of these tables that are finished."""
    found = {name_of(root, folder): read_manifest(folder) for folder in folders}
    return {name: manifest.identity for name, manifest in found.items() if manifest is not None}


def name_of(root: str, folder: str) -> str:
    """The name of a folder in the run; its whole address where it lies elsewhere."""
    whole, inner = storage.absolute(root).rstrip("/"), storage.absolute(folder)
    return inner.removeprefix(f"{whole}/")


def verb_of(name: str) -> str:
    """The verb that writes a folder of a run, given the folder's name in it; ``run`` for one that is not known."""
    first, *rest = name.split(posixpath.sep)
    return _VERBS.get(rest[0] if first == "control" and rest else first, "run")
