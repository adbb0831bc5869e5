"""Whether the tables in a run's folder still belong together.

A manifest names the tables that its own was made from, directly or not, by their identities
(:attr:`~mmedpo_ray.tables.manifest.Manifest.identity`). A table is stale if one of them has been replaced since by
one with another identity. A stage refuses stale inputs, and the report marks them. A deleted table makes nothing
stale, because the tables before it are named as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.tables.manifest import Manifest, read_manifest
from mmedpo_ray.tables.run_folder import command_of


@dataclass(frozen=True)
class Stale:
    """A table that no longer belongs to one that it was made from.

    Attributes:
        folder: of the stale table.
        made_from: name of the other in the run.
        unfinished: whether the other one is being made again and is not finished.
        command: makes the stale table again, or finishes the other one.
    """

    folder: str
    made_from: str
    unfinished: bool
    command: str

    def __str__(self) -> str:
        if self.unfinished:
            return f"{self.folder} was made from {self.made_from}/, which is being made again and is not finished"
        return f"{self.folder} was made from another {self.made_from}/ than the present one"


def find_stale(root: str, folder: str) -> Stale | None:
    """The first stale table, in the order of the pipeline, among those that a table was made from and itself.

    Args:
        root: folder of the run.
        folder: of the table.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    present: dict[str, Manifest | None] = {name_of(root, folder): manifest}
    for name in manifest.inputs:
        present[name] = read_manifest(storage.join(root, name))
    for name in [*manifest.inputs, name_of(root, folder)]:
        table = present[name]
        for made_from, identity in (table.inputs if table is not None else {}).items():
            if made_from not in present:
                present[made_from] = read_manifest(storage.join(root, made_from))
            now = present[made_from]
            unfinished = now is None and bool(storage.list_files(storage.join(root, made_from)))
            if unfinished or (now is not None and now.identity != identity):
                command = command_of(made_from if unfinished else name)
                return Stale(storage.join(root, name), made_from, unfinished, command)
    return None


def check(stage: str, root: str, folders: Sequence[str]) -> dict[str, str]:
    """The tables that a table made from these is made from, directly or not: name in the run → identity.

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
    """Raises a ``UserError`` that names the command to run first if a table exists and is stale."""
    if (stale := find_stale(root, folder)) is not None:
        raise UserError(
            f"{stage}: {stale}. Run `mmedpo {stale.command}` first (`mmedpo run` runs all in order)."
        )


def identities(root: str, folders: Sequence[str]) -> dict[str, str]:
    """Name in the run → identity, of those of these tables that are finished."""
    found = {name_of(root, folder): read_manifest(folder) for folder in folders}
    return {name: manifest.identity for name, manifest in found.items() if manifest is not None}


def name_of(root: str, folder: str) -> str:
    """The name of a folder in the run; its whole address if it lies elsewhere."""
    whole, inner = storage.absolute(root).rstrip("/"), storage.absolute(folder)
    return inner.removeprefix(f"{whole}/")
