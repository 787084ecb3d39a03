"""Load tests: the bench harness and the Locust users."""
