"""Ray job: scored pairs → trained weights.

ray job submit --working-dir . -- python jobs/align.py --config configs/phantom.yaml run.folder=/shared/run
"""

import sys

from mmedpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["align", *sys.argv[1:]]))
