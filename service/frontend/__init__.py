"""The front ends: REST and gRPC before the engine, in its process or in processes of their own."""
