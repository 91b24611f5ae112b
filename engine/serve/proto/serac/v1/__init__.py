"""Code generated from the .proto files beside it; see engine.serve.proto.generate."""
