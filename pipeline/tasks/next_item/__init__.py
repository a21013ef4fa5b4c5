"""The next-item task: batches, negatives, evaluation over the whole catalogue, batch scoring."""
