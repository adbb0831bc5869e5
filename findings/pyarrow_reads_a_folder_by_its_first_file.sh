#!/usr/bin/env bash
# pyarrow's read_table() of a folder drops every column, and every member of a struct, that the first file lacks; Ray Data keeps them.
#
# Guess:   a folder of Parquet files whose later parts have one column more reads as the union, or is refused for its schemas.
# Seen:    the schema is that of the first file by name. A column `mask` that begins in part 1 is gone, in part 1 too; of the turns of
#          a debate, list<struct>, the member `reason` is gone inside the lists. Rename the files and they are back. Floats under an
#          integer column are refused, so the reader does compare. ray.data.read_parquet() gives the union of the same folder.
# Matters: tables of preference pairs grow by runs (masks for some data sets only, judges that give reasons later). Which columns
#          training sees then depends on the names of files and on the library that reads them.
# Versions: pyarrow 26.0.1, ray 2.60.0 (its data extra's pandas 3.1.1), numpy 2.3.5, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.3.5 pyarrow==26.0.1 pandas==3.1.1 ray==2.60.0 fsspec==2026.9.0 2>/dev/null
cd "$folder"
RAY_USAGE_STATS_ENABLED=0 venv/bin/python - <<'PYTHON' 2>log.txt || { tail -20 log.txt; exit 1; }
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

print(*(f"{name} {version(name)}" for name in ("pyarrow", "ray")))
early = pa.table({"pair_id": ["a"], "debate": [[{"agent": "1", "score": 0.5}]]})
late = pa.table({"pair_id": ["b"], "debate": [[{"agent": "1", "score": 0.5, "reason": "side"}]], "mask": ["b.png"]})


def has(rows):
    """Whether the row of the late part still has its mask and its reason."""
    (row,) = (row for row in rows if row["pair_id"] == "b")
    return row.get("mask") == "b.png", row["debate"][0].get("reason") == "side"


seen = {}
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
for order, parts in {"early first": (early, late), "late first": (late, early)}.items():
    folder = Path(order)
    folder.mkdir()
    for number, part in enumerate(parts):
        pq.write_table(part, folder / f"part-{number}.parquet")
    seen[order, "pyarrow"] = has(pq.read_table(folder).to_pylist())
    seen[order, "ray"] = has(ray.data.read_parquet(str(folder)).take_all())
for (order, reader), (mask, reason) in seen.items():
    print(f"{order}, {reader}: expected mask and reason; seen mask {mask}, reason {reason}")
assert seen.pop(("early first", "pyarrow")) == (False, False)
assert all(kept == (True, True) for kept in seen.values())
try:
    pq.write_table(pa.table({"pair_id": ["c"], "weight": [1]}), "0.parquet")
    Path("mixed").mkdir()
    Path("0.parquet").rename("mixed/0.parquet")
    pq.write_table(pa.table({"pair_id": ["d"], "weight": [0.75]}), "mixed/1.parquet")
    pq.read_table("mixed")
    raise SystemExit("floats under an integer column are read now")
except pa.ArrowInvalid as error:
    print("floats under an integer column:", error)
PYTHON
