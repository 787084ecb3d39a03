"""Programs that the tests run as processes of their own, since their stubs clash with Kiln's."""
