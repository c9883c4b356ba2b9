"""Object stores, reached by URI: ``s3://bucket/prefix``, ``file:///dir`` and, in tests, memory."""
