"""What scripts/gpu.py runs: its stages, their records, and the bars that these are held against."""
