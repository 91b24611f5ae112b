"""Root of the generated package; see engine.serve.proto.generate."""
