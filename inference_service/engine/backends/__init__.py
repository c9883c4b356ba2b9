"""One kind of device in one file: what the layers of a model and its adapters are computed by."""
