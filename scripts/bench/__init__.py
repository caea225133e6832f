"""Measurements of the plugin's speed, and looks at its kernels: `python -m scripts.bench.NAME`."""
