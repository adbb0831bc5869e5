#!/usr/bin/env bash
# datasets: a map() that hands on or only looks at a JPEG picture compresses it once more at quality 75, without a word.
#
# Guess:   a row's picture that a map function does not change keeps its bytes; what is written anew is lossless.
# Seen:    this is about pictures inside the rows, as in the hub's Parquet files. As soon as the function touches row["image"] (its width,
#          say), or puts it into a list, as preference trainers want `images`, the decoded picture is written again in its own format
#          with Pillow's default quality of 75. Pictures published at quality 95 lose half of their bytes and change by up to tens of
#          grey levels; a mere `lambda row: row` changes nothing, so spot checks miss it. PNG and pictures given as paths are not touched.
# Matters: lesions are small and faint. What the model is trained on is not what was published, and a clean picture that went
#          through such a map differs from its noised PNG twin everywhere, not in the lesion alone: a shortcut for the visual pairs.
# Versions: datasets 5.2.0, pillow 13.0.0, numpy 2.3.5, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pillow==13.0.0 numpy==2.3.5 2>/dev/null
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" HF_DATASETS_DISABLE_PROGRESS_BARS=1 venv/bin/python - <<'PYTHON'
import io
from importlib.metadata import version

import numpy as np
from PIL import Image
from datasets import Dataset
from datasets import Image as ImageFeature

print("datasets", version("datasets"), "pillow", version("pillow"))
grain = np.random.default_rng(0).normal(0, 12, (128, 128))
film = Image.fromarray(np.clip(np.linspace(40, 200, 128)[None] + grain, 0, 255).astype(np.uint8))


def stored(picture, **options):
    file = io.BytesIO()
    picture.save(file, **options)
    return file.getvalue()


def losses(raw):
    """Bytes and largest change of a pixel after each map function."""
    reference = np.asarray(Image.open(io.BytesIO(raw)), int)
    rows = Dataset.from_list([{"image": {"bytes": raw, "path": None}, "question": "Is there a nodule?"}])
    rows = rows.cast_column("image", ImageFeature())
    functions = {
        "row as it is": lambda row: row,
        "looks at the width": lambda row: {"width": row["image"].width},
        "hands the picture on": lambda row: {"image": row["image"]},
        "list of pictures": lambda row: {"image": None, "images": [row["image"]]},
    }
    found = {}
    for name, function in functions.items():
        done = rows.map(function)
        arrow = done.with_format("arrow")[0]
        kept = arrow["images"][0].as_py()[0] if "images" in done.column_names else arrow["image"][0].as_py()
        change = np.abs(np.asarray(Image.open(io.BytesIO(kept["bytes"])), int) - reference).max()
        found[name] = int(change)
        print(f"  {name}: expected change 0, seen {change}; {len(raw)} bytes became {len(kept['bytes'])}")
    return found


print("JPEG of quality 95:")
jpeg = losses(stored(film, format="JPEG", quality=95))
print("PNG:")
png = losses(stored(film, format="PNG"))
assert jpeg.pop("row as it is") == 0
assert all(change >= 10 for change in jpeg.values())
assert not any(png.values())
PYTHON
