"""Ray job: the whole pipeline, from raw data to report.

ray job submit --working-dir . -- python jobs/pipeline.py --config configs/phantom.yaml run.folder=/shared/run
"""

import sys

from mmedpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
