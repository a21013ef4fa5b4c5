"""The tower in other people's models: inside DLRM on two ranks, with plain embeddings, and what it imports."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import helpers
import torch

EXAMPLE = helpers.REPO / "docs/examples/dlrm_plugin.py"
GUIDE = helpers.REPO / "docs/how-to/plug-in.md"


def test_dlrm_on_two_ranks_loses_auc_without_the_tower():
    done = subprocess.run(
        [
            *[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(EXAMPLE)],
            *["--steps=60", "--batch-size=128"],
        ],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    without, with_tower = (float(x) for x in re.findall(r"AUC with\S* the tower: (\d\.\d+)", done.stdout))
    assert with_tower > without + 0.08, done.stdout
    for table in ("item", "bank"):
        assert re.search(rf"{table} +\| row_wise +\| fused +\| \[0, 1\]", done.stdout), (
            f"the host's plan:\n{done.stdout}"
        )


def test_the_guide_shows_the_example_as_it_is():
    guide, example = GUIDE.read_text(), EXAMPLE.read_text()
    bare = {re.sub(r" +# \+.*", "", line).strip() for line in example.splitlines()}
    for block in re.findall(r"```\n(.*?)```", guide, re.DOTALL):
        for line in block.strip().splitlines():
            assert line.strip() in bare, line
    assert example.count("# +") <= 14, "about ten lines"
    imported = set(re.findall(r"elastic_rec\.(\w+)", example))
    assert imported == {"models"}


def test_plain_embeddings_without_sharding():
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    torch.manual_seed(0)
    scope: dict = {}
    exec(code, scope)
    assert scope["logits"].shape == (3,) and torch.isfinite(scope["loss"])
    bank = [p for name, p in scope["model"].named_parameters() if "bank" in name]
    assert len(bank) == 1 and bank[0].grad is not None and bool(bank[0].grad.abs().sum() > 0)


def test_models_need_neither_hydra_nor_a_process_group():
    code = (
        "import sys, elastic_rec.models; elastic_rec.models.ElasticTower, elastic_rec.models.RankingModel\n"
        "bad = [m for m in sys.modules if m.startswith(('hydra', 'omegaconf', 'elastic_rec.pipeline', "
        "'elastic_rec.feature_store'))]\n"
        "import torch.distributed as dist\n"
        "print(bad, dist.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "[] False", done.stdout + done.stderr[-2000:]
