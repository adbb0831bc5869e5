"""Ray job: endpoint + test samples → answers and metrics.

ray job submit --working-dir . -- python jobs/evaluate.py --config configs/phantom.yaml run.folder=/shared/run
"""

import sys

from mmedpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
