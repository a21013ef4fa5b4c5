"""The read path: row groups to histories and impressions, in one global order for all ranks."""
