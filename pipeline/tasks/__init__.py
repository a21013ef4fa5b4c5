"""What a model is trained for: the next item of a history, or the labels of impressions."""
