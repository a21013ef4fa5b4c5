"""The ELASTIC tower: linear dispatcher attention over events, started from an interest memory."""
