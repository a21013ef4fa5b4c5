"""The write path of labelled impressions."""
