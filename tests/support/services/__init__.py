"""Services of tests whose answers a test has in its hands, and their APIs."""
