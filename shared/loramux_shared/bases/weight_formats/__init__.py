"""The formats of weights of few bits, a file each; `bases/formats.py` collects them."""
