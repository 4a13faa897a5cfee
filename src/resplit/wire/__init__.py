"""The wire between members: messages (`node.proto`), commands, mutual TLS channels and emulated links."""
