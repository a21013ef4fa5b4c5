"""Figures, pages and plots of stores, runs and benchmarks."""
