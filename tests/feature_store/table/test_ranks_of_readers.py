"""Two ranks that open a store before and after it changed must not train together."""

import subprocess
import sys

from feature_store_reference import make_store, random_events
from store_files_cases import add_day

OPEN = """
import sys
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.pipeline.config.data import DataConfig
from elastic_rec.pipeline.config.train import TrainConfig
from elastic_rec.pipeline.tasks.registry import make_task
from elastic_rec.pipeline.runtime.world import start_world
world = start_world("cpu")
config = TrainConfig(data=DataConfig(store=sys.argv[1], version=int(sys.argv[2]) if world.rank else 1))
try:
    make_task(config, world=world)
except DataError as error:
    print(error)
"""


def test_ranks_that_see_different_versions_stop(tmp_path):
    store = make_store(tmp_path, random_events(100))
    add_day(store, tmp_path)
    script = tmp_path / "open.py"
    script.write_text(OPEN)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run([*launcher, str(store.path), "0"], capture_output=True, text=True, timeout=300)
    expected = f"{store.path}: changed while it was opened, rank 0 has version hash"
    assert done.stdout.count(expected) == 2, done.stdout + done.stderr
