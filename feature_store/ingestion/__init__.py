"""The write path: raw events and impressions to a store, and appends to it."""
