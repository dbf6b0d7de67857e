#!/bin/sh
# Regenerates python/kvtier/v1 from proto/. The generator is pinned, so the same
# .proto files always give the same bytes; CI checks that running it changes nothing.
#
# grpcio-tools 1.76.0 carries protoc 31.1 (protobuf 6.31.1). Its output runs with
# protobuf 6.31.1 or newer and the whole of 7.x, and with grpcio 1.76.0 or newer:
# keep pyproject.toml's lower bounds equal to these.
set -eu

TOOLS_VERSION=1.76.0
here=$(cd "$(dirname "$0")" && pwd)
proto="$here/../proto"
venv="${KVTIER_GENERATE_VENV:-$here/../.cache/python-generate-$TOOLS_VERSION}"

if ! "$venv/bin/python" -c 'import grpc_tools' 2>/dev/null; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet "grpcio-tools==$TOOLS_VERSION" "setuptools<81"
fi

rm -f "$here"/kvtier/v1/*_pb2.py "$here"/kvtier/v1/*_pb2.pyi "$here"/kvtier/v1/*_pb2_grpc.py
cd "$proto"
"$venv/bin/python" -m grpc_tools.protoc -I . \
    --python_out="$here" --pyi_out="$here" --grpc_python_out="$here" \
    kvtier/v1/*.proto
# types.proto has no service; its empty stub module would only be noise.
rm -f "$here/kvtier/v1/types_pb2_grpc.py"
