"""The description of the HTTP API, as an OpenAPI document."""
