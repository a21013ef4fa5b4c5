"""Ops, layers and heads: tensors in, tensors out. Knows nothing of files, stores or training loops."""

from elastic_rec.configs.stack import check_stack

check_stack()
