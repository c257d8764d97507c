"""Lets accelerate shard on CPUs, then runs a script: `accelerate launch --config_file sharded.yaml fsdp_on_cpu.py train.py`.

accelerate 1.15 starts FSDP only where it has found several accelerators (`AcceleratorState.__init__`: its list has no MULTI_CPU), although
PyTorch's `fully_shard` works on CPUs with gloo. So the processes call themselves GPUs; all else is accelerate's own path. At the end
each process writes down which of its parameters are really cut.
"""

import json
import os
import runpy
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

make_state = PartialState.__init__


def with_another_name(self, *args, **kwargs):
    make_state(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = with_another_name
script = Path(sys.argv[1])
sys.argv = sys.argv[1:]
names = runpy.run_path(str(script), run_name="__main__")
parts = {
    name: [weight.numel(), weight.to_local().numel() if isinstance(weight, DTensor) else weight.numel()]
    for name, weight in names["trainer"].model.named_parameters()
}
(script.parent / f"parts-{os.environ['RANK']}.json").write_text(json.dumps(parts))
