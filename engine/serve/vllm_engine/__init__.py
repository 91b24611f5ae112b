"""The worker contract `vllm.grpc.engine.VllmEngine`, which gateways speak, in front of the same replica."""
