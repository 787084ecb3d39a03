"""What follows requests to their end: spans, the access log, and the request log."""
