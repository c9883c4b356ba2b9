"""The gRPC shell of both services: faults as statuses, the server, messages of the deployment."""
