"""The doors of a replica: gRPC services, their clients and the way from the wire to the core and back."""
