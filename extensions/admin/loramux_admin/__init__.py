"""The extension `admin`: commands for operators of builders and replicas."""
