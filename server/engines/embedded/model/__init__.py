"""The model: loaded (loader.py), run over a step's rows (runner.py), its keys and values in pages (pages.py)."""
