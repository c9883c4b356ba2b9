"""What tests of several rooms use: servers, fakes, small models and adapters."""
