"""Ray job: trained weights → merged model, and a peft folder where LoRA is all.

ray job submit --working-dir . -- python jobs/export.py --config configs/phantom.yaml run.folder=/shared/run
"""

import sys

from mmedpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
