"""What times the plugin and looks at its kernels: `python -m scripts.bench.NAME`."""
