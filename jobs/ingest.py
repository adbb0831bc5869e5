"""Ray job: raw data set → samples.

ray job submit --working-dir . -- python jobs/ingest.py --config configs/phantom.yaml run.folder=/shared/run
"""

import sys

from mmedpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["ingest", *sys.argv[1:]]))
