"""The wire between members: messages (`node.proto`), mutual TLS channels, and emulated links."""
