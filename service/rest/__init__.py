"""The HTTP front end: a FastAPI app, one module per dialect, pure codecs beside them."""
