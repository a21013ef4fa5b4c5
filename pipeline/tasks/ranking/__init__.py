"""The ranking task: labels of candidates, metrics, batch scoring of candidate lists."""
