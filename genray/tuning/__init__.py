"""Grids of whole runs on Ray Tune."""
