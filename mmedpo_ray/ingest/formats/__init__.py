"""Data formats, one file each.

A new one is a file with a :class:`~mmedpo_ray.ingest.reader.Reader` and a line here.
"""

from __future__ import annotations

from mmedpo_ray.plugins import Registry

_HERE = "mmedpo_ray.ingest.formats"

# Name in `data.format` → reader.
BUILTIN = {
    "phantom": f"{_HERE}.phantom:PhantomReader",
    "mmedpo_json": f"{_HERE}.mmedpo_json:MMedPOJsonReader",
    "llava_json": f"{_HERE}.llava_json:LlavaJsonReader",
    "slake": f"{_HERE}.slake:SlakeReader",
    "vqa_rad": f"{_HERE}.vqa_rad:VqaRadReader",
    "omnimedvqa": f"{_HERE}.omnimedvqa:OmniMedVqaReader",
    "r2gen": f"{_HERE}.r2gen:R2GenReader",
    "hf_parquet": f"{_HERE}.hf_parquet:HfParquetReader",
    "trl": f"{_HERE}.trl:TrlReader",
    "llama_factory": f"{_HERE}.llama_factory:LlamaFactoryReader",
    "swift": f"{_HERE}.swift:SwiftReader",
}
FORMATS = Registry("data format", "mmedpo_ray.formats", BUILTIN)
