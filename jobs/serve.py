"""Ray job: the OpenAI-compatible endpoint, until the job is stopped.

ray job submit --working-dir . -- python jobs/serve.py --config configs/phantom.yaml run.folder=/shared/run
"""

import sys

from mmedpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
