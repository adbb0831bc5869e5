"""Ray job: tables and metrics → report.html.

ray job submit --working-dir . -- python jobs/report.py --config configs/phantom.yaml run.folder=/shared/run
"""

import sys

from mmedpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
