"""The gRPC front end: byte-level handlers, one module per dialect, pure codecs beside them."""
