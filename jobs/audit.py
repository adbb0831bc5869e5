"""Ray job: preference pairs → shortcuts and faults.

ray job submit --working-dir . -- python jobs/audit.py --config configs/phantom.yaml run.folder=/shared/run
"""

import sys

from mmedpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["audit", *sys.argv[1:]]))
