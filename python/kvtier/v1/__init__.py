"""Generated protobuf and gRPC code of package kvtier.v1 (see python/generate.sh)."""
