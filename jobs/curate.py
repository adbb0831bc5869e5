"""Ray job: samples → preference pairs.

ray job submit --working-dir . -- python jobs/curate.py --config configs/phantom.yaml run.folder=/shared/run
"""

import sys

from mmedpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["curate", *sys.argv[1:]]))
