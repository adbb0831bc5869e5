"""What stands on a device while ZeRO-3 takes a model over."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_llava import build_tiny_llava

pytestmark = pytest.mark.engine

_SCRIPT = """
import json, os, sys
sys.path[:0] = [sys.argv[1]]
from pathlib import Path
import torch
from align_world import training_spec, with_settings
from mmedpo_ray.align.engines import deepspeed as deepspeed_engine
from mmedpo_ray.align.policy import Policy, build_policy

os.environ |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"}
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
deepspeed = deepspeed_engine._import_deepspeed(use_gpu=False)
folder, found = Path(sys.argv[2]), {}
initialize = deepspeed.initialize

def looking(model, **others):
    found["whole"] = sum(value.numel() for value in model.parameters())
    found["sharded"] = sum(value.ds_tensor.numel() for value in model.parameters())
    found["buffers"] = sorted({str(value.device) for value in model.buffers()})
    return initialize(model=model, **others)

deepspeed.initialize = looking
spec = training_spec(folder, folder / "model", folder / "run", strategy="zero3")
policy = build_policy(spec)
found["expected"] = sum(value.numel() for value in policy.parameters())
engine = deepspeed_engine.DeepSpeedEngine(policy, spec)
stage3 = engine._optimizer
held = [*stage3.fp32_partitioned_groups_flat, stage3.grad_partitions_flat_buffer]
states = [stage3.optimizer.state[shard] for shard in stage3.fp32_partitioned_groups_flat]
held += [value for state in states for value in state.values()]
found["state"] = sum(value.nbytes for value in held if value.ndim)
found["bucket"] = engine._engine.zero_reduce_bucket_size()
found["trained"] = sum(value.ds_numel for value in policy.trained_parameters().values())
print(json.dumps(found))
"""


def test_no_device_holds_the_whole_model_before_it_is_sharded(tmp_path: Path) -> None:
    build_tiny_llava(tmp_path / "model")
    command = [sys.executable, "-c", _SCRIPT, str(Path(__file__).parent.parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["whole"] == 0, "every parameter was sharded before DeepSpeed moved the model"
    assert found["sharded"] >= found["expected"] > 0
    assert found["buffers"] == ["cpu"]
    # Exact copy, two moments and the sum of the gradients, of what is trained with filling to whole shards.
    assert 16 * found["trained"] <= found["state"] < 16.1 * found["trained"]
    assert found["bucket"] == found["trained"], "no larger bucket than there is to sum"
