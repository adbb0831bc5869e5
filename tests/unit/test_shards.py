"""Tensors in files of limited size: what comes back, how much is in a file, and what damage is noticed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from mmedpo_ray.models.shards import INDEX, ShardReader, ShardWriter


def write(folder: Path, tensors: dict[str, torch.Tensor], shard_bytes: int) -> None:
    with ThreadPoolExecutor(1) as pool:
        writer = ShardWriter(folder, pool, shard_bytes)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish().result()


@settings(max_examples=25)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), limit=st.integers(4, 200))
def test_tensors_of_any_size_come_back_from_files_below_the_limit(tmp_path_factory, sizes, limit):
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"t{number}": torch.randn(size) for number, size in enumerate(sizes)}
    write(folder, tensors, limit)
    reader = ShardReader(folder)
    assert list(reader.names) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(reader.tensor(name), tensor)
        assert reader.shape(name) == list(tensor.shape)
    for file in folder.glob("*.safetensors"):
        held = [tensors[name].numel() * 4 for name, place in reader._files.items() if place == file.name]
        assert sum(held) <= limit or len(held) == 1


def test_the_writer_takes_copies(tmp_path):
    """An optimizer step follows while the file is being written."""
    value = torch.ones(3)
    with ThreadPoolExecutor(1) as pool:
        writer = ShardWriter(tmp_path, pool)
        writer.add("x", value)
        value.zero_()
        writer.finish().result()
    assert torch.equal(ShardReader(tmp_path).tensor("x"), torch.ones(3))


@pytest.mark.parametrize("damage", ["index", "cut off", "gone", "other"])
def test_damage_is_noticed_when_the_folder_is_opened(tmp_path, damage):
    write(tmp_path, {"a": torch.ones(8), "b": torch.ones(8)}, 32)
    second = tmp_path / "shard-00002.safetensors"
    if damage == "index":
        (tmp_path / INDEX).write_text("{")
    elif damage == "cut off":
        second.write_bytes(second.read_bytes()[:-4])
    elif damage == "gone":
        second.unlink()
    else:
        second.write_bytes((tmp_path / "shard-00001.safetensors").read_bytes())
    with pytest.raises((OSError, ValueError, SafetensorError)):
        ShardReader(tmp_path)


def test_a_disk_that_fails_is_not_passed_over(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        writer = ShardWriter(tmp_path / "absent", pool, 8)
        with pytest.raises((OSError, SafetensorError)):
            for number in range(4):
                writer.add(str(number), torch.ones(4))
            writer.finish().result()
