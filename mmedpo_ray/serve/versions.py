"""Versions of served adapters: copies that do not change, and which of them answers under a name.

    versions/
      aligned@3f0c9a41d2be/     a copy of the adapter; the part after @ is a hash of its files
      versions.json             {"aligned": {"current": "aligned@3f0c…", "previous": null}}

Every engine and every ingress reads this folder, so replicas that start later serve the same versions. A
version has a name of its own in the engine, because vLLM keeps the prefix cache by the adapter's name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path

from pydantic import BaseModel
from safetensors import safe_open

from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.models.saving import replaced_folder

log = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_STATE = "versions.json"
_HASH_LENGTH = 12


class Alias(BaseModel):
    """What answers under a name.

    Attributes:
        current: the version that answers.
        previous: the one before it, which stays loaded; None if there was none.
        own: the version of the run itself, as it was when the endpoint last started.
    """

    current: str
    previous: str | None = None
    own: str | None = None


class VersionFolder:
    """The versions of one endpoint.

    Args:
        folder: which every node sees. It is made by the first :meth:`add`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> dict[str, Alias]:
        """Name → what answers under it; empty before the first version."""
        try:
            text = (self.folder / _STATE).read_bytes()
        except FileNotFoundError:
            return {}
        return {name: Alias.model_validate(alias) for name, alias in json.loads(text).items()}

    def path(self, version: str) -> Path:
        """The folder of a version's files."""
        return self.folder / version

    def names(self) -> list[str]:
        """Every version that may be asked for: those that answer, and those before them."""
        aliases = self.read().values()
        return [name for alias in aliases for name in (alias.current, alias.previous) if name is not None]

    def add(self, name: str, adapter: Path) -> str:
        """Copies an adapter; the same files are the same version.

        Args:
            name: under which it is to answer.
            adapter: peft folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

        Returns:
            The version, ``name@hash``.

        Raises:
            UserError: the folder has no such files.
        """
        files = [
            file for file in sorted(adapter.glob("adapter_*")) if file.suffix in (".json", ".safetensors")
        ]
        if {file.suffix for file in files} != {".json", ".safetensors"}:
            raise UserError(f"{adapter} holds no adapter in safetensors. Run `mmedpo export` of that run.")
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        version = f"{name}@{digest.hexdigest()[:_HASH_LENGTH]}"
        if not self.path(version).is_dir():
            with replaced_folder(self.path(version)) as copy:
                for file in files:
                    shutil.copyfile(file, copy / file.name)
        return version

    def check_shapes(self, version: str, other: str) -> None:
        """Checks that two versions fit the same layers: vLLM pads a smaller matrix without a word.

        Raises:
            UserError: a layer that both change has other sizes.
        """
        shapes = self._shapes(other)
        for layer, sizes in self._shapes(version).items():
            if layer in shapes and shapes[layer] != sizes:
                raise UserError(
                    f"the adapter does not fit: {layer} has size {sizes}, and {shapes[layer]} in {other}. It "
                    "was trained on another model."
                )

    def _shapes(self, version: str) -> dict[str, int]:
        """Matrix → its size on the layer's side: inputs of A (rank, inputs), outputs of B (outputs, rank)."""
        with safe_open(self.path(version) / _WEIGHTS, "numpy") as weights:
            shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        return {name: shape[1] if "lora_A" in name else shape[0] for name, shape in shapes.items()}

    def start(self, name: str, adapter: Path) -> None:
        """Says which version answers when the endpoint starts: that which did when it stopped.

        Unless the run itself has been exported again since: then its adapter is the newest.

        Raises:
            UserError: see :meth:`add`.
        """
        own = self.add(name, adapter)
        before = self.read().get(name)
        if before is None or before.own != own:
            self.switch(name, own)
            aliases = self.read()
            aliases[name].own = own
            self._write(aliases)
        elif before.current != own:
            log.warning(
                "%s answers with %s, which was rolled out; the run's own adapter is %s",
                name,
                before.current,
                own,
            )

    def switch(self, name: str, version: str) -> None:
        """Lets a version answer under a name; the one that did becomes the previous one.

        Raises:
            UserError: another rollout has deleted its files meanwhile.
        """
        if not self.path(version).is_dir():
            raise UserError(f"{self.path(version)} is gone: another rollout ran at the same time. Try again.")
        aliases = self.read()
        if name not in aliases:
            aliases[name] = Alias(current=version)
        elif (before := aliases[name]).current != version:
            aliases[name] = Alias(current=version, previous=before.current, own=before.own)
        self._write(aliases)

    def _write(self, aliases: dict[str, Alias]) -> None:
        state = {name: alias.model_dump() for name, alias in aliases.items()}
        storage.write_bytes(self.folder / _STATE, json.dumps(state, indent=1).encode())

    def prune(self, name: str) -> None:
        """Deletes the versions of a name that neither answer nor did so just before."""
        kept = self.names()
        for folder in self.folder.glob(f"{name}@*"):
            if folder.name not in kept:
                shutil.rmtree(folder)
