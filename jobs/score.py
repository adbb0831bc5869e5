"""Ray job: pairs → scored pairs.

ray job submit --working-dir . -- python jobs/score.py --config configs/phantom.yaml run.folder=/shared/run
"""

import sys

from mmedpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
