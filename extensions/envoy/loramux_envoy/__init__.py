"""The configuration of an Envoy in front of several replicas: `config.render` of a `fleet.Fleet`."""
