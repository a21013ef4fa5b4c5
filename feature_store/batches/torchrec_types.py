"""TorchRec's types, imported after the check that it belongs to this torch. No other module of the room imports
TorchRec: what only moves events (an ingest, Spark's executors) needs neither."""

from elastic_rec.configs.stack import check_stack

check_stack()

from torchrec.sparse.jagged_tensor import KeyedJaggedTensor  # noqa: E402
from torchrec.streamable import Pipelineable  # noqa: E402

__all__ = ["KeyedJaggedTensor", "Pipelineable"]
